"""Models sharded over processes with FSDP2, and what processes agree on.

Weights, gradients and optimiser state are sharded by layer (`fully_shard`); gloo on CPUs, NCCL on
GPUs. A model is read from its files layer by layer and sharded at once, so no process ever holds
more than one layer in full, or the embedding.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

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


def leave(code: int) -> NoReturn:
    """End this process of a group at once; the interpreter is not taken down.

    FSDP2 keeps gloo's threads alive beyond `destroy_process_group`, and one that still holds a
    tensor while the interpreter goes down aborts the process (PyTorch's pull request 179291).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over processes, the same on all of them."""
    if distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


T = TypeVar("T")


def dealt(units: Sequence[T]) -> list[T]:
    """This process's share of a list of units: dealt like cards, back and forth.

    So that units of steadily falling size are shared about equally.
    """
    count, own, mine = size(), rank(), []
    for index, unit in enumerate(units):
        turn, place = divmod(index, count)
        if own == (place if turn % 2 == 0 else count - 1 - place):
            mine.append(unit)
    return mine


def all_of(value: T) -> list[T]:
    """Every process's value, by their number, on all of them."""
    if not distributed.is_initialized():
        return [value]
    values: list[T] = [value] * size()
    distributed.all_gather_object(values, value)
    return values


def gathered(value: T) -> list[T]:
    """Every process's value, by their number, for process 0; for the others their own."""
    if not distributed.is_initialized():
        return [value]
    values: list[T] | None = [value] * size() if rank() == 0 else None
    distributed.gather_object(value, values)
    return [value] if values is None else values


def mesh(device: torch.device) -> DeviceMesh:
    """All processes in a row."""
    return init_device_mesh(device.type, (size(),))


@dataclass(frozen=True)
class Shards:
    """How models are sharded: over which processes, and the dtype in which they compute.

    Every layer is a group of its own, and so are embedding and head (one group where they are
    tied). A group's float32 shards are gathered in the dtype of products where they are used, and
    dropped after that; its gradients are added up in float32.
    """

    over: DeviceMesh
    products: torch.dtype | None  # None: the weights' own

    def load(
        self,
        config: PuzzleConfig,
        weights: Mapping[str, torch.Tensor],
        placement: Placement,
        prepare: Callable[[PuzzleForCausalLM], None],
    ) -> PuzzleForCausalLM:
        """A model whose layers, embedding and head are sharded; the last norm is for `add_rest`.

        Args:
            config: of the model.
            weights: by name, read one at a time.
            placement: dtype, device and attention implementation.
            prepare: sees the model before it has weights, to say which of them learn.
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
                self._shard(layer)
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        names = [name for name in model.state_dict() if not name.startswith("model.layers.")]
        fill(model, "", [name for name in names if name not in tied])
        model.tie_weights()
        tables: list[nn.Module] = [model.model.embed_tokens, model.lm_head]
        for group in [tables] if tied else [[table] for table in tables]:
            self._shard(group)
        for table in tables:
            assert isinstance(table, FSDPModule)
            table.set_unshard_in_backward(False)  # what their gradients take is no weight
        return model

    def add_rest(self, module: nn.Module) -> None:
        """Shard what no group holds. From now on `module` may only be used through its forward."""
        self._shard(module)

    def _shard(self, module: nn.Module | list[nn.Module]) -> None:
        policy = MixedPrecisionPolicy(
            self.products,
            reduce_dtype=torch.float32 if self.products else None,
            cast_forward_inputs=False,  # angles may be float32
        )
        fully_shard(module, mesh=self.over, mp_policy=policy)


@contextlib.contextmanager
def head(model: PuzzleForCausalLM) -> Iterator[torch.Tensor]:
    """The head's weight [V, D]; where it is sharded, gathered inside the `with` block."""
    if isinstance(model.lm_head, FSDPModule):
        model.lm_head.unshard()
    yield model.lm_head.weight
    if isinstance(model.lm_head, FSDPModule):
        model.lm_head.reshard()


def freeze(model: nn.Module) -> None:
    """Nothing learns."""
    model.requires_grad_(False)


def reshard(module: nn.Module) -> None:
    """Drop what a forward has gathered, after one that no backward follows."""
    for inner in module.modules():
        if isinstance(inner, FSDPModule):
            inner.reshard()


def shared(value: T) -> T:
    """Process 0's value, on all of them."""
    if not distributed.is_initialized():
        return value
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]
