import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from puzzle.device import Device
from puzzle.training import losses

T, D, V = 37, 16, 53


@pytest.fixture
def sides():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return (
        draw(T, D),
        draw(V, D),
        draw(T, D),
        draw(V, D),
        torch.randint(0, V, (T,), generator=generator),
    )


MIXES = [(1.0, 0.0), (0.0, 1.0), (1.0, 0.3), (0.5, 2.0)]


def plain(child, head, parent, parent_head, targets, settings):
    """The same losses as torch would be asked for them, all logits at once."""
    logits, target = child @ head.T, parent @ parent_head.T
    if settings.soft_cap:
        logits, target = (
            settings.soft_cap * torch.tanh(z / settings.soft_cap) for z in (logits, target)
        )
    t = settings.temperature
    kl = F.kl_div(
        F.log_softmax(logits / t, -1),
        F.log_softmax(target / t, -1),
        log_target=True,
        reduction="batchmean",
    )
    lm = F.cross_entropy(logits, targets)
    return settings.kl_weight * kl * t**2 + settings.lm_weight * lm, kl * t**2, lm


def gradients(loss, sides, settings):
    child, head = sides[0].clone().requires_grad_(), sides[1].clone().requires_grad_()
    total, kl, lm = loss(child, head, *sides[2:], settings)
    (3 * total).backward()
    return total.detach(), kl.detach(), lm.detach(), child.grad, head.grad


@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("mix", MIXES)
def test_losses_and_gradients_in_chunks_equal_plain_torch(sides, mix, temperature, chunk, soft_cap):
    settings = losses.LogitLoss(*mix, temperature, soft_cap, chunk_elements=chunk * V)
    found, expected = (
        gradients(losses.distillation_losses, sides, settings),
        gradients(plain, sides, settings),
    )
    if not settings.kl_weight:
        assert found[1].isnan()
        found, expected = (found[0], *found[2:]), (expected[0], *expected[2:])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mix", MIXES)
def test_in_float32_and_under_autocast_the_gradients_are_those_of_float64(sides, mix):
    settings = losses.LogitLoss(*mix, chunk_elements=8 * V)
    small = [s.float() / 4 if s.is_floating_point() else s for s in sides]
    exact = gradients(plain, [s.double() if s.is_floating_point() else s for s in small], settings)
    single = gradients(losses.distillation_losses, small, settings)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradients(losses.distillation_losses, small, settings)
    for index in (0, 2, 3, 4):
        torch.testing.assert_close(single[index].double(), exact[index], rtol=1e-4, atol=1e-6)
        assert mixed[index].dtype == torch.float32
        assert (mixed[index] - exact[index]).norm() < 0.02 * exact[
            index
        ].norm()  # bfloat16 rounds to 0.4 %


def test_the_heads_gradient_is_not_rounded_under_autocast(sides):
    """The inputs of its product are; one chunk, so that nothing is added to it."""
    child, head, *others = [s.float() if s.is_floating_point() else s for s in sides]
    head = head.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        losses.distillation_losses(child, head, *others, losses.LogitLoss())[0].backward()
    assert not torch.equal(head.grad, head.grad.bfloat16().float())


def test_a_two_byte_head_is_multiplied_in_its_own_dtype(sides):
    """No float32 copy of it: of a vocabulary of 128k that would be gigabytes."""
    halves = [s.bfloat16() if s.is_floating_point() else s for s in sides]
    multiplied = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket is torch.ops.aten.mm:
                multiplied.extend(arg.dtype for arg in args)
            return function(*args, **(kwargs or {}))

    with Products(), torch.no_grad():
        losses.distillation_losses(*halves, losses.LogitLoss())
    assert set(multiplied) == {torch.bfloat16}


def test_a_frozen_head_gets_no_gradient_and_no_memory_for_one(sides):
    child, head = sides[0].clone().requires_grad_(), sides[1]
    total, _, _ = losses.distillation_losses(child, head, *sides[2:], losses.LogitLoss())
    assert total.grad_fn.gradients[1] is None
    total.backward()
    torch.testing.assert_close(child.grad, gradients(plain, sides, losses.LogitLoss())[3] / 3)
    with pytest.raises(RuntimeError):
        total.backward()


def test_without_a_kl_weight_the_parent_is_not_needed(sides):
    settings = losses.LogitLoss(kl_weight=0.0, lm_weight=1.0)
    total, kl, lm = losses.distillation_losses(sides[0], sides[1], None, None, sides[4], settings)
    torch.testing.assert_close(lm, F.cross_entropy(sides[0] @ sides[1].T, sides[4]))
    assert total == lm and kl.isnan()


@pytest.mark.parametrize("chunk", [5, 1000])
def test_token_metrics_equal_plain_torch(sides, chunk, monkeypatch):
    monkeypatch.setattr(losses, "tokens_per_chunk", lambda vocabulary: chunk)
    child, head, parent, parent_head, targets = (
        s.float() if s.is_floating_point() else s for s in sides
    )
    candidates = torch.stack([child, 2 * child, parent])
    found = losses.token_metrics(parent, parent_head, candidates, head, targets)
    for metrics, candidate in zip(found, candidates, strict=True):
        logits, reference = candidate @ head.T, parent @ parent_head.T
        kl = F.kl_div(
            F.log_softmax(logits, -1),
            F.log_softmax(reference, -1),
            log_target=True,
            reduction="none",
        ).sum(-1)
        top5 = (logits.topk(5).indices == targets[:, None]).any(-1)
        torch.testing.assert_close(metrics[0], kl, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            metrics[1], F.cross_entropy(logits, targets, reduction="none"), rtol=1e-4, atol=1e-5
        )
        assert metrics[2].bool().equal(logits.argmax(-1) == targets)
        assert metrics[3].bool().equal(top5)
        assert metrics[4].bool().equal((logits.topk(10).indices == targets[:, None]).any(-1))
        torch.testing.assert_close(metrics[5], 1 - F.cosine_similarity(candidate, parent, dim=-1))


@pytest.mark.parametrize("soft_cap", [None, 4.0])
@pytest.mark.parametrize("chunk", [5, 1000])
def test_the_kl_to_a_parent_is_that_of_the_token_metrics(sides, chunk, soft_cap, monkeypatch):
    """Also of a child that is the parent, where it is nothing but rounding."""
    monkeypatch.setattr(losses, "tokens_per_chunk", lambda vocabulary: chunk)
    monkeypatch.setattr(losses, "HEAD_ROWS", 7)
    child, head, parent = (s.float() for s in sides[:3])
    candidates = [child, 2 * child, parent]
    metrics = losses.token_metrics(parent, head, candidates, head, sides[4], soft_cap)
    found = losses.KLToParent(parent, head, soft_cap).sums(candidates)
    assert found.dtype == torch.float64 and found[2].abs() < 1e-4
    torch.testing.assert_close(found, metrics[:, 0].double().sum(-1), rtol=1e-5, atol=1e-4)


def test_the_kl_to_a_parent_rounds_as_logits_do():
    """What is multiplied by itself and what is not must agree, or the parent's KL is not zero."""
    torch.manual_seed(0)
    parent, head = 0.3 * torch.randn(64, 512), torch.randn(1024, 512)
    child = parent + 0.03 * torch.randn(64, 512)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses.KLToParent(parent, head).sums([child, parent])
        expected = losses.token_metrics(parent, head, [child], head, torch.zeros(64).long())
    assert found[1].abs() / 64 < 1e-5
    torch.testing.assert_close(found[0], expected[0, 0].double().sum(), rtol=1e-4, atol=1e-4)
    halves = parent.bfloat16(), head.bfloat16()
    assert losses.KLToParent(*halves).sums([halves[0]]).abs() / 64 < 1e-5


def test_logits_stay_float32_under_autocast():
    """The inputs of the product may be rounded, its result may not: no ties where bfloat16 would
    make them.
    """
    hidden, head = torch.randn(8, D), torch.randn(V, D)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses._logits(hidden, head)
        coarse = hidden @ head.T
    assert found.dtype == torch.float32 and coarse.dtype == torch.bfloat16
    assert not torch.equal(found, found.bfloat16().float())
    torch.testing.assert_close(found, hidden @ head.T, rtol=2e-2, atol=5e-2)
    assert torch.get_float32_matmul_precision() == "highest"


def test_metrics_of_the_parent_itself_are_exact_under_autocast():
    """Nothing after the logits may run in bfloat16: the parent's KL to itself is 0 and its loss
    that of float32.
    """
    torch.manual_seed(0)
    hidden, head = 3 * torch.randn(64, D), torch.randn(512, D)
    targets = torch.randint(512, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        found = losses.token_metrics(hidden, head, hidden[None], head, targets)[0]
        logits = losses._logits(hidden, head)
    assert found[0].abs().max() < 1e-5 and found[5].abs().max() < 1e-5
    torch.testing.assert_close(
        found[1], F.cross_entropy(logits, targets, reduction="none"), rtol=1e-5, atol=1e-5
    )


def test_the_normalised_mse_of_nothing_is_one_and_of_the_parent_zero():
    parent = torch.randn(4, 5, 6)
    assert losses.normalized_mse(torch.zeros_like(parent), parent).item() == pytest.approx(1.0)
    assert losses.normalized_mse(parent, parent).item() == 0.0


def test_the_cosine_distance_ignores_length_and_is_two_for_opposites():
    parent = torch.randn(4, 5, 6)
    assert losses.cosine_distance(3 * parent, parent).item() == pytest.approx(0.0, abs=1e-6)
    assert losses.cosine_distance(-parent, parent).item() == pytest.approx(2.0, abs=1e-6)


def test_a_massive_channel_weighs_what_the_most_can():
    """A thousand times the rest: 100 medians of energy are left, and as much of the errors."""
    torch.manual_seed(0)
    parent_TD, error_TD = torch.randn(512, 64), 0.1 * torch.randn(512, 64)
    assert losses.channel_roots(parent_TD).tolist() == [1.0] * 64
    assert losses.channel_roots(torch.zeros(4, 64)).tolist() == [1.0] * 64
    usual = error_TD.square().sum() / parent_TD.square().sum()
    parent_TD[:, 7] *= 1000
    error_TD[:, 7] *= 1000
    roots_D = losses.channel_roots(parent_TD)
    energy_D = parent_TD.square().sum(0)
    assert roots_D[7] ** 2 == pytest.approx((100 * energy_D.median() / energy_D[7]).item())
    torch.testing.assert_close(losses.channel_roots(1e-4 * parent_TD), roots_D)
    child_TD = (parent_TD + error_TD).requires_grad_()
    loss = losses.squared_error(child_TD, parent_TD, roots_D)
    loss.backward()
    weighted = (error_TD * roots_D).square().sum()
    assert loss.item() == pytest.approx(weighted.item(), rel=1e-3)
    torch.testing.assert_close(child_TD.grad, 2 * roots_D**2 * error_TD, rtol=1e-3, atol=1e-3)
    relative = loss.item() / (parent_TD * roots_D).square().sum().item()
    assert relative == pytest.approx(usual.item(), rel=0.5)


def test_channels_without_energy_have_weight_one():
    parent_TD = torch.zeros(8, 16)
    parent_TD[:, 3] = 5.0
    assert losses.channel_roots(parent_TD).tolist() == [1.0] * 16


def test_logits_are_rounded_under_autocast_only():
    """Where the processor has products of bfloat16."""
    torch.manual_seed(0)
    hidden_TD, head_VD = torch.randn(64, 512), torch.randn(1024, 512)
    exact_TV = hidden_TD.double() @ head_VD.double().T
    plain_TV = losses._logits(hidden_TD, head_VD)
    assert (plain_TV - exact_TV).abs().max() < 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        rounded_TV = losses._logits(hidden_TD, head_VD)
    error = (rounded_TV - exact_TV).abs().max()
    assert rounded_TV.dtype == torch.float32 and error < 1.0
    if Device.choose("cpu", "auto").has_bfloat16:
        assert error > 1e-2  # otherwise the product takes twice as long for nothing


def test_a_token_is_among_the_first_by_its_rank():
    """Row r of the logits has its target in place r."""
    tokens, vocabulary = 13, 16
    logits_TV = torch.arange(vocabulary, 0, -1.0).repeat(tokens, 1)
    targets_T, head_VD = torch.arange(tokens), torch.eye(vocabulary)
    (metrics,) = losses.token_metrics(logits_TV, head_VD, logits_TV[None], head_VD, targets_T)
    for place, most in ((2, 1), (3, 5), (4, 10)):
        assert metrics[place].tolist() == [float(rank < most) for rank in range(tokens)]
