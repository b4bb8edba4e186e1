"""Room of the stage `library`: every variant of every layer, trained by BLD (paper: section 3)."""

from pydantic import JsonValue

from puzzle.artifacts import Inputs
from puzzle.stage import Job, Scope, Stage, Work


def _settings(job: Job) -> Inputs:
    recipe = job.run.recipe
    deploys: list[JsonValue] = []
    deploys += sorted({",".join(place.deploy) for place in recipe.all_places().values()})
    return {
        "corpus": recipe.corpus.model_dump(mode="json"),
        # `memory` changes how BLD is done, not what comes out
        "library": recipe.library.model_dump(mode="json", exclude={"memory"}),
        "deploy": deploys,
    }


def _work() -> Work:
    from puzzle.library.stage import WORK

    return WORK


LIBRARY = Stage(
    name="library",
    folder="library",
    scope=Scope.RUN,
    summary="Train every subblock variant by blockwise local distillation.",
    after=(),
    settings=_settings,
    packages=("puzzle-nas", "torch", "transformers", "tokenizers", "datasets"),
    work=_work,
    repairs=True,
)
