"""Stage `score`: replace-1-block scores, the quality of the parent with one block replaced (paper:
section 4.2).

Exact: the parent's activations at every block input are computed once per shard of sequences. A
replacement starts from there; the blocks of a layer go through the layers after it together,
batched to `tokens_per_pass`. Logits are chunked over tokens; the parent's log-probabilities are
recomputed from its final hidden state.

Fisher (`fisher.py`): a second-order estimate of the KL from a few backward passes of the parent; no
suffix is run. Hybrid: Fisher for every block, then exact scores of those that a search could choose
(`candidates`).

Memory beside the parent: the activations of one shard ((L + 1) x tokens x D, on the host), the
library where it is small beside the memory and otherwise one layer of it, one pass.

Reads: the parent, the library, the validation side of the corpus. Writes: `score/scores.jsonl`,
append-only, one record per (method, layer, block, shard) with sums over tokens; `read` adds them
up, and `losses` is what a search adds up. The parent's own block is among them: its KL is 0, its LM
loss the parent's.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from puzzle import artifacts, plan
from puzzle.data import tasks
from puzzle.errors import UserError
from puzzle.library import stage as library
from puzzle.model import variants as subblocks
from puzzle.model.architecture import FFN, Attention, Block, ModelShape
from puzzle.model.modeling_puzzle import PuzzleDecoderLayer, PuzzleForCausalLM
from puzzle.run import Run
from puzzle.score import fisher
from puzzle.training.losses import ACCURACIES, METRICS, token_metrics

ERROR_OF_FISHER = (
    0.05  # hybrid: a block is a candidate unless it loses even when estimates err by this share
)


@dataclass(frozen=True)
class Score:
    """Means of every metric over tokens (`task`: over questions), and their standard errors over
    sequences.
    """

    means: dict[str, float]
    stderrs: dict[str, float]

    def __getattr__(self, name: str) -> float:
        try:
            return self.means[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True)
class Shard:
    """Sequences that are scored together: of text, or the rows of questions."""

    name: int | str
    tokens_BS: torch.Tensor
    questions: tasks.Rows | None = None


def inputs(run: Run) -> dict[str, Any]:
    settings = run.recipe.score.model_dump(
        mode="json", exclude={"tokens_per_pass", "metric"}
    )  # the same scores
    return run.data_inputs | {
        "library": run.fingerprint_of("library"),
        "score": settings,
        "task": tasks.fingerprint(run.recipe.score.task),
    }


def run(run: Run, folder: Path) -> dict[str, Any]:
    settings, parent = run.recipe.score, run.parent_model
    path = folder / "scores.jsonl"
    shards = all_shards(run)
    library_of = Library(run, parent)
    wanted = [scored_blocks(options.blocks, settings.granularity) for options in run.space.layers]
    if settings.method != "exact":
        text = [shard for shard in shards if shard.questions is None]
        _score(run, path, parent, library_of, text, wanted, "fisher")
    if settings.method == "hybrid":
        estimates = {key: found.kl for key, found in _read(path, "fisher").items()}
        names = [
            candidates(options, [estimates[i, b.name] for b in options], run.parent.shape)
            for i, options in enumerate(wanted)
        ]
        kept, total = sum(map(len, names)), sum(map(len, wanted))
        run.progress.say(
            f"  a search could choose {kept} of {total} blocks: these are scored exactly"
        )
        wanted = names
    if settings.method != "fisher":
        _score(run, path, parent, library_of, shards, wanted, "exact")
    return {"scores": artifacts.file_fingerprint(path)}


def all_shards(run: Run) -> list[Shard]:
    """The text that is scored, and the task's questions if there is one."""
    settings = run.recipe.score
    text = run.corpus["validation"].head(settings.sequences).split(settings.shard_sequences)
    shards = [Shard(index, tokens_BS) for index, tokens_BS in enumerate(text)]
    if settings.task is not None:
        for index, rows in enumerate(tasks.batches(run, settings.task)):
            shards.append(Shard(f"task-{index}", rows.tokens_RS, rows))
    return shards


def scored_blocks(blocks: Sequence[Block], granularity: str) -> list[Block]:
    """All blocks of a layer, or those that change one subblock of the parent's block, which comes
    first.
    """
    if granularity == "block":
        return list(blocks)
    parent = blocks[0]
    return [b for b in blocks if b.attention == parent.attention or b.ffn == parent.ffn]


def candidates(blocks: Sequence[Block], losses: Sequence[float], shape: ModelShape) -> list[Block]:
    """The blocks of a layer that some search could choose, if the losses are right to
    `ERROR_OF_FISHER`.

    Whatever a search limits (seconds, bytes, parameters), an attention and an FFN have a price each
    in it, so it minimises loss + prices * sizes for prices of at least 0. A block stays if there
    are prices at which no other is surely better: what the half-planes of all the others leave of
    the quadrant of prices is not empty. (What whole blocks leave of a budget can make another block
    the best by a little; benchmarks/score.py measures that.)
    """
    sizes = np.array([[_size(b.attention, shape), _size(b.ffn, shape)] for b in blocks])
    loss = np.maximum(np.array(losses), 0.0)
    least, most = loss * (1 - ERROR_OF_FISHER), loss * (1 + ERROR_OF_FISHER)
    highest = 1e4 * max(loss.max(), 1e-9)
    kept = [blocks[0]]
    for index in range(1, len(blocks)):
        prices = [(0.0, 0.0), (highest, 0.0), (highest, highest), (0.0, highest)]
        for other in range(len(blocks)):
            prices = _clip(prices, sizes[index] - sizes[other], most[other] - least[index])
        if prices:
            kept.append(blocks[index])
    return kept


def _clip(
    polygon: list[tuple[float, float]], normal: np.ndarray, room: float
) -> list[tuple[float, float]]:
    """The part of a convex polygon where normal . point <= room."""
    (a, b), clipped = normal.tolist(), []
    over = [a * x + b * y - room for x, y in polygon]
    for index, (x, y) in enumerate(polygon):
        (u, v), before, after = polygon[index - 1], over[index - 1], over[index]
        if before * after < 0:
            share = before / (before - after)
            clipped.append((u + share * (x - u), v + share * (y - v)))
        if after <= 0:
            clipped.append((x, y))
    return clipped


def _size(variant: Attention | FFN, shape: ModelShape) -> float:
    parent = (
        shape.parent_block.attention if isinstance(variant, Attention) else shape.parent_block.ffn
    )
    return shape.parameters(variant) / shape.parameters(parent)


def _score(
    run: Run,
    path: Path,
    parent: PuzzleForCausalLM,
    library_of: "Library",
    shards: list[Shard],
    wanted: list[list[Block]],
    method: str,
) -> None:
    """Every wanted block of every layer on every shard that has no record yet."""
    done = {(r["method"], r["layer"], r["block"], r["shard"]) for r in artifacts.read_jsonl(path)}
    verb = "scoring blocks" if method == "exact" else "estimating blocks (Fisher)"
    with run.progress.task(verb, len(shards) * sum(map(len, wanted)), "blocks") as task:
        for shard in shards:
            missing = [
                [b for b in bs if (method, i, b.name, shard.name) not in done]
                for i, bs in enumerate(wanted)
            ]
            task.skip(sum(map(len, wanted)) - sum(map(len, missing)))
            if not any(missing):
                continue
            states = parent_states(run, parent, shard.tokens_BS)
            estimator = (
                fisher.Estimator(run, parent, shard.tokens_BS, states)
                if method == "fisher"
                else None
            )
            for layer in reversed(range(len(wanted))):  # the order in which gradients travel
                blocks = missing[layer]
                variants = library_of.layer(layer, blocks)
                if estimator is not None:
                    found = estimator.estimate(layer, variants)
                else:
                    found = score_layer(run, parent, layer, variants, states, shard)
                for block in blocks:
                    name = {
                        "method": method,
                        "layer": layer,
                        "block": block.name,
                        "shard": shard.name,
                    }
                    artifacts.append_jsonl(path, name | found[block.name])
                task.advance(len(blocks))


# ----------------------------------------------------------------------------------------- variants


class Library:
    """The blocks of the library as modules; all layers are kept where they are small beside the
    memory.
    """

    def __init__(self, run: Run, parent: PuzzleForCausalLM) -> None:
        self.run, self.parent = run, parent
        size = 4 * sum(plan.trained_parameters(run, run.parent.shape))
        self.kept: dict[int, Variants] | None = (
            {} if size < plan.RESIDENT_SHARE * run.memory_bytes else None
        )

    def layer(self, index: int, blocks: Sequence[Block]) -> "Variants":
        module = self.parent.model.layers[index]
        if self.kept is None:
            return Variants(self.run, index, module, blocks)
        if index not in self.kept:
            self.kept[index] = Variants(
                self.run, index, module, self.run.space.layers[index].blocks
            )
        return self.kept[index].only(blocks)


class Variants:
    """The blocks of one layer as modules, ready to run: two subblocks composed, or a pair trained
    together.
    """

    def __init__(
        self, run: Run, layer: int, parent_layer: PuzzleDecoderLayer, blocks: Sequence[Block]
    ) -> None:
        own = parent_layer.state_dict()

        def load(block: Block, state: dict[str, torch.Tensor]) -> PuzzleDecoderLayer:
            return subblocks.frozen_module(run.parent, layer, block, run.attention, state).to(
                run.device
            )

        if run.recipe.library.coupled:
            whole = {b: load(b, library.read_block(run, layer, b, own)) for b in blocks}
            self.halves = {block: (module, module) for block, module in whole.items()}
            return
        no_attention, no_ffn = Attention("no_op"), FFN("no_op")
        attention = {
            a: load(Block(a, no_ffn), library.read_state(run, layer, a, own))
            for a, _ in map(_pair, blocks)
        }
        ffn = {
            f: load(Block(no_attention, f), library.read_state(run, layer, f, own))
            for _, f in map(_pair, blocks)
        }
        self.halves = {block: (attention[block.attention], ffn[block.ffn]) for block in blocks}

    def only(self, blocks: Sequence[Block]) -> "Variants":
        chosen = object.__new__(Variants)
        chosen.halves = {block: self.halves[block] for block in blocks}
        return chosen

    def outputs(
        self, x_BSD: torch.Tensor, context: dict[str, Any]
    ) -> Iterator[tuple[Block, torch.Tensor]]:
        """Every block's output [B, S, D]; an attention half shared by neighbours is computed once."""
        last: PuzzleDecoderLayer | None = None
        for block, (attention, ffn) in self.halves.items():
            if attention is not last:
                attended_BSD, last = attention.attention(x_BSD, **context), attention
            yield block, ffn.feed_forward(attended_BSD)


def _pair(block: Block) -> tuple[Attention, FFN]:
    return block.attention, block.ffn


# -------------------------------------------------------------------------------------------- exact


@torch.no_grad()
def parent_states(
    run: Run, parent: PuzzleForCausalLM, tokens_BS: torch.Tensor
) -> list[torch.Tensor]:
    """The parent's input of every layer and, last, the last layer's output: L + 1 host tensors [B,
    S, D].
    """
    with run.autocast():
        hidden, context = parent.model.embed(tokens_BS.to(run.device))
        states = [hidden.cpu()]
        for module in parent.model.layers:
            hidden = module(hidden, **context)
            states.append(hidden.cpu())
        return states


@torch.no_grad()
def score_layer(
    run: Run,
    parent: PuzzleForCausalLM,
    layer: int,
    variants: Variants,
    states: list[torch.Tensor],
    shard: Shard,
) -> dict[str, dict[str, float]]:
    """Sums over the tokens of a shard of every metric, for every block of one layer."""
    tokens_BS = shard.tokens_BS.to(run.device)
    x_BSD = states[layer].to(run.device)
    per_pass = max(1, run.recipe.score.tokens_per_pass // tokens_BS.numel())
    results: dict[str, dict[str, float]] = {}
    with run.autocast():
        final_BSD = parent.model.norm(states[-1].to(run.device))
        _, context = parent.model.embed(tokens_BS[:1])  # a batch of one fits any number of variants
        outputs = variants.outputs(x_BSD, context)
        while pending := list(itertools.islice(outputs, per_pass)):
            metrics = finish(
                parent, layer, [output for _, output in pending], context, final_BSD, tokens_BS
            )
            for (block, _), metrics_MBS in zip(pending, metrics, strict=True):
                rows = shard.questions
                results[block.name] = _sums(metrics_MBS) if rows is None else rows.sums(metrics_MBS)
    return results


def finish(
    parent: PuzzleForCausalLM,
    layer: int,
    outputs: list[torch.Tensor],
    context: dict[str, Any],
    final_BSD: torch.Tensor,
    tokens_BS: torch.Tensor,
) -> torch.Tensor:
    """Run several outputs [B, S, D] of one layer through the layers after it at once: metrics [C,
    M, B, S - 1].
    """
    count, (B, S) = len(outputs), tokens_BS.shape
    hidden = torch.cat(outputs)
    for module in parent.model.layers[layer + 1 :]:
        hidden = module(hidden, **context)
    child_CTD = parent.model.norm(hidden).view(count, B, S, -1)[:, :, :-1].flatten(1, 2)
    head = parent.lm_head.weight
    targets = tokens_BS[:, 1:].flatten()
    cap = parent.config.final_logit_softcapping
    final_TD = final_BSD[:, :-1].flatten(0, 1)
    metrics_CMT = token_metrics(final_TD, head, child_CTD, head, targets, soft_cap=cap)
    return metrics_CMT.view(count, len(METRICS), B, S - 1).double()


def _sums(metrics_MBS: torch.Tensor) -> dict[str, float]:
    """Sums over tokens, and of the squares of every sequence's mean."""
    squares_M = metrics_MBS.mean(dim=-1).square().sum(dim=-1)
    sums = dict(zip(METRICS, metrics_MBS.sum(dim=(1, 2)).tolist(), strict=True))
    squares = {
        f"{name}_squares": value for name, value in zip(METRICS, squares_M.tolist(), strict=True)
    }
    return {"tokens": metrics_MBS[0].numel(), "sequences": metrics_MBS.shape[1]} | sums | squares


# ------------------------------------------------------------------------------------------ reading


def read(run: Run) -> dict[tuple[int, str], Score]:
    """Scores by (layer, block name): exact ones, or Fisher's estimates where `score.method` says
    so.
    """
    method = "fisher" if run.recipe.score.method == "fisher" else "exact"
    return _read(run.stage_folder("score") / "scores.jsonl", method)


def read_estimates(run: Run) -> dict[tuple[int, str], Score]:
    """Fisher's estimates, also where exact scores stand beside them."""
    return _read(run.stage_folder("score") / "scores.jsonl", "fisher")


def _read(path: Path, method: str) -> dict[tuple[int, str], Score]:
    totals: dict[tuple[int, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for record in artifacts.read_jsonl(path):
        if record.pop("method") == method:
            total = totals[record.pop("layer"), record.pop("block")]
            record.pop("shard")
            for key, value in record.items():
                total[key] += value
    return {key: _mean(total) for key, total in totals.items()}


def _mean(total: dict[str, float]) -> Score:
    tokens, sequences = total.pop("tokens"), total.pop("sequences")
    questions = total.pop("questions", 0.0)
    means, stderrs = {}, {}
    for name in [name for name in total if not name.endswith("_squares")]:
        count = questions if name == "task" else tokens
        means[name] = total[name] / count
        independent = questions if name == "task" else sequences
        variance = max(0.0, total[f"{name}_squares"] / independent - means[name] ** 2) / max(
            1, independent - 1
        )
        stderrs[name] = variance**0.5
    return Score(means, stderrs)


def scored_layers(run: Run, losses: dict[tuple[int, str], float]) -> list[list[Block]]:
    """The blocks of every layer that a search can choose from: those with a loss."""
    return [[b for b in o.blocks if (i, b.name) in losses] for i, o in enumerate(run.space.layers)]


def losses(run: Run) -> dict[tuple[int, str], float]:
    """What the search adds up, by (layer, block name): the loss against the parent's own block,
    which has 0.

    With `granularity: subblock` a block's loss is the sum of its two subblocks'. Blocks without a
    score are missing.
    """
    settings, scores = run.recipe.score, read(run)
    metric = settings.metric
    sign = -1.0 if metric in ACCURACIES else 1.0
    parent, path = run.parent.shape.parent_block, run.stage_folder("score") / "scores.jsonl"
    for layer in range(len(run.space.layers)):
        if (layer, parent.name) not in scores:
            raise UserError(
                f"{path}: layer {layer} has no score of the parent's block; run `puzzle score` again"
            )
    for (layer, name), found_score in scores.items():
        if not np.isfinite(value := found_score.means.get(metric, np.nan)):
            raise UserError(
                f"{path}: layer {layer}, {name}: {metric} is {value}; expected a number, score again"
            )

    def loss(layer: int, block: Block) -> float:
        return sign * (
            getattr(scores[layer, block.name], metric) - getattr(scores[layer, parent.name], metric)
        )

    found: dict[tuple[int, str], float] = {}
    for layer, options in enumerate(run.space.layers):
        for block in options.blocks:
            parts = [block]
            if settings.granularity == "subblock" and (layer, block.name) not in scores:
                parts = [Block(block.attention, parent.ffn), Block(parent.attention, block.ffn)]
            if all((layer, part.name) in scores for part in parts):
                found[layer, block.name] = sum(loss(layer, part) for part in parts)
    return found
