"""Variants, blocks, architectures and the shape of a parent: the nouns of the project.

A subblock variant has a short name that is used in files, tables and the command line: `gqa_2`
(attention with 2 KV heads), `gated_384` (FFN of intermediate size 384), `linear`, `no_op`. A block
is `gqa_2+gated_384`. Everything that follows from a variant alone (which half of a block it is, its
name, the block that holds nothing else) is said here once. The checkpoint's `block_configs` (the
convention of the nemotron-nas model type) is written and read in `block_configs.py`. Nothing here
needs torch. Paper: section 2.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from puzzle.errors import UserError

Slot = Literal["attention", "ffn"]
KINDS_WITHOUT_SIZE = ("linear", "no_op")


@dataclass(frozen=True, order=True)
class Attention:
    """An attention variant: `kind` is gqa, linear or no_op; `kv_heads` counts for gqa only."""

    kind: str
    kv_heads: int = 0

    @property
    def name(self) -> str:
        """`gqa_2`, `linear` or `no_op`."""
        return f"gqa_{self.kv_heads}" if self.kind == "gqa" else self.kind

    @property
    def slot(self) -> Slot:
        """The half of a block this variant takes."""
        return "attention"

    @property
    def size(self) -> int:
        """KV heads; 0 for variants without a size."""
        return self.kv_heads

    @property
    def alone(self) -> "Block":
        """The block that holds this variant and nothing else: its other half is a no-op."""
        return Block(self, NO_FFN)


@dataclass(frozen=True, order=True)
class FFN:
    """An FFN variant: `kind` is gated, linear or no_op; `intermediate_size` is of gated only."""

    kind: str
    intermediate_size: int = 0

    @property
    def name(self) -> str:
        """`gated_384`, `linear` or `no_op`."""
        return f"gated_{self.intermediate_size}" if self.kind == "gated" else self.kind

    @property
    def slot(self) -> Slot:
        """The half of a block this variant takes."""
        return "ffn"

    @property
    def size(self) -> int:
        """Intermediate size; 0 for variants without a size."""
        return self.intermediate_size

    @property
    def alone(self) -> "Block":
        """The block that holds this variant and nothing else: its other half is a no-op."""
        return Block(NO_ATTENTION, self)


Subblock = Attention | FFN
NO_ATTENTION, NO_FFN = Attention("no_op"), FFN("no_op")


@dataclass(frozen=True, order=True)
class Block:
    """One layer: an attention variant and an FFN variant."""

    attention: Attention
    ffn: FFN

    @property
    def name(self) -> str:
        """`gqa_2+gated_384`."""
        return f"{self.attention.name}+{self.ffn.name}"

    @property
    def slot(self) -> Literal["block"]:
        """Stands beside a subblock's slot in the names of library files."""
        return "block"

    @property
    def subblocks(self) -> tuple[Attention, FFN]:
        """Both halves, in the order in which a layer applies them."""
        return self.attention, self.ffn

    @property
    def is_no_op(self) -> bool:
        """Whether the layer does nothing at all."""
        return self == Block(NO_ATTENTION, NO_FFN)


def file_stem(layer: int, variant: Subblock | Block) -> str:
    """The name, without suffix, of a variant's files in the library: `007.attention.gqa_2`."""
    return f"{layer:03d}.{variant.slot}.{variant.name}"


def _parse(name: str, sized_kind: str) -> tuple[str, int] | None:
    """(kind, size) of a variant's name, or None where it is no such name."""
    if name in KINDS_WITHOUT_SIZE:
        return name, 0
    kind, _, size = name.partition("_")
    is_number = size.isdecimal() and size.isascii() and len(size) < 10
    if kind == sized_kind and is_number and int(size) > 0:
        return kind, int(size)
    return None


def parse_attention(name: str) -> Attention:
    """Read `gqa_2`, `linear` or `no_op`. Raises `UserError` for anything else."""
    parsed = _parse(name, "gqa")
    if parsed is None:
        raise UserError(f"attention variant {name!r:.80}: expected gqa_<kv heads>, linear or no_op")
    return Attention(*parsed)


def parse_ffn(name: str) -> FFN:
    """Read `gated_384`, `linear` or `no_op`. Raises `UserError` for anything else."""
    parsed = _parse(name, "gated")
    if parsed is None:
        raise UserError(
            f"FFN variant {name!r:.80}: expected gated_<intermediate size>, linear or no_op"
        )
    return FFN(*parsed)


def parse_block(name: str) -> Block:
    """Read `gqa_2+gated_384`. Raises `UserError` for anything else."""
    attention, plus, ffn = name.partition("+")
    if not plus:
        raise UserError(
            f"block {name!r:.80}: expected <attention>+<ffn>, for example gqa_2+gated_384"
        )
    return Block(parse_attention(attention), parse_ffn(ffn))


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What costs and spaces need to know of a parent; every size in elements.

    `num_key_value_heads` and `intermediate_size` are the largest of any layer.
    """

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
    qk_norm: Literal["head", "projection"] | None = None  # over each head, or over the projection
    norms: int = 1  # of a subblock
    windows: tuple[int | None, ...] = ()  # sliding window by layer, in tokens; empty: none anywhere
    stock: bool = True  # whether engines serve children of this family without our plugin
    blocks: tuple[Block, ...] = ()  # of every layer, where they differ; empty: the widest in all

    @property
    def widest_block(self) -> Block:
        """The most KV heads and the largest width of any layer of the parent."""
        return Block(
            Attention("gqa", self.num_key_value_heads), FFN("gated", self.intermediate_size)
        )

    @property
    def parent_blocks(self) -> tuple[Block, ...]:
        """The parent's own block in every layer."""
        return self.blocks or (self.widest_block,) * self.num_hidden_layers

    def parameters(self, variant: Subblock | Block) -> int:
        """Parameters of a subblock with its norms, or of both of a block; a no-op has none."""
        D, query = self.hidden_size, self.num_attention_heads * self.head_dim
        norms = self.norms * D
        match variant:
            case Block():
                return sum(self.parameters(half) for half in variant.subblocks)
            case Attention(kind="gqa", kv_heads=heads):
                key = heads * self.head_dim
                biases = (query + 2 * key) * self.qkv_bias + D * self.output_bias
                by_kind = {None: 0, "head": 2 * self.head_dim, "projection": query + key}
                return 2 * D * query + 2 * D * key + biases + by_kind[self.qk_norm] + norms
            case FFN(kind="gated", intermediate_size=size):
                return 3 * D * size + norms
            case _:
                return D * D + norms if variant.kind == "linear" else 0

    @property
    def constant_parameters(self) -> int:
        """Embedding, output head (once where tied) and the final norm."""
        tables = 1 if self.tie_word_embeddings else 2
        return tables * self.vocab_size * self.hidden_size + self.hidden_size

    @property
    def passing_elements(self) -> int:
        """Of a token that goes through a layer: residual, norms, and the FFN's intermediates."""
        return 6 * self.hidden_size + 3 * self.intermediate_size

    def kv_elements_per_token(self, variant: Subblock | Block) -> int:
        """Keys and values that one token leaves in the cache of this subblock or block."""
        attention = variant.attention if isinstance(variant, Block) else variant
        if isinstance(attention, Attention) and attention.kind == "gqa":
            return 2 * attention.kv_heads * self.head_dim
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
        """The parent's own block in every layer."""
        return cls(shape.parent_blocks)

    @classmethod
    def from_names(cls, names: Sequence[str]) -> "Architecture":
        """From block names such as `gqa_2+gated_384`. Raises `UserError` for one that is none."""
        return cls(tuple(parse_block(name) for name in names))

    @property
    def names(self) -> list[str]:
        """The blocks' names, in the order of the layers."""
        return [block.name for block in self.blocks]

    def parameters(self, shape: ModelShape) -> int:
        """Parameters of the whole model, embedding and head included."""
        return shape.constant_parameters + sum(shape.parameters(block) for block in self.blocks)

    def kv_elements_per_token(self, shape: ModelShape) -> int:
        """Keys and values that one token leaves in the cache of all layers."""
        return sum(shape.kv_elements_per_token(block) for block in self.blocks)
