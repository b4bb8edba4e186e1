"""The search around an incumbent: what replacements do to each other, measured.

Replace-1-block scores are made at the parent and added up, which is right for light compression and
far off for heavy. So, once a search has found the best sum: every block that a search could choose
is put into that child in the place of its own, and the KL is measured in the company of the other
chosen blocks, on a part of the text. Around the child these differences add up as well as they ever
do, and together with the scores at the parent they make a form with interactions
(`interactions.py`). They propose further children within the same limits: those that the program,
solved again with the differences, takes when 1, 2, 3, ... layers may change, the optimum of the
form, which is proven, and the exchanges of two that promise most by the form. Of these the one with
the least KL when it is assembled, on all of the text, is the next incumbent, and so on until none
is better, `search.refinements` times with new differences. In the end, optima of differences with
noise on them are tried, too, which change a few layers at once.

To every KL comes what the parameters that a child lacks count as (`search.capacity`). Where they
count, the best sum is a poor place to begin: it buys parameters of layers whose scores no longer
tell them apart. So the search also begins at a child that is only halves of the parent's layers and
none of others, which it first improves among such children; the better end is taken.

What is measured is remembered in `assembled.jsonl` in the child's folder, so an interrupted search
goes on, and the next search of the same child knows it too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from puzzle import artifacts
from puzzle.artifacts import Record
from puzzle.errors import UserError
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, Block
from puzzle.score import SCORE
from puzzle.score.candidates import candidates
from puzzle.search import interactions, mip
from puzzle.search.interactions import Interactions
from puzzle.search.mip import Optimum
from puzzle.search.program import Program, Row
from puzzle.search.space_program import Choices, Limit, build
from puzzle.stage import Job

if TYPE_CHECKING:
    from puzzle.score.assembled import AssembledKL

ASSEMBLED = "assembled.jsonl"  # in the child's folder
PART = 0.25  # of the text, on which exchanges are measured
CHANGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # layers in which a step may differ
EXCHANGES = 48  # of two layers, that are tried on a part of the text
TRIED = 6  # of those, on all of it
DRAWN, DRAWN_CHANGES, NOISE = 60, 4, 0.35  # optima of noisy differences, their layers, the noise
LEAST_GAIN = 0.002  # of the KL, for which there is another step
SOLVE_S, SOLVE_GAP, DRAWN_GAP = 10.0, 1e-3, 1e-2
FORM_GAP = 1e-2  # of the KL


class AssembledScore(Record):
    """One line of `assembled.jsonl`."""

    scores: str  # fingerprint of the scores whose text it is measured on
    whole: bool  # on all of that text, or on its first part
    blocks: list[str]
    kl: float  # of the assembled child, nats per token


@dataclass(frozen=True)
class Predicted:
    """The child at the optimum of a form with interactions."""

    blocks: list[str]
    value: float  # KL and what missing parameters count as, as it predicts
    bound: float  # it predicts nothing below within the limits: proven
    assembled: float  # the same of the assembled child


@dataclass(frozen=True)
class Refined:
    """What the search around an incumbent has found."""

    blocks: list[str]
    kl: float
    first_kl: float  # of the best sum of scores
    first_missing: float  # what its missing parameters count as
    steps: int  # that were better than the one before
    form: Predicted | None  # the last one


class Measurement:
    """Assembled KLs of a child's architectures, from memory or measured when first asked for."""

    def __init__(self, job: Job) -> None:
        self.job, self.path = job, job.child.folder / ASSEMBLED
        self.scores = job.manifest(SCORE).fingerprint
        records = artifacts.read_records(self.path, AssembledScore)
        self.known = {(r.whole, *r.blocks): r.kl for r in records if r.scores == self.scores}

    @cached_property
    def _on(self) -> "dict[bool, AssembledKL]":
        """On all of the text, and on its first part."""
        from puzzle.score.assembled import AssembledKL
        from puzzle.score.stage import text_shards

        shards = text_shards(self.job.run)
        whole = AssembledKL(self.job.run, shards)
        return {True: whole, False: whole.on_first(max(1, round(PART * len(shards))))}

    def kl(self, blocks: Sequence[str], *, whole: bool = True) -> float:
        """Of one child."""
        if (whole, *blocks) not in self.known:
            found = self._on[whole].kl(Architecture.from_names(blocks))
            self._remember(whole, blocks, found)
        return self.known[(whole, *blocks)]

    def measure(self, children: Sequence[list[str]], *, whole: bool) -> None:
        """Of those that are not remembered yet, with a bar."""
        unknown = [list(one) for one in dict.fromkeys(map(tuple, children))]
        unknown = [blocks for blocks in unknown if (whole, *blocks) not in self.known]
        if not unknown:
            return
        progress = self.job.run.progress
        with progress.task("assembling children", len(unknown), "children") as task:
            architectures = [Architecture.from_names(blocks) for blocks in unknown]
            for child, kl in self._on[whole].kls(architectures):
                self._remember(whole, unknown[child], kl)
                task.advance()

    def exchanged(self, blocks: Sequence[str], layers: Sequence[Sequence[Block]]) -> np.ndarray:
        """Of the child with one block exchanged, on a part of the text [C]: for every block."""

        def with_block(index: int, block: Block) -> list[str]:
            return [*blocks[:index], block.name, *blocks[index + 1 :]]

        missing = [
            [block for block in layer if (False, *with_block(index, block)) not in self.known]
            for index, layer in enumerate(layers)
        ]
        if any(missing):
            measured = self._on[False]
            total = sum(map(len, missing)) * len(measured.texts)
            architecture = Architecture.from_names(blocks)
            with self.job.run.progress.task("scoring around the child", total, "blocks") as task:
                found = measured.exchanged(architecture, missing, task.advance)
                for index, by_name in enumerate(found):
                    for block in missing[index]:
                        self._remember(False, with_block(index, block), by_name[block.name])
        pairs = [(index, block) for index, layer in enumerate(layers) for block in layer]
        return np.array([self.known[(False, *with_block(i, block))] for i, block in pairs])

    def _remember(self, whole: bool, blocks: Sequence[str], kl: float) -> None:
        if not np.isfinite(kl):
            raise UserError(f"search: the KL of an assembled child is {kl}; score again")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = AssembledScore(scores=self.scores, whole=whole, blocks=list(blocks), kl=kl)
        artifacts.append_record(self.path, record)
        self.known[(whole, *blocks)] = kl


def refine(
    job: Job,
    choices: Choices,
    limits: Sequence[Limit],
    starts: Sequence[list[str]],
    refused: Sequence[list[str]],
) -> Refined:
    """The best child by its assembled KL, and by its size, that steps around an incumbent lead to.

    Args:
        job: a child's.
        choices: the blocks and their scores.
        limits: what the child must keep.
        starts: children to start from; the first one keeps the limits.
        refused: children that are not taken.
    """
    measurement = Measurement(job)
    of_halves = _best_of_halves(measurement, choices, limits, refused)
    near = _candidates(job, choices, [*starts, *of_halves])
    walk = _Walk.among(near, measurement, limits, refused)
    feasible = [blocks for blocks in starts if walk.program.feasible(near.columns(blocks))]
    first = min(feasible or [starts[0]], key=walk.value)
    ends = [walk.improve(start) for start in (first, *of_halves)]
    best = min(ends, key=lambda end: walk.value(end.blocks))
    kl, first_kl = measurement.kl(best.blocks), measurement.kl(starts[0])
    first_missing = near.missing_of(near.columns(starts[0]))
    return Refined(best.blocks, kl, first_kl, first_missing, best.steps, best.form)


@dataclass(frozen=True)
class _End:
    """Where steps from a child have led."""

    blocks: list[str]
    steps: int
    form: Predicted | None  # the last one


@dataclass(frozen=True)
class _Walk:
    """Steps among the children of a space that keep the limits."""

    measurement: Measurement
    near: Choices
    program: Program

    @classmethod
    def among(
        cls,
        near: Choices,
        measurement: Measurement,
        limits: Sequence[Limit],
        refused: Sequence[list[str]],
    ) -> "_Walk":
        """Among the children of these blocks that keep the limits and were not refused."""
        program = build(near, limits, measurement.job.child.search)
        return cls(measurement, near, _without(program, near, refused))

    def value(self, blocks: list[str], *, whole: bool = True) -> float:
        """KL and what missing parameters count as."""
        missing = self.near.missing_of(self.near.columns(blocks))
        return self.measurement.kl(blocks, whole=whole) + missing

    def best_of(self, proposals: list[list[str]], best: list[str]) -> list[str]:
        """The best of those that promise most on a part of the text; `best` where none is better.

        At the parent the KL is zero but for rounding, which may be of either sign.
        """
        self.measurement.measure(proposals, whole=False)
        promising = sorted(proposals, key=lambda blocks: self.value(blocks, whole=False))[:TRIED]
        self.measurement.measure([*promising, best], whole=True)
        following, value = min(promising, key=self.value, default=best), self.value(best)
        is_better = value - self.value(following) > LEAST_GAIN * abs(value)
        return following if is_better else best

    def improve(self, start: list[str]) -> _End:
        """Step by step to a child that no step makes better, with new differences so many times."""
        near, program, value = self.near, self.program, self.value
        best, steps, predicted = start, 0, None
        rng = np.random.default_rng(0)
        refinements = self.measurement.job.child.search.refinements
        for number in range(1, refinements + 1):
            before, own = best, near.columns(best)
            exchanged = self.measurement.exchanged(best, near.layers)
            if near.missing is not None:
                elsewhere = near.missing[own].sum() - near.missing[own][program.groups]
                exchanged = exchanged + elsewhere + near.missing
            form = Interactions.between(program, own, float(exchanged[own[0]]), exchanged)
            optimum = interactions.solve(program, form, gap=FORM_GAP, time_limit_s=SOLVE_S)
            proposed = []
            if optimum is not None:
                blocks = near.names(optimum.columns)
                proposed, kl = [blocks], value(blocks)
                predicted = Predicted(blocks, optimum.objective, optimum.bound, kl)
            while True:
                around_it = replace(program, costs=exchanged)
                solved = _solved(around_it, near, best)
                pairs = _exchanges_of_two(program, form, near, best)
                following = self.best_of([*proposed, *solved, *pairs], best)
                if following == best and (number == refinements or best == before):
                    following = self.best_of(self._drawn(around_it, best, rng), best)
                if following == best:
                    break
                best, steps = following, steps + 1
            if best == before:
                break
        return _End(best, steps, predicted)

    def _drawn(
        self, program: Program, incumbent: list[str], rng: np.random.Generator
    ) -> list[list[str]]:
        """Optima that differ from it in a few layers, of the program's costs with noise on them."""
        own = self.near.columns(incumbent)
        gains = program.costs - program.costs[own][program.groups]
        optima = []
        progress = self.measurement.job.run.progress
        with progress.task("searching near the child", DRAWN, "programs") as task:
            for _ in range(DRAWN):
                noisy = replace(program, costs=gains * rng.lognormal(0.0, NOISE, len(gains)))
                changes = int(rng.integers(2, DRAWN_CHANGES + 1))
                optima.append(_near(noisy, own, changes, DRAWN_GAP))
                task.advance()
        return _others(optima, self.near, incumbent)


def _best_of_halves(
    measurement: Measurement,
    choices: Choices,
    limits: Sequence[Limit],
    refused: Sequence[list[str]],
) -> list[list[str]]:
    """One child of the parent's halves of layers, or none; empty where parameters do not count."""
    if choices.missing is None or not choices.missing.any():
        return []
    parent_blocks = measurement.job.run.parent.shape.parent_blocks
    layers = [
        [
            block
            for block in layer
            if block.attention in (own.attention, NO_ATTENTION) and block.ffn in (own.ffn, NO_FFN)
        ]
        for layer, own in zip(choices.layers, parent_blocks, strict=True)
    ]
    walk = _Walk.among(choices.keeping(layers), measurement, limits, refused)
    optimum = mip.solve(walk.program, gap=SOLVE_GAP, time_limit_s=SOLVE_S)
    return [] if optimum is None else [walk.improve(walk.near.names(optimum.columns)).blocks]


def _candidates(job: Job, choices: Choices, starts: Sequence[list[str]]) -> Choices:
    """The blocks that some search could choose by their scores, and those of the starts."""
    shape = job.run.parent.shape
    layers = []
    for index, layer in enumerate(choices.layers):
        first = int(choices.starts[index])
        costs = choices.costs[first : first + len(layer)]
        kept = candidates(layer, costs.tolist(), shape)
        used = {blocks[index] for blocks in starts}
        kept += [block for block in layer if block.name in used and block not in kept]
        layers.append(kept)
    return choices.keeping(layers)


def _without(program: Program, choices: Choices, refused: Sequence[list[str]]) -> Program:
    rows = [choices.columns(names) for names in refused if choices.has(names)]
    away = (mip.overlap_row(columns, len(columns) - 1) for columns in rows)
    return replace(program, extra=(*program.extra, *away))


def _near(program: Program, own: np.ndarray, changes: int, gap: float) -> Optimum | None:
    """The optimum among what differs from the columns `own` in so many groups at most."""
    count = len(own)
    unchanged = Row(own, -np.ones(count), float(changes - count))
    within = replace(program, extra=(*program.extra, unchanged))
    return mip.solve(within, gap=gap, time_limit_s=SOLVE_S)


def _solved(program: Program, choices: Choices, incumbent: list[str]) -> list[list[str]]:
    """The best children that differ from the incumbent in at most 1, 2, 3, ... layers."""
    own, count = choices.columns(incumbent), len(incumbent)
    changes = (*(number for number in CHANGES if number < count), count)
    optima = [_near(program, own, number, SOLVE_GAP) for number in changes]
    return _others(optima, choices, incumbent)


def _others(
    optima: Sequence[Optimum | None], choices: Choices, incumbent: list[str]
) -> list[list[str]]:
    """The children that were found, each once, without the incumbent."""
    found = [choices.names(optimum.columns) for optimum in optima if optimum is not None]
    return [
        list(blocks) for blocks in dict.fromkeys(map(tuple, found)) if list(blocks) != incumbent
    ]


def _exchanges_of_two(
    program: Program, form: Interactions, choices: Choices, incumbent: list[str]
) -> list[list[str]]:
    """The exchanges of two layers that keep the limits and promise most, the best first."""
    own, groups = choices.columns(incumbent), program.groups
    shared = form.shared - form.shared[own][groups]
    gain = form.private - form.private[own][groups]
    gain = gain + shared * (shared + 2 * form.shared[own].sum())
    slack = program.limits - program.resources[:, own].sum(axis=1)
    change = program.resources - program.resources[:, own[groups]]
    promised: list[tuple[float, int, int]] = []
    for first, start in enumerate(program.starts[1:][groups]):
        others = np.arange(start, len(gain))
        both = gain[first] + gain[others] + 2 * shared[first] * shared[others]
        fits = (change[:, first, None] + change[:, others] <= slack[:, None]).all(axis=0)
        worth = np.flatnonzero(fits & (both < 0) & (others != own[groups[others]]))
        if first != own[groups[first]]:
            promised += [(float(both[k]), first, int(others[k])) for k in worth]
    found = []
    for _, first, second in sorted(promised)[:EXCHANGES]:
        columns = own.copy()
        columns[groups[first]], columns[groups[second]] = first, second
        if program.feasible(columns):
            found.append(choices.names(columns))
    return found
