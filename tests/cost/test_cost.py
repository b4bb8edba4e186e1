import dataclasses
import random

import numpy as np
import pytest

from puzzle import artifacts, pipeline
from puzzle.cost import stage as cost
from puzzle.engines import roofline_engine
from puzzle.errors import UserError
from puzzle.model.architecture import FFN, Architecture, Attention


@pytest.fixture
def costed(tiny_run):
    pipeline.execute_stage(tiny_run, "cost")
    return tiny_run


def test_predictions_equal_the_engine_on_random_architectures(costed, tmp_path):
    """The roofline engine is exactly additive, so the table made from its probe must reproduce it."""
    table, rng = cost.read(costed), random.Random(0)
    for index in range(10):
        architecture = Architecture(
            tuple(rng.choice(layer.blocks) for layer in costed.space.layers)
        )
        cost.write_checkpoint(costed, tmp_path / str(index), architecture)
        sheet = costed.recipe.cost.device_sheet
        session = roofline_engine.RooflineSession(tmp_path / str(index), table.scenario, sheet)
        assert table.predict(architecture).total_s == pytest.approx(
            session.time_batch(table.scenario).total_s, rel=1e-7
        )


def test_the_predicted_parent_is_the_measured_parent(costed):
    table = cost.read(costed)
    session = roofline_engine.RooflineSession(
        costed.parent.folder, table.scenario, costed.recipe.cost.device_sheet
    )
    timing = session.time_batch(table.scenario)
    predicted = table.predict(Architecture.of_parent(costed.parent.shape))
    assert (predicted.prefill_s, predicted.decode_s) == pytest.approx(
        (timing.prefill_s, timing.decode_s)
    )


def test_the_probe_holds_every_costly_variant_alone_and_equally_often(costed):
    shape, variants = costed.parent.shape, cost.distinct_variants(costed)
    probe = cost.Probe.of(variants, shape, 4)
    assert probe.architecture.blocks[0] == shape.parent_block
    assert set(probe.places) == {v for v in variants if v.kind != "no_op"}
    assert len({len(places) for places in probe.places.values()}) == 1
    for variant, places in probe.places.items():
        for block in (probe.architecture.blocks[place] for place in places):
            other = block.ffn if isinstance(variant, Attention) else block.attention
            assert variant in (block.attention, block.ffn) and other.kind == "no_op"


def test_layers_of_the_probe_make_up_the_architecture(costed):
    probe, rng = (
        cost.Probe.of(cost.distinct_variants(costed), costed.parent.shape, 4),
        random.Random(1),
    )
    for _ in range(20):
        architecture = probe.random(rng)
        layers = probe.layers_of(architecture, rng)
        run = Architecture(tuple(probe.architecture.blocks[index] for index in layers))
        assert layers[0] == 0 and probe.counts(run) == probe.counts(architecture)


def test_the_fit_finds_the_true_costs_through_noise_and_outliers():
    rng = np.random.default_rng(0)
    true = np.array([0.3, 0.1, 0.05, 1.0])
    samples = cost.Samples()
    for _ in range(400):
        counts = [*rng.integers(0, 6, size=3), 1]
        noise = 3.0 if rng.random() < 0.05 else rng.normal(1, 0.05)  # one in twenty is disturbed
        samples.add(counts, float(counts @ true * noise))
    found, error = samples.fit()
    assert np.abs(found - true).max() < 0.03 and (np.abs(found - true) < 5 * error).all()


def test_memory_is_weights_plus_cache(costed):
    table, shape = cost.read(costed), costed.parent.shape
    predicted = table.predict(Architecture.of_parent(shape))
    parameters = Architecture.of_parent(shape).parameters(shape)
    assert predicted.parameter_bytes == 4 * parameters
    cache = (
        8 * (16 + 16) * 4 * 2 * 2 * 16 * 4
    )  # batch, tokens, layers, K and V, KV heads, head_dim, bytes
    assert predicted.memory_bytes == 4 * parameters + cache


def reuse(run, table):
    recipe = run.recipe
    changed = recipe.model_copy(
        update={"cost": recipe.cost.model_copy(update={"table": str(table)})}
    )
    other = type(run)(changed, run.folder.with_name("other"), run.progress)
    pipeline.execute_stage(other, "cost")
    return other


def test_a_table_can_be_reused(costed):
    path = costed.stage_folder("cost") / "costs.jsonl"
    assert cost.read(reuse(costed, path)) == cost.read(costed)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", "0"),
        ("engine", "vllm"),
        ("device", "other"),
        ("dtype", "float16"),
        ("scenarios", {}),
    ],
)
def test_a_table_of_something_else_is_refused(costed, tmp_path, key, value):
    records = artifacts.read_jsonl(costed.stage_folder("cost") / "costs.jsonl")
    records[0][key] = value
    path = tmp_path / "stale.jsonl"
    artifacts.write_jsonl(path, records)
    with pytest.raises(UserError, match=f"{key} is .* measure again"):
        reuse(costed, path)


def test_a_table_that_lacks_a_variant_is_refused(costed, tmp_path):
    records = artifacts.read_jsonl(costed.stage_folder("cost") / "costs.jsonl")
    path = tmp_path / "short.jsonl"
    artifacts.write_jsonl(path, [r for r in records if r.get("variant") != "gqa_1"])
    with pytest.raises(UserError, match="has no attention gqa_1"):
        reuse(costed, path)


@pytest.mark.parametrize("value", [float("nan"), -1.0, None, "fast"])
def test_a_bad_figure_is_one_clear_line(costed, value):
    path = costed.stage_folder("cost") / "costs.jsonl"
    records = artifacts.read_jsonl(path)
    records[1]["decode_s"] = value
    artifacts.write_jsonl(path, records)
    with pytest.raises(UserError, match="decode_s is .*; expected a number"):
        cost.read(costed)


def test_a_missing_variant_is_one_clear_line(costed):
    path = costed.stage_folder("cost") / "costs.jsonl"
    artifacts.write_jsonl(
        path, [r for r in artifacts.read_jsonl(path) if r.get("variant") != "gqa_1"]
    )
    with pytest.raises(
        UserError, match="scenario main has no attention gqa_1; run `puzzle cost` again"
    ):
        cost.read(costed)


def test_costs_add_up():
    a, b = cost.Cost(1.0, 2.0, 3, 4, 5), cost.Cost(0.5, 0.25, 1, 1, 1)
    assert dataclasses.astuple(a + b) == (1.5, 2.25, 4, 5, 6)
    assert (a + b).total_s == 3.75


def test_wider_and_more_heads_never_cost_less(costed):
    table = cost.read(costed).variants
    assert table["ffn", FFN("gated", 96).name].total_s > table["ffn", "no_op"].total_s == 0
    assert (
        table["attention", "gqa_2"].kv_cache_bytes == 2 * table["attention", "gqa_1"].kv_cache_bytes
    )
