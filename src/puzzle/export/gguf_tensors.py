"""The tensors of a GGUF file: their names, order, types and rows.

Query and key rows are reordered: transformers rotates dimension j with j + head_dim/2, llama.cpp
2j with 2j + 1. RoPE scaling is written as the factors by which transformers divides each frequency
(`rope_freqs`) and the factor of cos and sin, so that every scaling that does not depend on the
text's length is exact.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from puzzle.errors import UserError
from puzzle.export.gguf_child import kept_layers
from puzzle.export.gguf_types import gguf_package, tensor_type
from puzzle.model import child
from puzzle.model.architecture import Architecture, Block
from puzzle.model.modeling_puzzle import PuzzleConfig
from puzzle.model.weights import Weights

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, TensorNameMap

# The modules of a layer that have weights, in the order of the file
ATTENTION = {
    "gqa": (
        "input_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
    ),
    "linear": ("input_layernorm", "self_attn.linear_attn"),
    "no_op": (),
}
FFN = {
    "gated": ("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "no_op": (),
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of the file.

    Its values are those of `source` in the checkpoint or, where that is empty, `constant`. The rows
    of `heads` heads are reordered; 0 leaves them as they are.
    """

    name: str
    shape: tuple[int, ...]
    type: "GGMLQuantizationType"
    source: str = ""
    heads: int = 0
    constant: torch.Tensor | None = None

    def original(self, weights: Weights) -> torch.Tensor:
        """Values in float32, rows in the checkpoint's order."""
        values = weights[self.source] if self.constant is None else self.constant
        return values.float()

    def read(self, weights: Weights) -> torch.Tensor:
        """Values in float32, rows in llama.cpp's order."""
        values = self.original(weights)
        return interleave(values, self.heads) if self.heads else values


class CheckpointTensor(NamedTuple):
    """A tensor of the checkpoint that goes into the file.

    `renumbered` is its name if the layers that are left out had never been there; `heads` as in
    `Entry`.
    """

    name: str
    renumbered: str
    heads: int = 0


def plan(
    config: PuzzleConfig, architecture: Architecture, weights: Weights, dtype: str
) -> list[Entry]:
    """The tensors of the file, in its order.

    Raises `UserError` that names a tensor of the checkpoint for which llama.cpp has no place.
    """
    package, stored = gguf_package(), set(weights)
    blocks = [(index, architecture.blocks[index]) for index in kept_layers(architecture)]
    names: TensorNameMap = package.get_tensor_name_map(package.MODEL_ARCH.DECI, len(blocks))
    entries = []
    for tensor in _checkpoint_tensors(config, blocks, stored):
        shape = tuple(weights[tensor.name].shape)
        name = names.get_name(tensor.renumbered, try_suffixes=(".weight", ".bias"))
        assert name is not None, tensor.renumbered
        entries.append(
            Entry(
                name=name,
                shape=shape,
                type=tensor_type(shape, dtype),
                source=tensor.name,
                heads=tensor.heads,
            )
        )
    unknown = stored - {entry.source for entry in entries}
    if config.tie_word_embeddings:
        unknown.discard("lm_head.weight")
    if unknown:
        raise UserError(
            f"export gguf: got a tensor {min(unknown)!r}, which llama.cpp's deci models do not "
            "have; expected Llama's tensors and linear attention; "
            "serve this child with another engine"
        )
    return entries + _constants(config, blocks[0][1], dtype)


def _checkpoint_tensors(
    config: PuzzleConfig, blocks: list[tuple[int, Block]], stored: set[str]
) -> Iterator[CheckpointTensor]:
    """The tensors of the checkpoint in the file's order; `blocks`: (layer, block) of those kept.

    Weights are those the checkpoint should hold, biases those it does hold.
    """
    yield CheckpointTensor("model.embed_tokens.weight", "model.embed_tokens.weight")
    for position, (layer, block) in enumerate(blocks):
        heads = {
            "self_attn.q_proj": config.num_attention_heads,
            "self_attn.k_proj": block.attention.kv_heads,
        }
        for module in (*ATTENTION[block.attention.kind], *FFN[block.ffn.kind]):
            names = [f"{module}.weight"]
            can_have_bias = "linear" not in module and "norm" not in module
            if can_have_bias and f"model.layers.{layer}.{module}.bias" in stored:
                names.append(f"{module}.bias")
            for name in names:
                yield CheckpointTensor(
                    f"model.layers.{layer}.{name}",
                    f"model.layers.{position}.{name}",
                    heads.get(module, 0),
                )
    yield CheckpointTensor("model.norm.weight", "model.norm.weight")
    if not config.tie_word_embeddings:
        yield CheckpointTensor("lm_head.weight", "lm_head.weight")


def _constants(config: PuzzleConfig, first_block: Block, dtype: str) -> list[Entry]:
    """Tensors the checkpoint does not have.

    RoPE's factors, and a linear attention that adds nothing for a first layer without attention.
    Its zero matrix has the type of the other matrices, because llama.cpp's quantiser refuses files
    that hold quantised tensors already.
    """
    entries = []
    float32, D = gguf_package().GGMLQuantizationType.F32, config.hidden_size
    factors, _ = rope_factors(config)
    if (factors != 1).any():
        shape = tuple(factors.shape)
        entries.append(Entry(name="rope_freqs.weight", shape=shape, type=float32, constant=factors))
    if first_block.attention.kind == "no_op":
        norm = Entry(
            name="blk.0.attn_norm.weight", shape=(D,), type=float32, constant=torch.ones(D)
        )
        output = Entry(
            name="blk.0.attn_output.weight",
            shape=(D, D),
            type=tensor_type((D, D), dtype),
            constant=torch.zeros(()).expand(D, D),
        )
        entries += [norm, output]
    return entries


def rope_factors(config: PuzzleConfig) -> tuple[torch.Tensor, float]:
    """What the RoPE scaling of transformers amounts to.

    Returns:
        By what each plain frequency is divided, [head_dim/2], and what cos and sin are multiplied
        with.
    """
    without_layers = PuzzleConfig(**{**config.to_dict(), "block_configs": []})
    rotary = child.skeleton(without_layers, torch.device("cpu"), "eager").model.rotary_emb
    plain, _ = type(rotary).compute_default_rope_parameters(config)
    return plain / rotary.inv_freq, float(rotary.attention_scaling)


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads * R, ...] from transformers' order to llama.cpp's.

    In each head of R rows: from the first halves of all pairs, then the second halves, to pair by
    pair.
    """
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def deinterleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `interleave`: in a head of R rows, row 2j + s goes to s * R/2 + j.

    By indices, so that `verify` does not check `interleave` with its own arithmetic.
    """
    rows_per_head = rows.shape[0] // heads
    half = rows_per_head // 2
    place = torch.arange(rows_per_head)
    order = place.remainder(half) * 2 + place.div(half, rounding_mode="floor")
    first_rows = torch.arange(heads)[:, None] * rows_per_head
    return rows[(first_rows + order).flatten()]
