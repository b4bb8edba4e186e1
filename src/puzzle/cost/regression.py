"""From steps of random architectures to the seconds of every variant: robust least squares."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

OFF_THE_LINE = 0.1  # of a series' mean: how far steps in the hardware's efficiency may bend it
ROUNDS = 6  # of fitting and discarding outliers
Vector = NDArray[np.float64]
Series = Sequence[Sequence[tuple[int, float]]]  # unknowns of one kind: (index, size)


@dataclass
class Samples:
    """What one phase has shown: counts of variants and the seconds of a prefill or a step."""

    counts: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, counts: list[int], seconds: float) -> None:
        """Add one prefill or decode step of a model with so many of each variant."""
        self.counts.append(counts)
        self.seconds.append(seconds)

    def fit(self, series: Series = ()) -> tuple[Vector, Vector]:
        """(seconds of every unknown, their standard errors): least squares of relative errors.

        Within a series the seconds of a variant are expected on a straight line in its size, give
        or take `OFF_THE_LINE` of the series' mean: eleven widths then need hardly more samples than
        two. Outliers beyond three robust standard deviations are discarded.
        """
        x, y = np.array(self.counts, dtype=float), np.array(self.seconds)
        x = x / y[:, None]
        kept, sigma = np.ones(len(y), dtype=bool), 0.05
        first_mean = float(np.median(y) / np.abs(self.counts).sum(axis=1).max())
        means = [first_mean] * len(series)
        for _ in range(ROUNDS):
            prior = [
                sigma / (OFF_THE_LINE * mean) * _off_line(unknowns, x.shape[1])
                for mean, unknowns in zip(means, series, strict=True)
            ]
            rows = np.vstack([x[kept], *prior])
            rights = np.concatenate([np.ones(kept.sum()), np.zeros(len(rows) - kept.sum())])
            beta = np.linalg.lstsq(rows, rights, rcond=None)[0]
            residual = x @ beta - 1
            sigma = max(1.48 * float(np.median(np.abs(residual[kept]))), 1e-12)
            kept = np.abs(residual) <= 3 * sigma + 1e-9
            means = [_mean(beta, unknowns) for unknowns in series]
        variance = residual[kept].var() * np.linalg.pinv(rows.T @ rows).diagonal()
        return beta, np.sqrt(variance.clip(min=0.0))


def _mean(beta: Vector, unknowns: Sequence[tuple[int, float]]) -> float:
    return max(float(beta[[index for index, _ in unknowns]].mean()), 1e-12)


def _off_line(unknowns: Sequence[tuple[int, float]], columns: int) -> Vector:
    """Rows [len(unknowns), columns] that measure how far a series lies off a straight line."""
    line = np.array([[1.0, size] for _, size in unknowns])
    rows = np.zeros((len(unknowns), columns))
    indices = [index for index, _ in unknowns]
    rows[:, indices] = np.eye(len(unknowns)) - line @ np.linalg.pinv(line)
    return rows
