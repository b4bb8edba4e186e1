"""Training state in one safetensors file: trained weights, optimisers, step.

Training that goes on from it is bit-identical to training that was never interrupted. Random
numbers need no saving: batches are a pure function of (seed, step) and nothing here uses dropout.

Tensors are written one at a time, so there is never a second copy of all. A file's metadata holds a
checksum of all of it, which is verified before a process goes on from what another one has written.
Several processes, and training that goes on meanwhile, write snapshots instead (`snapshots.py`).
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from puzzle import artifacts
from puzzle.errors import UserError

NO_DIGEST = b"0" * 64  # stands where the checksum is written at the end
_trusted: set[Path] = set()  # checkpoints that this process has written or verified

Modules = Mapping[str, nn.Module]
Optimizers = Mapping[str, torch.optim.Optimizer]
DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
}


def save(
    path: Path,
    step: int,
    modules: Modules,
    optimizers: Optimizers,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write what is trained; frozen weights have not changed.

    Args:
        path: of the checkpoint.
        step: to go on from.
        modules: by name; only their parameters that learn are kept.
        optimizers: by name; their whole state is kept.
        notes: small JSON values that must survive an interruption, such as skipped steps.
    """
    metadata = {"step": str(step), "notes": json.dumps(dict(notes or {}))}
    write(path, tensors(modules, optimizers), metadata)


def tensors(modules: Modules, optimizers: Optimizers) -> dict[str, torch.Tensor]:
    """Parameters that learn and the optimisers' states, by the names they have in a file."""
    named: dict[str, torch.Tensor] = {}
    for key, module in modules.items():
        named |= {f"module/{key}/{name}": parameter for name, parameter in _trained(module)}
    for key, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            named |= {
                f"optimizer/{key}/{index}/{name}": torch.as_tensor(value)
                for name, value in state.items()
            }
    return named


@torch.no_grad()
def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself; a sharded one in full, in which every process must take part.

    Of shards of different lengths torch makes one that is a part of a longer storage, which
    safetensors does not write: it is copied.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    full = tensor.full_tensor().detach()
    is_whole = full.untyped_storage().nbytes() == full.numel() * full.element_size()
    return full if is_whole else full.clone()


def write(path: Path, named: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, one tensor at a time, complete or not there.

    It is the length of the header, the header (JSON) and the bytes of the tensors.
    """
    _trusted.add(path)
    header: dict[str, Any] = {"__metadata__": {"sha256": NO_DIGEST.decode(), **metadata}}
    end = 0
    for name, tensor in named.items():
        first, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [first, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    begin = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(begin)
    with artifacts.atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(begin)
        for tensor in named.values():
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
        file.seek(begin.index(NO_DIGEST))
        file.write(digest.hexdigest().encode())


@contextlib.contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """A checkpoint to read from. Raises `UserError` for a damaged one."""
    try:
        if path not in _trusted:
            _verify(path)
            _trusted.add(path)
        file = safe_open(path, framework="pt")
    except (SafetensorError, ValueError) as error:
        raise UserError(
            f"{path}: is damaged ({error}); remove it, and what it holds is trained again"
        ) from None
    with file:
        yield file


def _verify(path: Path) -> None:
    """Raise `ValueError` where the checksum in a checkpoint's metadata is not that of its bytes."""
    with safe_open(path, framework="pt") as file:
        expected = (file.metadata() or {}).get("sha256", "").encode()
    with path.open("rb") as file:
        begin = file.read(8)
        begin += file.read(int.from_bytes(begin, "little"))
        digest = hashlib.sha256(begin.replace(expected, NO_DIGEST, 1))
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    if digest.hexdigest().encode() != expected:
        raise ValueError("its checksum differs")


@torch.no_grad()
def restore(path: Path, modules: Modules, optimizers: Optimizers) -> tuple[int, dict[str, Any]]:
    """Load in place; returns (the step to go on from, notes).

    That is (0, {}) where there is no checkpoint.
    """
    if not path.exists():
        return 0, {}
    with opened(path) as file:
        load(file.keys(), file.get_tensor, modules, optimizers)
    return peek(path)


@torch.no_grad()
def load(
    names: Iterable[str],
    read: Callable[[str], torch.Tensor],
    modules: Modules,
    optimizers: Optimizers,
) -> None:
    """Put stored tensors where `tensors` has them from, one at a time.

    `read` gives them in full; those that are sharded take their part.
    """
    for key, module in modules.items():
        for name, parameter in _trained(module):
            parameter.copy_(shard(read(f"module/{key}/{name}"), parameter))
    for key, optimizer in optimizers.items():
        state_dict = optimizer.state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for full_name in names:
            if full_name.startswith(f"optimizer/{key}/"):
                index, name = full_name.removeprefix(f"optimizer/{key}/").split("/")
                value = shard(read(full_name), parameters[int(index)])
                state_dict["state"].setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(state_dict)


def shard(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a full tensor, laid out as `like`.

    A single number stays as it is, and so does every tensor where `like` is not sharded.
    """
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(
        tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return (
        (name, parameter)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    )


def weights(path: Path, key: str) -> dict[str, torch.Tensor]:
    """The weights of one of the modules of a checkpoint."""
    with opened(path) as file:
        prefix = f"module/{key}/"
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a dict)
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def peek(path: Path) -> tuple[int, dict[str, Any]]:
    """(step, notes) of a checkpoint, without its tensors."""
    with opened(path) as file:
        return int(file.metadata()["step"]), json.loads(file.metadata()["notes"])
