"""Models sharded over processes with FSDP2, and what processes agree on.

Weights, gradients and optimiser state are sharded by layer (`fully_shard`); gloo on CPUs, NCCL on
GPUs. A model is read from its files layer by layer and sharded at once, so no process ever holds
more than one layer in full, or the embedding.
"""

from collections.abc import Callable, Mapping

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from puzzle.device import Placement
from puzzle.model import child
from puzzle.model.modeling_puzzle import PuzzleConfig, PuzzleForCausalLM


def rank() -> int:
    """This process's number; 0 without a group."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def size() -> int:
    """How many processes work together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes."""
    if distributed.is_initialized():
        distributed.barrier()


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over processes, the same on all of them."""
    if distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


def mesh(device: torch.device) -> DeviceMesh:
    """All processes in a row."""
    return init_device_mesh(device.type, (size(),))


def load_sharded(
    config: PuzzleConfig,
    weights: Mapping[str, torch.Tensor],
    placement: Placement,
    prepare: Callable[[PuzzleForCausalLM], None],
    over: DeviceMesh,
) -> PuzzleForCausalLM:
    """A model whose layers are sharded; embedding, last norm and head wait for `shard_rest`.

    Args:
        config: of the model.
        weights: by name, read one at a time.
        placement: dtype, device and attention implementation.
        prepare: sees the model before it has weights, to say which of them learn.
        over: the processes.
    """
    model = child.skeleton(config, placement.device, placement.attention)
    prepare(model)

    def fill(module: nn.Module, prefix: str, names: list[str]) -> None:
        state = {
            name: weights[prefix + name].to(
                device=placement.device, dtype=placement.dtype, copy=True
            )
            for name in names
        }
        module.load_state_dict(state, assign=True, strict=False)

    for index, layer in enumerate(model.model.layers):
        if names := list(layer.state_dict()):
            fill(layer, f"model.layers.{index}.", names)
            fully_shard(layer, mesh=over)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    names = [name for name in model.state_dict() if not name.startswith("model.layers.")]
    fill(model, "", [name for name in names if name not in tied])
    model.tie_weights()
    return model


def freeze(model: nn.Module) -> None:
    """Nothing learns."""
    model.requires_grad_(False)


def shard_rest(module: nn.Module, over: DeviceMesh) -> None:
    """Shard what no layer holds. From now on `module` may only be used through its forward."""
    fully_shard(module, mesh=over)


def reshard(module: nn.Module) -> None:
    """Drop what a forward has gathered, after one that no backward follows."""
    if isinstance(module, FSDPModule):
        module.reshard()
