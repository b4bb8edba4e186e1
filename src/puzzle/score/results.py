"""Scores on disk and what a search adds up.

`scores.jsonl` is append-only, one record per method, layer, block and shard with sums over tokens;
`read` adds them up, and `losses` is what a search minimises. The parent's own block is among them:
its KL is 0, its LM loss the parent's.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from puzzle import artifacts
from puzzle.artifacts import Record
from puzzle.errors import UserError
from puzzle.model.architecture import Block
from puzzle.run import Run
from puzzle.score import SCORE
from puzzle.stage import Job
from puzzle.training.losses import ACCURACIES

SCORES = "scores.jsonl"
Method = Literal["exact", "fisher"]
Losses = dict[tuple[int, str], float]  # by layer and block name


class Sums(Record):
    """What one block has shown on one shard.

    `sums` are over tokens (of `task`: over questions), `squares` over the squares of every
    sequence's (or question's) mean, for the standard error.
    """

    sums: dict[str, float]
    squares: dict[str, float]
    tokens: int
    sequences: int
    questions: int = 0


class BlockScore(Record):
    """One line of `scores.jsonl`."""

    method: Method
    layer: int
    block: str
    shard: str
    result: Sums


@dataclass(frozen=True)
class Score:
    """Means of every metric over tokens (`task`: over questions), with their standard errors."""

    means: Mapping[str, float]
    stderrs: Mapping[str, float]

    @property
    def kl(self) -> float:
        """KL(parent || parent with this block replaced), nats per token."""
        return self.means["kl"]


def read(run: Run) -> dict[tuple[int, str], Score]:
    """Scores by (layer, block name): exact, or Fisher's estimates where `score.method` says so."""
    return read_method(run, "fisher" if run.recipe.score.method == "fisher" else "exact")


def read_method(run: Run, method: Method) -> dict[tuple[int, str], Score]:
    """Scores of one method, also where those of the other stand beside them."""
    path = Job(run).folder(SCORE) / SCORES
    return summarise(artifacts.read_records(path, BlockScore), method)


def summarise(records: Iterable[BlockScore], method: Method) -> dict[tuple[int, str], Score]:
    """Means and standard errors over the shards."""
    by_block: dict[tuple[int, str], list[Sums]] = defaultdict(list)
    for record in records:
        if record.method == method:
            by_block[record.layer, record.block].append(record.result)
    return {key: _score(parts) for key, parts in by_block.items()}


def _score(parts: list[Sums]) -> Score:
    means, stderrs = {}, {}
    names = dict.fromkeys(name for part in parts for name in part.sums)
    sequences, tokens = sum(p.sequences for p in parts), sum(p.tokens for p in parts)
    questions = sum(p.questions for p in parts)
    for name in names:
        count = questions if name == "task" else tokens
        independent = questions if name == "task" else sequences
        total = sum(part.sums.get(name, 0.0) for part in parts)
        squares = sum(part.squares.get(name, 0.0) for part in parts)
        means[name] = total / count
        variance = max(0.0, squares / independent - means[name] ** 2) / max(1, independent - 1)
        stderrs[name] = variance**0.5
    return Score(means, stderrs)


def scored_layers(run: Run, losses: Losses) -> list[list[Block]]:
    """The blocks of every layer that a search can choose from: those with a loss."""
    layers = enumerate(run.space.layers)
    return [[b for b in layer.blocks if (index, b.name) in losses] for index, layer in layers]


def losses(run: Run) -> Losses:
    """What the search adds up: every block's loss against the parent's own block, which has 0.

    With `granularity: subblock` a block's loss is the sum of its two subblocks'. Blocks without a
    score are missing. Raises `UserError` where the parent's own score is missing or a figure is not
    finite.
    """
    settings, scores = run.recipe.score, read(run)
    metric, parents = settings.metric, run.parent.shape.parent_blocks
    sign = -1.0 if metric in ACCURACIES else 1.0
    values = _checked(run, scores)

    def loss(layer: int, block: Block) -> float:
        return sign * (values[layer, block.name] - values[layer, parents[layer].name])

    block_losses: Losses = {}
    for index, layer in enumerate(run.space.layers):
        for block in layer.blocks:
            parts = [block]
            if settings.granularity == "subblock" and (index, block.name) not in values:
                attention, ffn = parents[index].subblocks
                parts = [Block(block.attention, ffn), Block(attention, block.ffn)]
            if all((index, part.name) in values for part in parts):
                block_losses[index, block.name] = sum(loss(index, part) for part in parts)
    return block_losses


def _checked(run: Run, scores: Mapping[tuple[int, str], Score]) -> Losses:
    """The values of the recipe's metric, all of them numbers."""
    path, metric = Job(run).folder(SCORE) / SCORES, run.recipe.score.metric
    for layer, parent in enumerate(run.parent.shape.parent_blocks):
        if (layer, parent.name) not in scores:
            raise UserError(
                f"{path}: layer {layer} has no score of the parent's block; run `puzzle score` "
                "again"
            )
    values = {}
    for (layer, name), score in scores.items():
        value = score.means.get(metric, np.nan)
        if not np.isfinite(value):
            raise UserError(
                f"{path}: layer {layer}, {name}: {metric} is {value}; expected a number, score "
                "again"
            )
        values[layer, name] = value
    return values
