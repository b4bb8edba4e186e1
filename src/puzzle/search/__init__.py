"""Room of the stage `search`: one block per layer within the constraints (paper: section 4.1)."""

from pydantic import JsonValue

from puzzle.artifacts import Inputs
from puzzle.cost import COST
from puzzle.score import SCORE
from puzzle.stage import Job, Scope, Stage, Work


def _settings(job: Job) -> Inputs:
    from puzzle.search import finalists, tried

    score, child = job.run.recipe.score, job.child
    return {
        "search": child.search.model_dump(mode="json"),
        "metric": score.metric,
        "granularity": score.granularity,
        "batch_sizes": list(job.place.cost.batch_sizes),
        "place": child.place,
        "capacity": finalists.capacity(job),
        "served": list[JsonValue](tried.corrections(job)),
    }


def _work() -> Work:
    from puzzle.search.stage import WORK

    return WORK


SEARCH = Stage(
    name="search",
    folder="search",
    scope=Scope.CHILD,
    summary="Choose one block per layer within the constraints.",
    after=(SCORE, COST),
    settings=_settings,
    packages=("puzzle-nas", "highspy", "torch", "transformers"),
    work=_work,
)
