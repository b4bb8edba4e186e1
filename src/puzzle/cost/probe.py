"""The probe: one model that holds every costly variant alone in a layer, several times over.

An engine serves it and runs other layers in every step, so that one engine start serves hundreds of
random architectures.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from puzzle.cost import parts
from puzzle.cost.parts import Part, Windows
from puzzle.model import child
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, ModelShape
from puzzle.model.parent import Parent

LEAST_LAYERS = 4  # of a random model, also where the parent has fewer: its first one never changes
PROBE_BYTES = 256 << 20  # a probe may always have so many; beyond it, no more than the parent


@dataclass(frozen=True)
class Probe:
    """The probe's architecture and where it holds each variant.

    Layer 0 is the parent's widest block and always runs: engines take the cache's length from it,
    and stock vLLM cannot start with a no-op attention.
    """

    architecture: Architecture
    windows: Windows  # of its layers
    places: dict[Part, list[int]]  # layers by variant, in the order of the unknowns
    shape: ModelShape
    served_windows: Windows  # of the parent's layers, that matter in the scenarios

    @classmethod
    def of(
        cls, needed: Sequence[Part], shape: ModelShape, windows: Windows, element_bytes: int
    ) -> "Probe":
        """A probe of these variants, with as many copies of each as its size allows.

        `windows`: of the parent's layers, that matter in the scenarios.
        """
        costly = [part for part in needed if part.variant.kind != "no_op"]
        first = parts.of_block(shape.widest_block, windows[0] if windows else None)
        costly += [part for part in first if part not in costly]
        parent_bytes = element_bytes * Architecture.of_parent(shape).parameters(shape)
        copy_bytes = element_bytes * sum(shape.parameters(part.variant) for part in costly)
        fitting = int(max(parent_bytes, PROBE_BYTES) / copy_bytes)
        copies = min(shape.num_hidden_layers, max(1, fitting))
        blocks, own_windows = [shape.widest_block], [first[0].window]
        places: dict[Part, list[int]] = {part: [] for part in costly}
        for part in costly * copies:
            places[part].append(len(blocks))
            blocks.append(part.variant.alone)
            own_windows.append(part.window)
        return cls(Architecture(tuple(blocks)), own_windows, places, shape, windows)

    @property
    def reference(self) -> Architecture:
        """The parent, with its widest block in layer 0: what steps are scaled by."""
        return self.with_first_layer(Architecture(tuple(self.shape.parent_blocks)))

    def with_first_layer(self, architecture: Architecture) -> Architecture:
        """An architecture as the probe can serve it: its layer 0 is the parent's widest block."""
        return Architecture((self.shape.widest_block, *architecture.blocks[1:]))

    def parts(self, architecture: Architecture) -> list[Part]:
        """Attention and FFN of every layer, with the windows they have there."""
        return parts.of_architecture(architecture, self.served_windows)

    def layers_of(self, model: Sequence[Part], rng: random.Random) -> list[int]:
        """Layers of the probe that make up a model, random copies of each variant.

        The model's own layer 0 must be the parent's widest block, as in `reference`.
        """
        unused: dict[Part, list[int]] = {}
        layers = [0]
        for part in model[2:]:
            if part.variant.kind == "no_op":
                continue
            if not unused.get(part):
                unused[part] = rng.sample(self.places[part], len(self.places[part]))
            layers.append(unused[part].pop())
        return layers

    def random_model(self, rng: random.Random, unused: dict[Part, list[Part]]) -> list[Part]:
        """A random share of the parent's attentions and another of its FFNs replaced.

        A random share of the replacements are no-ops, all others the same variant: many of one kind
        say several times as much of it as a few of every kind (docs/log.md). That is as uneven as
        what a search chooses, which may drop all attentions and keep all FFNs. A window may come
        into any layer.

        Args:
            rng: what is drawn from.
            unused: kept by the caller, empty at first: each variant comes once before any comes
                again, so that a few models have had all of them.
        """
        reference = self.parts(self.reference)
        spare = LEAST_LAYERS - len(reference) // 2
        replaceable = reference[2:] + reference[:2] * max(0, spare)
        halves = [(replaceable[::2], Part(NO_ATTENTION)), (replaceable[1::2], Part(NO_FFN))]
        attentions, ffns = (
            self._random_half(rng, parents, no_op, unused.setdefault(no_op, []))
            for parents, no_op in halves
        )
        model = reference[:2]
        for attention, ffn in zip(attentions, ffns, strict=True):
            model += [attention, ffn]
        return model

    def _random_half(
        self, rng: random.Random, parents: list[Part], no_op: Part, unused: list[Part]
    ) -> list[Part]:
        others = [part for part in self.places if part.variant.slot == no_op.variant.slot]
        replaced, dropped = (rng.betavariate(0.5, 0.5) for _ in range(2))
        unused += [] if unused else rng.sample(others, len(others))
        half = []
        for parent in parents:
            if rng.random() > replaced:
                half.append(parent)
            else:
                half.append(no_op if rng.random() < dropped else unused[-1])
        if unused[-1] in half:
            unused.pop()
        return half

    @property
    def series(self) -> list[list[tuple[int, float]]]:
        """The GQA variants of a window and the gated variants, where there are more than two."""
        kinds: dict[tuple[str, int | None], list[tuple[int, float]]] = {}
        for index, (variant, window) in enumerate(self.places):
            if variant.kind in ("gqa", "gated"):
                kinds.setdefault((variant.kind, window), []).append((index, float(variant.size)))
        return [unknowns for unknowns in kinds.values() if len(unknowns) > 2]

    def counts(self, model: Sequence[Part]) -> list[int]:
        """How often each variant occurs, in the order of `places`, and last 1 for the constant."""
        return [*(model.count(part) for part in self.places), 1]


def write_checkpoint(
    parent: Parent,
    folder: Path,
    architecture: Architecture,
    windows: Windows | None = None,
    *,
    weights: bool = True,
) -> None:
    """An architecture as a checkpoint with random weights: cost does not depend on their values.

    Args:
        parent: whose family and sizes it has.
        folder: the checkpoint's.
        architecture: the blocks.
        windows: of its layers; the parent's own if None.
        weights: False: without any, for engines that make them on their device.
    """
    config = parent.child_config(architecture, windows)
    state = {}
    if weights:
        state = dict(child.RandomWeights(config, torch.device("cpu")))
    card = "Random weights, for measuring.\n"
    child.save(folder, config, architecture, state, parent.folder, card)
