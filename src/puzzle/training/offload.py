"""What is kept in the host's memory: float32 weights and their moments, a frozen model's layers.

The device holds the weights in the dtype of products, and float32 gradients, to which micro-batches
add up. A step brings one tensor's gradient to the host, updates the float32 weight there, and sends
it back rounded: 2 + 4 bytes a parameter on the device instead of 12 or 16, for one transfer of
gradients and weights a step (as in ZeRO-Offload). A frozen layer is on the device while it
computes.
"""

from collections.abc import Iterable

import torch
from torch import nn

from puzzle.device import pinned
from puzzle.model.modeling_puzzle import PuzzleForCausalLM


class HostWeights:
    """Float32 weights on the host, which optimisers step, and a model that computes with them."""

    def __init__(self, masters: nn.Module, computing: nn.Module) -> None:
        """Both have the same parameters in the same order, and the same of them learn.

        Args:
            masters: on the host, in float32.
            computing: on the device, in the dtype of products.
        """
        pairs = zip(masters.parameters(), computing.parameters(), strict=True)
        self.pairs = [pair for pair in pairs if pair[0].requires_grad]
        for _, weight in self.pairs:
            weight.grad_dtype = torch.float32

    @torch.no_grad()
    def step(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """One tensor after the other; optimisers pass over those that have no gradient."""
        for master, weight in self.pairs:
            if weight.grad is not None:
                master.grad = weight.grad.to(master.device)
                for optimizer in optimizers:
                    optimizer.step()
                master.grad = None
                weight.copy_(master)

    @torch.no_grad()
    def publish(self) -> None:
        """Send all weights to the device, after they were read from a checkpoint."""
        for master, weight in self.pairs:
            weight.copy_(master)


def fetch_layers(model: PuzzleForCausalLM, device: torch.device) -> PuzzleForCausalLM:
    """A frozen model on the host whose layers come to the device for their forward, one at a time.

    Embedding, last norm and head stay there.
    """
    for module in (model.model.embed_tokens, model.model.norm, model.lm_head):
        module.to(device)
    model.tie_weights()
    model.model.make_rotary(device)
    for layer in model.model.layers:
        host = {name: pinned(weight, device) for name, weight in layer.state_dict().items()}

        def fetch(layer: nn.Module, _: object, host: dict[str, torch.Tensor] = host) -> None:
            there = {name: weight.to(device, non_blocking=True) for name, weight in host.items()}
            layer.load_state_dict(there, assign=True)

        def drop(layer: nn.Module, *_: object, host: dict[str, torch.Tensor] = host) -> None:
            layer.load_state_dict(host, assign=True)

        drop(layer)
        layer.register_forward_pre_hook(fetch)
        layer.register_forward_hook(drop)
    return model
