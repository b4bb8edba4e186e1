"""The form with interactions: what determines it, and its least value against all choices."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from puzzle.search import interactions
from puzzle.search.interactions import Interactions
from puzzle.search.mip import overlap_row
from puzzle.search.program import Program, starts_of

LAYERS, BLOCKS = 6, 5


def all_choices(program):
    """Every choice [N, G] that keeps the limits."""
    columns = [np.arange(a, b) for a, b in itertools.pairwise(program.starts)]
    return [np.array(c) for c in itertools.product(*columns) if program.feasible(np.array(c))]


def random_instance(seed):
    """Limits from loose to impossible, shared parts of both signs, sometimes an extra row."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, rng.integers(1, 6))
    starts, count = starts_of(sizes.tolist()), int(sizes.sum())
    resources = rng.integers(0, 4, (rng.integers(0, 3), count)).astype(float)
    room = rng.uniform(0.1, 0.8, len(resources))
    limits = room * np.maximum.reduceat(resources, starts[:-1], axis=1).sum(axis=1)
    scale = 10.0 ** rng.uniform(-3, 2)
    private = scale * rng.uniform(0, 1, count) * rng.integers(0, 2, count)
    shared = np.sqrt(scale) * rng.normal(rng.uniform(-1, 1), 1, count) * 10 ** rng.uniform(-2, 0)
    program = Program(starts, np.zeros(count), resources, limits)
    if rng.random() < 0.3:
        away = overlap_row(starts[:-1], len(sizes) - 1)
        program = replace(program, extra=(away,))
    return program, Interactions(private, shared)


def check(seed):
    program, form = random_instance(seed)
    choices = all_choices(program)
    found = interactions.solve(program, form, gap=1e-6)
    if not choices:
        assert found is None
        return False
    values = [form.value(columns) for columns in choices]
    least, unit = min(values), max(map(abs, values))
    assert found is not None and program.feasible(found.columns)
    assert found.objective == pytest.approx(form.value(found.columns), rel=1e-12)
    assert found.objective <= least + 2e-6 * abs(least) + 1e-8 * unit
    assert found.bound <= least + 1e-8 * unit  # what is proven is true
    assert found.gap <= 2e-6 or found.objective - found.bound <= 1e-8 * unit
    return True


@pytest.mark.training
def test_the_least_value_is_that_of_all_choices():
    feasible = sum(check(seed) for seed in range(300))
    assert 150 < feasible < 300  # impossible ones are among them


@pytest.mark.slow
def test_the_least_value_is_that_of_all_choices_thousands_of_times():
    assert sum(check(seed) for seed in range(300, 5000)) > 2000


def true_form(seed, negative):
    """A KL that is such a form; the parent's block, the first of a layer, costs nothing."""
    rng = np.random.default_rng(seed)
    starts = starts_of([BLOCKS] * LAYERS)
    private = rng.uniform(0, 0.05, LAYERS * BLOCKS)
    shared = rng.uniform(-0.02 if negative else 0.0, 0.2, LAYERS * BLOCKS)
    private[starts[:-1]] = shared[starts[:-1]] = 0.0
    scores = private + shared**2
    program = Program(starts, scores, np.zeros((0, len(scores))), np.zeros(0))
    own = starts[:-1] + rng.integers(1, BLOCKS, LAYERS)
    return program, Interactions(private, shared), own


def exchanged_by(form, program, own):
    """KL of the child with every block in the place of its own."""
    found = []
    for column, group in enumerate(program.groups):
        columns = own.copy()
        columns[group] = column
        found.append(form.value(columns))
    return np.array(found)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_two_sets_of_scores_determine_the_form(seed, negative):
    program, truth, own = true_form(seed, negative)
    exchanged = exchanged_by(truth, program, own)
    form = Interactions.between(program, own, truth.value(own), exchanged)
    rng = np.random.default_rng(seed)
    for _ in range(100):  # children any number of exchanges away
        columns = program.starts[:-1] + rng.integers(0, BLOCKS, LAYERS)
        assert form.value(columns) == pytest.approx(truth.value(columns), abs=1e-8)
    assert np.allclose(form.shared[own], 0)


def test_scores_that_add_up_leave_a_sum():
    """The same costs at the child as at the parent: no interaction, and none is invented."""
    program, _, own = true_form(0, negative=False)
    exchanged = program.costs[own].sum() + program.costs - program.costs[own][program.groups]
    form = Interactions.between(program, own, float(program.costs[own].sum()), exchanged)
    assert (form.shared == 0).all()
    assert form.value(program.starts[:-1]) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("rounding", [-3e-6, 0.0, 3e-6])
def test_around_the_parent_nothing_interacts(rounding):
    """Its own KL is zero but for rounding, of either sign."""
    program, _, _ = true_form(0, negative=False)
    own = program.starts[:-1]
    exchanged = rounding + program.costs - program.costs[own][program.groups]
    form = Interactions.between(program, own, rounding, exchanged)
    assert (form.shared == 0).all()
    assert np.isfinite(form.private).all()


def test_interactions_change_which_child_is_best():
    """Two layers; one large replacement is better than two small ones whose sum is less."""
    starts = starts_of([3, 3])
    scores = np.array([0.0, 0.04, 0.09] * 2)  # nothing private: KL = (sum of square roots)^2
    form = Interactions(np.zeros(6), np.sqrt(scores))
    size = np.array([[3.0, 2.0, 1.0] * 2])
    program = Program(starts, scores, size, np.array([4.0]))
    found = interactions.solve(program, form)
    assert found.objective == pytest.approx(0.09)
    assert sorted(found.columns.tolist()) in ([0, 5], [2, 3])
    assert found.gap <= 1e-4


def test_a_time_that_is_over_returns_the_best_and_says_what_is_proven():
    program, form, _ = true_form(1, negative=True)
    size = np.tile(np.arange(BLOCKS, 0, -1.0), LAYERS)
    program = replace(program, resources=size[None], limits=np.array([16.0]))
    values = [form.value(columns) for columns in all_choices(program)]
    found = interactions.solve(program, form, gap=0.0, time_limit_s=1e-9)
    assert found.bound <= min(values) <= found.objective + 1e-12
