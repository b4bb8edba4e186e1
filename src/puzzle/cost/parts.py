"""What a layer's costs are of: its subblock variants, and the window that its attention sees."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from puzzle.config import ScenarioConfig
from puzzle.model.architecture import Architecture, Block, Subblock

Windows = Sequence[int | None]  # of every layer, in tokens; empty: full attention everywhere
Key = tuple[str, str]  # slot and name, as in a table of costs


class Part(NamedTuple):
    """A subblock variant as a layer has it. Equal parts cost the same, whatever the layer."""

    variant: Subblock
    window: int | None = None  # of its attention, where a scenario is longer

    @classmethod
    def of(cls, variant: Subblock, window: int | None) -> "Part":
        """A variant in a layer of this window, which only GQA takes notice of."""
        return cls(variant, window if variant.kind == "gqa" else None)

    @property
    def name(self) -> str:
        """`gqa_2`; with a window `gqa_2@4096`."""
        return self.variant.name + ("" if self.window is None else f"@{self.window}")

    @property
    def key(self) -> Key:
        """`attention, gqa_2@4096`."""
        return self.variant.slot, self.name


def of_block(block: Block, window: int | None) -> list[Part]:
    """The attention and the FFN of a layer that has this window."""
    return [Part.of(half, window) for half in block.subblocks]


def of_architecture(architecture: Architecture, windows: Windows) -> list[Part]:
    """Both of every layer."""
    by_layer = zip(architecture, windows or [None] * len(architecture), strict=True)
    return [part for block, window in by_layer for part in of_block(block, window)]


def served_windows(windows: Windows, scenarios: Iterable[ScenarioConfig]) -> Windows:
    """The windows that matter: a window as long as every scenario is full attention."""
    longest = max(scenario.input_length + scenario.output_length for scenario in scenarios)
    served = tuple(w if w is not None and w < longest else None for w in windows)
    return served if any(served) else ()
