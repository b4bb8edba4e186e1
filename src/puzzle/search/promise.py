"""The promise: every constraint judged against what serving the child has shown.

A measured figure has an interval. A constraint is met where all of the interval keeps it, missed
where none of it does, and undecided where the wish lies within. Relative speeds are judged by the
ratio of turns of both sides, absolute ones by the child's own seconds. Parameters are counted; the
KV cache is what the engine allocated, and memory what it took at its peak, where it can tell.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from puzzle.artifacts import Record
from puzzle.engines.intervals import Interval
from puzzle.engines.turns import Measurement
from puzzle.search.answers import Answer, Figures
from puzzle.search.constraints import Constraint

GIVEN_AWAY = 0.02  # beyond the wish: more is quality that nobody asked to give
LIKELY_AWAY = 0.035  # by the estimate, where its interval does not say so: worth another look
FIGURES = {  # the field of `Figures` that a constraint limits
    "throughput": "throughput_tok_per_s",
    "user_throughput": "user_throughput_tok_per_s",
    "inter_token_latency": "inter_token_latency_s",
    "latency": "latency_s",
    "time_to_first_token": "time_to_first_token_s",
    "memory": "memory_bytes",
    "parameters": "parameters",
    "kv_cache": "kv_cache_bytes",
}
# Of a measurement, and a percentile where one was asked for
RATIOS: dict[str, Callable[[Measurement, int | None], Interval]] = {
    "throughput": lambda measurement, _: measurement.speedup,
    "latency": lambda measurement, _: measurement.latency_ratio,
    "time_to_first_token": lambda measurement, p: measurement.first_token_ratio(p),
    "user_throughput": lambda measurement, p: measurement.user_throughput_ratio(p),
    "inter_token_latency": lambda measurement, p: measurement.inter_token_latency_ratio(p),
}
ABSOLUTE: dict[str, Callable[[Measurement, int | None], Interval]] = {
    "throughput": lambda measurement, _: measurement.child.throughput_tok_per_s,
    "latency": lambda measurement, _: measurement.child.latency_s,
    "time_to_first_token": lambda measurement, p: measurement.child.time_to_first_token(p),
    "user_throughput": lambda measurement, p: measurement.child.user_throughput_tok_per_s(p),
    "inter_token_latency": lambda measurement, p: measurement.child.inter_token_latency(p),
}
Verdict = Literal["met", "missed", "undecided", "predicted"]


class Promise(Record):
    """One constraint and what was measured, or predicted where nothing can be measured here."""

    constraint: str
    scenario: str
    asked: str  # in words, as `measured` is
    measured: str
    wanted: float
    predicted: float  # in the unit of `wanted`, as `figure` is
    margin: float  # by which the search aimed beyond what was asked
    at_least: bool  # otherwise at most
    figure: Interval
    verdict: Verdict

    @property
    def in_words(self) -> str:
        """`asked throughput 2x, measured 2.05x (2.02x to 2.07x) the parent's: met`."""
        return self.told("measured")

    def told(self, how: str) -> str:
        """The same, where it may have been `modelled` instead of measured."""
        if self.verdict == "predicted":
            return f"asked {self.asked}, predicted {self.measured}: not measured yet"
        return f"asked {self.asked}, {how} {self.measured}: {self.verdict}"

    @property
    def is_slack(self) -> bool:
        """Whether it is surely more than 2 % beyond what was asked."""
        return self.exceeds(GIVEN_AWAY)

    def exceeds(self, share: float) -> bool:
        """Whether it is surely beyond what was asked by more than that share."""
        if self.at_least:
            return self.figure.low > self.wanted * (1 + share)
        return self.figure.high < self.wanted / (1 + share)

    @property
    def by_estimate(self) -> "Promise":
        """As if the figure were certain."""
        value = self.figure.value
        return self.model_copy(update={"figure": Interval(value=value, low=value, high=value)})

    @property
    def is_likely(self) -> bool:
        """Whether its estimate is what was asked, or better."""
        return self.by_estimate.exceeds(0.0)

    @property
    def uncertainty(self) -> float:
        """From the estimate to that end of its interval that decides, as a share."""
        figure = self.figure
        return figure.value / figure.low - 1 if self.at_least else figure.high / figure.value - 1

    @property
    def is_surprise(self) -> bool:
        """Whether it is surely better than predicted, without the margin that was aimed at.

        A margin is for what is uncertain, and what was served is not; what the search has predicted
        beyond it is nothing that another search would keep.
        """
        if self.at_least:
            return self.figure.low > self.predicted / (1 + self.margin)
        return self.figure.high < self.predicted * (1 + self.margin)


def overall(promises: Sequence[Promise]) -> Verdict:
    """Of all constraints together: the worst."""
    verdicts = {promise.verdict for promise in promises}
    order: tuple[Verdict, ...] = ("missed", "undecided", "predicted")
    return next((one for one in order if one in verdicts), "met")


def give_away(promises: Sequence[Promise]) -> bool:
    """Whether quality was given that nobody asked to give: every constraint has room to spare.

    And the search did not know: what it has itself predicted beyond the wish is nothing that
    another search would keep.
    """
    is_slack = bool(promises) and all(promise.is_slack for promise in promises)
    return is_slack and any(promise.is_surprise for promise in promises)


def is_settled(promises: Sequence[Promise]) -> bool:
    """Whether another look at a child would say little of whether it goes on.

    All is met or missed; and whether quality was given away is known, or not likely. Or something
    is undecided and by its estimate less than what was asked: it could hardly be met any more, and
    another child is aimed better.
    """
    undecided = [promise for promise in promises if promise.verdict == "undecided"]
    if undecided:
        return not all(promise.is_likely for promise in undecided)
    if give_away(promises):
        return True
    likely = [promise.by_estimate for promise in promises]
    is_far = bool(likely) and all(one.exceeds(LIKELY_AWAY) for one in likely)
    return not (is_far and any(one.is_surprise for one in likely))


def judge(answer: Answer, measurements: Mapping[str, Measurement]) -> list[Promise]:
    """Every constraint of the answer's best solution against what was measured."""
    return [judge_one(c, measurements[c.scenario], answer) for c in answer.constraints]


def judge_one(constraint: Constraint, measurement: Measurement, answer: Answer) -> Promise:
    """One constraint. The weights' size is as predicted, for it is counted."""
    if not constraint.kind.timed:
        size = _size(constraint.name, measurement, answer.best.predicted[constraint.scenario])
        return _promise(constraint, Interval(value=size, low=size, high=size), answer)
    figures = ABSOLUTE if constraint.relative is None else RATIOS
    figure = figures[constraint.name](measurement, constraint.percentile)
    return _promise(constraint, figure, answer)


def _verdict(figure: Interval, wanted: float, at_least: bool) -> Verdict:
    near, far = (figure.low, figure.high) if at_least else (-figure.high, -figure.low)
    wanted = wanted if at_least else -wanted
    if near >= wanted:
        return "met"
    return "missed" if far < wanted else "undecided"


def _promise(constraint: Constraint, figure: Interval | None, answer: Answer) -> Promise:
    """The record; without a figure, of what is predicted."""
    kind, field = constraint.kind, FIGURES[constraint.name]
    predicted, of_parent = (
        float(getattr(figures[constraint.scenario], field))
        for figures in (answer.best.predicted, answer.parent)
    )
    stretch = 1 / constraint.stretch if kind.at_least else constraint.stretch
    predicted, of_parent = stretch * predicted, stretch * of_parent
    wanted = constraint.value if kind.timed else constraint.limit
    form, unit, after = ",.4g", f" {kind.unit}", ""
    if kind.timed and constraint.relative is not None:
        predicted, wanted = predicted / of_parent, constraint.relative
        form, unit, after = ".2f", "x", " the parent's"
    shown = figure or Interval(value=predicted, low=predicted, high=predicted)
    where = "" if constraint.scenario == "main" else f" ({constraint.scenario})"
    return Promise(
        constraint=constraint.name,
        scenario=constraint.scenario,
        asked=f"{constraint.name} {constraint.text}{where}",
        measured=shown.with_unit(form, unit) + after,
        wanted=wanted,
        predicted=predicted,
        margin=answer.margin if kind.timed else 0.0,
        at_least=kind.at_least,
        figure=shown,
        verdict="predicted" if figure is None else _verdict(figure, wanted, kind.at_least),
    )


def predict(answer: Answer) -> list[Promise]:
    """Every constraint with what is predicted, where the child cannot be measured here."""
    return [_promise(constraint, None, answer) for constraint in answer.constraints]


def _size(name: str, measurement: Measurement, predicted: Figures) -> float:
    child = measurement.child
    besides = predicted.memory_bytes - predicted.kv_cache_bytes
    counted = besides + child.kv_cache_bytes
    return {
        "parameters": float(predicted.parameters),
        "kv_cache": float(child.kv_cache_bytes),
        "memory": float(counted if child.memory_bytes is None else child.memory_bytes),
    }[name]
