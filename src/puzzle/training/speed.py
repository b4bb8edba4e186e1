"""How fast a parent's layers and head run here, for estimates of time.

Small layers reach a small share of the rate of large matrix products: what surrounds the products
takes the time, and over a large vocabulary the softmax does. So one layer of the parent's shape,
with random weights, and the losses over its vocabulary are timed on a batch, which takes about two
seconds. What has more than `MEASURED_PARAMETERS` is mostly products, and a device that is only
planned for cannot be timed: for these it is `Device.training_flops_per_s`, and the rates on its
sheet for what moves.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from puzzle.device import TRANSFERS, Device
from puzzle.model import child
from puzzle.model.architecture import Architecture
from puzzle.model.modeling_puzzle import PuzzleModel
from puzzle.model.parent import Parent
from puzzle.training.losses import LOSS_ELEMENTS, LogitLoss, distillation_losses, token_metrics

MEASURED_PARAMETERS = 1 << 26  # of a layer, or of the head
REPETITIONS = 8
TOKENS = 4096  # of the timed batch, or a sequence where that is longer
VOCABULARY = 256  # of the timed layer: its embedding is only read


@dataclass(frozen=True)
class Speed:
    """Seconds of each kind of work."""

    forward_s: float  # per parameter of layers and token
    training_s: float  # the same, forward and backward
    judged_s: float  # per token: `token_metrics` of one candidate
    loss_s: float  # per token: `distillation_losses`, forward and backward
    # Per byte; 0 where it is not known: what computes is timed here, what moves is not.
    network_s: float = 0.0
    link_s: float = 0.0
    file_s: float = 0.0


def measure(parent: Parent, device: Device, sequence_length: int) -> Speed:
    """Times one layer of the parent's shape and its head, where they are small enough."""
    rate = device.training_flops_per_s
    head = parent.shape.vocab_size * parent.shape.hidden_size
    # A parameter's product with an activation is 2 FLOPs; the loss is of two models, one trains.
    speed = Speed(2 / rate, 6 / rate, 4 * head / rate, 8 * head / rate)
    if (sheet := device.planned) is not None:
        return replace(
            speed,
            network_s=1 / (TRANSFERS * sheet.network_bytes),
            link_s=1 / (TRANSFERS * sheet.link_bytes),
            file_s=1 / sheet.disk_bytes,
        )
    rows = max(1, TOKENS // sequence_length)
    if parent.shape.parameters(parent.shape.parent_blocks[0]) <= MEASURED_PARAMETERS:
        forward_s, training_s = _time_layer(parent, device, rows, sequence_length)
        speed = replace(speed, forward_s=forward_s, training_s=training_s)
    if head <= MEASURED_PARAMETERS:
        judged_s, loss_s = _time_head(parent, device, rows * sequence_length)
        speed = replace(speed, judged_s=judged_s, loss_s=loss_s)
    return speed


def _time_layer(parent: Parent, device: Device, rows: int, length: int) -> tuple[float, float]:
    """Seconds per parameter and token: forward, and forward with backward."""
    block = parent.shape.parent_blocks[0]
    config = parent.child_config(Architecture((block,)), parent.shape.windows[:1])
    config.vocab_size, config.pad_token_id = VOCABULARY, None
    config._attn_implementation = child.attention_for(config, device.attention_for(length))
    with device.torch_device:
        model = PuzzleModel(config)
    tokens_BS = torch.zeros(rows, length, dtype=torch.long, device=device.torch_device)

    def run() -> torch.Tensor:
        with device.autocast():
            hidden_BSD: torch.Tensor = model(tokens_BS, use_cache=False).last_hidden_state
        return hidden_BSD

    def train() -> None:
        run().sum().backward()
        model.zero_grad()

    work = float(parent.shape.parameters(block)) * tokens_BS.numel()
    with torch.no_grad():
        forward_s = _seconds(run, device) / work
    return forward_s, _seconds(train, device) / work


def _time_head(parent: Parent, device: Device, tokens: int) -> tuple[float, float]:
    """Seconds per token of the metrics, and of the losses with their backward."""
    D, V = parent.shape.hidden_size, parent.shape.vocab_size
    place = device.torch_device
    head_VD = torch.zeros(V, D, device=place, requires_grad=True)
    hidden_TD = torch.zeros(tokens, D, device=place, requires_grad=True)
    targets_T = torch.zeros(tokens, dtype=torch.long, device=place)
    settings = LogitLoss(1.0, 0.0, 1.0, None, LOSS_ELEMENTS[device.type])
    frozen_TD, frozen_VD = hidden_TD.detach(), head_VD.detach()

    def judge() -> None:
        with device.autocast():
            token_metrics(frozen_TD, frozen_VD, frozen_TD[None], frozen_VD, targets_T)

    def train() -> None:
        with device.autocast():
            loss, _, _ = distillation_losses(
                hidden_TD, head_VD, frozen_TD, frozen_VD, targets_T, settings
            )
        loss.backward()

    return _seconds(judge, device) / tokens, _seconds(train, device) / tokens


def _seconds(step: Callable[[], object], device: Device) -> float:
    """The fastest of some repetitions: the first ones prepare kernels, and others may compute."""
    taken = []
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device.torch_device)
        taken.append(time.perf_counter() - began)
    return min(taken)
