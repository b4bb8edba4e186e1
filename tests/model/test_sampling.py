"""Sampling in batches: each row as if it were alone, and as often as the softmax says."""

import pytest
import torch
from conftest import make_parent

from puzzle.model import parent
from puzzle.model.sampling import GumbelNoise, sample

PROMPTS = [[1, 7, 30], [1], [1, 4, 9, 200, 17, 3]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_parent(tmp_path_factory.mktemp("parent"))
    return parent.describe(str(folder)).load(torch.float32, torch.device("cpu"))


def test_a_row_is_what_it_is_alone(model):
    state = torch.get_rng_state()
    together = sample(model, PROMPTS, 12, 1.0, [5, 6, 7])
    alone = [
        sample(model, [prompt], 12, 1.0, [seed])[0]
        for prompt, seed in zip(PROMPTS, (5, 6, 7), strict=True)
    ]
    assert together == alone
    assert torch.equal(torch.get_rng_state(), state)
    assert sample(model, PROMPTS, 12, 1.0, [5, 6, 8])[:2] == together[:2]
    assert sample(model, PROMPTS, 12, 1.0, [5, 6, 8])[2] != together[2]


def test_a_text_ends_where_the_model_ends_it(model):
    full = sample(model, PROMPTS, 12, 1.0, [5, 6, 7])
    assert [len(ids) for ids in full] == [12] * 3
    model.generation_config.eos_token_id = [full[1][3]]
    try:
        ended = sample(model, PROMPTS, 12, 1.0, [5, 6, 7])
    finally:
        model.generation_config.eos_token_id = None
    assert ended[1] == full[1][: full[1].index(full[1][3]) + 1]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_tokens_are_as_frequent_as_the_softmax_says(temperature):
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0])
    rows = 4000
    noise = GumbelNoise(range(rows), temperature, logits_V.device)
    drawn = noise(torch.zeros(rows, 1), logits_V.expand(rows, 4)).argmax(1)
    shares = torch.bincount(drawn, minlength=4) / rows
    expected = (logits_V / temperature).softmax(0)
    bound = 4 * (expected * (1 - expected) / rows).sqrt()
    assert ((shares - expected).abs() <= bound).all()
