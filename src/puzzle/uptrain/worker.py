"""One process of several: `torchrun ... -m puzzle.uptrain.worker RUN [--child NAME]`.

Exit codes as in cli.py.
"""

import argparse
import contextlib
import faulthandler
import os
import sys
import traceback
from pathlib import Path

from torch import distributed

from puzzle import artifacts, locks
from puzzle.device import keep_freed_memory
from puzzle.errors import UserError
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.training import sharding
from puzzle.uptrain import UPTRAIN, launch, stage


def main() -> None:
    """Join the group, distil the child together, leave with an exit code."""
    parser = argparse.ArgumentParser(prog="puzzle.uptrain.worker", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--child", default="main")
    parser.add_argument("--quiet", action="store_true")
    arguments = parser.parse_args()
    faulthandler.enable()  # a signal that ends this process leaves a stack in its log
    launched = launch.LAUNCHED in os.environ
    if launched and os.environ.get("RANK") == "0":
        sys.stderr = sys.stdout  # torchrun's own log goes to a file; people see process 0
    keep_freed_memory()
    try:
        with launch.group():
            progress = Progress(arguments.quiet or sharding.rank() > 0)
            run = Run.open(arguments.run, progress)
            with contextlib.closing(run.metrics):
                work(run, arguments.child, launched)
    except UserError as error:
        print(f"puzzle: {' '.join(str(error).split())}", file=sys.stderr)
        sharding.leave(error.exit_code)
    except Exception:
        traceback.print_exc(file=sys.__stderr__)
        sharding.leave(1)  # at once: the others wait in a collective operation
    sharding.leave(0)


def work(run: Run, child: str, launched: bool) -> None:
    """Distil; where `launched` by `puzzle uptrain`, that command opens and closes the stage."""
    job = run.child_job(child)
    stage.check(job, sharding.size())
    if job.child.uptrain.lora_rank:
        raise UserError(
            "uptrain.lora_rank: is for one process; use `puzzle uptrain RUN`, or lora_rank: 0"
        )
    folder, first = job.folder(UPTRAIN), sharding.rank() == 0
    if launched:
        stage.distil(job, folder)
        return
    with contextlib.ExitStack() as held:
        finished = [False]
        if first:
            held.enter_context(locks.hold(folder, wait=run.wait, say=run.progress.say))
            inputs = UPTRAIN.inputs(job)
            finished = [artifacts.is_done(folder, inputs)]
            if not finished[0]:
                artifacts.begin(folder, inputs)
                _ = run.corpus
        distributed.broadcast_object_list(finished)
        if not finished[0]:
            stage.distil(job, folder)
        if first:
            from puzzle import pipeline

            pipeline.execute_stage(UPTRAIN, job)  # finds the weights there and closes the stage


if __name__ == "__main__":
    main()
