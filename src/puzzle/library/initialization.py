"""The first weights of every variant, made from the parent's layer (paper: appendix A).

- fewer KV heads: mean-pool the K and V projections of the merged heads (`pool_kv_heads`);
- linear attention: the product of O and V, for each token attends to itself; V is repeated over
  its query group;
- narrower FFN: keep the channels with the largest contribution, mean |x_i| * ||W_down[:, i]||_2;
- linear FFN: the product of down and up, gate ignored.

With `library.initialization: least_squares` the linear variants, and the down projection that is
left after pruning, solve a ridge regression on calibration activations instead, which shrinks
towards the weights above: with few tokens it stays near them, with many it fits. How much it
shrinks is chosen by cross-validation: Gram matrices are summed up over two folds of the tokens, and
weights that are fitted to one are judged on the other. Ours, not the paper's
(benchmarks/least_squares.py compares them).

Shape legend: B batch, S sequence, T = B * S tokens, D hidden, I intermediate, K KV heads, d head
dimension, F the two folds.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from puzzle.model.architecture import Attention, ModelShape, Subblock
from puzzle.model.modeling_puzzle import PuzzleDecoderLayer
from puzzle.model.variants import State, subblock_state

RIDGES = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4)  # as shares of the Gram matrix's diagonal
CHECKED_OUTPUTS = 256  # about so many rows of the weights choose the ridge
FOLDS = 2


@dataclass(frozen=True)
class Calibration:
    """What the initialisers need to know of one layer, from calibration tokens.

    `contribution_I` is the paper's channel contribution. The Gram matrices (sums over the tokens of
    each fold of outer products, None where least squares is not asked for) are of the FFN's
    intermediate activation, of its normed input, of its normed input with its output, and the last
    two again for attention.
    """

    contribution_I: torch.Tensor | None = None  # None where the parent has no gated FFN
    intermediate_FII: torch.Tensor | None = None
    ffn_in_FDD: torch.Tensor | None = None
    ffn_out_FDD: torch.Tensor | None = None
    attention_in_FDD: torch.Tensor | None = None
    attention_out_FDD: torch.Tensor | None = None


@dataclass
class _Sums:
    """Sums over the tokens that modules have seen, filled by forward hooks."""

    products: bool
    activation_I: torch.Tensor | None = None
    grams: dict[str, torch.Tensor] = field(default_factory=dict)

    def add_activation(self, x_TI: torch.Tensor) -> None:
        total_I = x_TI.abs().sum(dim=0)
        self.activation_I = total_I if self.activation_I is None else self.activation_I + total_I

    def add_product(self, name: str, left_TN: torch.Tensor, right_TM: torch.Tensor) -> None:
        """The first half of a batch's tokens goes to one fold, the second to the other."""
        if name not in self.grams:
            size = FOLDS, left_TN.shape[1], right_TM.shape[1]
            self.grams[name] = torch.zeros(size, device=left_TN.device)
        folds = (part.tensor_split(FOLDS) for part in (left_TN, right_TM))
        with torch.autocast(left_TN.device.type, enabled=False):
            for gram_NM, left, right in zip(self.grams[name], *folds, strict=True):
                gram_NM.addmm_(left.T, right)

    def watch_down(self, module: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
        """Sum up what goes into the FFN's down projection."""

        def before(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x_TI = args[0].flatten(0, 1).float()
            self.add_activation(x_TI)
            if self.products:
                self.add_product("down_in", x_TI, x_TI)

        return module.register_forward_pre_hook(before)

    def watch(self, name: str, module: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
        """Sum up the outer products of a module's input with itself and with its output."""

        def after(
            _: torch.nn.Module,
            args: tuple[torch.Tensor, ...],
            output: torch.Tensor | tuple[torch.Tensor, ...],
        ) -> None:
            y_BSD = output[0] if isinstance(output, tuple) else output
            x_TD, y_TD = args[0].flatten(0, 1).float(), y_BSD.flatten(0, 1).float()
            self.add_product(f"{name}_in", x_TD, x_TD)
            self.add_product(f"{name}_out", x_TD, y_TD)

        return module.register_forward_hook(after)


@torch.no_grad()
def calibrate(
    layer: PuzzleDecoderLayer,
    batches: Iterable[torch.Tensor],
    context: Mapping[str, object],
    least_squares: bool = False,
) -> Calibration:
    """Run the parent's layer on calibration inputs [B, S, D] and sum up what it does."""
    sums, tokens = _Sums(least_squares), 0
    mlp, attention = layer.mlp, layer.self_attn
    down_proj: torch.nn.Linear | None = mlp.down_proj if isinstance(mlp, LlamaMLP) else None
    hooks = [] if down_proj is None else [sums.watch_down(down_proj)]
    if least_squares:
        halves = {"ffn": mlp, "attention": attention}
        hooks += [sums.watch(name, half) for name, half in halves.items() if half is not None]
    for x_BSD in batches:
        layer(x_BSD, **context)
        tokens += x_BSD.shape[0] * x_BSD.shape[1]
    for hook in hooks:
        hook.remove()
    contribution_I = None
    if down_proj is not None and sums.activation_I is not None:
        contribution_I = channel_contribution(sums.activation_I, tokens, down_proj.weight)
    names = ("down_in", "ffn_in", "ffn_out", "attention_in", "attention_out")
    return Calibration(contribution_I, *(sums.grams.get(name) for name in names))


@torch.no_grad()
def solve(gram_FNN: torch.Tensor, cross_FNM: torch.Tensor, near_MN: torch.Tensor) -> torch.Tensor:
    """argmin_W |X W^T - Y|^2 + ridge |(W - near) D|^2, [M, N], from X^T X and X^T Y of two folds.

    D^2 is the diagonal of X^T X, so that the result follows any scale of the channels. The ridge is
    the one of `RIDGES` whose weights, fitted to either fold, gain most on the other one, going by
    the fold that gains less. Where none of them gains on both, the result is `near`.
    """
    near, grams = near_MN.double(), gram_FNN.double()
    left_FNM = cross_FNM.double() - grams @ near.T  # what the weights to stay near do not explain
    energy_N = grams.diagonal(dim1=1, dim2=2).sum(0)
    scale_N = energy_N.clamp_min(max(float(energy_N.max()) * 1e-12, 1e-30)).rsqrt()
    checked_FNM = left_FNM[:, :, :: max(1, left_FNM.shape[2] // CHECKED_OUTPUTS)]
    best_gain, best_ridge = 0.0, None
    for ridge in RIDGES:
        gains = []
        for fold, other in ((0, 1), (1, 0)):
            change_NM = _change(grams[fold], checked_FNM[fold], scale_N, ridge)
            fit_NM = 2 * checked_FNM[other] - grams[other] @ change_NM
            gains.append(float((change_NM * fit_NM).sum()))  # by how much |Y - X W^T|^2 falls
        if min(gains) > best_gain:
            best_gain, best_ridge = min(gains), ridge
        elif best_ridge is not None:
            break  # smaller ones fit noise
    if best_ridge is None:
        return near_MN.float().contiguous()
    change_NM = _change(grams.sum(0), left_FNM.sum(0), scale_N, best_ridge)
    return (near + change_NM.T).float().contiguous()


def _change(
    gram_NN: torch.Tensor, left_NM: torch.Tensor, scale_N: torch.Tensor, ridge: float
) -> torch.Tensor:
    """The solution of (X^T X + ridge D^2) change = left, [N, M]; NaN where it has none."""
    scaled = gram_NN * scale_N[:, None] * scale_N
    scaled.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if failed.item():
        return torch.full_like(left_NM, torch.nan)
    return scale_N[:, None] * torch.cholesky_solve(scale_N[:, None] * left_NM, factor)


def initial_state(
    layer_state: Mapping[str, torch.Tensor],
    variant: Subblock,
    shape: ModelShape,
    calibration: Calibration,
) -> State:
    """Weights of a variant from those of the parent's layer, float32.

    Args:
        layer_state: the parent's layer; names are relative to the layer.
        variant: what to make.
        shape: of the parent.
        calibration: of the same layer. With Gram matrices, least squares are used.
    """
    parent_state = {
        name: tensor.float() for name, tensor in subblock_state(layer_state, type(variant)).items()
    }
    if variant.kind == "no_op":
        return {}
    if isinstance(variant, Attention):
        return _initial_attention(parent_state, variant, shape, calibration)
    norms = _norms(parent_state)
    if variant.kind == "linear":
        return norms | {"mlp.linear_mlp.weight": _initial_linear_ffn(parent_state, calibration)}
    down_DI = parent_state["mlp.down_proj.weight"]
    assert calibration.contribution_I is not None
    kept = calibration.contribution_I.topk(variant.intermediate_size).indices.sort().values
    down = down_DI[:, kept].clone()
    if calibration.intermediate_FII is not None and len(kept) < down_DI.shape[1]:
        rows_FKI = calibration.intermediate_FII[:, kept]
        down = solve(rows_FKI[:, :, kept], rows_FKI @ down_DI.T, down)
    return norms | {
        "mlp.gate_proj.weight": parent_state["mlp.gate_proj.weight"][kept].clone(),
        "mlp.up_proj.weight": parent_state["mlp.up_proj.weight"][kept].clone(),
        "mlp.down_proj.weight": down,
    }


def _norms(parent_state: State) -> State:
    return {name: t.clone() for name, t in parent_state.items() if "layernorm" in name}


def _initial_linear_ffn(parent_state: State, calibration: Calibration) -> torch.Tensor:
    matrix = parent_state["mlp.down_proj.weight"] @ parent_state["mlp.up_proj.weight"]
    if calibration.ffn_in_FDD is not None and calibration.ffn_out_FDD is not None:
        return solve(calibration.ffn_in_FDD, calibration.ffn_out_FDD, matrix)
    return matrix


def _initial_attention(
    parent_state: State, variant: Attention, shape: ModelShape, calibration: Calibration
) -> State:
    if variant.kind == "linear":
        matrix = linear_attention(parent_state, shape)
        if calibration.attention_in_FDD is not None and calibration.attention_out_FDD is not None:
            matrix = solve(calibration.attention_in_FDD, calibration.attention_out_FDD, matrix)
        return _norms(parent_state) | {"self_attn.linear_attn.weight": matrix}
    pooled = (".k_proj.", ".v_proj.", *([".k_norm."] if shape.qk_norm == "projection" else []))
    return {
        name: pool_kv_heads(tensor, shape.head_dim, variant.kv_heads)
        if any(part in name for part in pooled)
        else tensor.clone()
        for name, tensor in parent_state.items()
    }


def pool_kv_heads(projection: torch.Tensor, head_dim: int, kv_heads: int) -> torch.Tensor:
    """[K*d, ...] -> [kv_heads*d, ...]: the mean over each group of neighbouring KV heads."""
    grouped = projection.unflatten(0, (kv_heads, -1, head_dim))
    pooled: torch.Tensor = grouped.mean(dim=1).flatten(0, 1)
    return pooled


def linear_attention(parent_state: State, shape: ModelShape) -> torch.Tensor:
    """W_O W_V [D, D], V repeated over the query heads of its group; without a bias."""
    value_KdD = parent_state["self_attn.v_proj.weight"].unflatten(0, (-1, shape.head_dim))
    group = shape.num_attention_heads // len(value_KdD)
    value_HdD = value_KdD.repeat_interleave(group, dim=0)
    matrix: torch.Tensor = parent_state["self_attn.o_proj.weight"] @ value_HdD.flatten(0, 1)
    return matrix


def channel_contribution(
    activation_sum_I: torch.Tensor, tokens: int, down_proj_DI: torch.Tensor
) -> torch.Tensor:
    """C_i = mean |x_i| * ||W_down[:, i]||_2, [I]. Paper: appendix A."""
    norm_I: torch.Tensor = down_proj_DI.float().norm(dim=0)
    return activation_sum_I / tokens * norm_I
