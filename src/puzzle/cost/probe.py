"""The probe: one model that holds every costly variant alone in a layer, several times over.

An engine serves it and runs other layers in every step, so that one engine start serves hundreds of
random architectures.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from puzzle.model import child
from puzzle.model.architecture import (
    FFN,
    NO_ATTENTION,
    NO_FFN,
    Architecture,
    Attention,
    Block,
    ModelShape,
    Subblock,
)
from puzzle.model.parent import Parent

Half = TypeVar("Half", Attention, FFN)
PROBE_BYTES = 256 << 20  # a probe may always have so many; beyond it, no more than the parent


@dataclass(frozen=True)
class Probe:
    """The probe's architecture and where it holds each variant.

    Layer 0 is the parent's widest block and always runs: engines take the cache's length from it,
    and stock vLLM cannot start with a no-op attention.
    """

    architecture: Architecture
    places: dict[Subblock, list[int]]  # layers by variant, in the order of the unknowns
    shape: ModelShape

    @classmethod
    def of(cls, variants: Sequence[Subblock], shape: ModelShape, element_bytes: int) -> "Probe":
        """A probe of these variants, with as many copies of each as its size allows."""
        costly = [variant for variant in variants if variant.kind != "no_op"]
        costly += [half for half in shape.widest_block.subblocks if half not in costly]
        parent_bytes = element_bytes * Architecture.of_parent(shape).parameters(shape)
        copy_bytes = element_bytes * sum(shape.parameters(variant) for variant in costly)
        fitting = int(max(parent_bytes, PROBE_BYTES) / copy_bytes)
        copies = min(shape.num_hidden_layers, max(1, fitting))
        blocks = [shape.widest_block]
        places: dict[Subblock, list[int]] = {variant: [] for variant in costly}
        for variant in costly * copies:
            places[variant].append(len(blocks))
            blocks.append(variant.alone)
        return cls(Architecture(tuple(blocks)), places, shape)

    @property
    def reference(self) -> Architecture:
        """The parent, with its widest block in layer 0: what steps are scaled by."""
        return self.with_first_layer(Architecture(tuple(self.shape.parent_blocks)))

    def with_first_layer(self, architecture: Architecture) -> Architecture:
        """An architecture as the probe can serve it: its layer 0 is the parent's widest block."""
        return Architecture((self.shape.widest_block, *architecture.blocks[1:]))

    def layers_of(self, architecture: Architecture, rng: random.Random) -> list[int]:
        """Layers of the probe that make up an architecture, random copies of each variant.

        The architecture's own layer 0 must be the parent's widest block, as in `reference`.
        """
        unused: dict[Subblock, list[int]] = {}
        layers = [0]
        for block in architecture.blocks[1:]:
            for variant in block.subblocks:
                if variant.kind == "no_op":
                    continue
                if not unused.get(variant):
                    unused[variant] = rng.sample(self.places[variant], len(self.places[variant]))
                layers.append(unused[variant].pop())
        return layers

    def random_architecture(self, rng: random.Random) -> Architecture:
        """A random share of the parent's attentions and another of its FFNs replaced.

        A random share of the replacements are no-ops. That is as uneven as what a search chooses,
        which may drop all attentions and keep all FFNs.
        """
        reference = self.reference.blocks
        attentions = [v for v in self.places if isinstance(v, Attention)]
        ffns = [v for v in self.places if isinstance(v, FFN)]
        parents = [block.attention for block in reference[1:]]
        attention_half = self._random_half(rng, parents, NO_ATTENTION, attentions)
        ffn_half = self._random_half(rng, [block.ffn for block in reference[1:]], NO_FFN, ffns)
        blocks = [Block(a, f) for a, f in zip(attention_half, ffn_half, strict=True)]
        return Architecture((reference[0], *blocks))

    def _random_half(
        self, rng: random.Random, parents: list[Half], no_op: Half, others: list[Half]
    ) -> list[Half]:
        replaced, dropped = (rng.betavariate(0.5, 0.5) for _ in range(2))
        half = []
        for parent in parents:
            if rng.random() > replaced:
                half.append(parent)
            else:
                half.append(no_op if rng.random() < dropped else rng.choice(others))
        return half

    @property
    def series(self) -> list[list[tuple[int, float]]]:
        """The GQA and the gated variants, where there are more than two of a kind."""
        kinds = []
        for kind in ("gqa", "gated"):
            sizes = enumerate(self.places)
            unknowns = [(index, float(v.size)) for index, v in sizes if v.kind == kind]
            if len(unknowns) > 2:
                kinds.append(unknowns)
        return kinds

    def counts(self, architecture: Architecture) -> list[int]:
        """How often each variant occurs, in the order of `places`, and last 1 for the constant."""
        parts = [half for block in architecture for half in block.subblocks]
        return [*(parts.count(variant) for variant in self.places), 1]


def write_checkpoint(
    parent: Parent, folder: Path, architecture: Architecture, *, weights: bool = True
) -> None:
    """An architecture as a checkpoint with random weights: cost does not depend on their values.

    `weights` False: without any, for engines that make them on their device.
    """
    config = parent.child_config(architecture, layers=())  # full attention: windows cost less
    state = {}
    if weights:
        state = dict(child.RandomWeights(config, torch.device("cpu")))
    card = "Random weights, for measuring.\n"
    child.save(folder, config, architecture, state, parent.folder, card)
