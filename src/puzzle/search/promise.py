"""The promise: every constraint judged against what serving the child has shown.

Relative speeds are judged by the ratio of the pairs, absolute ones by the child's own median.
Parameters are counted; the KV cache is what the engine allocated. A miss becomes a correction of
this child's predictions, which its next search takes into account.
"""

from collections.abc import Mapping, Sequence

from puzzle import artifacts
from puzzle.artifacts import Record
from puzzle.cost import COST
from puzzle.engines.turns import Measurement
from puzzle.search import answers
from puzzle.search.answers import Answer, Figures
from puzzle.search.constraints import Constraint
from puzzle.stage import Job

MEASURED = "measured.jsonl"  # in the child's folder
FIGURES = {  # the field of `Figures` that a constraint limits
    "throughput": "throughput_tok_per_s",
    "latency": "latency_s",
    "time_to_first_token": "time_to_first_token_s",
    "memory": "memory_bytes",
    "parameters": "parameters",
    "kv_cache": "kv_cache_bytes",
}
REPEATED_MISS = 1.02  # a further factor where the same architecture misses again


class Promise(Record):
    """One constraint and what was measured."""

    constraint: str
    scenario: str
    asked: str  # in words, as `measured` is
    measured: str
    value: float
    met: bool | None  # None: predicted, not measured yet
    slower_than_predicted: float  # the factor by which the prediction was too optimistic

    @property
    def in_words(self) -> str:
        """`asked throughput 2x, measured 2.05x the parent's: met`."""
        if self.met is None:
            return f"asked {self.asked}, predicted {self.measured}: not measured yet"
        return f"asked {self.asked}, measured {self.measured}: {'met' if self.met else 'missed'}"


class MeasuredChild(Record):
    """One line of `measured.jsonl`: an architecture that was served, and the promise."""

    source: str  # fingerprint of the stage that measured it
    costs: str  # fingerprint of the costs that it was predicted from
    blocks: list[str]
    speedups: dict[str, float]  # by scenario
    met: bool
    time_factor: float  # by which this child's predicted seconds are to be corrected


def judge(answer: Answer, measurements: Mapping[str, Measurement]) -> list[Promise]:
    """Every constraint of the answer's best solution against what was measured."""
    predicted = answer.best.predicted
    return [
        _judge(
            constraint,
            measurements[constraint.scenario],
            predicted[constraint.scenario],
            answer.parent[constraint.scenario],
        )
        for constraint in answer.constraints
    ]


def _judge(
    constraint: Constraint, measurement: Measurement, predicted: Figures, parent: Figures
) -> Promise:
    kind, relative = constraint.kind, constraint.relative
    if kind.timed:
        value = _measured_time(constraint, measurement)
        wanted = constraint.value if relative is None else relative
        expected = _predicted_time(constraint, predicted, parent)
        met = value >= wanted if kind.at_least else value <= wanted
        slower = expected / value if kind.at_least else value / expected
    else:
        value = _measured_size(constraint.name, measurement, predicted)
        met, slower = value <= constraint.limit, 1.0
    shown = f"{value:,.4g} {kind.unit}"
    if kind.timed and relative is not None:
        shown = f"{value:.2f}x the parent's"
    return _promise(constraint, shown, value, met, slower)


def _promise(
    constraint: Constraint, shown: str, value: float, met: bool | None, slower: float = 1.0
) -> Promise:
    where = "" if constraint.scenario == "main" else f" ({constraint.scenario})"
    return Promise(
        constraint=constraint.name,
        scenario=constraint.scenario,
        asked=f"{constraint.name} {constraint.text}{where}",
        measured=shown,
        value=value,
        met=met,
        slower_than_predicted=slower,
    )


def predict(answer: Answer) -> list[Promise]:
    """Every constraint with what is predicted, where the child cannot be measured here."""
    promises = []
    for constraint in answer.constraints:
        predicted = answer.best.predicted[constraint.scenario]
        value = float(getattr(predicted, FIGURES[constraint.name]))
        shown = f"{value:,.4g} {constraint.kind.unit}"
        if constraint.kind.timed and constraint.relative is not None:
            value = _predicted_time(constraint, predicted, answer.parent[constraint.scenario])
            shown = f"{value:.2f}x the parent's"
        promises.append(_promise(constraint, shown, value, None))
    return promises


def _measured_time(constraint: Constraint, measurement: Measurement) -> float:
    """A speed or latency: over the parent's where it was asked relative to the parent."""
    if constraint.relative is not None:
        return {
            "throughput": measurement.speedup,
            "latency": measurement.latency_ratio,
            "time_to_first_token": measurement.time_to_first_token_ratio,
        }[constraint.name]
    return {
        "throughput": measurement.child.throughput_tok_per_s,
        "latency": measurement.child.latency_s,
        "time_to_first_token": measurement.child.time_to_first_token_s,
    }[constraint.name]


def _predicted_time(constraint: Constraint, predicted: Figures, parent: Figures) -> float:
    def value(figures: Figures) -> float:
        return float(getattr(figures, FIGURES[constraint.name]))

    if constraint.relative is None:
        return value(predicted)
    return value(predicted) / value(parent)


def _measured_size(name: str, measurement: Measurement, predicted: Figures) -> float:
    cache = measurement.child.kv_cache_bytes
    weights = predicted.memory_bytes - predicted.kv_cache_bytes
    return {
        "parameters": float(predicted.parameters),
        "kv_cache": float(cache),
        "memory": float(weights + cache),
    }[name]


# -------------------------------------------------------------------------------------- corrections


def read_measured(job: Job) -> list[MeasuredChild]:
    """What serving earlier architectures of this child has shown."""
    return artifacts.read_records(job.child.folder / MEASURED, MeasuredChild)


def misses(job: Job) -> list[MeasuredChild]:
    """The architectures that were tried for this child and missed: they correct its searches.

    Those that were predicted from other costs than the present ones do not count.
    """
    costs = _costs_fingerprint(job)
    return [m for m in read_measured(job) if not m.met and m.costs == costs]


def _costs_fingerprint(job: Job) -> str:
    manifest = artifacts.read_manifest(job.folder(COST))
    return "" if manifest is None else manifest.fingerprint


def time_factor(job: Job) -> float:
    """By how much predicted seconds are corrected: the largest miss so far."""
    return max([1.0, *(miss.time_factor for miss in misses(job))])


def record(job: Job, source: str, speedups: dict[str, float], promises: Sequence[Promise]) -> None:
    """Append what a stage has measured to the child's record, once.

    `source` is the fingerprint of that stage, by which a repeated call is recognised.
    """
    if any(measured.source == source for measured in read_measured(job)):
        return
    blocks = answers.read(job).best.blocks
    missed = [promise.slower_than_predicted for promise in promises if promise.met is False]
    factor = max([time_factor(job), *missed])
    if missed and any(miss.blocks == blocks for miss in misses(job)):
        factor *= REPEATED_MISS
    measured = MeasuredChild(
        source=source,
        costs=_costs_fingerprint(job),
        blocks=blocks,
        speedups=speedups,
        met=not missed,
        time_factor=factor,
    )
    artifacts.append_record(job.child.folder / MEASURED, measured)
