"""The search space: the variants of each layer, filtered by what each deployment target can serve.

Torch-free. What a target cannot serve is left out here and nowhere else, and reported
(`SearchSpace.left_out`). The rules were checked in the engines' sources and are listed in
docs/architecture.md. Paper: section 2.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from puzzle.config import LayerOverride, LibraryConfig
from puzzle.errors import UserError
from puzzle.model.architecture import (
    FFN,
    Attention,
    Block,
    ModelShape,
    Subblock,
    parse_attention,
    parse_ffn,
)

REPLACEMENTS = ("linear", "no_op")  # from the larger to the smaller
Variant = TypeVar("Variant", Attention, FFN)


@dataclass(frozen=True)
class LayerSpace:
    """The variants of one layer, the parent's first, and the blocks (pairs) they may form."""

    attention: tuple[Attention, ...]
    ffn: tuple[FFN, ...]
    blocks: tuple[Block, ...]

    @classmethod
    def of_blocks(cls, blocks: Sequence[Block]) -> "LayerSpace":
        """The space of these blocks, with the variants in the order in which they appear."""
        attention = dict.fromkeys(block.attention for block in blocks)
        ffn = dict.fromkeys(block.ffn for block in blocks)
        return cls(tuple(attention), tuple(ffn), tuple(blocks))

    @property
    def subblocks(self) -> tuple[Subblock, ...]:
        """All variants: attention, then FFN."""
        return (*self.attention, *self.ffn)


@dataclass(frozen=True)
class SearchSpace:
    """What every layer may use."""

    layers: tuple[LayerSpace, ...]
    left_out: tuple[str, ...]  # one line per rule of a deployment target that removed something

    @property
    def log10_size(self) -> float:
        """The number of architectures, as a power of ten."""
        return sum(math.log10(len(layer.blocks)) for layer in self.layers)

    def restricted(self, names: Sequence[Sequence[str]]) -> "SearchSpace":
        """Only the blocks of these names, layer by layer."""
        layers = [
            LayerSpace.of_blocks([block for block in layer.blocks if block.name in kept])
            for layer, kept in zip(self.layers, names, strict=True)
        ]
        return SearchSpace(tuple(layers), self.left_out)

    def summary(self) -> str:
        """One line for people."""
        counts = sorted({len(layer.blocks) for layer in self.layers})
        per_layer = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return (
            f"{len(self.layers)} layers, {per_layer} blocks a layer, "
            f"10^{self.log10_size:.1f} architectures"
        )


def build(config: LibraryConfig, shape: ModelShape, deploy: Sequence[str]) -> SearchSpace:
    """The search space of a parent.

    `deploy` names the engines that must be able to serve every child. The parent's block stays in
    every layer whatever they serve. Raises `UserError` for sizes, names or layers that the parent
    does not have, and for an engine that serves no child of this parent.
    """
    variants = [_layer_variants(config, parent) for parent in shape.parent_blocks]
    _check_layers(config.layers, shape.num_hidden_layers)
    _check_budgets(config.budgets, variants)
    layers = []
    for index, (attention, ffn) in enumerate(variants):
        blocks = [Block(a, f) for a in attention for f in ffn]
        if (override := config.layers.get(index)) is not None:
            _check_override(index, override, attention, ffn)
            blocks = _overridden(blocks, override, shape.parent_blocks[index])
        layers.append(LayerSpace.of_blocks(blocks))
    return servable(SearchSpace(tuple(layers), ()), deploy, shape)


def servable(space: SearchSpace, deploy: Sequence[str], shape: ModelShape) -> SearchSpace:
    """What of a space every engine in `deploy` can serve, and the parent's blocks.

    Raises `UserError` for an engine that serves no child of this parent.
    """
    if "llama.cpp" in deploy and not shape.stock:
        raise UserError(
            "deploy: llama.cpp serves children of Llama-like parents only; "
            "leave it out for this parent"
        )
    if not shape.stock:  # its children need our vLLM plugin, which serves every block
        deploy = [engine for engine in deploy if engine != "vllm"]
    layers: list[LayerSpace] = []
    left_out = dict.fromkeys(space.left_out)  # an ordered set
    for index, layer in enumerate(space.layers):
        kept = []
        for block in layer.blocks:
            rules = _violated_rules(index, block, deploy)
            left_out.update(dict.fromkeys(rules))
            if not rules or block == shape.parent_blocks[index]:
                kept.append(block)
        layers.append(LayerSpace.of_blocks(kept))
    return SearchSpace(tuple(layers), tuple(left_out))


def union(spaces: Sequence[SearchSpace], full: SearchSpace) -> SearchSpace:
    """The blocks that are in any of the spaces, in the order of the full space."""
    names = [
        [block.name for block in layer.blocks if any(block in s.layers[i].blocks for s in spaces)]
        for i, layer in enumerate(full.layers)
    ]
    left_out = [rule for rule in spaces[0].left_out if all(rule in s.left_out for s in spaces)]
    return SearchSpace(full.restricted(names).layers, tuple(left_out))


def narrow(
    space: SearchSpace,
    architectures: Sequence[Sequence[str]],
    count: int,
    best: Sequence[Sequence[str]] = (),
) -> SearchSpace:
    """The parent's block and the `count` others that the architectures use most, layer by layer.

    An architecture is a block name per layer; blocks that none uses are dropped, and ties go to
    the block that comes first in the space. Paper: appendix F.1.1. The blocks of the `best`, one
    architecture per child, are kept even where they are more than `count`: each child that could be
    made before can be made afterwards.
    """
    layers = []
    for index, layer in enumerate(space.layers):
        uses = Counter(names[index] for names in architectures)
        ranked = sorted(layer.blocks[1:], key=lambda block: -uses[block.name])  # a stable sort
        kept = {layer.blocks[0], *(block for block in ranked[:count] if uses[block.name])}
        answers = {names[index] for names in best}
        kept |= {block for block in layer.blocks if block.name in answers}
        layers.append(LayerSpace.of_blocks([block for block in layer.blocks if block in kept]))
    return SearchSpace(tuple(layers), space.left_out)


def _layer_variants(config: LibraryConfig, parent: Block) -> tuple[list[Attention], list[FFN]]:
    """What a layer whose parent has this block may use."""
    return attention_variants(config, parent.attention), ffn_variants(config, parent.ffn)


def attention_variants(config: LibraryConfig, variant: Attention) -> list[Attention]:
    """The parent's attention, fewer KV heads in falling order, and the replacements.

    Raises `UserError` for a number of KV heads that does not divide the parent's.
    """
    replacements = [
        Attention(kind) for kind in REPLACEMENTS if kind in config.attention_replacements
    ]
    if variant.kind != "gqa":
        return _smaller(variant, replacements)
    parent = variant.kv_heads
    heads = [n for n in range(parent, 0, -1) if parent % n == 0]
    if config.kv_heads != "divisors":
        for n in config.kv_heads:
            if n not in heads:
                raise UserError(
                    f"library.kv_heads: got {n}, but the parent has {parent} KV heads; "
                    f"expected divisors of it: {heads}"
                )
        heads = [parent, *sorted(set(config.kv_heads) - {parent}, reverse=True)]
    return [Attention("gqa", n) for n in heads] + replacements


def _smaller(variant: Variant, replacements: list[Variant]) -> list[Variant]:
    """A replacement of the parent's own, and the replacements that are smaller still."""
    smaller = REPLACEMENTS[REPLACEMENTS.index(variant.kind) + 1 :]
    return [variant] + [other for other in replacements if other.kind in smaller]


def ffn_variants(config: LibraryConfig, variant: FFN) -> list[FFN]:
    """The parent's FFN, narrower ones in falling order, and the replacements.

    Sizes are rounded to `ffn_multiple`; those that do not end up below the parent's are left out.
    """
    replacements = [FFN(kind) for kind in REPLACEMENTS if kind in config.ffn_replacements]
    if variant.kind != "gated":
        return _smaller(variant, replacements)
    parent, multiple = variant.intermediate_size, config.ffn_multiple
    sizes = {
        max(multiple, round(parent * percent / 100 / multiple) * multiple)
        for percent in config.ffn_percent
    }
    narrower = [size for size in sorted(sizes, reverse=True) if size < parent]
    return [FFN("gated", size) for size in (parent, *narrower)] + replacements


def _check_layers(overrides: Mapping[int, LayerOverride], num_hidden_layers: int) -> None:
    unknown = set(overrides) - set(range(num_hidden_layers))
    if unknown:
        raise UserError(
            f"library.layers: got layer {min(unknown)}, "
            f"expected 0 to {num_hidden_layers - 1} (the parent's layers)"
        )


def _check_budgets(
    budgets: Mapping[str, int], variants: Sequence[tuple[Sequence[Attention], Sequence[FFN]]]
) -> None:
    """A budget is of all attentions or FFNs, of a variant's name, or of `attention.NAME`."""
    attention_names = {variant.name for attention, _ in variants for variant in attention}
    ffn_names = {variant.name for _, ffn in variants for variant in ffn}
    names = attention_names | ffn_names
    names |= {f"attention.{name}" for name in attention_names}
    names |= {f"ffn.{name}" for name in ffn_names}
    for name in budgets:
        if name not in names | {"attention", "ffn"}:
            raise UserError(
                f"library.budgets: got {name!r}, "
                f"expected attention, ffn or a variant of the space: {', '.join(sorted(names))}"
            )


def _check_override(
    layer: int, override: LayerOverride, attention: Sequence[Attention], ffn: Sequence[FFN]
) -> None:
    halves = (("attention", override.attention, attention), ("ffn", override.ffn, ffn))
    for half, asked, variants in halves:
        names = [variant.name for variant in variants]
        for name in asked:
            if name not in names:
                raise UserError(
                    f"library.layers.{layer}.{half}: got {name!r}, expected one of the space's: "
                    f"{', '.join(names)}"
                )


def _overridden(
    blocks: Sequence[Block], override: LayerOverride, parent_block: Block
) -> list[Block]:
    """The blocks made of the parent's variants and those that a layer's override names."""
    attention = {parent_block.attention, *map(parse_attention, override.attention)}
    ffn = {parent_block.ffn, *map(parse_ffn, override.ffn)}
    return [block for block in blocks if block.attention in attention and block.ffn in ffn]


def _violated_rules(layer: int, block: Block, deploy: Sequence[str]) -> list[str]:
    """The rules by which some of the engines cannot serve this block."""
    rules = [_violated_rule(layer, block, engine) for engine in deploy]
    return [rule for rule in rules if rule is not None]


def _violated_rule(layer: int, block: Block, engine: str) -> str | None:
    """None where `engine` serves this block, otherwise the rule that forbids it."""
    if engine == "vllm":
        if "linear" in (block.attention.kind, block.ffn.kind):
            return "stock vllm serves no linear replacement (vllm-plugin does)"
        if layer == 0 and block.attention.kind == "no_op":
            return "stock vllm fails on a no-op attention in layer 0 (vllm-plugin serves it)"
    if engine == "llama.cpp":
        if block.ffn.kind == "linear":
            return "llama.cpp serves no linear FFN"
        if block.ffn.kind == "no_op" and block.attention.kind != "no_op":
            return "llama.cpp loses the attention output where only the FFN is a no-op"
    return None
