"""What is kept on the host computes what it would on the device."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from puzzle.training.muon import Muon
from puzzle.training.offload import HostWeights, fetch_layers

BETAS = (0.9, 0.95)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def optimizers(weights: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    matrices = [weight for weight in weights.parameters() if weight.ndim == 2]
    rest = [weight for weight in weights.parameters() if weight.ndim == 1]
    muon = Muon(matrices, torch.float32, torch.device("cpu"))
    muon.param_groups[0]["lr"] = rate
    return [muon, torch.optim.AdamW(rest, lr=rate, betas=BETAS, weight_decay=0.0, fused=True)]


def learn(weights: nn.Module, step: Callable[[], None], steps: int) -> None:
    for number in range(steps):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(number))
        for half in x.split(3):  # micro-batches
            weights(half.to(next(weights.parameters()).dtype)).float().square().sum().backward()
        torch.nn.utils.clip_grad_norm_(weights.parameters(), 1.0)
        step()
        weights.zero_grad()


def test_in_float32_it_is_what_the_optimisers_do_to_the_bit():
    plain, masters, computing = model(), model(), model()
    on_device, on_host = optimizers(plain, 1e-2), optimizers(masters, 1e-2)
    learn(plain, lambda: [each.step() for each in on_device], 5)
    host = HostWeights(masters, computing)
    learn(computing, lambda: host.step(on_host), 5)
    assert not torch.equal(masters[0].weight, model()[0].weight)
    for expected, master, weight in zip(
        plain.parameters(), masters.parameters(), computing.parameters(), strict=True
    ):
        assert torch.equal(master, expected) and torch.equal(weight, expected)


def test_updates_too_small_for_bfloat16_add_up():
    masters, start = model(), model()
    computing = copy.deepcopy(masters).to(torch.bfloat16)
    host = HostWeights(masters, computing)
    adamw = torch.optim.AdamW(masters.parameters(), lr=1e-5, betas=BETAS, weight_decay=0.0)
    learn(computing, lambda: host.step([adamw]), 50)
    assert all(weight.dtype == torch.bfloat16 for weight in computing.parameters())
    for master, before, weight in zip(
        masters.parameters(), start.parameters(), computing.parameters(), strict=True
    ):
        moved = (master - before).abs()
        assert 1e-4 < moved.max() < 6e-4  # 50 steps of 1e-5: each is lost on a weight of 0.1
        assert torch.equal(weight, master.to(torch.bfloat16))


def test_gradients_of_micro_batches_add_up_in_float32():
    computing = model().to(torch.bfloat16)
    HostWeights(model(), computing)
    weight = computing[0].weight
    for _ in range(300):  # in bfloat16 the sum stays at 256
        weight.sum().backward()
    assert weight.grad.dtype == torch.float32 and torch.all(weight.grad == 300)


def test_frozen_weights_have_no_master_that_learns():
    masters, computing = model(), model()
    for both in (masters, computing):
        both[0].requires_grad_(False)
    assert len(HostWeights(masters, computing).pairs) == 2


def test_layers_that_are_fetched_give_the_same_output(tiny):
    tokens = torch.arange(12)[None]
    expected = tiny.load(torch.float32, torch.device("cpu"))(tokens).logits
    fetched = fetch_layers(tiny.load(torch.float32, torch.device("cpu")), torch.device("cpu"))
    assert torch.equal(fetched(tokens).logits, expected)


def test_a_layer_leaves_the_device_after_its_forward(tiny):
    """The meta device stands in for a GPU: its weights are elsewhere while a layer computes."""
    fetched, seen = tiny.load(torch.float32, torch.device("cpu")), []
    on_host = {name: weight.data_ptr() for name, weight in fetched.model.layers.named_parameters()}
    fetch_layers(fetched, torch.device("meta"))
    for layer in fetched.model.layers:
        layer.mlp.register_forward_pre_hook(lambda m, _: seen.append(m.up_proj.weight.device.type))
    x = torch.zeros(1, 4, 64, device="meta")
    angles = (torch.zeros(1, 4, 16, device="meta"),) * 2
    for layer in fetched.model.layers:
        x = layer(x, attention_mask={None: None}, position_embeddings={None: angles})
    assert seen == ["meta"] * len(fetched.model.layers)
    for name, weight in fetched.model.layers.named_parameters():
        assert weight.device.type == "cpu" and weight.data_ptr() == on_host[name]
