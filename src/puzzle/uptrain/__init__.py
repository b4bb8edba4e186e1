"""Room of the stage `uptrain`: global knowledge distillation (paper: section 4.3)."""

from puzzle.artifacts import Inputs
from puzzle.assemble import ASSEMBLE
from puzzle.stage import Job, Scope, Stage, Work

# What these settings change is how the work is done, not what comes out.
SAME_RESULT = {
    "wandb",
    "micro_batch_sequences",
    "activation_checkpointing",
    "optimizer_memory",
    "checkpoint_minutes",
    "checkpoint_steps",
}


def _settings(job: Job) -> Inputs:
    return {
        "corpus": job.run.recipe.corpus.model_dump(mode="json"),
        "uptrain": job.child.uptrain.model_dump(mode="json", exclude=SAME_RESULT),
    }


def _work() -> Work:
    from puzzle.uptrain.stage import WORK

    return WORK


UPTRAIN = Stage(
    name="uptrain",
    folder="uptrained",
    scope=Scope.CHILD,
    summary="Global knowledge distillation of the child.",
    after=(ASSEMBLE,),
    settings=_settings,
    packages=("puzzle-nas", "torch", "transformers", "tokenizers", "datasets"),
    work=_work,
)
