"""The search space: which subblock variants each layer may use, after the deployment targets had
their say.

Torch-free. What an engine cannot serve is left out here, once, and said aloud
(`SearchSpace.left_out`); the facts were checked in the engines' sources and stand in
docs/architecture.md. Paper: section 2.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from puzzle.config import LibraryConfig
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

ENGINES = ("vllm", "vllm-plugin", "llama.cpp", "transformers", "tensorrt-llm")


@dataclass(frozen=True)
class LayerSpace:
    """The variants of one layer, the parent's first, and the blocks (pairs) they may form."""

    attention: tuple[Attention, ...]
    ffn: tuple[FFN, ...]
    blocks: tuple[Block, ...]

    @property
    def subblocks(self) -> tuple[Subblock, ...]:
        return (*self.attention, *self.ffn)


@dataclass(frozen=True)
class SearchSpace:
    layers: tuple[LayerSpace, ...]
    left_out: tuple[str, ...]  # one line per rule of a deployment target that removed something

    @property
    def log10_size(self) -> float:
        """The number of architectures, as a power of ten."""
        return sum(math.log10(len(layer.blocks)) for layer in self.layers)

    def summary(self) -> str:
        counts = sorted({len(layer.blocks) for layer in self.layers})
        per_layer = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return f"{len(self.layers)} layers, {per_layer} blocks a layer, 10^{self.log10_size:.1f} architectures"


def narrow(space: SearchSpace, architectures: Sequence[Sequence[str]], count: int) -> SearchSpace:
    """The parent's block and the `count` others that the architectures use most, layer by layer
    (appendix F.1.1).
    """
    layers = []
    for index, layer in enumerate(space.layers):
        uses = Counter(names[index] for names in architectures)
        ranked = sorted(
            layer.blocks[1:], key=lambda block: -uses[block.name]
        )  # stable: the space's order breaks ties
        kept = {layer.blocks[0], *(block for block in ranked[:count] if uses[block.name])}
        layers.append(_layer_space([block for block in layer.blocks if block in kept]))
    return SearchSpace(tuple(layers), space.left_out)


def _layer_space(blocks: Sequence[Block]) -> LayerSpace:
    attention = dict.fromkeys(block.attention for block in blocks)
    return LayerSpace(
        tuple(attention), tuple(dict.fromkeys(block.ffn for block in blocks)), tuple(blocks)
    )


def attention_variants(config: LibraryConfig, shape: ModelShape) -> list[Attention]:
    parent = shape.num_key_value_heads
    heads = [n for n in range(parent, 0, -1) if parent % n == 0]
    if config.kv_heads != "divisors":
        for n in config.kv_heads:
            if n not in heads:
                raise UserError(
                    f"library.kv_heads: got {n}, but the parent has {parent} KV heads; expected divisors of it: {heads}"
                )
        heads = [parent, *sorted(set(config.kv_heads) - {parent}, reverse=True)]
    variants = [Attention("gqa", n) for n in heads]
    return variants + [
        Attention(kind) for kind in ("linear", "no_op") if kind in config.attention_replacements
    ]


def ffn_variants(config: LibraryConfig, shape: ModelShape) -> list[FFN]:
    parent, multiple = shape.intermediate_size, config.ffn_multiple
    sizes = {
        max(multiple, round(parent * percent / 100 / multiple) * multiple)
        for percent in config.ffn_percent
    }
    variants = [FFN("gated", parent)] + [
        FFN("gated", size) for size in sorted(sizes, reverse=True) if size < parent
    ]
    return variants + [FFN(kind) for kind in ("linear", "no_op") if kind in config.ffn_replacements]


def _servable(layer: int, block: Block, engine: str) -> str | None:
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


def build(config: LibraryConfig, shape: ModelShape, deploy: Sequence[str]) -> SearchSpace:
    """The space of a parent. Raises `UserError` for sizes or layers the parent does not have."""
    if "llama.cpp" in deploy and not shape.stock:
        raise UserError(
            "deploy: llama.cpp serves children of Llama-like parents only; leave it out for this parent"
        )
    if not shape.stock:  # its children need our plugin anyway
        deploy = [engine for engine in deploy if engine != "vllm"]
    attention, ffn = attention_variants(config, shape), ffn_variants(config, shape)
    parent = shape.parent_block
    unknown = set(config.layers) - set(range(shape.num_hidden_layers))
    if unknown:
        last = shape.num_hidden_layers - 1
        raise UserError(
            f"library.layers: got layer {min(unknown)}, expected 0 to {last} (the parent's layers)"
        )
    names = (
        {v.name for v in attention}
        | {v.name for v in ffn}
        | {f"attention.{v.name}" for v in attention}
    )
    names |= {f"ffn.{v.name}" for v in ffn}
    for name in config.budgets:
        if name not in names:
            raise UserError(
                f"library.budgets: got {name!r}, expected a variant of the space: {', '.join(sorted(names))}"
            )
    layers, left_out = [], {}
    for index in range(shape.num_hidden_layers):
        blocks = [Block(a, f) for a in attention for f in ffn]
        if (override := config.layers.get(index)) is not None:
            known = [*(variant.name for variant in attention), *(variant.name for variant in ffn)]
            for name in (*override.attention, *override.ffn):
                if name not in known:
                    raise UserError(
                        f"library.layers.{index}: got {name!r}, expected one of the space's: {', '.join(known)}"
                    )
            kept_attention = {parent.attention, *map(parse_attention, override.attention)}
            kept_ffn = {parent.ffn, *map(parse_ffn, override.ffn)}
            blocks = [b for b in blocks if b.attention in kept_attention and b.ffn in kept_ffn]
        kept = []
        for block in blocks:
            reasons = [reason for engine in deploy if (reason := _servable(index, block, engine))]
            left_out.update(dict.fromkeys(reasons))
            if not reasons or block == parent:
                kept.append(block)
        layers.append(_layer_space(kept))
    return SearchSpace(tuple(layers), tuple(left_out))
