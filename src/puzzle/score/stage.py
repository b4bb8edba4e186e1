"""Stage `score`: the quality of the parent with one block replaced (paper: section 4.2).

Exact (`exact.py`): the replaced block's output runs through the rest of the parent. Fisher
(`fisher.py`): a second-order estimate of the KL from a few backward passes of the parent. Hybrid:
Fisher for every block, then exact scores of those that a search could choose (`candidates.py`).

The work is a list of units, the blocks of one layer on one shard of sequences. A unit's records are
a file of their own until all are there, so an interruption costs the units in progress, and any
number of processes goes on. What memory that takes: `memory.py`.

Reads: the parent, the library, the score side of the corpus. Writes: `score/scores.jsonl`
(`results.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from puzzle import artifacts
from puzzle.artifacts import Inputs
from puzzle.data import tasks
from puzzle.model.architecture import Block
from puzzle.model.layers import ParentLayers
from puzzle.run import Run
from puzzle.score import memory
from puzzle.score.candidates import candidates, scored_blocks
from puzzle.score.exact import LoadBlocks, Scorer, Shard, parent_states
from puzzle.score.fisher import Estimator
from puzzle.score.modules import LibraryBlocks
from puzzle.score.results import SCORES, BlockScore, Method, Sums, summarise
from puzzle.stage import Job, Work, always
from puzzle.training import sharding

Unit = tuple[int, int]  # numbers of the shard and of the layer


def _facts(job: Job) -> Inputs:
    task = tasks.fingerprint(job.run.recipe.score.task)
    return job.run.data_facts | {"task": task}


def _check(job: Job) -> None:
    if job.run.recipe.score.task is not None:
        tasks.check(job.run.recipe.score.task)


def _execute(job: Job, folder: Path) -> None:
    run = job.run
    settings, streamed = run.recipe.score, sharding.shared(memory.is_streamed(run))
    library = LibraryBlocks(run, kept=memory.keeps_library(run))
    scoring = _Scoring(run, folder, run.parent_layers(streamed=streamed), library, streamed)
    blocks = [scored_blocks(layer.blocks, settings.granularity) for layer in run.space.layers]
    records = []
    if settings.method != "exact":
        records += scoring.score("fisher", text_shards(run), blocks)
    if settings.method == "hybrid":
        blocks = sharding.shared(scoring.candidates(blocks, records))
    if settings.method != "fisher":
        records += scoring.score("exact", all_shards(run), blocks)
    if sharding.rank() == 0:
        artifacts.write_records(folder / SCORES, records)
    sharding.barrier()


def text_shards(run: Run) -> list[Shard]:
    """The text that is scored."""
    settings = run.recipe.score
    rows_NS = run.corpus["score"].head(settings.sequences)
    parts = rows_NS.split(settings.shard_sequences)
    return [Shard(str(index), tokens_BS) for index, tokens_BS in enumerate(parts)]


def all_shards(run: Run) -> list[Shard]:
    """The text that is scored, and the task's questions if there is one."""
    shards = text_shards(run)
    for index, batch in enumerate(run.questions("score")):
        shards.append(Shard(f"task-{index}", batch.tokens_RS, batch))
    return shards


@dataclass(frozen=True)
class _Scoring:
    """The scoring of blocks into a folder."""

    run: Run
    folder: Path
    parent: ParentLayers
    library: LibraryBlocks
    streamed: bool

    def score(
        self, method: Method, shards: list[Shard], blocks: list[list[Block]]
    ) -> list[BlockScore]:
        """Every block of every layer on every shard; process 0 gets the records of all."""
        # layers in the order in which gradients travel
        units = [(s, layer) for s in range(len(shards)) for layer in reversed(range(len(blocks)))]
        paths = {unit: self._path(method, shards[unit[0]], unit[1]) for unit in units}
        missing = sharding.shared([unit for unit in units if not paths[unit].exists()])
        made: dict[Unit, list[BlockScore]] = {}
        verb = "scoring blocks" if method == "exact" else "estimating blocks (Fisher)"
        mine = self._mine(missing, len(shards))
        count = sum(len(blocks[layer]) for _, layer in mine)
        done = sum(len(blocks[layer]) for _, layer in set(units) - set(missing))
        with self.run.progress.task(verb, done + count, "blocks") as task:
            task.skip(done)
            for number, shard in enumerate(shards):
                layers = [layer for s, layer in mine if s == number]
                for layer, results in self._on_shard(method, shard, layers, blocks):
                    unit = number, layer
                    made[unit] = [
                        BlockScore(
                            method=method,
                            layer=layer,
                            block=block.name,
                            shard=shard.name,
                            result=results[block.name],
                        )
                        for block in blocks[layer]
                    ]
                    artifacts.write_records(paths[unit], made[unit])
                    task.advance(len(blocks[layer]))
        gathered = sharding.gathered(made)
        if sharding.rank() > 0:
            return []
        of_all = {unit: records for part in gathered for unit, records in part.items()}
        for unit in units:
            if unit not in of_all:
                of_all[unit] = artifacts.read_records(paths[unit], BlockScore)
        return [record for unit in units for record in of_all[unit]]

    def _path(self, method: Method, shard: Shard, layer: int) -> Path:
        return self.folder / artifacts.UNFINISHED / f"{method}-{shard.name}-{layer:03d}.jsonl"

    @staticmethod
    def _mine(missing: list[Unit], shards: int) -> list[Unit]:
        """This process's units: whole shards, whose activations are computed once, then layers."""
        by_shard = [[unit for unit in missing if unit[0] == number] for number in range(shards)]
        by_shard = [units for units in by_shard if units]
        whole = len(by_shard) - len(by_shard) % sharding.size()
        mine = [unit for units in sharding.dealt(by_shard[:whole]) for unit in units]
        return mine + sharding.dealt([unit for units in by_shard[whole:] for unit in units])

    def _on_shard(
        self, method: Method, shard: Shard, layers: list[int], blocks: list[list[Block]]
    ) -> Iterator[tuple[int, dict[str, Sums]]]:
        """Of these layers' blocks on one shard, layer after layer."""
        if not layers:
            return
        states, context = parent_states(self.run, self.parent, shard.tokens_BS)

        def load(layer: int, some: list[Block]) -> LoadBlocks:
            return partial(self.library.layer, layer, some)

        if method == "fisher":
            estimator = Estimator(self.run, self.parent, shard.tokens_BS, states, context)
            for layer in layers:
                yield layer, estimator.estimate(layer, load(layer, blocks[layer]))
            return
        scorer = Scorer(self.run, self.parent, shard, states, context)
        most = memory.passing_blocks(self.run, shard.tokens_BS.numel(), streamed=self.streamed)
        for group in self._groups(layers, blocks, most):
            results: dict[int, dict[str, Sums]] = {layer: {} for layer in group}
            for first in range(0, max(len(blocks[layer]) for layer in group), most):
                some = {layer: blocks[layer][first : first + most] for layer in group}
                found = scorer.score({layer: load(layer, b) for layer, b in some.items() if b})
                for layer, of_layer in found.items():
                    results[layer] |= of_layer
            yield from results.items()

    def _groups(self, layers: list[int], blocks: list[list[Block]], most: int) -> list[list[int]]:
        """Layers whose blocks go on together: one by one, or streamed up to `most` blocks."""
        groups: list[list[int]] = []
        size = 0
        for layer in layers:
            count = len(blocks[layer])
            if not self.streamed or not groups or size + count > most:
                groups.append([])
                size = 0
            groups[-1].append(layer)
            size += count
        return groups

    def candidates(self, blocks: list[list[Block]], records: list[BlockScore]) -> list[list[Block]]:
        """The blocks that a search could choose, by Fisher's estimates; for process 0 to tell."""
        if sharding.rank() > 0:
            return []
        estimates = {key: score.kl for key, score in summarise(records, "fisher").items()}
        shape = self.run.parent.shape
        kept = [
            candidates(layer, [estimates[index, block.name] for block in layer], shape)
            for index, layer in enumerate(blocks)
        ]
        count, total = sum(map(len, kept)), sum(map(len, blocks))
        self.run.progress.say(
            f"  a search could choose {count} of {total} blocks: these are scored exactly"
        )
        return kept


WORK = Work(facts=_facts, execute=_execute, need=memory.need, check=_check, is_shared=always)
