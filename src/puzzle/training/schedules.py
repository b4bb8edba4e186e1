"""Learning-rate schedules: pure functions of the step, so that resuming needs no state."""

import math

import torch

DEFAULT_WIDTH = 256  # of the embedded parent
LIBRARY_RATE, ADAMW_RATE, MUON_RATE = 2e-3, 1e-3, 4e-3
ADAMW_SHARE = 0.25  # of Muon's rate, for what AdamW steps beside it


def cosine(step: int, steps: int, warmup_share: float) -> float:
    """The learning-rate factor of a step: linear warm-up, then half a cosine down to zero."""
    warmup = max(1, round(steps * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    progress = torch.tensor((step - warmup) / max(1, steps - warmup))
    return float(0.5 * (1 + torch.cos(torch.pi * progress)))


def warmup_stable_decay(step: int, steps: int, warmup_share: float, decay_share: float) -> float:
    """The factor of a step: linear warm-up, constant, then a straight line down to zero."""
    warmup = max(1, round(steps * warmup_share))
    decay = max(1, math.ceil(steps * decay_share))
    return min(1.0, (step + 1) / warmup, (steps - step) / decay)


def peak(given: float | None, default: float, width: int) -> float:
    """The learning rate at its peak: as given, or the default for parents of this width.

    The defaults were found at `DEFAULT_WIDTH`; from there on they fall in proportion, as Adam's
    do under muP (docs/log.md has the rates that were best at two widths).
    """
    return given or default * min(1.0, DEFAULT_WIDTH / width)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The same rate for every group of parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate
