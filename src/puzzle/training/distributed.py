"""Several processes for one uptraining: started with torchrun, both models sharded with FSDP2, one
log for each.

    puzzle uptrain RUN                                        starts them itself (`uptrain.processes`), on one machine
    torchrun --nnodes 2 ... -m puzzle.uptrain RUN             on several machines that share the run directory

Weights, gradients and optimiser state are sharded by layer (`fully_shard`); gloo on CPUs, NCCL on
GPUs. A model is read from its files layer by layer and sharded at once, so no process ever holds
more than one layer whole, or the embedding.

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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from puzzle.errors import UserError
from puzzle.model import child
from puzzle.model.modeling_puzzle import PuzzleConfig, PuzzleForCausalLM
from puzzle.run import Run

LAUNCHED = "PUZZLE_LAUNCHED"  # set for processes that `launch` started


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def barrier() -> None:
    if distributed.is_initialized():
        distributed.barrier()


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over processes, the same on all of them."""
    if distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


# ------------------------------------------------------------------------------------------- models


def mesh(device: torch.device) -> DeviceMesh:
    return init_device_mesh(device.type, (size(),))


def load_sharded(
    config: PuzzleConfig,
    weights: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
    attention: str,
    prepare: Callable[[PuzzleForCausalLM], None],
    over: DeviceMesh,
) -> PuzzleForCausalLM:
    """A model whose layers are sharded; embedding, last norm and head wait for `shard_rest`.

    `prepare` sees the model before it has weights, to say which of them learn.
    """
    model = child.skeleton(config, device, attention)
    prepare(model)

    def fill(module: nn.Module, prefix: str, names: list[str]) -> None:
        state = {
            name: weights[prefix + name].to(device=device, dtype=dtype, copy=True) for name in names
        }
        module.load_state_dict(state, assign=True, strict=False)

    for index, layer in enumerate(model.model.layers):
        if names := list(layer.state_dict()):
            fill(layer, f"model.layers.{index}.", names)
            fully_shard(layer, mesh=over)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    rest = [
        name
        for name in model.state_dict()
        if not name.startswith("model.layers.") and name not in tied
    ]
    fill(model, "", rest)
    model.tie_weights()
    return model


def freeze(model: nn.Module) -> None:
    model.requires_grad_(False)


def shard_rest(module: nn.Module, over: DeviceMesh) -> None:
    """Shard what no layer holds. From now on `module` may only be used through its forward."""
    fully_shard(module, mesh=over)


def reshard(module: nn.Module) -> None:
    """After a forward that no backward follows: what it gathered would otherwise stay, in place of
    the shards.
    """
    if isinstance(module, FSDPModule):
        module.reshard()


# ---------------------------------------------------------------------------------------- processes


def processes(run: Run) -> int:
    """How many the recipe wants: by default one for each GPU of this machine, one on a CPU."""
    asked = run.recipe.uptrain.processes
    if asked == "auto":
        alone = run.device.type != "cuda" or run.recipe.uptrain.lora_rank > 0
        return 1 if alone else torch.cuda.device_count()
    if run.device.type == "cuda" and asked > torch.cuda.device_count():
        raise UserError(
            f"uptrain.processes: got {asked}, but this machine has {torch.cuda.device_count()} GPUs"
        )
    return asked


@contextlib.contextmanager
def group() -> Iterator[None]:
    """Join the processes that torchrun started."""
    if "RANK" not in os.environ:
        raise UserError("puzzle.uptrain: start it with `puzzle uptrain RUN`, or through torchrun")
    end_with_parent()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def end_with_parent() -> None:
    """Ask the kernel to kill this process when the one that started it is gone, however it went."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def launch(module: str, arguments: list[str], processes: int, logs: Path) -> str:
    """Run `python -m MODULE ARGUMENTS` in so many processes and wait. What went wrong, in words;
    empty if nothing.

    What process 0 prints is shown; everything else goes to files in `logs`.
    """
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {"OMP_NUM_THREADS": str(threads)} | dict(os.environ) | {LAUNCHED: "1"}
    words = [
        "--standalone",
        "--nproc-per-node",
        str(processes),
        "--local-ranks-filter",
        "0",
        "--log-dir",
        str(logs),
        "--redirects",
        ",".join(f"{index}:{3 if index else 2}" for index in range(processes)),
        "-m",
        module,
        *arguments,
    ]
    with (logs / "torchrun.log").open("w") as log:
        command = [sys.executable, "-m", "puzzle.training.distributed", *words]
        torchrun = subprocess.Popen(command, env=environment, stdout=sys.__stderr__, stderr=log)
        try:
            code = torchrun.wait()
        finally:
            if torchrun.poll() is None:  # interrupted: torchrun ends its processes, then itself
                torchrun.terminate()
                torchrun.wait()
    return (
        ""
        if code == 0
        else _what_failed((logs / "torchrun.log").read_text(encoding="utf-8", errors="replace"))
    )


def _what_failed(log: str) -> str:
    """The process that died first, from torchrun's summary: others that only lost it end with an
    error of their own.
    """
    failures = re.findall(r"rank\s*:\s*(\d+)[^\n]*\n\s*exitcode\s*:\s*(-?\d+)", log)
    if not failures:
        return "torchrun failed"
    dead, code = next(
        (f for f in failures if int(f[1]) < 0 and int(f[1]) != -signal.SIGTERM), failures[-1]
    )
    how = (
        f"was killed ({signal.Signals(-int(code)).name})"
        if int(code) < 0
        else f"ended with exit code {code}"
    )
    return f"process {dead} {how}"


if __name__ == "__main__":
    from torch.distributed.run import main

    end_with_parent()
    main(sys.argv[1:])
