"""The KL that a sum of scores stands for, going by children that were assembled and measured."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curve:
    """The KL that sums of scores stand for: through what searched children have shown."""

    sums: list[float]  # rising, from 0 on
    kls: list[float]

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> "Curve | None":
        """From (sum, KL) to (sum, KL), never falling; None for fewer than two points."""
        shown = sorted((x, y) for x, y in points if x > 0)
        if len(shown) < 2:
            return None
        sums, kls = zip(*shown, strict=True)
        rising = np.maximum.accumulate([0.0, *kls]).tolist()
        return cls([0.0, *sums], rising)

    def kl(self, score_sum: float) -> float:
        """Beyond the last point in proportion to the sum."""
        if score_sum > self.sums[-1]:
            return self.kls[-1] * score_sum / self.sums[-1]
        return float(np.interp(score_sum, self.sums, self.kls))

    def score_sum(self, kl: float) -> float:
        """The largest sum that stands for a KL of at most `kl`."""
        if kl >= self.kls[-1]:
            return self.sums[-1] * kl / max(self.kls[-1], 1e-300)
        index = int(np.searchsorted(self.kls, kl, side="right"))
        (x0, y0), (x1, y1) = ((self.sums[i], self.kls[i]) for i in (index - 1, index))
        return x0 + (x1 - x0) * (kl - y0) / (y1 - y0)
