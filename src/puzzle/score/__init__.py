"""Room of the stage `score`: the parent with one block replaced (paper: section 4.2)."""

from puzzle.artifacts import Inputs
from puzzle.library import LIBRARY
from puzzle.stage import Job, Scope, Stage, Work


def _settings(job: Job) -> Inputs:
    recipe = job.run.recipe
    # The metric is chosen by the search; the others change no score.
    excluded = {"tokens_per_pass", "memory", "metric", "assembled"}
    return {
        "corpus": recipe.corpus.model_dump(mode="json"),
        "score": recipe.score.model_dump(mode="json", exclude=excluded),
    }


def _work() -> Work:
    from puzzle.score.stage import WORK

    return WORK


SCORE = Stage(
    name="score",
    folder="score",
    scope=Scope.RUN,
    summary="Measure the parent's quality with each single block replaced.",
    after=(LIBRARY,),
    settings=_settings,
    packages=("puzzle-nas", "torch", "transformers", "tokenizers", "datasets"),
    work=_work,
)
