"""A cost model that knows what serving has shown: corrected variant by variant.

The table is where it starts: every variant's seconds, give or take what the table may be off. What
was served is linear in them: a child that took r times the parent's seconds says

    counts(child) . seconds - r counts(parent) . seconds = 0

give or take its interval. The posterior of this Gaussian model is the corrected table, for the
prefill and for the decode steps, and how uncertain a prediction still is. The parent's own seconds
stay as they are: they are what all others are relative to. Near what was served the prediction
follows it; far from it the table is as before.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from puzzle.artifacts import Record
from puzzle.cost import parts
from puzzle.cost.parts import Key
from puzzle.cost.regression import Vector
from puzzle.cost.table import Cost, CostTable
from puzzle.engines.intervals import Interval, Percentiles
from puzzle.model.architecture import Architecture

# What a table may be off, beside its standard errors (benchmarks/promise.py, docs/log.md).
VARIANT_ERROR = 0.015  # of a variant's seconds
CONSTANT_ERROR = 0.007  # of the parent's seconds
CURVATURE = 0.007  # of a model's seconds: what no sum of variants says
INTERVAL_SIGMAS = 2 * 1.96  # standard errors in the width of an interval


class Observation(Record):
    """An architecture served in turn with another: its seconds over the other's."""

    scenario: str  # the table it is served in: `main`, `main@32` or another scenario
    blocks: list[str]
    compared_with: list[str]
    compared_in: str | None = None  # the table of the other; None: the same
    prefill: Interval
    decode: Interval | None  # None where one token is put out
    memory_bytes: int | None = None  # of the architecture, as the engine had it
    first_token: Percentiles | None = None  # of the architecture
    inter_token: Percentiles | None = None


@dataclass(frozen=True)
class Phase:
    """The prefill or the decode steps: seconds of every unknown [U] and their covariance [U, U]."""

    seconds: Vector
    covariance: NDArray[np.float64]

    def corrected(self, rows: Vector, sigmas: Vector) -> "Phase":
        """With rows [R, U] that were seen to be 0, give or take `sigmas` [R] seconds.

        Where they are farther from it than the table may be off, the table is off by more.
        """
        seen, noise = rows @ self.seconds, np.diag(sigmas**2)
        expected = rows @ self.covariance @ rows.T + noise
        surprise = float(seen @ np.linalg.pinv(expected) @ seen) / len(seen)
        prior = max(1.0, surprise) * self.covariance
        gain = prior @ rows.T @ np.linalg.pinv(rows @ prior @ rows.T + noise)
        return Phase(self.seconds - gain @ seen, prior - gain @ rows @ prior)

    def variance(self, row: Vector) -> float:
        """Of the seconds of a model with these counts [U]."""
        return max(0.0, float(row @ self.covariance @ row))


@dataclass(frozen=True)
class CostModel:
    """A table, corrected by observations, and the uncertainty of what it predicts."""

    table: CostTable
    unknowns: list[Key]  # the last is the constant
    prefill: Phase
    decode: Phase
    is_exact: bool  # modelled, and nothing served has said otherwise

    @classmethod
    def of(
        cls, table: CostTable, parent: Architecture, observations: Sequence[Observation] = ()
    ) -> "CostModel":
        """The table's model, corrected by what was observed in its scenario."""
        unknowns = [*table.variants, ("constant", "constant")]
        counts = _counts(unknowns, table, parent)
        costs = [*table.variants.values(), table.constant]
        phases = []
        for name in ("prefill", "decode"):
            seconds = np.array([getattr(cost, f"{name}_s") for cost in costs])
            of_parent = float(counts @ seconds)
            sigmas = VARIANT_ERROR * seconds
            sigmas[-1] = CONSTANT_ERROR * of_parent
            measured = table.covariance.among(unknowns, name)
            covariance = measured + np.diag(sigmas**2)
            covariance *= of_parent > 0  # no decode steps where one token is put out
            free = Phase(seconds, covariance)
            # The parent's seconds are what everything is relative to.
            gain = free.covariance @ counts / max(free.variance(counts), 1e-300)
            covariance = free.covariance - np.outer(gain, counts @ free.covariance)
            phase = Phase(seconds, covariance)
            phases.append(_observed(phase, partial(_counts, unknowns, table), name, observations))
        is_exact = not table.header.measured and not observations
        prefill, decode = phases
        corrected = _with_memory(_with_seconds(table, prefill, decode), observations)
        corrected = _with_percentiles(corrected, observations)
        return cls(corrected, unknowns, prefill, decode, is_exact)

    def uncertainty(self, architecture: Architecture) -> float:
        """The standard error of a model's predicted seconds, as a share of them."""
        if self.is_exact:
            return 0.0
        counts = _counts(self.unknowns, self.table, architecture)
        variance = self.prefill.variance(counts) + self.decode.variance(counts)
        share = variance**0.5 / self.table.predict(architecture).total_s
        return float(np.hypot(share, CURVATURE))


def in_own_table(
    seen: Observation, tables: Mapping[str, CostTable], parent: Architecture
) -> Observation:
    """An observation against the parent in another table, as one against it in its own.

    With a sweep of batch sizes the parent is served at its best batch and the child at another; the
    parent's seconds in both tables are what the tables keep fixed.
    """
    if seen.compared_in in (None, seen.scenario):
        return seen
    other, own = (tables[name].predict(parent) for name in (seen.compared_in, seen.scenario))

    decode = seen.decode and seen.decode.times(other.decode_s / own.decode_s)
    prefill = seen.prefill.times(other.prefill_s / own.prefill_s)
    updates = {"prefill": prefill, "decode": decode, "compared_in": None}
    return seen.model_copy(update=updates)


def _observed(
    phase: Phase,
    counts: Callable[[Architecture], Vector],
    name: str,
    observations: Sequence[Observation],
) -> Phase:
    rows, sigmas = [], []
    for seen in observations:
        ratio: Interval | None = getattr(seen, name)
        if ratio is None:
            continue
        ours, others = (
            counts(Architecture.from_names(names)) for names in (seen.blocks, seen.compared_with)
        )
        rows.append(ours - ratio.value * others)
        error = float(np.hypot((ratio.high - ratio.low) / INTERVAL_SIGMAS / ratio.value, CURVATURE))
        sigmas.append(error * float(ours @ phase.seconds))
    if not rows:
        return phase
    return phase.corrected(np.array(rows), np.array(sigmas))


def _with_memory(table: CostTable, observations: Sequence[Observation]) -> CostTable:
    """Weights and KV cache are counted; what serving takes besides is the most that was seen."""
    constant = replace(table.constant, workspace_bytes=0)
    counted = replace(table, constant=constant)
    besides = [
        seen.memory_bytes - counted.predict(Architecture.from_names(seen.blocks)).memory_bytes
        for seen in observations
        if seen.memory_bytes is not None
    ]
    if not besides:
        return table
    return replace(table, constant=replace(constant, workspace_bytes=max(0, *besides)))


def _with_percentiles(table: CostTable, observations: Sequence[Observation]) -> CostTable:
    """The parent's, or the largest that was seen."""
    first, inter = table.first_token, table.inter_token
    for seen in observations:
        first = first.largest(seen.first_token or first)
        inter = inter.largest(seen.inter_token or inter)
    return replace(table, first_token=first, inter_token=inter)


def _counts(unknowns: Sequence[Key], table: CostTable, architecture: Architecture) -> Vector:
    """How often each unknown occurs in a model, [U]."""
    keys = [part.key for part in parts.of_architecture(architecture, table.header.windows)]
    counts: Vector = np.array([*map(keys.count, unknowns[:-1]), 1], dtype=float)
    return counts


def _with_seconds(table: CostTable, prefill: Phase, decode: Phase) -> CostTable:
    def corrected(cost: Cost, unknown: int, least: float) -> Cost:
        prefill_s, decode_s = (max(least, float(p.seconds[unknown])) for p in (prefill, decode))
        return replace(cost, prefill_s=prefill_s, decode_s=decode_s)

    costs = enumerate(table.variants.items())
    variants = {variant: corrected(cost, index, 0.0) for index, (variant, cost) in costs}
    return replace(table, variants=variants, constant=corrected(table.constant, -1, -np.inf))
