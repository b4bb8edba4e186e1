"""From steps of random architectures to the seconds of every variant: robust least squares."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

OFF_THE_LINE = 0.1  # of a series' mean: how far steps in the hardware's efficiency may bend it
ROUNDS = 6  # of fitting and discarding outliers
LEAST_UNIT = 0.2  # of the median sample: what errors are relative to at least
ORDER, LEAST_FOR_ORDER = 2, 40  # of the autoregression of errors; samples that it needs
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
        """(seconds of the unknowns [U], their covariance [U, U]): least squares of relative errors.

        Samples are in the order in which they were served. What disturbs a machine lasts, so errors
        that follow each other are alike (in one minute of vLLM a correlation of 0.6 to 0.7): what
        the ones before predict of an error is taken off it, and off the counts, before the squares
        are added up (autoregression of `ORDER`; Cochrane and Orcutt 1949). That is worth two to
        three times as many samples (docs/log.md). Outliers beyond three robust standard deviations
        are discarded.

        Within a series the seconds of a variant are expected on a straight line in its size, give
        or take `OFF_THE_LINE` of the series' mean: eleven widths then need hardly more samples than
        two.
        """
        counts, y = np.array(self.counts, dtype=float), np.array(self.seconds)
        kept, sigma, unit = np.ones(len(y), dtype=bool), 0.05, y
        first_mean = float(np.median(y) / np.abs(counts).sum(axis=1).max())
        means = [first_mean] * len(series)
        lasting = np.zeros(ORDER if len(y) >= LEAST_FOR_ORDER else 0)
        for _ in range(ROUNDS):
            prior = [
                sigma / (OFF_THE_LINE * mean) * _off_line(unknowns, counts.shape[1])
                for mean, unknowns in zip(means, series, strict=True)
            ]
            x, shown = counts / unit[:, None], y / unit
            news, new = _unexpected(x, lasting), _unexpected(shown, lasting)
            rows = np.vstack([news[kept], *prior])
            rights = np.concatenate([new[kept], np.zeros(len(rows) - kept.sum())])
            beta = np.linalg.lstsq(rows, rights, rcond=None)[0]
            residual = news @ beta - new
            sigma = max(1.48 * float(np.median(np.abs(residual[kept]))), 1e-12)
            kept = np.abs(residual) <= 3 * sigma + 1e-9
            means = [_mean(beta, unknowns) for unknowns in series]
            lasting = _autoregression(shown - x @ beta, len(lasting))
            # Relative to what is fitted: what was measured would let noise shrink the fit.
            unit = np.maximum(counts @ beta, LEAST_UNIT * np.median(y))
        return beta, residual[kept].var() * np.linalg.pinv(rows.T @ rows)


def _autoregression(errors: Vector, order: int) -> Vector:
    """What an error is expected to keep of the ones before it, the last first (Yule and Walker).

    Outliers count as three robust standard deviations.
    """
    centred = errors - np.median(errors)
    most = 3 * 1.48 * float(np.median(np.abs(centred)))
    centred = np.clip(centred, -most, most)
    size = len(centred)
    alike = np.array([centred[lag:] @ centred[: size - lag] for lag in range(order + 1)])
    if not order or alike[0] <= 0:
        return np.zeros(order)
    lags = np.arange(order)
    matrix = alike[np.abs(lags[:, None] - lags)] + 1e-6 * alike[0] * np.eye(order)
    kept: Vector = np.linalg.solve(matrix, alike[1:])
    return kept


def _unexpected(rows: Vector, lasting: Vector) -> Vector:
    """Rows less what the ones before let expect of them; the first ones have none before them."""
    news = rows.copy()
    for lag, share in enumerate(lasting, start=1):
        news[lag:] -= share * rows[:-lag]
    return news


def _mean(beta: Vector, unknowns: Sequence[tuple[int, float]]) -> float:
    return max(float(beta[[index for index, _ in unknowns]].mean()), 1e-12)


def _off_line(unknowns: Sequence[tuple[int, float]], columns: int) -> Vector:
    """Rows [len(unknowns), columns] that measure how far a series lies off a straight line."""
    line = np.array([[1.0, size] for _, size in unknowns])
    rows = np.zeros((len(unknowns), columns))
    indices = [index for index, _ in unknowns]
    rows[:, indices] = np.eye(len(unknowns)) - line @ np.linalg.pinv(line)
    return rows
