"""One process of several: `torchrun ... -m puzzle.worker RECIPE [--out RUN] [--child NAME]`.

The processes share one run, on one machine or on several with a common folder: process 0 does what
`puzzle run` does (with --child, what is left to do for that child), and all of them work on the
stages that can be shared. RECIPE may be the directory of a run that was begun. Exit codes as in
cli.py.
"""

import argparse
import contextlib
import faulthandler
import os
import sys
import traceback
from pathlib import Path

from puzzle import pipeline
from puzzle.commands.options import read_recipe
from puzzle.config import expanded
from puzzle.device import keep_freed_memory
from puzzle.errors import UserError, mendable
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.stage import Job
from puzzle.training import launch, sharding


def main() -> None:
    """Join the group, work together, leave with an exit code."""
    parser = argparse.ArgumentParser(prog="puzzle.worker", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--order", help=argparse.SUPPRESS)  # of `puzzle`, which started this
    arguments = parser.parse_args()
    faulthandler.enable()  # a signal that ends this process leaves a stack in its log
    if launch.LAUNCHED in os.environ and os.environ.get("RANK") == "0":
        sys.stderr = sys.stdout  # torchrun's own log goes to a file; people see process 0
    keep_freed_memory()
    try:
        with launch.group() as rates:
            progress = Progress(arguments.quiet or sharding.rank() > 0)
            progress.slow = rates.slow
            if arguments.order is not None:
                follow(launch.Order.parse(arguments.order, "order"), progress)
            elif sharding.rank() == 0:
                lead(arguments, progress)
            else:
                for order in launch.orders():
                    follow(order, progress)
    except Exception as error:
        refusal = mendable(error) if isinstance(error, OSError) else error
        if isinstance(refusal, UserError):
            print(f"puzzle: {' '.join(str(refusal).split())}", file=sys.__stderr__)
            sharding.leave(refusal.exit_code)
        traceback.print_exc(file=sys.__stderr__)
        sharding.leave(1)  # at once: the others wait in a collective operation
    sharding.leave(0)


def lead(arguments: argparse.Namespace, progress: Progress) -> None:
    """The whole run, or one child of it; the others join where they can."""
    if (expanded(Path(arguments.recipe)) / "run.yaml").is_file():
        run = Run.open(Path(arguments.recipe), progress)
    else:
        recipe = read_recipe(arguments.recipe, arguments.out, [])
        run = Run(recipe, Path(recipe.out), progress)
    with contextlib.closing(run.metrics):
        if arguments.child is None:
            pipeline.execute(run)
        else:
            pipeline.make_child(run.child_job(arguments.child))
    launch.dismiss()


def follow(order: launch.Order, progress: Progress) -> None:
    """Work on one stage, which process 0 or the command that started this opens and closes."""
    run = Run.open(Path(order.run), progress, corpus_folder=Path(order.corpus))
    job = Job(run) if order.child is None else run.child_job(order.child)
    stage = next(stage for stage in pipeline.STAGES if stage.name == order.stage)
    with contextlib.closing(run.metrics):
        stage.work().execute(job, job.folder(stage))


if __name__ == "__main__":
    main()
