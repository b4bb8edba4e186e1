"""Several processes that share a stage's work, started with torchrun, one log for each.

    puzzle run RECIPE                                 starts them itself, on one machine
    torchrun --nnodes 2 ... -m puzzle.worker RECIPE   on several that share the run directory

On one machine a command starts a group for every stage that can be shared, and waits. Under
torchrun there is one group for the whole run: process 0 leads through the pipeline, and the others
are told which stage to join. If a process dies, torchrun ends the others; if the command that
started them dies, the kernel ends them all (Linux).
"""

import contextlib
import ctypes
import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch._C._distributed_c10d import TCPStore

from puzzle.artifacts import Record
from puzzle.errors import UserError
from puzzle.run import Run
from puzzle.stage import Job, Stage
from puzzle.training import sharding
from puzzle.training.pulse import Pulse, Rates

LAUNCHED = "PUZZLE_LAUNCHED"  # set for processes that a command of ours has started
LOOK_EVERY_S = 0.2  # for the next order
# For tensors of a process that lives, and computes or writes; whether it lives: pulse.py.
LONGEST_WAIT = timedelta(days=7)


def processes(run: Run) -> int:
    """How many share a stage: those of the group, or as the recipe says.

    By default one for each GPU of this machine, one on a CPU. Raises `UserError` for more than
    there are GPUs.
    """
    asked, device = run.recipe.processes, run.device
    if sharding.size() > 1:
        return sharding.size()
    if asked == "auto":
        return device.memory.devices if device.torch_device == torch.device("cuda") else 1
    if device.type == "cuda" and asked > device.memory.devices:
        raise UserError(
            f"processes: got {asked}, but this machine has {device.memory.devices} GPUs"
        )
    return asked


def processes_beside(run: Run) -> int:
    """How many of them share this machine and its memory."""
    count = -(-processes(run) // run.device.memory.machines)  # several only where it is planned for
    return min(count, int(os.environ.get("LOCAL_WORLD_SIZE", count)))


class Order(Record):
    """A stage that a group works on, as its processes are told."""

    stage: str
    run: str
    corpus: str
    child: str | None

    @classmethod
    def of(cls, stage: Stage, job: Job) -> "Order":
        """To work on this job."""
        run, child = job.run, None if job.wish is None else job.wish.name
        return cls(
            stage=stage.name, run=str(run.folder), corpus=str(run.corpus_folder), child=child
        )


def execute(stage: Stage, job: Job, folder: Path) -> None:
    """The work of a stage: by this process, the group that it leads, or one that it starts."""
    work = stage.work()
    if not work.is_shared(job) or processes(job.run) == 1:
        work.execute(job, folder)
    else:
        _ = job.run.corpus  # built once, here
        order = Order.of(stage, job)
        if sharding.size() > 1:
            _orders().give(order.model_dump_json())
            work.execute(job, folder)
        else:
            job.run.release_models()
            _start(order, job)
    if work.finish is not None:
        work.finish(job, folder)


# ------------------------------------------------------------------------- in one of the processes


@contextlib.contextmanager
def group() -> Iterator[Rates]:
    """Join the processes that torchrun has started; gives what tells which of them are slow."""
    if "RANK" not in os.environ:
        raise UserError("puzzle.worker: start it with `puzzle run RECIPE`, or through torchrun")
    end_with_parent_process()
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=LONGEST_WAIT)
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(*place, is_master=False)  # not in turn with waits for tensors
    pulse = Pulse(store, sharding.rank(), sharding.size(), _leave_the_dead)
    pulse.start()
    try:
        yield Rates(store, sharding.rank(), sharding.size())
        sharding.barrier()
    finally:
        pulse.stop()
        distributed.destroy_process_group()


def _leave_the_dead(what: str) -> None:
    print(f"puzzle: {what}", file=sys.__stderr__)
    sharding.leave(1)


class _Orders:
    """What process 0 tells the others, in the store that the group has met in."""

    def __init__(self) -> None:
        self.store = distributed.distributed_c10d._get_default_store()
        self.count = 0

    def give(self, text: str) -> None:
        """Tell all others."""
        self.store.set(f"puzzle/{self.count}", text)
        self.count += 1

    def take(self) -> str:
        """The next one, waited for however long process 0 works alone."""
        key = f"puzzle/{self.count}"
        while not self.store.check([key]):
            time.sleep(LOOK_EVERY_S)
        self.count += 1
        text: str = self.store.get(key).decode()
        return text


@functools.cache
def _orders() -> _Orders:
    return _Orders()


def dismiss() -> None:
    """Tell the others that there is nothing more to do."""
    _orders().give("")


def orders() -> Iterator[Order]:
    """What process 0 orders, until it dismisses this one."""
    while text := _orders().take():
        yield Order.parse(text, "order")


def end_with_parent_process() -> None:
    """Ask the kernel to kill this process when the one that started it is gone."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


# ---------------------------------------------------------------------- in the one that starts them


def _start(order: Order, job: Job) -> None:
    """Start a group for one stage and wait. Raises `UserError` where one of its processes dies."""
    run, count = job.run, processes(job.run)
    name = order.stage if order.child is None else f"{order.stage}-{order.child}"
    logs = run.folder / "logs" / name
    run.progress.say(f"  {count} processes; logs in {logs}")
    arguments = [order.run, "--order", order.model_dump_json()]
    arguments += ["--quiet"] if run.progress.quiet else []
    if failure := launch("puzzle.worker", arguments, count, logs):
        raise UserError(f"{order.stage}: {failure}")


def launch(module: str, arguments: list[str], count: int, logs: Path) -> str:
    """Run `python -m MODULE ARGUMENTS` in `count` processes and wait.

    What process 0 prints is shown; everything else goes to files in `logs`. Returns what went
    wrong, in words; empty if nothing.
    """
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // count)
    environment = {"OMP_NUM_THREADS": str(threads)} | dict(os.environ) | {LAUNCHED: "1"}
    redirects = ",".join(f"{index}:{3 if index else 2}" for index in range(count))
    command = [sys.executable, "-m", "puzzle.training.launch", "--standalone"]
    command += ["--nproc-per-node", str(count), "--local-ranks-filter", "0"]
    command += ["--log-dir", str(logs), "--redirects", redirects, "-m", module, *arguments]
    with (logs / "torchrun.log").open("w") as log:
        torchrun = subprocess.Popen(command, env=environment, stdout=sys.__stderr__, stderr=log)
        try:
            code = torchrun.wait()
        finally:
            if torchrun.poll() is None:  # interrupted: torchrun ends its processes, then itself
                torchrun.terminate()
                torchrun.wait()
    if code == 0:
        return ""
    return what_failed((logs / "torchrun.log").read_text(encoding="utf-8", errors="replace"), logs)


def what_failed(summary: str, logs: Path) -> str:
    """The process that died first, from torchrun's summary, and what its log says.

    Others that only lost it end with an error of their own.
    """
    failures = re.findall(r"rank\s*:\s*(\d+)[^\n]*\n\s*exitcode\s*:\s*(-?\d+)", summary)
    if not failures:
        return f"torchrun failed (log: {logs / 'torchrun.log'})"
    killed = [f for f in failures if int(f[1]) < 0 and int(f[1]) != -signal.SIGTERM]
    refused = [f for f in failures if int(f[1]) == UserError.exit_code]
    dead, code = (refused or killed or failures[-1:])[0]
    written = sorted(logs.glob(f"*/attempt_0/{dead}/stderr.log"), key=lambda p: p.stat().st_mtime)
    log = written[-1] if written else logs
    text = log.read_text(encoding="utf-8", errors="replace") if written else ""
    said = [line for line in text.splitlines() if line.startswith("puzzle: ")]
    if refused and said:
        return said[-1].removeprefix("puzzle: ")
    how = f"ended with exit code {code}"
    if int(code) < 0:
        how = f"was killed ({signal.Signals(-int(code)).name})"
    elif said:
        how += f", {said[-1].removeprefix('puzzle: ')}"
    return f"process {dead} {how}; the same command goes on (log: {log})"


if __name__ == "__main__":
    from torch.distributed.run import main

    end_with_parent_process()
    main(sys.argv[1:])
