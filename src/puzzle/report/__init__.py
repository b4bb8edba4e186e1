"""Room of the stage `report`: the page, the model card, the table that a run ends with."""

from puzzle.artifacts import Inputs
from puzzle.evaluate import EVALUATE
from puzzle.library import LIBRARY
from puzzle.score import SCORE
from puzzle.search import SEARCH
from puzzle.stage import Job, Scope, Stage, Work
from puzzle.uptrain import UPTRAIN


def _settings(job: Job) -> Inputs:
    return {}


def _work() -> Work:
    from puzzle.report.stage import WORK

    return WORK


REPORT = Stage(
    name="report",
    folder="report",
    scope=Scope.CHILD,
    summary="Write report/index.html and the model card.",
    after=(LIBRARY, SCORE, SEARCH, UPTRAIN, EVALUATE),
    settings=_settings,
    packages=("puzzle-nas",),
    work=_work,
)
