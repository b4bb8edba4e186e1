"""How certain a quality is: intervals bootstrapped over documents.

Tokens of one text are not independent, documents about are. Two models on the same text are
resampled together, so what makes a document hard for both cancels in their ratio or difference.

Shape legend: U units (documents, or sequences where there are few), R resamples.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from puzzle.artifacts import Record
from puzzle.engines.intervals import CONFIDENCE, Interval

RESAMPLES = 2000
Vector = NDArray[np.float64]


class UnitSums(Record):
    """Sums over the tokens of every unit, of one model against the parent."""

    units: list[int]
    tokens: list[int]
    metrics: dict[str, list[float]]  # by name, in the order of the units

    def mean(self, metric: str) -> Interval:
        """Per token."""
        columns: list[Sequence[float]] = [self.metrics[metric], self.tokens]
        return bootstrap(columns, lambda sums: sums[0] / sums[1])

    def retention(self, parent: "UnitSums", metric: str = "top1") -> Interval | None:
        """The share of the parent's metric that is kept; None where the parent has nothing."""
        if not sum(parent.metrics[metric]):
            return None
        columns = [self.metrics[metric], parent.metrics[metric]]
        return bootstrap(columns, lambda sums: sums[0] / np.maximum(sums[1], 1e-12))

    def is_on_text_of(self, other: "UnitSums") -> bool:
        """Whether both were measured on the same text, so that they compare."""
        return (self.units, self.tokens) == (other.units, other.tokens)

    def difference(self, other: "UnitSums", metric: str) -> Interval:
        """Per token, minus another model's on the same text. Raises `ValueError` for other text."""
        if not self.is_on_text_of(other):
            raise ValueError("two models that were not evaluated on the same text do not compare")
        columns: list[Sequence[float]] = [self.metrics[metric], other.metrics[metric], self.tokens]
        return bootstrap(columns, lambda sums: (sums[0] - sums[1]) / sums[2])


class Buckets(Record):
    """What one model has shown by position; every sequence is a unit, in each bucket."""

    ends: list[int]  # a bucket holds the positions from the end of the one before it
    sums: list[UnitSums]

    def mean(self, metric: str) -> list[Interval]:
        """Per token, of each bucket."""
        return [sums.mean(metric) for sums in self.sums]

    def growth(self, metric: str = "kl") -> Interval | None:
        """The last bucket's mean over the first's; None where there is nothing to compare."""
        first, last = self.sums[0], self.sums[-1]
        if len(self.sums) < 2 or sum(first.metrics[metric]) <= 0:
            return None
        columns: list[list[float] | list[int]] = [
            last.metrics[metric],
            last.tokens,
            first.metrics[metric],
            first.tokens,
        ]
        return bootstrap(columns, lambda s: (s[0] / s[1]) / (s[2] / s[3]).clip(1e-12))


def bootstrap(columns: Sequence[Sequence[float]], figure: Callable[[Vector], Vector]) -> Interval:
    """A figure of the sums of columns [U], with its interval over resampled units."""
    values = np.array(columns, dtype=float)
    count = values.shape[1]
    rng = np.random.default_rng(0)
    weights_RU = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    resampled = figure(values @ weights_RU.T)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    value = float(figure(values.sum(axis=1)))
    return Interval(value=value, low=min(value, float(low)), high=max(value, float(high)))
