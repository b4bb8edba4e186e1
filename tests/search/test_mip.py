"""The solver against trying every choice of small random programs."""

import dataclasses
import itertools
from unittest import mock

import numpy as np
import pytest
from highspy import HighsModelStatus
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import brute_force, every_choice, programs, uneven_programs

from puzzle.search import mip
from puzzle.search.highs import Model
from puzzle.search.program import Program, starts_of

pytestmark = pytest.mark.training  # thousands of programs: half a minute


def check_against_brute_force(program):
    optimum, expected = mip.solve(program, gap=0.0), brute_force(program)
    assert (optimum is None) == (expected is None)
    if optimum is not None:
        size = np.abs(program.costs).max(initial=1e-9)
        assert optimum.objective == pytest.approx(expected, abs=1e-8 * size)
        assert optimum.objective == pytest.approx(program.costs[optimum.columns].sum())
        assert optimum.bound <= expected + 1e-8 * size
        assert optimum.objective - optimum.bound <= 1e-6 * size
        if abs(optimum.objective) > 1e-6 * size:  # otherwise both are rounding
            distance = max(0.0, optimum.objective - optimum.bound)
            assert optimum.gap == pytest.approx(distance / abs(optimum.objective))
        assert program.feasible(optimum.columns)
    return optimum


@settings(max_examples=2000, deadline=None)
@given(programs())
def test_the_program_equals_brute_force_infeasible_ones_too(program):
    check_against_brute_force(program)


def test_a_program_that_the_presolve_of_highs_calls_infeasible_is_solved():
    """Found by the test above, with HiGHS 1.15.1."""
    rows = [
        [1, 3, 3, 9, 0, 7, 0, 0, -3, 0, -1, 5, 5, 7, 7, 3],
        [0] * 16,
        [0, 0, -1, -1, 0, 0, 0, 0, 0, -1, 0, 0, 0, 0, 0, 1],
    ]
    costs = np.array([0, -1, 0, 0, 0, -1, 0, -1, 1, 0, 0, 0, 0, 0, 0, 0], dtype=float)
    limits = np.array([14.0, 0.0, 0.0])
    program = Program(starts_of([3, 4, 4, 2, 3]), costs, np.array(rows, dtype=float), limits)
    check_against_brute_force(program)
    assert mip.solve(program, gap=0.0).objective == -1.0


@settings(max_examples=300, deadline=None)
@given(uneven_programs(), st.sampled_from([0.0, 1e-4, 1e-2]))
def test_the_proof_is_in_the_scale_of_the_objective_however_large_other_costs_are(program, gap):
    optimum, expected = mip.solve(program, gap=gap), brute_force(program)
    assert (optimum is None) == (expected is None)
    if optimum is not None:
        assert program.feasible(optimum.columns)
        assert optimum.bound <= expected * (1 + 1e-7)
        assert expected * (1 - 1e-7) <= optimum.objective <= expected * (1 + gap + 1e-6)
        assert optimum.gap <= gap + 1e-6


@settings(max_examples=500, deadline=None)
@given(programs(), st.floats(-30, 0), st.sampled_from([0.0, 0.02, 0.2]))
def test_a_gap_is_kept_whatever_the_objectives_sign_and_however_small_the_core(program, shift, gap):
    """A core of one column a group must grow; the shift makes all objectives lower."""
    unit = np.abs(program.costs).max(initial=1e-9)
    shifted = np.where(program.groups == 0, program.costs + shift * unit, program.costs)
    program = dataclasses.replace(program, costs=shifted)
    with mock.patch.multiple(mip, CORE_PER_GROUP=1, CORE_SPARE=0):
        optimum = mip.solve(program, gap=gap)
    expected = brute_force(program)
    assert (optimum is None) == (expected is None)
    if optimum is not None:
        assert optimum.bound <= expected + 1e-7 * unit
        assert optimum.objective <= expected + gap * abs(optimum.objective) + 1e-7 * unit


def test_a_program_on_which_presolve_fails_is_solved_without_it(monkeypatch):
    program = Program(np.array([0, 2, 4]), np.array([2.0, 1, 1, 3]), np.zeros((0, 4)), np.zeros(0))
    expected, asked = mip.solve(program, gap=0.0), []
    real = Model._solved

    def fails(self, options):
        asked.append(options.get("presolve", "on"))
        highs = real(self, options)
        if asked[-1] == "on":
            failed = mock.Mock(wraps=highs)
            failed.getModelStatus.side_effect = lambda: HighsModelStatus.kSolveError
            return failed
        return highs

    monkeypatch.setattr(Model, "_solved", fails)
    found = mip.solve(program, gap=0.0)
    assert "off" in asked and found.objective == expected.objective == 2.0


def test_a_gap_is_relative_to_the_objective_not_to_the_costs_that_it_is_the_difference_of():
    """The core's best choice has -2, the best of all -4: farther apart than 20 % of 2, but not than
    20 % of the base of -12 and of the 10 above it.
    """
    costs, resources = np.array([-12.0, -2.0, -4.0]), np.array([[2.0, 0.0, 1.0]])
    program = Program(starts_of([3]), costs, resources, np.array([1.0]))
    with mock.patch.multiple(mip, CORE_PER_GROUP=1, CORE_SPARE=0):
        assert mip.solve(program, gap=0.2).objective == -4.0


@settings(max_examples=100, deadline=None)
@given(uneven_programs(), st.integers(0, 4), st.sampled_from([0.0, 1e-2, 0.5]))
def test_diverse_solutions_come_best_first_also_within_a_gap(program, overlap, gap):
    optima = mip.diverse(program, solutions=4, overlap=overlap, gap=gap, time_limit_s=10.0)
    objectives = [optimum.objective for optimum in optima]
    assert objectives == sorted(objectives) and len(optima) <= 4
    for one, other in itertools.combinations(optima, 2):
        assert (one.columns == other.columns).sum() <= overlap
    if optima:
        assert optima[0].bound <= brute_force(program) * (1 + 1e-7)
    if len(optima) < 4:  # only where no more are different enough
        rows = [mip.overlap_row(optimum.columns, overlap) for optimum in optima]
        assert brute_force(dataclasses.replace(program, extra=(*program.extra, *rows))) is None


@settings(max_examples=500, deadline=None)
@given(programs())
def test_a_core_that_starts_too_small_grows_until_the_optimum_is_proven(program):
    with mock.patch.multiple(mip, CORE_PER_GROUP=0, CORE_SPARE=1):
        check_against_brute_force(program)


@settings(max_examples=300, deadline=None)
@given(programs(), st.integers(0, 4))
def test_the_next_solutions_equal_brute_force_over_what_is_different_enough(program, overlap):
    for _ in range(2):
        optimum = check_against_brute_force(program)
        if optimum is None:
            return
        row = mip.overlap_row(optimum.columns, overlap)
        program = dataclasses.replace(program, extra=(*program.extra, row))
    check_against_brute_force(program)


@settings(max_examples=100, deadline=None)
@given(programs())
def test_the_nearest_relaxation_is_that_of_brute_force(program):
    if not len(program.limits):
        return
    sizes = np.maximum(np.abs(program.limits), np.abs(program.resources).max(axis=1))
    sizes[sizes == 0] = 1e-12

    def excess(columns):
        used = program.resources[:, columns].sum(axis=1)
        return max(0.0, ((used - program.limits) / sizes).max())

    least = min(excess(columns) for columns in every_choice(program))
    assert excess(mip.nearest(program, 10.0)) == pytest.approx(least, abs=2e-3)


@settings(max_examples=300, deadline=None)
@given(programs())
def test_feasible_choices_are_those_that_keep_every_limit(program):
    for columns in itertools.islice(every_choice(program), 64):
        used = program.resources[:, columns].sum(axis=1)  # small integers, so without rounding
        assert program.feasible(np.array(columns)) == bool((used <= program.limits).all())


def test_a_limit_is_kept_to_rounding_whatever_its_size():
    """The sum of 0.1 and 0.2 is above 0.3, and so it is of bytes."""
    for size in (1.0, 1e12, 1e-12):
        resources = np.array([[0.1, 5.0, 0.2, 5.0]]) * size
        program = Program(np.array([0, 2, 4]), np.zeros(4), resources, np.array([0.3 * size]))
        assert resources[0, [0, 2]].sum() > 0.3 * size or size != 1.0
        assert program.feasible(np.array([0, 2]))
        over = dataclasses.replace(program, limits=program.limits * (1 - 1e-6))
        assert not over.feasible(np.array([0, 2]))
