"""Subblock variants as modules and their training-free initialisation (paper: appendix A).

A variant is a `PuzzleDecoderLayer` whose other half is a no-op, so it carries its own norm and the
same weight names as in a child's layer. `initial_state` makes its weights from the parent's layer:

- fewer KV heads: mean-pool the K and V projections of the merged heads;
- linear attention: the product of O and V (each token attends to itself; V repeated over its query
  group);
- narrower FFN: keep the channels with the largest contribution, mean |x_i| * ||W_down[:, i]||_2;
- linear FFN: the product of down and up, gate ignored.

With `library.initialization: least_squares` the linear variants and the down projection that is
left after pruning solve a ridge regression on calibration activations instead: ours, not the
paper's (docs/log.md measures both).

Shape legend: D hidden, I intermediate, H heads, K KV heads, d head dimension.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from puzzle.model import child
from puzzle.model.architecture import FFN, Architecture, Attention, Block, ModelShape, Subblock
from puzzle.model.modeling_puzzle import PuzzleConfig, PuzzleDecoderLayer
from puzzle.model.parent import Parent

State = dict[str, torch.Tensor]
PREFIXES: dict[type, tuple[str, ...]] = {
    Attention: ("self_attn.", "input_layernorm.", "attention_output_layernorm."),
    FFN: ("mlp.", "post_attention_layernorm.", "feedforward_output_layernorm."),
}


def slot(variant: Subblock) -> str:
    """`attention` or `ffn`: where a variant goes in a block."""
    return "attention" if isinstance(variant, Attention) else "ffn"


def is_trained(variant: Subblock, shape: ModelShape) -> bool:
    """Parent and no-op subblocks cost no training."""
    return variant.kind != "no_op" and variant not in (
        shape.parent_block.attention,
        shape.parent_block.ffn,
    )


def module(
    parent: Parent, index: int, variant: Subblock, attention_implementation: str
) -> PuzzleDecoderLayer:
    """An uninitialised layer with just this subblock, for the parent's layer `index`."""
    no_op = FFN("no_op") if isinstance(variant, Attention) else Attention("no_op")
    block = Block(variant, no_op) if isinstance(variant, Attention) else Block(no_op, variant)  # type: ignore[arg-type]
    return block_module(parent, index, block, attention_implementation)


def block_module(
    parent: Parent, index: int, block: Block, attention_implementation: str
) -> PuzzleDecoderLayer:
    """An uninitialised layer of this block, for the parent's layer `index`."""
    config: PuzzleConfig = parent.child_config(Architecture((block,)), [index])
    config._attn_implementation = child.attention_for(config, attention_implementation)
    return PuzzleDecoderLayer(config, 0, 0)


def load(
    parent: Parent,
    index: int,
    block: Block,
    attention_implementation: str,
    state: Mapping[str, torch.Tensor],
    device: torch.device,
) -> PuzzleDecoderLayer:
    """A frozen layer of this block with these weights, which it takes over without a copy."""
    with torch.device("meta"):
        layer = block_module(parent, index, block, attention_implementation)
    layer.load_state_dict(state, strict=True, assign=True)
    return layer.to(device).requires_grad_(False).eval()


def subblock_state(layer_state: Mapping[str, torch.Tensor], kind: type[Subblock]) -> State:
    """The part of a layer's weights that belongs to its attention or its FFN subblock, norm
    included.
    """
    return {name: tensor for name, tensor in layer_state.items() if name.startswith(PREFIXES[kind])}


@dataclass
class Calibration:
    """What the initialisers need to know of one layer, from calibration tokens.

    `contribution_I` is the paper's channel contribution. The Gram matrices (sums over tokens of
    outer products, None where least squares is not asked for) are of the FFN's intermediate
    activation, of its normed input, of its normed input with its output, and the last two again for
    attention.
    """

    contribution_I: torch.Tensor
    intermediate_II: torch.Tensor | None = None
    ffn_in_DD: torch.Tensor | None = None
    ffn_out_DD: torch.Tensor | None = None
    attention_in_DD: torch.Tensor | None = None
    attention_out_DD: torch.Tensor | None = None


@torch.no_grad()
def calibrate(
    layer: PuzzleDecoderLayer,
    batches: Iterable[torch.Tensor],
    context: Mapping[str, Any],
    least_squares: bool = False,
) -> Calibration:
    """Run the parent's layer on calibration inputs [B, S, D] and sum up."""
    sums: dict[str, torch.Tensor] = {}
    tokens = 0

    def add_product(name: str, left_TN: torch.Tensor, right_TM: torch.Tensor) -> None:
        if name not in sums:
            sums[name] = torch.zeros(left_TN.shape[1], right_TM.shape[1], device=left_TN.device)
        sums[name].addmm_(left_TN.T, right_TM)

    def seen(name: str) -> Any:
        def hook(
            _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            output = output[0] if isinstance(output, tuple) else output
            x_TD, y_TD = given.flatten(0, 1).float(), output.flatten(0, 1).float()
            if name == "down":
                total_I = x_TD.abs().sum(dim=0)
                sums["activation_I"] = (
                    sums["activation_I"] + total_I if "activation_I" in sums else total_I
                )
            if least_squares:
                with torch.autocast(x_TD.device.type, enabled=False):
                    add_product(f"{name}_in", x_TD, x_TD)
                    if name != "down":
                        add_product(f"{name}_out", x_TD, y_TD)

        return hook

    watched = {"down": layer.mlp.down_proj, "ffn": layer.mlp, "attention": layer.self_attn}
    hooks = [
        module.register_forward_hook(seen(name), with_kwargs=True)
        for name, module in watched.items()
    ]
    for x_BSD in batches:
        layer(x_BSD, **context)
        tokens += x_BSD.shape[0] * x_BSD.shape[1]
    for hook in hooks:
        hook.remove()
    contribution_I = channel_contribution(sums["activation_I"], tokens, layer.mlp.down_proj.weight)
    names = ("down_in", "ffn_in", "ffn_out", "attention_in", "attention_out")
    return Calibration(contribution_I, *(sums.get(name) for name in names))


RIDGE = 1e-3  # of the mean diagonal


def solve(gram_NN: torch.Tensor, cross_NM: torch.Tensor) -> torch.Tensor:
    """argmin_W |X W^T - Y|^2 + ridge |W|^2, [M, N], from X^T X and X^T Y; in float64."""
    gram = (
        gram_NN.double() if gram_NN.dtype != torch.double else gram_NN
    )  # in place where it is a copy already
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-12))
    factor = torch.linalg.cholesky(gram, out=gram)
    return torch.cholesky_solve(cross_NM.double(), factor).T.float().contiguous()


def initial_state(
    layer_state: Mapping[str, torch.Tensor],
    variant: Subblock,
    shape: ModelShape,
    found: Calibration,
) -> State:
    """Weights of a variant from those of the parent's layer (names relative to the layer), float32."""
    own = {name: t.float() for name, t in subblock_state(layer_state, type(variant)).items()}
    if variant.kind == "no_op":
        return {}
    if isinstance(variant, Attention):
        return _initial_attention(own, variant, shape, found)
    norm = {name: tensor.clone() for name, tensor in own.items() if "layernorm" in name}
    down_DI = own["mlp.down_proj.weight"]
    if variant.kind == "linear":
        if found.ffn_in_DD is not None and found.ffn_out_DD is not None:
            return norm | {"mlp.linear_mlp.weight": solve(found.ffn_in_DD, found.ffn_out_DD)}
        return norm | {"mlp.linear_mlp.weight": down_DI @ own["mlp.up_proj.weight"]}
    kept = found.contribution_I.topk(variant.intermediate_size).indices.sort().values
    down = down_DI[:, kept].clone()
    if found.intermediate_II is not None and len(kept) < down_DI.shape[1]:
        cross_KD = found.intermediate_II[kept] @ down_DI.T
        down = solve(found.intermediate_II[kept][:, kept].double(), cross_KD)
    return norm | {
        "mlp.gate_proj.weight": own["mlp.gate_proj.weight"][kept].clone(),
        "mlp.up_proj.weight": own["mlp.up_proj.weight"][kept].clone(),
        "mlp.down_proj.weight": down,
    }


def _initial_attention(
    own: State, variant: Attention, shape: ModelShape, found: Calibration
) -> State:
    if variant.kind == "linear":
        if found.attention_in_DD is not None and found.attention_out_DD is not None:
            matrix = solve(found.attention_in_DD, found.attention_out_DD)
        else:
            matrix = linear_attention(own, shape)
        norms = {name: tensor.clone() for name, tensor in own.items() if "layernorm" in name}
        return norms | {"self_attn.linear_attn.weight": matrix}
    pooled = (".k_proj.", ".v_proj.", *([".k_norm."] if shape.qk_norm == "projection" else []))
    return {
        name: pool_kv_heads(t, shape, variant.kv_heads)
        if any(p in name for p in pooled)
        else t.clone()
        for name, t in own.items()
    }


def pool_kv_heads(projection: torch.Tensor, shape: ModelShape, kv_heads: int) -> torch.Tensor:
    """[K*d, ...] -> [kv_heads*d, ...]: the mean over each group of neighbouring KV heads."""
    grouped = projection.unflatten(
        0, (kv_heads, shape.num_key_value_heads // kv_heads, shape.head_dim)
    )
    return grouped.mean(dim=1).flatten(0, 1)


def linear_attention(own: State, shape: ModelShape) -> torch.Tensor:
    """W_O · W_V [D, D], V repeated over the query heads of its group. A linear replacement has no
    bias.
    """
    value_KdD = own["self_attn.v_proj.weight"].unflatten(
        0, (shape.num_key_value_heads, shape.head_dim)
    )
    group = shape.num_attention_heads // shape.num_key_value_heads
    return own["self_attn.o_proj.weight"] @ value_KdD.repeat_interleave(group, dim=0).flatten(0, 1)


def channel_contribution(
    activation_sum_I: torch.Tensor, tokens: int, down_proj_DI: torch.Tensor
) -> torch.Tensor:
    """C_i = mean |x_i| * ||W_down[:, i]||_2, [I]. Paper: appendix A."""
    return activation_sum_I / tokens * down_proj_DI.float().norm(dim=0)
