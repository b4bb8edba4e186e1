import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle import pipeline, search
from puzzle.architecture import FFN, Attention, Block
from puzzle.errors import Infeasible, UserError

BLOCKS = [Block(a, f) for a in (Attention("gqa", 2), Attention("no_op")) for f in (FFN("gated", 8), FFN("no_op"))]


@st.composite
def problems(draw):
    """2 to 4 layers of 2 to 4 blocks, 0 to 2 constraints; small integers make ties and tight limits common."""
    sizes = draw(st.lists(st.integers(2, 4), min_size=2, max_size=4))
    columns = sum(sizes)
    numbers = st.lists(st.integers(0, 9), min_size=columns, max_size=columns)
    rows = draw(st.lists(numbers, max_size=2))
    limits = [draw(st.integers(0, 9 * len(sizes))) for _ in rows]
    resources = np.array(rows, dtype=float).reshape(len(rows), columns)
    return search.Problem(
        [BLOCKS[:n] for n in sizes], np.array(draw(numbers), dtype=float), resources, np.array(limits, dtype=float)
    )


def brute_force(problem, avoid=(), overlap=0):
    starts = problem.starts
    best = None
    for choice in itertools.product(*(range(a, b) for a, b in itertools.pairwise(starts))):
        index = list(choice)
        if any(problem.resources[r][index].sum() > problem.limits[r] + 1e-9 for r in range(len(problem.limits))):
            continue
        if any(len(set(choice) & set(earlier.tolist())) > overlap for earlier in avoid):
            continue
        value = problem.scores[index].sum()
        best = value if best is None else min(best, value)
    return best


@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_program_equals_brute_force_infeasible_ones_too(problem):
    found = search.solve(problem, gap=0.0, time_limit_s=60)
    expected = brute_force(problem)
    if expected is None:
        assert found is None
    else:
        chosen, solution = found
        assert solution.objective == pytest.approx(expected) == pytest.approx(problem.scores[chosen].sum())
        assert solution.gap <= 1e-9
        assert all(problem.resources @ np.bincount(chosen, minlength=len(problem.scores)) <= problem.limits + 1e-6)


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(0, 3))
def test_the_next_solution_equals_brute_force_over_what_is_different_enough(problem, overlap):
    first = search.solve(problem, gap=0.0, time_limit_s=60)
    if first is None:
        return
    second = search.solve(problem, gap=0.0, time_limit_s=60, avoid=[first[0]], overlap=overlap)
    expected = brute_force(problem, [first[0]], overlap)
    assert (second is None) == (expected is None)
    if second is not None:
        assert second[1].objective == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [("throughput", "2x", (2.0, True)), ("memory", "50%", (0.5, True)), ("memory", "40GiB", (40 * 2**30, False)),
     ("memory", "40 GB", (40e9, False)), ("latency", "3s", (3.0, False)), ("latency", "250 ms", (0.25, False)),
     ("throughput", "1500 tok/s", (1500.0, False)), ("parameters", "4.5B", (4.5e9, False)),
     ("parameters", "1000", (1000.0, False)), ("latency", "1e-1 s", (0.1, False))],
)  # fmt: skip
def test_quantities_are_read_with_their_units(name, text, expected):
    number, relative = search.parse_quantity(name, text)
    assert (number, relative) == (pytest.approx(expected[0]), expected[1])


@pytest.mark.parametrize(
    ("name", "text"),
    [("memory", "40"), ("memory", "40 s"), ("throughput", "fast"), ("latency", "-3s"), ("latency", "0s"),
     ("throughput", ""), ("latency", "nan s"), ("latency", "3 s s"), ("throughput", "1500 tok")],
)  # fmt: skip
def test_an_unclear_quantity_is_a_user_error(name, text):
    with pytest.raises(UserError, match=rf"search.{name}: got .*expected a number with a unit"):
        search.parse_quantity(name, text)


@pytest.mark.training
def test_an_impossible_wish_says_what_binds_and_the_best_attainable(finished_run):
    with pytest.raises(
        Infeasible, match=r"throughput 99x is out of reach \(best attainable: [0-9.e+]+ tokens per second\)"
    ):
        again(finished_run, throughput="99x")


@pytest.mark.training
def test_every_constraint_of_an_impossible_wish_is_judged_on_its_own(finished_run):
    with pytest.raises(Infeasible) as raised:
        again(finished_run, throughput="1.1x", parameters="1%")
    assert "throughput 1.1x is reachable alone" in str(raised.value)
    assert "parameters 1% is out of reach" in str(raised.value)


@pytest.mark.training
@pytest.mark.parametrize(
    ("name", "text", "figure", "share"),
    [("latency", "70%", "latency_s", 0.7), ("memory", "60%", "memory_bytes", 0.6),
     ("parameters", "60%", "parameters", 0.6),
     ("kv_cache", "50%", "kv_cache_bytes", 0.5), ("time_to_first_token", "60%", "time_to_first_token_s", 0.6)],
)  # fmt: skip
def test_every_kind_of_constraint_is_kept_by_the_solution(finished_run, name, text, figure, share):
    answer = again(finished_run, **{name: text})
    assert answer["solutions"][0]["predicted"][figure] <= share * answer["parent"][figure] * (1 + 1e-9)


@pytest.mark.training
def test_diverse_solutions_differ_in_enough_layers_and_get_no_better(finished_run):
    answer = again(finished_run, throughput="1.2x", solutions=4, diversity=0.5)
    chosen = [s["blocks"] for s in answer["solutions"]]
    assert len(chosen) >= 2
    for a, b in itertools.combinations(chosen, 2):
        assert sum(x != y for x, y in zip(a, b, strict=True)) >= 2
    objectives = [s["objective"] for s in answer["solutions"]]
    assert objectives == sorted(objectives)


@pytest.mark.training
def test_the_frontier_never_gets_better_with_more_throughput(finished_run):
    again(finished_run, throughput="1.3x")
    points = search.artifacts.read_json(finished_run.stage_folder("search") / "frontier.json")
    assert len(points) > 2
    objectives = [p["objective"] for p in points]
    assert objectives == sorted(objectives) and objectives[0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.training
def test_no_constraint_at_all_is_a_user_error(finished_run):
    with pytest.raises(UserError, match="no constraint is set"):
        again(finished_run)


def again(run, **constraints):
    """Search a finished run anew with other constraints, in the same folder."""
    empty = dict.fromkeys(search.KINDS)
    config = run.recipe.search.model_validate(run.recipe.search.model_dump() | empty | {"margin": 0.0} | constraints)
    other = type(run)(run.recipe.model_copy(update={"search": config}), run.folder, run.progress)
    try:
        pipeline.execute_stage(other, "search")
        return search.artifacts.read_json(run.stage_folder("search") / "solutions.json")
    finally:
        pipeline.execute_stage(run, "search")
