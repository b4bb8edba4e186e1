"""Layers with sliding windows cost what they cost: predictions against the engine itself."""

import json
import random

import families
import numpy as np
import pytest
from conftest import NEEDS_VLLM, tiny_recipe
from test_cost import time_on_roofline

from puzzle import config, pipeline
from puzzle.config import ScenarioConfig
from puzzle.cost import COST, table
from puzzle.cost.probe import write_checkpoint
from puzzle.engines.roofline_engine import Seen
from puzzle.model.architecture import Architecture
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.search import space_program
from puzzle.search.constraints import KINDS

WINDOW, LENGTHS = 16, (24, 20)  # of every other layer; tokens in and out


def costed(folder, text_folder, lengths, deploy="transformers", **cost):
    """A place of a Gemma 2 parent: layers 0 and 2 have a window, 1 and 3 have none."""
    parent = families.make("gemma2", folder / "parent")
    settings = json.loads((parent / "config.json").read_text())
    long = settings | {"max_position_embeddings": max(256, sum(lengths))}
    (parent / "config.json").write_text(json.dumps(long))
    scenario = {"batch_size": 4, "input_length": lengths[0], "output_length": lengths[1]}
    settings = tiny_recipe(parent, text_folder, folder / "run") | {"deploy": [deploy]}
    settings["cost"] |= {"scenario": scenario} | cost
    run = Run(config.parse(settings), folder / "run", Progress(quiet=True))
    job = run.place_job()
    pipeline.execute_stage(COST, job)
    return job


@pytest.fixture
def windowed(tmp_path, text_folder):
    """With a scenario that is longer than the window."""
    return costed(tmp_path, text_folder, LENGTHS)


def test_predictions_equal_the_engine_on_random_architectures(windowed, tmp_path):
    costs, rng, parent = table.read(windowed), random.Random(0), windowed.run.parent
    assert list(costs.header.windows) == [WINDOW, None, WINDOW, None]
    for index in range(10):
        layers = windowed.run.space.layers
        architecture = Architecture(tuple(rng.choice(layer.blocks) for layer in layers))
        folder = tmp_path / str(index)
        write_checkpoint(parent, folder, architecture)
        seconds = time_on_roofline(windowed, folder, costs.scenario)
        predicted = costs.predict(architecture)
        assert (predicted.prefill_s, predicted.decode_s) == pytest.approx(seconds, rel=1e-7)
        cached = [
            4 * min(sum(LENGTHS), window or 99) * parent.shape.kv_elements_per_token(block) * 4
            for block, window in zip(architecture, parent.shape.windows, strict=True)
        ]
        assert predicted.kv_cache_bytes == sum(cached)  # batch, tokens, elements, bytes


def test_a_layer_with_a_window_is_cheaper_and_the_search_knows_which(windowed):
    costs, layers = table.read(windowed), windowed.run.space.layers
    shared = [b for b in layers[0].blocks if b in layers[1].blocks and b.attention.kind == "gqa"]
    assert shared
    for block in shared:
        narrow, full = costs.block(block, 0), costs.block(block, 1)
        assert narrow.total_s < full.total_s and narrow.kv_cache_bytes < full.kv_cache_bytes
    choices = space_program.Choices(
        [list(layer.blocks) for layer in layers], np.zeros(sum(len(la.blocks) for la in layers))
    )
    limit = space_program.Limit(KINDS["latency"], costs, 1.0)
    used = space_program.build(choices, [limit]).resources[0]
    expected = [costs.block(b, index).total_s for index, la in enumerate(layers) for b in la.blocks]
    assert used == pytest.approx(expected)


def test_a_window_longer_than_every_scenario_is_full_attention(tmp_path, text_folder):
    costs = table.read(costed(tmp_path, text_folder, (8, 8)))
    assert costs.header.windows == []
    assert not any("@" in name for _, name in costs.variants)


@pytest.mark.parametrize("window", [1, 5, 8, 11, 30])
@pytest.mark.parametrize(("start", "count"), [(8, 6), (20, 5)])
def test_what_a_window_sees_is_what_counting_says(start, count, window):
    scenario = ScenarioConfig(batch_size=1, input_length=start, output_length=count)
    of_prefill = Seen.of_prefill(scenario, window)
    assert of_prefill.pairs == sum(min(token, window) for token in range(1, start + 1))
    of_decode = Seen.of_decode(scenario, window)
    counted = sum(min(start + step, window) for step in range(1, count + 1)) / count
    assert of_decode.keys == of_decode.pairs == pytest.approx(counted, abs=0.51)
    assert of_decode.keys <= Seen.of_decode(scenario, None).keys


@pytest.mark.vllm
@pytest.mark.training
@NEEDS_VLLM
def test_vllm_keeps_of_a_window_the_pages_that_it_touches(tmp_path, text_folder):
    """And serves a probe whose layers have windows and KV heads of all kinds."""
    place = {"engine": "vllm", "seconds": 3}
    costs = table.read(costed(tmp_path, text_folder, (300, 40), "vllm-plugin", **place))
    narrow, full = (costs.variants["attention", name] for name in ("gqa_2@16", "gqa_2"))
    assert narrow.kv_cache_bytes * 3 == full.kv_cache_bytes * 2  # pages of 128 tokens: 2 and 3
