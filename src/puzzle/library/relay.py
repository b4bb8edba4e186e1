"""Layers have owners: every process of a group trains the variants of its own layers.

The owners stand in the order of their layers. The parent's activations go from each to the next
one, through the host's memory (gloo, on GPUs as well): a layer's outputs are little beside what its
variants compute of them. An owner runs its own layers of the parent once ahead and hands their
outputs on before it trains, so that the next one need not wait for that.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import distributed

from puzzle.device import pinned
from puzzle.library.memory import trained_variants
from puzzle.run import Run
from puzzle.training import sharding


def owned_layers(run: Run, owner: int, owners: int) -> range:
    """The layers of one of so many owners: neighbours, with about equal work.

    A trained parameter counts thrice (forward and both products backward), one of the parent twice.
    """
    shape = run.parent.shape
    work = [2.0 * shape.parameters(block) for block in shape.parent_blocks]
    for layer, variant in trained_variants(run):
        work[layer] += 3.0 * shape.parameters(variant)
    before, total, mine = 0.0, sum(work), []
    for layer, amount in enumerate(work):
        middle = before + amount / 2
        before += amount
        if min(owners - 1, int(owners * middle / total)) == owner:
            mine.append(layer)
    return range(mine[0], mine[-1] + 1) if mine else range(0)


@dataclass
class Relay:
    """This process's place among the owners; an owner without layers has neither neighbour."""

    run: Run
    layers: range
    previous: int | None
    following: int | None
    on_their_way: list[tuple[distributed.Work, torch.Tensor]] = field(default_factory=list)
    waited_s: float = 0.0  # for the neighbours

    @classmethod
    def of(cls, run: Run) -> "Relay":
        """The relay of this process."""
        ranges = [owned_layers(run, owner, sharding.size()) for owner in range(sharding.size())]
        owners = [owner for owner, layers in enumerate(ranges) if layers]
        if sharding.rank() not in owners:
            return cls(run, range(0), None, None)
        place = owners.index(sharding.rank())
        previous = owners[place - 1] if place else None
        following = owners[place + 1] if place + 1 < len(owners) else None
        return cls(run, ranges[sharding.rank()], previous, following)

    @property
    def is_first(self) -> bool:
        """Whether it makes its inputs itself."""
        return bool(self.layers) and self.previous is None

    def hand_on(self, states: Sequence[torch.Tensor]) -> None:
        """Send the inputs of the next owner's first layer; what was sent before must be there."""
        began = time.perf_counter()
        self.finish()
        self.waited_s += time.perf_counter() - began
        if self.run.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # what is on its way to the host is there
        for x_BSD in states:
            host = x_BSD.cpu().contiguous()
            work = distributed.isend(host, self.following)
            assert work is not None
            self.on_their_way.append((work, host))

    def take(self, shapes: Sequence[torch.Size]) -> list[torch.Tensor]:
        """The inputs of this owner's first layer, of these batches [B, S]: on the host."""
        placement, width = self.run.placement, self.run.parent.shape.hidden_size
        empty = (torch.empty(*shape, width, dtype=placement.dtype) for shape in shapes)
        states = [pinned(x_BSD, placement.device) for x_BSD in empty]
        began = time.perf_counter()
        for x_BSD in states:
            distributed.recv(x_BSD, self.previous)
        self.waited_s += time.perf_counter() - began
        return states

    def finish(self) -> None:
        """Wait until everything that was handed on has arrived."""
        for work, _ in self.on_their_way:
            work.wait()
        self.on_their_way.clear()
