"""From turns of steps to seconds with a 95 % interval.

Parent and child take turns (`turns.py`), so every turn is a pair of times of the same second. Other
work on the machine makes a turn slower: both sides by about the same factor where it lasts for the
whole turn, and one side alone where it begins or ends in it. Hence two estimators, from the turns
of all engine starts:

- the ratio of two sides is that of the median turn, quiet or not: what lasts cancels, and what hits
  one side is as likely to hit the other (docs/log.md has the comparison with quiet turns alone);
- the level of both together is the mean of the quiet turns, in which both sides together took at
  most a tenth more than in the fastest tenth: the time on a quiet machine.

Where two engines were served one after the other there are no pairs, and quiet turns make the
ratio, too. The interval is bootstrapped over engine starts, since the same child differs by some
per cent from start to start, and then over the turns of each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from puzzle.artifacts import Record

CONFIDENCE = 0.95
PERCENTILES = (50, 90, 95, 99)  # that can be asked for
RESAMPLES = 1000
FASTEST = 0.1  # the share of the turns by which the others are judged
QUIET = 1.1  # times the fastest: turns that count
DISTURBED = 1.25  # times the fastest: turns that other work on the machine has slowed
Vector = NDArray[np.float64]
Pairs = NDArray[np.float64]  # [turns, sides]: seconds of a step of the parent and of the child


class Interval(Record):
    """An estimate, and the interval that holds the true value with a confidence of 95 %."""

    value: float
    low: float
    high: float

    @property
    def inverse(self) -> "Interval":
        """Of one over it."""
        return Interval(value=1 / self.value, low=1 / self.high, high=1 / self.low)

    def times(self, factor: float) -> "Interval":
        """Of so many times it."""
        low, value, high = (factor * x for x in (self.low, self.value, self.high))
        return Interval(value=value, low=low, high=high)

    def with_unit(self, form: str, unit: str) -> str:
        """`1.66x (1.64x to 1.69x)`; without the interval where it has no width."""
        if self.low == self.high:
            return f"{self.value:{form}}{unit}"
        return f"{self.value:{form}}{unit} ({self.low:{form}}{unit} to {self.high:{form}}{unit})"


class Percentiles(Record):
    """Percentiles of a latency, each over the figure that is given without one.

    Of a batch's first tokens: until so many sequences have theirs, over until all have. Of the
    steps after it: within how long so many of them are done, over the mean step.
    """

    p50: float = 1.0
    p90: float = 1.0
    p95: float = 1.0
    p99: float = 1.0

    @classmethod
    def of(cls, relative: Sequence[float], *, whole: bool = False) -> "Percentiles":
        """From what every sequence or step took, over that figure.

        `whole`: no value between two of them, as of sequences.
        """
        method: Literal["higher", "linear"] = "higher" if whole else "linear"
        shares = [percentile / 100 for percentile in PERCENTILES]
        values = np.quantile(np.array(relative, dtype=float), shares, method=method)
        return cls(**{f"p{p}": float(v) for p, v in zip(PERCENTILES, values, strict=True)})

    def at(self, percentile: int | None) -> float:
        """Of one of `PERCENTILES`; 1 for none."""
        return 1.0 if percentile is None else float(getattr(self, f"p{percentile}"))

    def largest(self, other: "Percentiles") -> "Percentiles":
        """The larger one of each."""
        ours, theirs = self.model_dump(), other.model_dump()
        return Percentiles(**{name: max(ours[name], theirs[name]) for name in ours})


@dataclass(frozen=True)
class Phase:
    """A part of a batch: so many steps of it, and the turns that show what one of them takes.

    The prefill is a phase of one step; the output is cut into a few. Within one, steps take longer
    as the context grows: `positions` [turns] says where each turn stands.
    """

    steps: int
    turns: Pairs
    positions: Vector

    @classmethod
    def of(cls, steps: int, turns: Sequence[Sequence[float]] | Pairs) -> "Phase":
        """A phase whose turns all stand at the same place, as prefills do."""
        return cls(steps, np.array(turns), np.zeros(len(turns)))

    def expected(self) -> Pairs:
        """What an undisturbed turn at each turn's position takes, about: [turns, sides].

        A straight line through the fastest tenths of the early and of the late turns.
        """
        late = self.positions > np.median(self.positions)
        if not late.any():
            return np.broadcast_to(np.quantile(self.turns, FASTEST, axis=0), self.turns.shape)
        (x0, y0), (x1, y1) = (
            (self.positions[half].mean(), np.quantile(self.turns[half], FASTEST, axis=0))
            for half in (~late, late)
        )
        line = y0 + (self.positions[:, None] - x0) / (x1 - x0) * (y1 - y0)
        expected: Pairs = np.maximum(line, np.minimum(y0, y1) / 2)
        return expected


Start = Sequence[Phase]  # what one start of the engines has shown; the first phase is the prefill


@dataclass(frozen=True)
class Seconds:
    """Seconds of a batch of every side: until the first tokens, and after them; [sides] each."""

    prefill: Vector
    decode: Vector

    @property
    def total(self) -> Vector:
        """Of the whole batch."""
        return self.prefill + self.decode


Figure = Callable[[Seconds], float]


@dataclass(frozen=True)
class PhaseTurns:
    """The turns of a phase, by start, each over what is expected at its position."""

    seconds: Vector  # [sides]: of all its steps, were every turn as expected
    levels: list[Vector]  # [quiet turns]: the mean over the sides
    shares: list[Pairs]  # [turns, sides]: what every side took, over that mean
    slowness: Vector  # of every turn, quiet or not, against the fastest tenth

    @classmethod
    def of(cls, phases: Sequence[Phase], *, in_turn: bool = True) -> "PhaseTurns":
        """From the turns of all starts together. `in_turn`: the sides of a turn are a pair."""
        turns = np.concatenate([phase.turns for phase in phases])
        positions = np.concatenate([phase.positions for phase in phases])
        expected = Phase(1, turns, positions).expected()
        relative = turns / expected
        slowness = relative.sum(axis=1) / np.quantile(relative.sum(axis=1), FASTEST)
        quiet, level = slowness <= QUIET, relative.mean(axis=1)
        shares, counted = relative / level[:, None], np.ones_like(quiet) if in_turn else quiet
        starts = np.repeat(np.arange(len(phases)), [len(phase.turns) for phase in phases])
        return cls(
            phases[0].steps * expected.mean(axis=0),
            [level[quiet & (starts == start)] for start in range(len(phases))],
            [shares[counted & (starts == start)] for start in range(len(phases))],
            slowness,
        )

    def estimate(self, starts: Sequence[int], rng: np.random.Generator | None = None) -> Vector:
        """Seconds of all its steps, [sides], from these starts; with `rng`, of resampled turns.

        Where none of these starts has a turn that counts, all of them stand in.
        """
        level = _of_starts(self.levels, starts, rng).mean()
        seconds: Vector = level * self.seconds * np.median(_of_starts(self.shares, starts, rng), 0)
        return seconds


def _of_starts(
    by_start: Sequence[Vector], starts: Sequence[int], rng: np.random.Generator | None
) -> Vector:
    """The turns of some starts together, with `rng` resampled within each."""
    rows = [by_start[index] for index in starts if len(by_start[index])]
    if rng is not None:
        rows = [turns[rng.integers(len(turns), size=len(turns))] for turns in rows]
    return np.concatenate(rows or by_start)


def disturbed(starts: Sequence[Start]) -> float:
    """The share of the turns that other work on the machine has slowed."""
    phases = [PhaseTurns.of(phases) for phases in zip(*starts, strict=True)]
    return float((np.concatenate([phase.slowness for phase in phases]) > DISTURBED).mean())


def step_percentiles(phases: Sequence[Phase]) -> list[Percentiles]:
    """Of the steps after the first token, by side: they take longer as the context grows.

    On a quiet machine: from the straight line that is expected in the turns' positions. It goes
    through the fastest turns of both halves, so it is moved to where the median turn is.
    """
    turns = np.concatenate([phase.turns for phase in phases])
    positions = np.concatenate([phase.positions for phase in phases])
    line = Phase(1, turns, positions).expected()
    line = line + np.median(turns - line, axis=0)
    return [Percentiles.of(side / side.mean()) for side in line.T]


def intervals(
    starts: Sequence[Start], figures: Mapping[str, Figure], looks: int, *, in_turn: bool = True
) -> dict[str, Interval]:
    """Every figure with its interval.

    Args:
        starts: what every start of the engines has shown.
        figures: what is computed from the seconds of a batch.
        looks: at how many numbers of starts the interval may be looked at before the measurement
            ends. Each look gets its share of the 5 % (Bonferroni), so the one that it ends with
            holds as if it had been the only one.
        in_turn: whether the sides took turns; otherwise one engine was served after the other.
    """
    phases = [PhaseTurns.of(phases, in_turn=in_turn) for phases in zip(*starts, strict=True)]
    count, rng = len(starts), np.random.default_rng(0)
    estimate = _seconds(phases, range(count))
    # One start fewer than there are: then the variance between few starts is not underestimated.
    resampled = [
        _seconds(phases, rng.integers(count, size=max(1, count - 1)).tolist(), rng)
        for _ in range(RESAMPLES)
    ]
    tail = (1 - CONFIDENCE) / looks / 2
    result = {}
    for name, figure in figures.items():
        value = float(figure(estimate))
        low, high = np.quantile([figure(sample) for sample in resampled], [tail, 1 - tail])
        result[name] = Interval(value=value, low=min(value, low), high=max(value, high))
    return result


def _seconds(
    phases: Sequence[PhaseTurns], starts: Sequence[int], rng: np.random.Generator | None = None
) -> Seconds:
    prefill, *decode = (phase.estimate(starts, rng) for phase in phases)
    return Seconds(prefill, np.sum(decode, axis=0) if decode else 0 * prefill)
