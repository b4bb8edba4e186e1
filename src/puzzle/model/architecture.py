"""Variants, blocks, architectures and the shape of a parent: the nouns of the project, without
torch.

A subblock variant has a short name that is used in files, tables and the command line: `gqa_2`
(attention with 2 KV heads), `gated_384` (FFN of intermediate size 384), `linear`, `no_op`. A block
is `gqa_2+gated_384`. The checkpoint's `block_configs` (the convention of the nemotron-nas model
type) is written and read here. Paper: section 2.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from puzzle.errors import UserError

KINDS_WITHOUT_SIZE = ("linear", "no_op")


@dataclass(frozen=True, order=True)
class Attention:
    """`kind` is gqa, linear or no_op; `kv_heads` counts for gqa only."""

    kind: str
    kv_heads: int = 0

    @property
    def name(self) -> str:
        return f"gqa_{self.kv_heads}" if self.kind == "gqa" else self.kind


@dataclass(frozen=True, order=True)
class FFN:
    """`kind` is gated, linear or no_op; `intermediate_size` counts for gated only."""

    kind: str
    intermediate_size: int = 0

    @property
    def name(self) -> str:
        return f"gated_{self.intermediate_size}" if self.kind == "gated" else self.kind


@dataclass(frozen=True, order=True)
class Block:
    """One layer: an attention variant and an FFN variant."""

    attention: Attention
    ffn: FFN

    @property
    def name(self) -> str:
        return f"{self.attention.name}+{self.ffn.name}"


Subblock = Attention | FFN


def parse_attention(name: str) -> Attention:
    """`gqa_2`, `linear`, `no_op`; anything else is a `UserError`."""
    kind, _, size = name.partition("_") if name not in KINDS_WITHOUT_SIZE else (name, "", "")
    if kind == "gqa" and size.isdigit() and int(size) > 0:
        return Attention("gqa", int(size))
    if name in KINDS_WITHOUT_SIZE:
        return Attention(name)
    raise UserError(f"attention variant {name!r}: expected gqa_<kv heads>, linear or no_op")


def parse_ffn(name: str) -> FFN:
    """`gated_384`, `linear`, `no_op`; anything else is a `UserError`."""
    kind, _, size = name.partition("_") if name not in KINDS_WITHOUT_SIZE else (name, "", "")
    if kind == "gated" and size.isdigit() and int(size) > 0:
        return FFN("gated", int(size))
    if name in KINDS_WITHOUT_SIZE:
        return FFN(name)
    raise UserError(f"FFN variant {name!r}: expected gated_<intermediate size>, linear or no_op")


def parse_block(name: str) -> Block:
    attention, plus, ffn = name.partition("+")
    if not plus:
        raise UserError(f"block {name!r}: expected <attention>+<ffn>, for example gqa_2+gated_384")
    return Block(parse_attention(attention), parse_ffn(ffn))


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What costs and spaces need to know of a parent; every size in elements."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: str | None = None  # over each head, or over the projection
    norms: int = 1  # of a subblock
    windows: tuple[int | None, ...] = ()  # sliding-window length by layer; none where this is empty
    stock: bool = (
        True  # whether engines serve children of this family without our plugin, blocks aside
    )

    @property
    def parent_block(self) -> Block:
        return Block(
            Attention("gqa", self.num_key_value_heads), FFN("gated", self.intermediate_size)
        )

    def parameters(self, variant: Subblock) -> int:
        """Parameters of a subblock with its norms; a no-op has neither."""
        D, query = self.hidden_size, self.num_attention_heads * self.head_dim
        norms = self.norms * D
        match variant:
            case Attention(kind="gqa", kv_heads=heads):
                key = heads * self.head_dim
                biases = (query + 2 * key) * self.qkv_bias + D * self.output_bias
                qk_norms = {None: 0, "head": 2 * self.head_dim, "projection": query + key}[
                    self.qk_norm
                ]
                return 2 * D * query + 2 * D * key + biases + qk_norms + norms
            case FFN(kind="gated", intermediate_size=size):
                return 3 * D * size + norms
            case _:
                return D * D + norms if variant.kind == "linear" else 0

    @property
    def constant_parameters(self) -> int:
        """Embedding, output head (once where tied) and the final norm."""
        tables = 1 if self.tie_word_embeddings else 2
        return tables * self.vocab_size * self.hidden_size + self.hidden_size

    def kv_elements_per_token(self, variant: Subblock) -> int:
        """Keys and values that one token leaves in the cache of this subblock."""
        if isinstance(variant, Attention) and variant.kind == "gqa":
            return 2 * variant.kv_heads * self.head_dim
        return 0


@dataclass(frozen=True)
class Architecture:
    """One block per layer."""

    blocks: tuple[Block, ...]

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    @classmethod
    def of_parent(cls, shape: ModelShape) -> "Architecture":
        return cls((shape.parent_block,) * shape.num_hidden_layers)

    @classmethod
    def from_names(cls, names: Sequence[str]) -> "Architecture":
        return cls(tuple(parse_block(name) for name in names))

    @property
    def names(self) -> list[str]:
        return [block.name for block in self.blocks]

    def parameters(self, shape: ModelShape) -> int:
        subblocks = sum(
            shape.parameters(b.attention) + shape.parameters(b.ffn) for b in self.blocks
        )
        return shape.constant_parameters + subblocks

    def kv_elements_per_token(self, shape: ModelShape) -> int:
        return sum(shape.kv_elements_per_token(block.attention) for block in self.blocks)

    def block_configs(
        self, num_attention_heads: int, windows: Sequence[int | None] = ()
    ) -> list[dict[str, Any]]:
        """The checkpoint's `block_configs`, one entry per layer. `windows`: sliding-window length
        by layer.
        """
        windows = windows or [None] * len(self.blocks)
        return [
            {
                "attention": {
                    "no_op": block.attention.kind == "no_op",
                    "replace_with_linear": block.attention.kind == "linear",
                    "n_heads_in_group": {
                        "gqa": num_attention_heads // max(1, block.attention.kv_heads),
                        # Without meaning, but vLLM reads it of the first block that is no no-op
                        "linear": 1,
                    }.get(block.attention.kind),
                }
                | (
                    {"window_length": window}
                    if window is not None and block.attention.kind == "gqa"
                    else {}
                ),
                "ffn": {
                    "no_op": block.ffn.kind == "no_op",
                    "replace_with_linear": block.ffn.kind == "linear",
                    "intermediate_size": block.ffn.intermediate_size
                    if block.ffn.kind == "gated"
                    else None,
                },
            }
            for block, window in zip(self.blocks, windows, strict=True)
        ]

    def per_layer_config(
        self, kv_heads: int, intermediate_size: int
    ) -> dict[str, dict[str, int]] | None:
        """transformers' own convention: what differs from the parent's sizes, by layer. It knows
        sizes only, hence None for an architecture with a no-op or a linear replacement."""
        if any(b.attention.kind != "gqa" or b.ffn.kind != "gated" for b in self.blocks):
            return None
        sizes = {"num_key_value_heads": kv_heads, "intermediate_size": intermediate_size}
        layers = [
            {
                "num_key_value_heads": b.attention.kv_heads,
                "intermediate_size": b.ffn.intermediate_size,
            }
            for b in self.blocks
        ]
        different = [
            {key: size for key, size in layer.items() if size != sizes[key]} for layer in layers
        ]
        return {str(index): layer for index, layer in enumerate(different) if layer}

    @classmethod
    def from_block_configs(
        cls, configs: Sequence[dict[str, Any]], num_attention_heads: int
    ) -> "Architecture":
        blocks = []
        for config in configs:
            attention, ffn = config["attention"], config["ffn"]
            kinds = [
                "no_op" if part["no_op"] else "linear" if part["replace_with_linear"] else ""
                for part in (attention, ffn)
            ]
            blocks.append(
                Block(
                    Attention(kinds[0])
                    if kinds[0]
                    else Attention("gqa", num_attention_heads // attention["n_heads_in_group"]),
                    FFN(kinds[1]) if kinds[1] else FFN("gated", ffn["intermediate_size"]),
                )
            )
        return cls(tuple(blocks))
