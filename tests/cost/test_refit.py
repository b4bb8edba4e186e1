"""The cost model corrected by what was served."""

import dataclasses

import numpy as np
import pytest
from served import give_or_take

from puzzle import pipeline
from puzzle.cost import COST, neighbours, table
from puzzle.cost.refit import CURVATURE, CostModel, Observation
from puzzle.engines.intervals import Percentiles
from puzzle.model.architecture import Architecture

PARENT = ["gqa_2+gated_96"] * 4  # of the tiny run
HALF = ["gqa_2+gated_96", "no_op+gated_96", "no_op+gated_96", "gqa_1+gated_96"]
NARROW = ["gqa_2+gated_96", "gqa_2+gated_64", "gqa_2+gated_64", "gqa_2+no_op"]


@pytest.fixture
def job(tiny_run):
    job = tiny_run.place_job()
    pipeline.execute_stage(COST, job)
    return job


@pytest.fixture
def costs(job):
    """The modelled table, as if it had been measured with an error of 3 % of each variant."""
    modelled = table.read(job)
    header = modelled.header.model_copy(update={"measured": True})
    variances = [
        np.diag([(0.03 * getattr(cost, phase)) ** 2 for cost in modelled.variants.values()])
        for phase in ("prefill_s", "decode_s")
    ]
    covariance = table.Covariance(list(modelled.variants), *variances)
    return dataclasses.replace(modelled, header=header, covariance=covariance)


def seconds(costs, names):
    return costs.predict(Architecture.from_names(names)).total_s


def model(costs, *observations):
    return CostModel.of(costs, Architecture.from_names(PARENT), observations)


def seen(costs, names, factor, compared_with=PARENT, width=0.002):
    """An architecture that takes `factor` times what is predicted, relative to another."""
    ours, other = (
        costs.predict(Architecture.from_names(blocks)) for blocks in (names, compared_with)
    )
    return Observation(
        scenario="main",
        blocks=names,
        compared_with=compared_with,
        prefill=give_or_take(factor * ours.prefill_s / other.prefill_s, width),
        decode=give_or_take(factor * ours.decode_s / other.decode_s, width),
    )


def test_with_nothing_served_the_table_stays_and_the_parent_is_certain(costs):
    start = model(costs)
    assert start.table == costs and not start.is_exact
    assert start.uncertainty(Architecture.from_names(PARENT)) == pytest.approx(CURVATURE)
    assert start.uncertainty(Architecture.from_names(HALF)) > 1.5 * CURVATURE


def test_percentiles_are_the_parents_or_the_largest_that_was_seen(costs):
    known = dataclasses.replace(costs, inter_token=Percentiles(p95=1.2, p99=1.3))
    assert model(known).table.inter_token == known.inter_token
    worse = seen(known, HALF, 1.0).model_copy(update={"inter_token": Percentiles(p95=1.4)})
    assert model(known, worse).table.inter_token == Percentiles(p95=1.4, p99=1.3)
    assert model(known, worse).table.first_token == known.first_token


def test_a_modelled_table_is_exact_until_something_is_served(job):
    modelled = table.read(job)
    assert model(modelled).is_exact
    assert model(modelled).uncertainty(Architecture.from_names(HALF)) == 0.0
    assert not model(modelled, seen(modelled, HALF, 1.1)).is_exact


@pytest.mark.parametrize("factor", [0.9, 0.97, 1.03, 1.1])
def test_predictions_follow_what_was_served_and_the_parent_stays(costs, factor):
    corrected = model(costs, seen(costs, HALF, factor)).table
    assert seconds(corrected, PARENT) == pytest.approx(seconds(costs, PARENT))
    moved = seconds(corrected, HALF) / seconds(costs, HALF)
    assert moved == pytest.approx(factor, abs=0.2 * abs(factor - 1))
    near = [HALF[0], *HALF[2:], "gqa_2+gated_96"]  # one more attention
    assert np.sign(seconds(corrected, near) / seconds(costs, near) - 1) == np.sign(factor - 1)


def test_what_is_served_makes_predictions_near_it_certain(costs):
    before, after = model(costs), model(costs, seen(costs, HALF, 1.0))
    half, narrow = Architecture.from_names(HALF), Architecture.from_names(NARROW)
    assert after.uncertainty(half) < 0.8 * before.uncertainty(half)
    assert after.uncertainty(narrow) > after.uncertainty(half)


def test_a_vague_observation_moves_little(costs):
    sharp, vague = (model(costs, seen(costs, HALF, 1.03, width=w)).table for w in (0.002, 0.2))
    start = seconds(costs, HALF)
    assert abs(seconds(vague, HALF) / start - 1) < 0.3 * abs(seconds(sharp, HALF) / start - 1)


def test_variants_that_were_not_served_keep_their_costs_up_to_what_the_parent_fixes(costs):
    corrected = model(costs, seen(costs, HALF, 1.05)).table
    name = ("ffn", "gated_64")
    assert corrected.variants[name].total_s == pytest.approx(costs.variants[name].total_s)
    name = ("attention", "gqa_1")
    assert corrected.variants[name].total_s > costs.variants[name].total_s


def test_a_neighbour_is_known_relative_to_its_child(costs):
    """The child is 5 % slower than predicted, its neighbour 8 % slower still."""
    near = ["gqa_2+gated_96", "no_op+gated_96", "no_op+gated_96", "linear+gated_96"]
    rows = (seen(costs, HALF, 1.05), seen(costs, near, 1.08, compared_with=HALF))
    corrected = model(costs, *rows).table
    ratio = seconds(corrected, near) / seconds(corrected, HALF)
    assert ratio == pytest.approx(1.08 * seconds(costs, near) / seconds(costs, HALF), rel=0.015)
    assert seconds(corrected, HALF) == pytest.approx(1.05 * seconds(costs, HALF), rel=0.015)


def test_a_child_that_took_more_memory_than_predicted_corrects_what_serving_takes_besides(costs):
    half, narrow = Architecture.from_names(HALF), Architecture.from_names(NARROW)
    expected = costs.predict(half).memory_bytes
    rows = [
        seen(costs, HALF, 1.0).model_copy(update={"memory_bytes": expected + more})
        for more in (1000, 3000)
    ]
    corrected = model(costs, *rows).table
    assert corrected.predict(half).memory_bytes == expected + 3000
    assert corrected.predict(narrow).memory_bytes == costs.predict(narrow).memory_bytes + 3000
    assert model(costs, seen(costs, HALF, 1.0)).table.constant.workspace_bytes == 0


def test_no_variant_gets_a_cost_below_zero(costs):
    rows = [seen(costs, ["gqa_2+gated_96", *["no_op+linear"] * 3], factor) for factor in (0.5, 0.4)]
    corrected = model(costs, *rows).table
    assert min(cost.total_s for cost in corrected.variants.values()) >= 0.0


def test_neighbours_are_served_in_one_engine_and_compared_with_the_child(job, tiny_run):
    """On a modelled device every figure is exactly what adds up."""
    child_job = tiny_run.job_of("main", tiny_run.recipe.all_children()["main"])
    served = [Architecture.from_names(names) for names in (HALF, NARROW, PARENT)]
    scenarios = {"main": job.place.cost.scenario}
    rows = neighbours.measure(child_job, served, scenarios)
    costs = table.read(job)
    assert [row.blocks for row in rows] == [NARROW, PARENT]
    for row in rows:
        assert row.scenario == "main" and row.compared_with == HALF
        ours, child = (
            costs.predict(Architecture.from_names(names)) for names in (row.blocks, HALF)
        )
        assert row.prefill.value == pytest.approx(ours.prefill_s / child.prefill_s)
        assert row.decode.value == pytest.approx(ours.decode_s / child.decode_s)
