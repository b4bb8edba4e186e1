"""Room of the stage `search`: one block per layer within the constraints (paper: section 4.1)."""

from puzzle.artifacts import Inputs
from puzzle.cost import COST
from puzzle.score import SCORE
from puzzle.stage import Job, Scope, Stage, Work


def _settings(job: Job) -> Inputs:
    from puzzle.search import promise

    score, child = job.run.recipe.score, job.child
    misses = [] if child.search.architecture is not None else promise.misses(job)
    return {
        "misses": [miss.as_json() for miss in misses],
        "search": child.search.model_dump(mode="json"),
        "metric": score.metric,
        "granularity": score.granularity,
        "batch_sizes": list(job.place.cost.batch_sizes),
        "place": child.place,
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
    work=_work,
)
