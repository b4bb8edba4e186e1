"""Room of the stage `cost`: what every variant takes at a place (paper: section 4.1)."""

from puzzle.artifacts import Inputs
from puzzle.stage import Job, Scope, Stage, Work


def _settings(job: Job) -> Inputs:
    cost = job.place.cost
    return {
        "engine": cost.engine,
        "device_sheet": cost.device_sheet,
        "scenarios": {name: s.model_dump(mode="json") for name, s in cost.measured.items()},
        "precision": cost.precision,
        "seconds": cost.seconds,
        "table": cost.table,
        "deploy": list(job.place.deploy),
    }


def _work() -> Work:
    from puzzle.cost.stage import WORK

    return WORK


COST = Stage(
    name="cost",
    folder="cost",
    scope=Scope.PLACE,
    summary="Measure what every variant takes on the serving engine.",
    after=(),
    settings=_settings,
    packages=("puzzle-nas",),
    work=_work,
)
