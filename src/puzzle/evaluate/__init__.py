"""Room of the stage `evaluate`: parent, child and uptrained child on test text and served."""

from puzzle.artifacts import Inputs
from puzzle.assemble import ASSEMBLE
from puzzle.cost import COST
from puzzle.search import SEARCH
from puzzle.stage import Job, Scope, Stage, Work
from puzzle.uptrain import UPTRAIN


def _settings(job: Job) -> Inputs:
    recipe = job.run.recipe
    return {
        "corpus": recipe.corpus.model_dump(mode="json"),
        # `memory` changes how it is done, not what comes out
        "evaluate": job.child.evaluate.model_dump(mode="json", exclude={"memory"}),
        "task": recipe.score.task,
    }


def _work() -> Work:
    from puzzle.evaluate.stage import WORK

    return WORK


EVALUATE = Stage(
    name="evaluate",
    folder="evaluate",
    scope=Scope.CHILD,
    summary="Parent against child: quality and measured speed.",
    after=(COST, SEARCH, ASSEMBLE, UPTRAIN),
    settings=_settings,
    packages=("puzzle-nas", "torch", "transformers", "tokenizers", "datasets"),
    work=_work,
)
