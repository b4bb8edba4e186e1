import pytest
import torch
import torch.nn.functional as F

from puzzle import losses

T, D, V = 37, 16, 53


@pytest.fixture
def sides():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw(T, D), draw(V, D), draw(T, D), draw(V, D), torch.randint(0, V, (T,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_chunked_losses_and_gradients_equal_plain_torch(sides, chunk, temperature):
    child, child_head, parent, parent_head, targets = (s.float() if s.is_floating_point() else s for s in sides)
    child.requires_grad_()
    child_head.requires_grad_()
    kl, lm = losses.distillation_losses(
        child, child_head, parent, parent_head, targets, temperature=temperature, chunk_tokens=chunk
    )
    (kl + 0.3 * lm).backward()
    found = [kl.detach(), lm.detach(), child.grad.clone(), child_head.grad.clone()]
    child.grad = child_head.grad = None

    logits, target = child @ child_head.T, parent @ parent_head.T
    plain_kl = F.kl_div(
        F.log_softmax(logits / temperature, -1), F.log_softmax(target / temperature, -1), log_target=True,
        reduction="batchmean",
    ) * temperature**2  # fmt: skip
    plain_lm = F.cross_entropy(logits, targets)
    (plain_kl + 0.3 * plain_lm).backward()
    for ours, theirs in zip(found, [plain_kl, plain_lm, child.grad, child_head.grad], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [5, 1000])
def test_token_metrics_equal_plain_torch(sides, chunk):
    child, head, parent, parent_head, targets = (s.float() if s.is_floating_point() else s for s in sides)
    candidates = torch.stack([child, 2 * child, parent])
    found = losses.token_metrics(parent, parent_head, candidates, head, targets, chunk_tokens=chunk)
    for metrics, candidate in zip(found, candidates, strict=True):
        logits, reference = candidate @ head.T, parent @ parent_head.T
        kl = F.kl_div(F.log_softmax(logits, -1), F.log_softmax(reference, -1), log_target=True, reduction="none").sum(
            -1
        )
        top5 = (logits.topk(5).indices == targets[:, None]).any(-1)
        torch.testing.assert_close(metrics[0], kl, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(metrics[1], F.cross_entropy(logits, targets, reduction="none"), rtol=1e-4, atol=1e-5)
        assert metrics[2].bool().equal(logits.argmax(-1) == targets)
        assert metrics[3].bool().equal(top5)
        assert metrics[4].bool().equal((logits.topk(10).indices == targets[:, None]).any(-1))
        torch.testing.assert_close(metrics[5], 1 - F.cosine_similarity(candidate, parent, dim=-1))


def test_logits_stay_float32_under_autocast():
    """The inputs of the product may be rounded, its result may not: no ties where bfloat16 would make them."""
    hidden, head = torch.randn(8, D), torch.randn(V, D)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses._logits(hidden, head)
        coarse = hidden @ head.T
    assert found.dtype == torch.float32 and coarse.dtype == torch.bfloat16
    assert not torch.equal(found, found.bfloat16().float())
    torch.testing.assert_close(found, hidden @ head.T, rtol=2e-2, atol=5e-2)
    assert torch.get_float32_matmul_precision() == "highest"


def test_metrics_of_the_parent_itself_are_exact_under_autocast():
    """Nothing after the logits may run in bfloat16: the parent's KL to itself is 0 and its loss that of float32."""
    hidden, head = 3 * torch.randn(64, D), torch.randn(512, D)
    targets = torch.randint(512, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        found = losses.token_metrics(hidden, head, hidden[None], head, targets)[0]
        logits = losses._logits(hidden, head)
    assert found[0].abs().max() < 1e-5 and found[5].abs().max() < 1e-5
    torch.testing.assert_close(found[1], F.cross_entropy(logits, targets, reduction="none"), rtol=1e-5, atol=1e-5)


def test_the_normalised_mse_of_nothing_is_one_and_of_the_parent_zero():
    parent = torch.randn(4, 5, 6)
    assert losses.normalized_mse(torch.zeros_like(parent), parent).item() == pytest.approx(1.0)
    assert losses.normalized_mse(parent, parent).item() == 0.0


def test_the_cosine_distance_ignores_length_and_is_two_for_opposites():
    parent = torch.randn(4, 5, 6)
    assert losses.cosine_distance(3 * parent, parent).item() == pytest.approx(0.0, abs=1e-6)
    assert losses.cosine_distance(-parent, parent).item() == pytest.approx(2.0, abs=1e-6)
