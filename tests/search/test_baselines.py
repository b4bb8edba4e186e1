"""The baselines against the exact search, and the greedy by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from programs import programs

from puzzle.search import baselines, mip
from puzzle.search.program import Program, starts_of


@pytest.mark.training  # for seconds: each example solves a dozen programs
@settings(max_examples=200, deadline=None)
@given(programs())
def test_no_baseline_beats_the_exact_search_and_none_breaks_a_limit(program):
    optimum = mip.solve(program, gap=0.0)
    every_column = np.ones(len(program.costs), dtype=bool)
    parameters = np.arange(len(program.costs)) * 1.0
    for name, columns in baselines.choices(program, parameters, every_column).items():
        assert columns is None or optimum is not None, name
        if columns is not None:
            assert program.feasible(columns), name
            tolerance = 1e-8 * np.abs(program.costs).max()
            assert program.costs[columns].sum() >= optimum.objective - tolerance, name


def test_greedy_is_the_papers():
    """Two layers, budget 10 each: the layer with the lower mean score goes first.

    What it leaves of its budget is added to that of the other.
    """
    resources = np.array([[9.0, 4.0, 16.0, 4.0]])
    costs = np.array([0.0, 1.0, 0.0, 5.0])
    program = Program(starts_of([2, 2]), costs, resources, np.array([20.0]))
    # The first takes 9; then 10 and the 1 left over are not enough for 16.
    assert baselines.greedy(program).tolist() == [0, 3]


def test_greedy_goes_by_rising_mean_score_and_passes_on_what_is_left():
    """Layer 0 has the lower mean and leaves 1 of its 2; only with that can layer 1 keep its best.

    In the other order, or without what is left, layer 1 gets its second best.
    """
    costs = np.array([0.0, 5.0, 0.0, 10.0, 30.0])
    resources = np.array([[1.0, 0.0, 3.0, 2.0, 1.0]])
    program = Program(starts_of([2, 3]), costs, resources, np.array([4.0]))
    assert baselines.greedy(program).tolist() == [0, 2]
    swapped = Program(
        starts_of([3, 2]), np.roll(costs, 3), np.roll(resources, 3, axis=1), program.limits
    )
    assert baselines.greedy(swapped).tolist() == [0, 3]
