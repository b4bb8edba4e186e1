import copy

import numpy as np
import pytest
import torch

from puzzle.library import initialization
from puzzle.model import variants
from puzzle.model.architecture import FFN, Attention


@pytest.fixture(scope="module")
def layer(tiny):
    return tiny.load(torch.float32, torch.device("cpu")).model.layers[1]


def initialised(tiny, layer, variant, contribution=None):
    """The variant as a module with its first weights."""
    if contribution is None:
        contribution = torch.rand(tiny.shape.intermediate_size)
    calibration = initialization.Calibration(contribution)
    module = variants.block_module(tiny, 0, variant.alone, "sdpa")
    module.load_state_dict(
        initialization.initial_state(layer.state_dict(), variant, tiny.shape, calibration)
    )
    return module.eval()


def context(length):
    still = (torch.ones(1, length, 16), torch.zeros(1, length, 16))
    return {"attention_mask": {None: None}, "position_embeddings": {None: still}}  # no window


@torch.no_grad()
def test_linear_attention_is_the_parents_where_a_token_sees_only_itself(tiny, layer):
    x = torch.randn(6, 1, 64)
    linear = initialised(tiny, layer, Attention("linear"))
    torch.testing.assert_close(
        linear.attention(x, **context(1)), layer.attention(x, **context(1)), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_merging_equal_kv_heads_changes_nothing(tiny, layer):
    twin = copy.deepcopy(layer)
    for projection in (twin.self_attn.k_proj, twin.self_attn.v_proj):
        projection.weight[16:] = projection.weight[:16]
    merged = initialised(tiny, twin, Attention("gqa", 1))
    x = torch.randn(2, 7, 64)
    torch.testing.assert_close(
        merged.attention(x, **context(7)), twin.attention(x, **context(7)), rtol=1e-4, atol=1e-5
    )


def test_merged_heads_are_the_mean_of_their_group(tiny, layer):
    state = initialization.initial_state(
        layer.state_dict(),
        Attention("gqa", 1),
        tiny.shape,
        initialization.Calibration(torch.ones(96)),
    )
    heads = layer.self_attn.k_proj.weight.view(2, 16, 64)
    torch.testing.assert_close(state["self_attn.k_proj.weight"], (heads[0] + heads[1]) / 2)


@torch.no_grad()
def test_a_narrower_ffn_is_the_parents_with_the_weakest_channels_silenced(tiny, layer):
    contribution = torch.rand(96)
    narrow = initialised(tiny, layer, FFN("gated", 40), contribution)
    h = torch.randn(3, 5, 64)
    kept = contribution.argsort(descending=True)[:40]
    normed = layer.post_attention_layernorm(h)
    x = layer.mlp.act_fn(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
    mask = torch.zeros(96).index_fill(0, kept, 1.0)
    torch.testing.assert_close(
        narrow.feed_forward(h), h + layer.mlp.down_proj(x * mask), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_a_linear_ffn_is_down_times_up(tiny, layer):
    h = torch.randn(3, 5, 64)
    normed = layer.post_attention_layernorm(h)
    expected = h + layer.mlp.down_proj(layer.mlp.up_proj(normed))
    torch.testing.assert_close(
        initialised(tiny, layer, FFN("linear")).feed_forward(h), expected, rtol=1e-4, atol=1e-4
    )


def test_the_channel_contribution_is_the_papers_formula():
    x, down = torch.randn(50, 8), torch.randn(3, 8)
    expected = [(x[:, i].abs().mean() * down[:, i].norm()).item() for i in range(8)]
    contribution = initialization.channel_contribution(x.abs().sum(0), 50, down)
    assert contribution.tolist() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_as_many_kv_heads_as_the_parent_is_the_identity(tiny, layer):
    state = initialization.initial_state(
        layer.state_dict(),
        Attention("gqa", 2),
        tiny.shape,
        initialization.Calibration(torch.ones(96)),
    )
    assert all(t.equal(layer.state_dict()[name]) for name, t in state.items())


@torch.no_grad()
def test_pruning_no_channel_is_the_identity(tiny, layer):
    h = torch.randn(3, 5, 64)
    assert initialised(tiny, layer, FFN("gated", 96)).feed_forward(h).equal(layer.feed_forward(h))


@torch.no_grad()
def test_the_parents_subblocks_reproduce_its_block_bitwise(tiny, layer):
    block = variants.block_module(tiny, 0, tiny.shape.widest_block, "sdpa")
    halves = (variants.subblock_state(layer.state_dict(), kind) for kind in (Attention, FFN))
    block.load_state_dict({name: t for state in halves for name, t in state.items()})
    x = torch.randn(2, 7, 64)
    assert block(x, **context(7)).equal(layer(x, **context(7)))


def calibrated(layer, least_squares=True, count=30):
    torch.manual_seed(1)
    batches = [torch.randn(4, 7, 64) for _ in range(count)]
    return batches, initialization.calibrate(layer, batches, context(7), least_squares)


@torch.no_grad()
def test_calibration_sees_the_activation_before_the_down_projection(tiny, layer):
    batches, calibration = calibrated(layer, least_squares=False)
    h = torch.cat([layer.attention(x, **context(7)) for x in batches])
    normed = layer.post_attention_layernorm(h)
    x = layer.mlp.act_fn(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
    expected = initialization.channel_contribution(
        x.abs().sum((0, 1)), 30 * 28, layer.mlp.down_proj.weight
    )
    torch.testing.assert_close(calibration.contribution_I, expected)
    assert calibration.intermediate_FII is None


@torch.no_grad()
@pytest.mark.parametrize(
    "variant", [FFN("linear"), FFN("gated", 40), Attention("linear")], ids=lambda v: v.name
)
def test_least_squares_is_numpys_where_the_ridge_is_small(tiny, layer, variant, monkeypatch):
    """Oracle: numpy.linalg.lstsq on the activations themselves."""
    monkeypatch.setattr(initialization, "RIDGES", (1e-9,))
    batches, calibration = calibrated(layer, count=300)
    x = torch.cat(batches)
    if isinstance(variant, Attention):
        inputs = layer.input_layernorm(x)
        targets = layer.attention(x, **context(7)) - x
    else:
        h = layer.attention(x, **context(7))
        inputs, targets = layer.post_attention_layernorm(h), layer.feed_forward(h) - h
    if variant.kind == "gated":
        kept = calibration.contribution_I.topk(40).indices.sort().values
        inputs = (layer.mlp.act_fn(layer.mlp.gate_proj(inputs)) * layer.mlp.up_proj(inputs))[
            ..., kept
        ]
    expected, *_ = np.linalg.lstsq(
        inputs.flatten(0, 1).double().numpy(), targets.flatten(0, 1).double().numpy()
    )
    state = initialization.initial_state(layer.state_dict(), variant, tiny.shape, calibration)
    matrix = next(t for name, t in state.items() if "linear_" in name or "down_proj" in name)
    torch.testing.assert_close(matrix.double(), torch.from_numpy(expected.T), rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.3, 0.7, 1.0, 3.0, 10.0, 30.0])
@pytest.mark.parametrize(
    "variant", [FFN("gated", 64), FFN("linear"), Attention("linear")], ids=lambda v: v.name
)
def test_least_squares_never_lose_to_the_first_weights_of_the_paper(tiny, layer, variant, ratio):
    """Errors on other tokens, by calibration tokens for each channel: few must not ruin it."""
    generator = torch.Generator().manual_seed(int(10 * ratio))
    width = tiny.shape.intermediate_size if variant.kind == "gated" else tiny.shape.hidden_size
    tokens = max(2, round(ratio * width))
    mixing = torch.randn(64, 64, generator=generator) * torch.linspace(2, 0.1, 64)  # correlated
    seen, unseen = (torch.randn(1, n, 64, generator=generator) @ mixing for n in (tokens, 4000))

    def error(least_squares):
        calibration = initialization.calibrate(layer, [seen], context(tokens), least_squares)
        state = initialization.initial_state(layer.state_dict(), variant, tiny.shape, calibration)
        module = variants.block_module(tiny, 0, variant.alone, "sdpa")
        module.load_state_dict(state)
        half = "attention" if variant.slot == "attention" else "feed_forward"
        more = context(4000) if variant.slot == "attention" else {}
        output, expected = (getattr(m.eval(), half)(unseen, **more) for m in (module, layer))
        return float((output - expected).square().mean())

    paper, ours = error(False), error(True)
    assert ours <= 1.01 * paper  # folds are samples
    if ratio == 30:
        assert ours < 0.9 * paper


def gram_folds(inputs_TN, targets_TM):
    """What calibration sums up of these tokens: products of two halves of them."""
    halves = [torch.stack([x[: len(x) // 2], x[len(x) // 2 :]]) for x in (inputs_TN, targets_TM)]
    return halves[0].mT @ halves[0], halves[0].mT @ halves[1]


@pytest.mark.parametrize("largest", [1.0, 1000.0])
def test_least_squares_follow_the_scale_of_channels_massive_ones_too(largest):
    """A channel a thousand times the rest, a dead one: other channels are fitted as well."""
    torch.manual_seed(2)
    x_TN, true_MN = torch.randn(400, 12).double(), torch.randn(5, 12).double()
    near_MN = true_MN + torch.randn(5, 12)
    scale_N = torch.ones(12).double()
    scale_N[3], scale_N[7] = largest, 0.0
    x_TN = x_TN * scale_N
    solved = initialization.solve(*gram_folds(x_TN, x_TN @ true_MN.T), near_MN)
    alive = scale_N > 0
    true, near = true_MN.float(), near_MN.float()
    # A ten-thousandth is left of the massive channel's share, which the others make up for
    torch.testing.assert_close(solved[:, alive], true[:, alive], rtol=0, atol=0.02)
    assert torch.equal(solved[:, ~alive], near[:, ~alive])  # nothing is known of it


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_least_squares_of_activations_that_are_not_finite_are_the_papers_weights(broken):
    x_TN, y_TM, near_MN = torch.randn(60, 6), torch.randn(60, 4), torch.randn(4, 6)
    x_TN[11, 2] = broken
    assert torch.equal(initialization.solve(*gram_folds(x_TN, y_TM), near_MN), near_MN)


@pytest.mark.parametrize("tokens", [2, 50])
def test_least_squares_of_constant_or_dead_inputs_are_the_papers_weights_or_better(tokens):
    near_MN = torch.randn(4, 6)
    for x_TN in (torch.zeros(tokens, 6), torch.ones(tokens, 6)):
        y_TM = torch.full((tokens, 4), 0.5)
        solved = initialization.solve(*gram_folds(x_TN, y_TM), near_MN)
        assert solved.isfinite().all()
        before, after = ((y_TM - x_TN @ w.T).square().sum() for w in (near_MN, solved))
        assert after <= before
