"""The measurement of a child beside its parent, and whether it meets what was asked.

`measured.json` is written by `assemble`; `evaluate` measures the finished child the same way.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from puzzle.artifacts import Record
from puzzle.assemble import ASSEMBLE
from puzzle.cost.scenarios import served
from puzzle.cost.table import are_from_elsewhere
from puzzle.engines.turns import LOOKS, Measurement, Served, measure_pair
from puzzle.progress import Task
from puzzle.search import answers, promise, tried
from puzzle.search.answers import Answer
from puzzle.search.constraints import KINDS, asked_in_words
from puzzle.search.promise import Promise, Verdict
from puzzle.stage import Job

MEASURED = "measured.json"
BUSY = 0.25  # share of disturbed turns from which on a machine is called busy


class MeasuredScenario(Record):
    """One scenario: what was measured, and predicted over measured speed-up minus 1."""

    measurement: Measurement
    prediction_error: float


class Measured(Record):
    """What serving a child has shown; no scenarios where its place is on another machine."""

    scenarios: dict[str, MeasuredScenario]
    promises: list[Promise]
    known_before: bool = False  # the same architecture was served earlier, and not again

    @property
    def verdict(self) -> Verdict:
        """Of all that was asked together."""
        return promise.overall(self.promises)

    @property
    def failed(self) -> list[Promise]:
        """The constraints that are missed or undecided."""
        return [one for one in self.promises if one.verdict in ("missed", "undecided")]

    @property
    def gives_away(self) -> bool:
        """Whether every constraint is met by more than 2 %: quality that nobody asked to give."""
        return promise.give_away(self.promises)

    @property
    def is_likely(self) -> bool:
        """Undecided, but by its estimates what was asked."""
        return self.verdict == "undecided" and all(one.is_likely for one in self.failed)

    def uncertainty(self, starts: int) -> float:
        """Of the widest interval, as it would be after so many starts; see `Promise.uncertainty`.

        The search aims beyond it, and the next child is looked at as often as it takes.
        """
        shown = max((one.uncertainty for one in self.promises), default=0.0)
        taken = min((one.measurement.starts for one in self.scenarios.values()), default=starts)
        return shown * math.sqrt(min(1.0, taken / starts))

    @property
    def can_be_corrected(self) -> bool:
        """Whether another search would aim differently: seconds and memory are corrected."""
        kinds = [KINDS[promise.constraint] for promise in self.failed]
        return not kinds or any(kind.timed or kind is KINDS["memory"] for kind in kinds)

    @property
    def failures(self) -> str:
        """In words, what is not met."""
        return "; ".join(promise.in_words for promise in self.failed)


def known(job: Job) -> Mapping[str, Measurement] | None:
    """What serving the answer's architecture has shown, where the answer is an earlier try."""
    final = answers.read(job).final
    earlier = None if final is None else tried.measured_before(job, final)
    return None if earlier is None else earlier.measurements


def measure(
    job: Job,
    folder: Path,
    known: Mapping[str, Measurement] | None = None,
    *,
    settles: bool = False,
) -> Measured:
    """Serve the checkpoint in `folder` beside the parent in every scenario and judge the promise.

    `main` is served at the batch size that the search chose, the parent at the one where it is
    fastest. Where the architecture's measurements are `known`, nothing is served. A measurement
    that `settles` whether this child goes on or another is tried is looked at again where the child
    is likely, but not surely, more than was asked; and not where it is likely less.
    """
    answer = answers.read(job)
    if are_from_elsewhere(job):
        return Measured(scenarios={}, promises=promise.predict(answer))
    measurements = known or _serve(job, folder, answer, settles)
    return Measured(
        scenarios={
            name: MeasuredScenario(
                measurement=measurement,
                prediction_error=answer.predicted_speedup(name) / measurement.speedup.value - 1,
            )
            for name, measurement in measurements.items()
        },
        promises=promise.judge(answer, measurements),
        known_before=known is not None,
    )


def _serve(job: Job, folder: Path, answer: Answer, settles: bool) -> dict[str, Measurement]:
    cost, progress = job.place.cost, job.run.progress
    sizes = (answer.parent_batch_size, answer.batch_size)
    main = [cost.scenario.model_copy(update={"batch_size": size}) for size in sizes]
    pairs = {"main": main} | {name: [one, one] for name, one in cost.scenarios.items()}
    job.run.release_models()
    measurements = {}
    for name, scenarios in pairs.items():
        parent, child = (
            Served(at, served(job, scenario), figures[name].kv_cache_bytes)
            for at, scenario, figures in zip(
                (job.run.parent.folder, folder),
                scenarios,
                (answer.parent, answer.best.predicted),
                strict=True,
            )
        )
        title = f"parent against child on {job.engine.name} ({child.scenario})"
        with job.measuring(), progress.task(title, cost.starts, "starts") as task:
            decided = _decides(answer, name, settles)

            def started(task: Task = task) -> None:
                if task.done >= task.total:  # nothing is decided yet: another look
                    task.extend(cost.starts)
                task.advance()

            measurements[name] = measure_pair(
                job.engine, parent, child, cost.starts, decided, started
            )
    return measurements


def _decides(answer: Answer, scenario: str, settles: bool) -> Callable[[Measurement], bool]:
    """Whether a measurement says of everything that was asked in a scenario: met or missed."""
    asked = [one for one in answer.constraints if one.scenario == scenario]

    def decided(measurement: Measurement) -> bool:
        judged = [promise.judge_one(one, measurement, answer) for one in asked]
        if settles:
            return promise.is_settled(judged)
        return all(one.verdict != "undecided" for one in judged)

    return decided


def describe(measured: Measured) -> list[str]:
    """What to say of a measurement, a line each."""
    told = []
    for name, scenario in measured.scenarios.items():
        measurement, error = scenario.measurement, scenario.prediction_error
        speedup = measurement.speedup
        told.append(
            f"{name}: measured {speedup.with_unit('.2f', 'x')}, predicted "
            f"{speedup.value * (1 + error):.2f}x ({error * 100:+.1f} %); {how(measurement)}"
        )
    told += [judged.in_words for judged in measured.promises]
    return told


def compare(first: Measured, last: Measured) -> list[str]:
    """What to say of two measurements of one architecture: they should agree in their intervals."""
    told = describe(last)
    for name in first.scenarios.keys() & last.scenarios.keys():
        before, now = (m.scenarios[name].measurement.speedup for m in (first, last))
        if before.high < now.low or now.high < before.low:
            told.append(
                f"{name}: the child was {before.with_unit('.2f', 'x')} when it was assembled: the "
                "machine was too busy for one of the two measurements"
            )
    return told


def how(measurement: Measurement) -> str:
    """How it was measured: `72 turns in 3 starts`, and what stood in the way."""
    starts = "1 start" if measurement.starts == 1 else f"{measurement.starts} starts"
    words = f"{measurement.turns} turns in {starts}"
    if not measurement.in_turn:
        words += ", one after the other, since both do not fit on the device together"
    if measurement.disturbed >= BUSY:
        words += f"; the machine was busy: {measurement.disturbed:.0%} of the turns were slowed"
    return words


def read(job: Job) -> Measured:
    """What the assembled child has shown."""
    return Measured.read(job.folder(ASSEMBLE) / MEASURED)


def record(job: Job, source: str, measured: Measured) -> None:
    """Append a measurement to the child's record, by which its next search is corrected.

    `source` is the fingerprint of the stage that measured.
    """
    if not measured.scenarios or measured.known_before:
        return
    cost, answer = job.place.cost, answers.read(job)
    tables, parent_tables = (
        {name: name for name in measured.scenarios} | {"main": cost.table_of(size)}
        for size in (answer.batch_size, answer.parent_batch_size)
    )
    tried.record_measured(
        job,
        tried.MeasuredChild(
            source=source,
            costs=tried.costs_fingerprint(job),
            wish=tried.wish(job),
            asked=asked_in_words(job.child.search, ["main", *cost.scenarios]),
            blocks=answer.best.blocks,
            objective=answer.best.rank,
            tables=tables,
            parent_tables=parent_tables,
            measurements={name: s.measurement for name, s in measured.scenarios.items()},
            verdict=measured.verdict,
            gives_away=measured.gives_away,
            is_likely=measured.is_likely,
            uncertainty=measured.uncertainty(LOOKS * cost.starts),
        ),
    )


def missed(job: Job, attempts: int) -> str:
    """The message of a child that does not meet what was asked after so many attempts."""
    measured = read(job)
    hint = "ask for less, or raise search.margin or search.attempts"
    if job.child.search.architecture is not None:
        hint = "ask for less of this architecture"
    elif not measured.can_be_corrected:
        hint = "ask for less: sizes are as the engine allocates them"
    elif measured.verdict == "undecided":
        hint = "the same command tries further ones; a larger cost.starts narrows the intervals"
    times = "1 attempt" if attempts == 1 else f"{attempts} attempts"
    return f"search: after {times} the child does not meet its wish: {measured.failures}; {hint}"
