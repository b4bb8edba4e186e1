"""Room of the stage `assemble`: the chosen blocks as a checkpoint, measured beside the parent."""

from puzzle.artifacts import Inputs
from puzzle.library import LIBRARY
from puzzle.search import SEARCH
from puzzle.stage import Job, Scope, Stage, Work


def _settings(job: Job) -> Inputs:
    return {}


def _work() -> Work:
    from puzzle.assemble.stage import WORK

    return WORK


ASSEMBLE = Stage(
    name="assemble",
    folder="child",
    scope=Scope.CHILD,
    summary="Put the chosen blocks together and measure the child.",
    after=(LIBRARY, SEARCH),
    settings=_settings,
    packages=("puzzle-nas", "torch", "transformers"),
    work=_work,
)
