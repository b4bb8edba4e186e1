"""Training state in one safetensors file: modules, optimisers, step. Restoring it continues bit-identically.

Random numbers need no saving: batches are a pure function of (seed, step) and nothing here uses dropout.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from puzzle import artifacts

FOLDER = "training"  # inside a stage folder; the pipeline removes it once the manifest is written
Modules = Mapping[str, nn.Module]
Optimizers = Mapping[str, torch.optim.Optimizer]


def save(
    path: Path, step: int, modules: Modules, optimizers: Optimizers, notes: Mapping[str, Any] | None = None
) -> None:
    """`notes` are small values (JSON) that must survive an interruption, such as skipped steps."""
    tensors: dict[str, torch.Tensor] = {}
    for key, module in modules.items():
        tensors |= {f"module/{key}/{name}": value for name, value in module.named_parameters()}
    for key, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{key}/{index}/{name}": torch.as_tensor(value) for name, value in state.items()}
    with artifacts.atomic_path(path) as temporary:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata={"step": str(step), "notes": json.dumps(dict(notes or {}))})


@torch.no_grad()
def restore(path: Path, modules: Modules, optimizers: Optimizers) -> tuple[int, dict[str, Any]]:
    """Load in place; (the step to go on from, notes), which is (0, {}) where there is no checkpoint."""
    if not path.exists():
        return 0, {}
    with safe_open(path, framework="pt") as file:
        for key, module in modules.items():
            for name, parameter in module.named_parameters():
                parameter.copy_(file.get_tensor(f"module/{key}/{name}"))
        for key, optimizer in optimizers.items():
            state_dict = optimizer.state_dict()
            for full_name in file.keys():  # noqa: SIM118 (not a dict)
                if full_name.startswith(f"optimizer/{key}/"):
                    index, name = full_name.removeprefix(f"optimizer/{key}/").split("/")
                    state_dict["state"].setdefault(int(index), {})[name] = file.get_tensor(full_name)
            optimizer.load_state_dict(state_dict)
    return peek(path)


def weights(path: Path, key: str) -> dict[str, torch.Tensor]:
    """The weights of one of the modules of a checkpoint."""
    with safe_open(path, framework="pt") as file:
        prefix = f"module/{key}/"
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a dict)
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def peek(path: Path) -> tuple[int, dict[str, Any]]:
    """(step, notes) of a checkpoint, without its tensors."""
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["step"]), json.loads(file.metadata()["notes"])


def cosine_schedule(step: int, steps: int, warmup_share: float) -> float:
    """The learning-rate factor of a step: linear warm-up, then half a cosine down to zero."""
    warmup = max(1, round(steps * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    progress = torch.tensor((step - warmup) / max(1, steps - warmup))
    return float(0.5 * (1 + torch.cos(torch.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
