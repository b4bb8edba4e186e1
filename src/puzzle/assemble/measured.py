"""The measurement of a child beside its parent, and whether it meets what was asked.

`measured.json` is written by `assemble`; `evaluate` measures the finished child the same way.
"""

from pathlib import Path

from puzzle.artifacts import Record
from puzzle.assemble import ASSEMBLE
from puzzle.cost.scenarios import served
from puzzle.cost.table import are_from_elsewhere
from puzzle.engines.turns import WARM_UPS, Measurement, Served, measure_pair
from puzzle.search import answers, promise
from puzzle.search.constraints import KINDS
from puzzle.search.promise import Promise
from puzzle.stage import Job

MEASURED = "measured.json"


class MeasuredScenario(Record):
    """One scenario: what was measured, and predicted over measured speed-up minus 1."""

    measurement: Measurement
    prediction_error: float


class Measured(Record):
    """What serving a child has shown; no scenarios where its place is on another machine."""

    scenarios: dict[str, MeasuredScenario]
    promises: list[Promise]

    @property
    def met(self) -> bool:
        """Whether no constraint is missed, as far as it was measured."""
        return all(promise.met is not False for promise in self.promises)

    @property
    def can_be_corrected(self) -> bool:
        """Whether another search would aim differently: only seconds are corrected."""
        missed = [promise for promise in self.promises if promise.met is False]
        return any(KINDS[promise.constraint].timed for promise in missed)

    @property
    def misses(self) -> str:
        """In words, what is not met."""
        return "; ".join(
            f"asked {promise.asked}, measured {promise.measured}"
            for promise in self.promises
            if promise.met is False
        )


def measure(job: Job, folder: Path, pairs: int) -> Measured:
    """Serve the checkpoint in `folder` beside the parent in every scenario and judge the promise.

    `main` is served at the batch size that the search chose, the parent at its own.
    """
    cost, answer = job.place.cost, answers.read(job)
    if are_from_elsewhere(job):
        return Measured(scenarios={}, promises=promise.predict(answer))
    main = cost.scenario.model_copy(update={"batch_size": answer.batch_size})
    pairs_of = {"main": (cost.scenario, main)}
    pairs_of |= {name: (scenario, scenario) for name, scenario in cost.scenarios.items()}
    job.run.release_models()
    measurements = {}
    progress = job.run.progress
    for name, scenarios in pairs_of.items():
        parent = Served(job.run.parent.folder, served(job, scenarios[0]))
        child = Served(folder, served(job, scenarios[1]))
        title = f"parent against child on {job.engine.name} ({child.scenario})"
        with job.measuring(), progress.task(title, pairs + WARM_UPS, "pairs") as task:
            measurements[name] = measure_pair(job.engine, parent, child, pairs, task.advance)
    return Measured(
        scenarios={
            name: MeasuredScenario(
                measurement=measurement,
                prediction_error=answer.predicted_speedup(name) / measurement.speedup - 1,
            )
            for name, measurement in measurements.items()
        },
        promises=promise.judge(answer, measurements),
    )


def describe(measured: Measured) -> list[str]:
    """What to say of a measurement, a line each."""
    told = []
    for name, scenario in measured.scenarios.items():
        speedup, error = scenario.measurement.speedup, scenario.prediction_error
        told.append(
            f"{name}: measured {speedup:.2f}x, predicted {speedup * (1 + error):.2f}x "
            f"({error * 100:+.1f} %)"
        )
    for judged in measured.promises:
        told.append(judged.in_words)
    return told


def read(job: Job) -> Measured:
    """What the assembled child has shown."""
    return Measured.read(job.folder(ASSEMBLE) / MEASURED)


def record(job: Job, source: str, measured: Measured) -> None:
    """Append a measurement to the child's record; a miss corrects its next search.

    `source` is the fingerprint of the stage that measured.
    """
    if not measured.scenarios:
        return
    speedups = {name: s.measurement.speedup for name, s in measured.scenarios.items()}
    promise.record(job, source, speedups, measured.promises)


def missed(job: Job, attempts: int) -> str:
    """The message of a child that misses after so many attempts."""
    hint = "ask for less, or raise search.margin or search.attempts"
    if job.child.search.architecture is not None:
        hint = "ask for less of this architecture"
    elif not read(job).can_be_corrected:
        hint = "ask for less: sizes are as the engine allocates them"
    times = "1 attempt" if attempts == 1 else f"{attempts} attempts"
    return f"search: after {times} the measured child still misses: {read(job).misses}; {hint}"
