"""Subblock variants as modules and their training-free initialisation (paper: appendix A).

A variant is a `PuzzleDecoderLayer` whose other half is a no-op, so it carries its own norm and the same weight
names as in a child's layer. `initial_state` makes its weights from the parent's layer:

- fewer KV heads: mean-pool the K and V projections of the merged heads;
- linear attention: the product of O and V (each token attends to itself; V repeated over its query group);
- narrower FFN: keep the channels with the largest contribution, mean |x_i| * ||W_down[:, i]||_2;
- linear FFN: the product of down and up, gate ignored.

Shape legend: D hidden, I intermediate, H heads, K KV heads, d head dimension.
"""

from collections.abc import Mapping

import torch

from puzzle.architecture import FFN, Architecture, Attention, Block, ModelShape, Subblock
from puzzle.modeling_puzzle import PuzzleConfig, PuzzleDecoderLayer
from puzzle.parent import Parent

State = dict[str, torch.Tensor]
PREFIXES: dict[type, tuple[str, str]] = {
    Attention: ("self_attn.", "input_layernorm."),
    FFN: ("mlp.", "post_attention_layernorm."),
}


def slot(variant: Subblock) -> str:
    """`attention` or `ffn`: where a variant goes in a block."""
    return "attention" if isinstance(variant, Attention) else "ffn"


def is_trained(variant: Subblock, shape: ModelShape) -> bool:
    """Parent and no-op subblocks cost no training."""
    return variant.kind != "no_op" and variant not in (shape.parent_block.attention, shape.parent_block.ffn)


def module(parent: Parent, variant: Subblock, attention_implementation: str) -> PuzzleDecoderLayer:
    """An uninitialised layer with just this subblock."""
    block = Block(variant, FFN("no_op")) if isinstance(variant, Attention) else Block(Attention("no_op"), variant)
    config: PuzzleConfig = parent.child_config(Architecture((block,)))
    config._attn_implementation = attention_implementation
    return PuzzleDecoderLayer(config, 0, 0)


def subblock_state(layer_state: Mapping[str, torch.Tensor], kind: type[Subblock]) -> State:
    """The part of a layer's weights that belongs to its attention or its FFN subblock, norm included."""
    return {name: tensor for name, tensor in layer_state.items() if name.startswith(PREFIXES[kind])}


def initial_state(
    layer_state: Mapping[str, torch.Tensor], variant: Subblock, shape: ModelShape, contribution_I: torch.Tensor
) -> State:
    """Weights of a variant from those of the parent's layer (names relative to the layer), float32."""
    own = {name: t.float() for name, t in subblock_state(layer_state, type(variant)).items()}
    if variant.kind == "no_op":
        return {}
    if isinstance(variant, Attention):
        if variant.kind == "linear":
            return {
                "input_layernorm.weight": own["input_layernorm.weight"].clone(),
                "self_attn.linear_attn.weight": linear_attention(own, shape),
            }
        return {
            name: pool_kv_heads(t, shape, variant.kv_heads) if ".k_proj." in name or ".v_proj." in name else t.clone()
            for name, t in own.items()
        }
    if variant.kind == "linear":
        return {
            "post_attention_layernorm.weight": own["post_attention_layernorm.weight"].clone(),
            "mlp.linear_mlp.weight": own["mlp.down_proj.weight"] @ own["mlp.up_proj.weight"],
        }
    kept = contribution_I.topk(variant.intermediate_size).indices.sort().values
    return {
        "post_attention_layernorm.weight": own["post_attention_layernorm.weight"].clone(),
        "mlp.gate_proj.weight": own["mlp.gate_proj.weight"][kept].clone(),
        "mlp.up_proj.weight": own["mlp.up_proj.weight"][kept].clone(),
        "mlp.down_proj.weight": own["mlp.down_proj.weight"][:, kept].clone(),
    }


def pool_kv_heads(projection: torch.Tensor, shape: ModelShape, kv_heads: int) -> torch.Tensor:
    """[K*d, ...] -> [kv_heads*d, ...]: the mean over each group of neighbouring KV heads."""
    grouped = projection.unflatten(0, (kv_heads, shape.num_key_value_heads // kv_heads, shape.head_dim))
    return grouped.mean(dim=1).flatten(0, 1)


def linear_attention(own: State, shape: ModelShape) -> torch.Tensor:
    """W_O · W_V [D, D], V repeated over the query heads of its group."""
    value_KdD = own["self_attn.v_proj.weight"].unflatten(0, (shape.num_key_value_heads, shape.head_dim))
    group = shape.num_attention_heads // shape.num_key_value_heads
    return own["self_attn.o_proj.weight"] @ value_KdD.repeat_interleave(group, dim=0).flatten(0, 1)


def channel_contribution(activation_sum_I: torch.Tensor, tokens: int, down_proj_DI: torch.Tensor) -> torch.Tensor:
    """C_i = mean |x_i| * ||W_down[:, i]||_2, [I]. Paper: appendix A."""
    return activation_sum_I / tokens * down_proj_DI.float().norm(dim=0)
