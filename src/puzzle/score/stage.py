"""Stage `score`: the quality of the parent with one block replaced (paper: section 4.2).

Exact (`exact.py`): the replaced block's output runs through the rest of the parent. Fisher
(`fisher.py`): a second-order estimate of the KL from a few backward passes of the parent. Hybrid:
Fisher for every block, then exact scores of those that a search could choose (`candidates.py`).

Memory beside the parent: the activations of one shard ((L + 1) x tokens x D, on the host), the
library where it is small beside the memory and otherwise one layer of it, one pass.

Reads: the parent, the library, the score side of the corpus. Writes: `score/scores.jsonl`
(`results.py`).
"""

from dataclasses import dataclass
from pathlib import Path

from puzzle import artifacts
from puzzle.artifacts import Inputs
from puzzle.data import tasks
from puzzle.library.memory import trained_parameters
from puzzle.model.architecture import Architecture, Block
from puzzle.model.modeling_puzzle import PuzzleForCausalLM
from puzzle.run import Run
from puzzle.score.candidates import candidates, scored_blocks
from puzzle.score.exact import HELD_SHARE, Shard, parent_states, score_layer
from puzzle.score.fisher import Estimator
from puzzle.score.modules import LibraryBlocks, is_resident
from puzzle.score.results import SCORES, BlockScore, Method, summarise
from puzzle.stage import Effort, Job, Need, Work
from puzzle.training.losses import CHUNK_ELEMENTS


def _facts(job: Job) -> Inputs:
    task = tasks.fingerprint(job.run.recipe.score.task)
    return job.run.data_facts | {"task": task}


def _check(job: Job) -> None:
    if job.run.recipe.score.task is not None:
        tasks.check(job.run.recipe.score.task)


def _execute(job: Job, folder: Path) -> None:
    run = job.run
    settings, shards = run.recipe.score, all_shards(run)
    scoring = _Scoring(run, folder / SCORES, run.parent_model, LibraryBlocks(run, run.parent_model))
    blocks = [scored_blocks(layer.blocks, settings.granularity) for layer in run.space.layers]
    if settings.method != "exact":
        scoring.score("fisher", text_shards(run), blocks)
    if settings.method == "hybrid":
        blocks = scoring.candidates(blocks)
    if settings.method != "fisher":
        scoring.score("exact", shards, blocks)


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
    """The scoring of blocks into a file."""

    run: Run
    path: Path
    parent: PuzzleForCausalLM
    library: LibraryBlocks

    def score(self, method: Method, shards: list[Shard], blocks: list[list[Block]]) -> None:
        """Every block of every layer on every shard that has no record yet."""
        records = artifacts.read_records(self.path, BlockScore)
        done = {(r.layer, r.block, r.shard) for r in records if r.method == method}
        total = sum(map(len, blocks))
        verb = "scoring blocks" if method == "exact" else "estimating blocks (Fisher)"
        with self.run.progress.task(verb, len(shards) * total, "blocks") as task:
            for shard in shards:
                missing = [
                    [block for block in layer if (index, block.name, shard.name) not in done]
                    for index, layer in enumerate(blocks)
                ]
                task.skip(total - sum(map(len, missing)))
                if not any(missing):
                    continue
                states = parent_states(self.run, self.parent, shard.tokens_BS)
                estimator = None
                if method == "fisher":
                    estimator = Estimator(self.run, self.parent, shard.tokens_BS, states)
                for index in reversed(range(len(blocks))):  # the order in which gradients travel
                    layer_blocks = self.library.layer(index, missing[index])
                    if estimator is not None:
                        results = estimator.estimate(index, layer_blocks)
                    else:
                        results = score_layer(
                            self.run, self.parent, index, layer_blocks, states, shard
                        )
                    for block in missing[index]:
                        record = BlockScore(
                            method=method,
                            layer=index,
                            block=block.name,
                            shard=shard.name,
                            result=results[block.name],
                        )
                        artifacts.append_record(self.path, record)
                    task.advance(len(missing[index]))

    def candidates(self, blocks: list[list[Block]]) -> list[list[Block]]:
        """The blocks that a search could choose, by Fisher's estimates."""
        records = artifacts.read_records(self.path, BlockScore)
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


# Of `Speed.judged_s`, for a block: the parent's side is computed once for all blocks that wait.
JUDGED = 0.5


def _need(job: Job) -> Need:
    """FLOPs of exact scoring: every block's run through the layers after it, and the head."""
    run = job.run
    settings, shape, layers = run.recipe.score, run.parent.shape, run.space.layers
    tokens = settings.sequences * run.recipe.corpus.sequence_length
    parameters = Architecture.of_parent(shape).parameters(shape)
    per_layer = (parameters - shape.constant_parameters) / shape.num_hidden_layers
    counts = [len(layer.blocks) for layer in layers]
    suffix = sum(n * (len(counts) - i) for i, n in enumerate(counts)) * per_layer
    head = shape.vocab_size * shape.hidden_size
    device, host = _memory_bytes(run, parameters)
    return Need(
        tokens=tokens,
        flops=2.0 * tokens * (suffix + sum(counts) * head),
        memory_bytes=device,
        host_bytes=host,
        disk_bytes=1e6,
        effort=Effort(forward=tokens * suffix, judged=JUDGED * tokens * sum(counts)),
        chosen=f"the parent in memory, the library {'too' if is_resident(run) else 'by layer'}",
        instead=_smallest_change(run, parameters),
    )


def _memory_bytes(run: Run, parameters: int) -> tuple[float, float]:
    """Of the device and of the host.

    On the device the parent, the library, and the larger of two. Exact: the states that wait for
    the head, a shard's input and final states, and a pass of `tokens_per_pass` or four copies of a
    chunk of logits. Fisher: a gradient of every sample, and the logits with the head in float32 or
    a layer forward and backward. On the host the activations of a shard at every layer.
    """
    settings, shape = run.recipe.score, run.parent.shape
    element = run.placement.dtype.itemsize
    sequences = min(settings.sequences, settings.shard_sequences)
    tokens = sequences * run.recipe.corpus.sequence_length
    library = float(element) * sum(trained_parameters(run))
    if not is_resident(run):
        library /= shape.num_hidden_layers
    state, of_token = tokens * shape.hidden_size, shape.passing_elements * element
    logits = 4.0 * 4 * CHUNK_ELEMENTS[run.device.type]
    exact = fisher = 0.0
    if settings.method != "fisher":
        waiting = max(len(layer.blocks) for layer in run.space.layers) * state * element
        waiting = min(waiting, int(HELD_SHARE * run.device.memory_bytes))
        passing = max(tokens, settings.tokens_per_pass) * of_token
        exact = waiting + 4.0 * 3 * state + max(passing, logits)
    if settings.method != "exact":
        head = 4.0 * shape.vocab_size * shape.hidden_size
        both_ways = 2.0 * tokens * of_token
        fisher = 4.0 * settings.fisher_samples * state + max(logits + head, both_ways)
    device = parameters * element + library + max(exact, fisher)
    return device, float((shape.num_hidden_layers + 1) * tokens * shape.hidden_size * element)


def _smallest_change(run: Run, parameters: int) -> str:
    """What would make scoring fit where it does not."""
    memory = run.device.memory
    if not memory.lacks(*_memory_bytes(run, parameters)):
        return ""
    least = {"shard_sequences": 1, "tokens_per_pass": 1, "fisher_samples": 4}
    score = run.recipe.score.model_copy(update=least)
    recipe = run.recipe.model_copy(update={"score": score})
    smaller = Run(recipe, run.folder, run.progress, device=run.device)
    if not memory.lacks(*_memory_bytes(smaller, parameters)):
        return "lower score.shard_sequences and score.tokens_per_pass"
    return "the whole parent is in memory while blocks are scored: use a larger device"


WORK = Work(facts=_facts, execute=_execute, need=_need, check=_check)
