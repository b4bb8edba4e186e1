"""Muon of whole matrices: what torch's does, and how it is resumed.

Of sharded ones: tests/uptrain/test_launch.py.
"""

import pytest
import torch

from puzzle.training import muon
from puzzle.training.muon import Muon, orthogonal

SHAPES = ((6, 6), (4, 9), (12, 5))
CPU = torch.device("cpu")


def matrices() -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(*shape, generator=draw)) for shape in SHAPES]


def step(weights: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for number in steps:
        draw = torch.Generator().manual_seed(100 + number)
        for weight in weights:
            weight.grad = torch.randn(*weight.shape, generator=draw)
        optimizer.step()


def ours(weights: list[torch.nn.Parameter], products: torch.dtype = torch.bfloat16) -> Muon:
    optimizer = Muon(weights, products, CPU)
    optimizer.param_groups[0]["lr"] = 0.03
    return optimizer


def test_a_step_is_that_of_torch():
    expected, weights = matrices(), matrices()
    settings = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    step(expected, torch.optim.Muon(expected, lr=0.03, **settings), range(4))
    step(weights, ours(weights), range(4))
    for one, other, before in zip(weights, expected, matrices(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        assert (one - before).abs().min() > 0


def test_in_float32_it_is_near_the_step_in_bfloat16():
    rounded, exact = matrices(), matrices()
    step(rounded, ours(rounded), range(1))
    step(exact, ours(exact, torch.float32), range(1))
    for one, other, before in zip(rounded, exact, matrices(), strict=True):
        assert (one - other).norm() < 0.05 * (other - before).norm()


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_singular_values_become_about_one_and_directions_stay(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    matrix = U @ torch.diag(torch.linspace(0.05, 1.0, len(S))) @ V
    found = orthogonal(matrix)
    inner = U.T @ found @ V.T  # diagonal where the directions are kept
    values = inner.diagonal()
    assert values.min() > 0.6 and values.max() < 1.3
    assert (inner - torch.diag(values)).abs().max() < 1e-4


def test_a_step_has_the_size_of_adamws():
    """.2 of the rate, root mean square: whatever the gradient and the shape."""
    for shape in ((64, 64), (32, 128), (128, 32)):
        weight = torch.nn.Parameter(torch.zeros(*shape))
        step([weight], ours([weight], torch.float32), range(1))
        assert weight.square().mean().sqrt().item() == pytest.approx(0.2 * 0.03, rel=0.2)


def test_a_gradient_of_zero_moves_nothing():
    weights = matrices()
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    ours(weights).step()
    assert all(torch.equal(one, other) for one, other in zip(weights, matrices(), strict=True))


def test_its_momentum_is_all_that_it_needs_to_go_on():
    through, stopped = matrices(), matrices()
    step(through, ours(through), range(5))
    first = ours(stopped)
    step(stopped, first, range(2))
    later = ours(stopped)
    later.load_state_dict(first.state_dict())
    step(stopped, later, range(2, 5))
    assert all(torch.equal(one, other) for one, other in zip(through, stopped, strict=True))


def test_matrices_are_dealt_by_their_work():
    shapes = [(2, 2), (64, 64), (2, 3), (64, 65)]
    owners = muon._owners([torch.empty(shape) for shape in shapes], 2)
    assert owners[1] != owners[3] and owners[0] != owners[2]


def test_flops_count_three_products_in_each_of_five_iterations():
    assert muon.flops(2, 3) == muon.flops(3, 2) == 5 * (2 * 4 * 3 + 2 * 8 + 2 * 4 * 3)
