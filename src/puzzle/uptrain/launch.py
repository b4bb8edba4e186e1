"""Several processes for one uptraining, started with torchrun, one log for each.

    puzzle uptrain RUN                                   starts them itself, on one machine
    torchrun --nnodes 2 ... -m puzzle.uptrain.worker RUN   on several that share the run directory

If a process dies, torchrun ends the others; if the command that started them dies, the kernel ends
them all (Linux).
"""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import distributed

from puzzle.errors import UserError
from puzzle.stage import Job

LAUNCHED = "PUZZLE_LAUNCHED"  # set for processes that `launch` has started


def processes(job: Job) -> int:
    """How many the child wants: by default one for each GPU of this machine, one on a CPU.

    Raises `UserError` for more than there are GPUs.
    """
    settings, device = job.child.uptrain, job.run.device
    if settings.processes == "auto":
        alone = device.type != "cuda" or settings.lora_rank > 0
        return 1 if alone else device.memory.devices
    if device.type == "cuda" and settings.processes > device.memory.devices:
        raise UserError(
            f"uptrain.processes: got {settings.processes}, but this machine has "
            f"{device.memory.devices} GPUs"
        )
    return settings.processes


@contextlib.contextmanager
def group() -> Iterator[None]:
    """Join the processes that torchrun has started."""
    if "RANK" not in os.environ:
        raise UserError(
            "puzzle.uptrain.worker: start it with `puzzle uptrain RUN`, or through torchrun"
        )
    end_with_parent_process()
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def end_with_parent_process() -> None:
    """Ask the kernel to kill this process when the one that started it is gone."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def launch(module: str, arguments: list[str], count: int, logs: Path) -> str:
    """Run `python -m MODULE ARGUMENTS` in `count` processes and wait.

    What process 0 prints is shown; everything else goes to files in `logs`. Returns what went
    wrong, in words; empty if nothing.
    """
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // count)
    environment = {"OMP_NUM_THREADS": str(threads)} | dict(os.environ) | {LAUNCHED: "1"}
    redirects = ",".join(f"{index}:{3 if index else 2}" for index in range(count))
    command = [sys.executable, "-m", "puzzle.uptrain.launch", "--standalone"]
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
    return what_failed((logs / "torchrun.log").read_text(encoding="utf-8", errors="replace"))


def what_failed(log: str) -> str:
    """The process that died first, from torchrun's summary.

    Others that only lost it end with an error of their own.
    """
    failures = re.findall(r"rank\s*:\s*(\d+)[^\n]*\n\s*exitcode\s*:\s*(-?\d+)", log)
    if not failures:
        return "torchrun failed"
    killed = [f for f in failures if int(f[1]) < 0 and int(f[1]) != -signal.SIGTERM]
    dead, code = (killed or failures[-1:])[0]
    if int(code) < 0:
        return f"process {dead} was killed ({signal.Signals(-int(code)).name})"
    return f"process {dead} ended with exit code {code}"


if __name__ == "__main__":
    from torch.distributed.run import main

    end_with_parent_process()
    main(sys.argv[1:])
