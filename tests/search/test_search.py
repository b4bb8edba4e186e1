import dataclasses
import itertools
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle import pipeline
from puzzle.errors import Infeasible, UserError
from puzzle.model.architecture import parse_block
from puzzle.search import baselines, mip
from puzzle.search import stage as search


@st.composite
def programs(draw):
    """2 to 5 layers of 2 to 4 columns, 0 to 3 limits; small integers make ties and tight limits
    common.

    Half of them have the same resources in every layer, as measured costs do: these are solved by
    counting.
    """
    sizes = draw(st.lists(st.integers(2, 4), min_size=2, max_size=5))
    columns = sum(sizes)
    numbers = st.lists(st.integers(-3, 9), min_size=columns, max_size=columns)
    if draw(st.booleans()):
        kinds = draw(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), max_size=3))
        rows = [[kind[j] for n in sizes for j in range(n)] for kind in kinds]
    else:
        rows = draw(st.lists(numbers, max_size=3))
    limits = [draw(st.integers(0, 9 * len(sizes))) for _ in rows]
    costs = np.array(draw(numbers)) * draw(st.sampled_from([1.0, 1e-4, 1e5]))
    resources = np.array(rows, dtype=float).reshape(len(rows), columns)
    return mip.Program(mip.starts_of(sizes), costs, resources, np.array(limits, dtype=float))


def brute_force(program):
    best = None
    for choice in itertools.product(*(range(a, b) for a, b in itertools.pairwise(program.starts))):
        index = list(choice)
        if any(
            program.resources[r][index].sum() > program.limits[r] + 1e-9
            for r in range(len(program.limits))
        ):
            continue
        picked = np.bincount(index, minlength=len(program.costs))
        if any(picked[row.columns] @ row.values > row.limit + 1e-9 for row in program.extra):
            continue
        value = program.costs[index].sum()
        best = value if best is None else min(best, value)
    return best


def check_against_brute_force(program):
    found, expected = mip.solve(program, gap=0.0), brute_force(program)
    assert (found is None) == (expected is None)
    if found is not None:
        size = np.abs(program.costs).max(initial=1e-9)
        assert found.objective == pytest.approx(expected, abs=1e-8 * size)
        assert found.objective == pytest.approx(program.costs[found.chosen].sum())
        assert (
            found.bound <= expected + 1e-8 * size and found.objective - found.bound <= 1e-6 * size
        )
        assert program.feasible(found.chosen)
    return found


@settings(max_examples=2000, deadline=None)
@given(programs())
def test_the_program_equals_brute_force_infeasible_ones_too(program):
    check_against_brute_force(program)


@settings(max_examples=300, deadline=None)
@given(programs(), st.integers(0, 4))
def test_the_next_solutions_equal_brute_force_over_what_is_different_enough(program, overlap):
    for _ in range(2):
        found = check_against_brute_force(program)
        if found is None:
            return
        row = mip.overlap_row(found.chosen, overlap)
        program = dataclasses.replace(program, extra=(*program.extra, row))
    check_against_brute_force(program)


@settings(max_examples=200, deadline=None)
@given(programs())
def test_no_baseline_beats_the_exact_search_and_none_breaks_a_limit(program):
    found = mip.solve(program, gap=0.0)
    every = np.ones(len(program.costs), dtype=bool)
    for name, chosen in baselines.choices(
        program, np.arange(len(program.costs)) * 1.0, every
    ).items():
        assert chosen is None or found is not None, name
        if chosen is not None:
            assert program.feasible(chosen), name
            assert (
                program.costs[chosen].sum() >= found.objective - 1e-8 * np.abs(program.costs).max()
            ), name


@settings(max_examples=100, deadline=None)
@given(programs())
def test_the_nearest_relaxation_is_that_of_brute_force(program):
    if not len(program.limits):
        return
    sizes = np.maximum(np.abs(program.limits), np.abs(program.resources).max(axis=1))
    sizes[sizes == 0] = 1e-12

    def excess(index):
        return max(0.0, ((program.resources[:, index].sum(axis=1) - program.limits) / sizes).max())

    every = itertools.product(*(range(a, b) for a, b in itertools.pairwise(program.starts)))
    assert excess(mip.nearest(program, 10.0)) == pytest.approx(
        min(excess(list(i)) for i in every), abs=2e-3
    )


def test_greedy_is_the_papers():
    """Two layers, budget 10 each: the layer with the lower mean goes first; what it leaves lets the
    other keep more.
    """
    resources = np.array([[9.0, 4.0, 16.0, 4.0]])
    program = mip.Program(
        mip.starts_of([2, 2]), np.array([0.0, 1.0, 0.0, 5.0]), resources, np.array([20.0])
    )
    assert baselines.greedy(program).tolist() == [
        0,
        3,
    ]  # 9, then 10 + 1 left over is not enough for 16


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("throughput", "2x", (2.0, True)),
        ("memory", "50%", (0.5, True)),
        ("memory", "40GiB", (40 * 2**30, False)),
        ("memory", "40 GB", (40e9, False)),
        ("latency", "3s", (3.0, False)),
        ("latency", "250 ms", (0.25, False)),
        ("throughput", "1500 tok/s", (1500.0, False)),
        ("parameters", "4.5B", (4.5e9, False)),
        ("parameters", "1000", (1000.0, False)),
        ("latency", "1e-1 s", (0.1, False)),
    ],
)
def test_quantities_are_read_with_their_units(name, text, expected):
    number, relative = search.parse_quantity(name, text)
    assert (number, relative) == (pytest.approx(expected[0]), expected[1])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("memory", "40"),
        ("memory", "40 s"),
        ("throughput", "fast"),
        ("latency", "-3s"),
        ("latency", "0s"),
        ("throughput", ""),
        ("latency", "nan s"),
        ("latency", "3 s s"),
        ("throughput", "1500 tok"),
    ],
)
def test_an_unclear_quantity_is_a_user_error(name, text):
    with pytest.raises(UserError, match=rf"search.{name}: got .*expected a number with a unit"):
        search.parse_quantity(name, text)


@pytest.mark.training
def test_an_impossible_wish_says_what_binds_and_the_best_attainable(finished_run):
    with pytest.raises(
        Infeasible,
        match=r"throughput 99x is out of reach \(best attainable: [0-9.e+]+ tokens per second\)",
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
    [
        ("latency", "70%", "latency_s", 0.7),
        ("memory", "60%", "memory_bytes", 0.6),
        ("parameters", "60%", "parameters", 0.6),
        ("kv_cache", "50%", "kv_cache_bytes", 0.5),
        ("time_to_first_token", "60%", "time_to_first_token_s", 0.6),
    ],
)
def test_every_kind_of_constraint_is_kept_by_the_solution(finished_run, name, text, figure, share):
    answer = again(finished_run, **{name: text})
    assert answer["solutions"][0]["predicted"]["main"][figure] <= share * answer["parent"]["main"][
        figure
    ] * (1 + 1e-9)


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
    points = again(finished_run, throughput="1.3x")["frontier"]
    assert len(points) > 2
    objectives = [p["objective"] for p in points]
    assert objectives == sorted(objectives) and objectives[0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.training
def test_a_limit_on_changed_layers_order_of_widths_and_one_block_everywhere(finished_run):
    parent = finished_run.parent.shape.parent_block.name
    free = again(finished_run, throughput="1.15x")["solutions"][0]
    few = again(finished_run, throughput="1.15x", changed_layers=2)["solutions"][0]
    assert (
        sum(name != parent for name in few["blocks"]) <= 2
        and few["objective"] >= free["objective"] - 1e-9
    )
    ordered = again(finished_run, throughput="1.15x", monotone=True)["solutions"][0]
    widths = [parse_block(name).ffn.intermediate_size for name in ordered["blocks"]]
    assert (
        widths == sorted(widths, reverse=True) and ordered["objective"] >= free["objective"] - 1e-9
    )
    same = again(finished_run, throughput="1.15x", homogeneous=True)["solutions"][0]
    assert len(set(same["blocks"])) == 1 and same["objective"] >= free["objective"] - 1e-9


@pytest.mark.training
@pytest.mark.parametrize("kind", ["memory", "latency", "kv_cache"])
def test_a_frontier_of_any_resource_has_no_dominated_point(finished_run, kind):
    points = again(finished_run, throughput="1.1x", frontier=kind, points=8)["frontier"]
    figure = {"memory": "memory_bytes", "latency": "latency_s", "kv_cache": "kv_cache_bytes"}[kind]
    values = [(p[figure], p["objective"]) for p in points]
    assert len(values) > 2
    assert not [a for a in values for b in values if a != b and b[0] <= a[0] and b[1] <= a[1]]


@pytest.mark.training
def test_the_baselines_are_recorded_beside_the_solution(finished_run):
    rows = again(finished_run, throughput="1.2x")["baselines"]
    names = {row["name"] for row in rows}
    assert names == {
        "greedy",
        "most parameters",
        "random",
        "no-op only",
        "evolutionary",
        "homogeneous",
    }
    assert sum(row["objective"] is not None for row in rows) >= 4


@pytest.fixture(scope="module")
def served_in_many_ways(finished_run, tmp_path_factory):
    """The finished run's library and scores with more scenarios and batch sizes measured."""
    folder = tmp_path_factory.mktemp("ways") / "run"
    shutil.copytree(finished_run.folder, folder, ignore=shutil.ignore_patterns("cost", "search"))
    sheet = folder.parent / "memory_bound.yaml"  # here a larger batch gives throughput for nothing
    sheet.write_text("{flops_per_s: 1.0e+12, bytes_per_s: 1.0e+9, step_overhead_s: 1.0e-6}")
    more = {
        "device_sheet": str(sheet),
        "batch_sizes": [2, 32],
        "scenarios": {"long": {"batch_size": 2, "input_length": 128, "output_length": 8}},
    }
    recipe = finished_run.recipe
    costs = recipe.cost.model_validate(recipe.cost.model_dump() | more)
    run = type(finished_run)(
        recipe.model_copy(update={"cost": costs}), folder, finished_run.progress
    )
    for stage in ("cost", "search"):
        pipeline.execute_stage(run, stage)
    return run


@pytest.mark.training
def test_one_text_holds_in_every_scenario(served_in_many_ways):
    answer = again(served_in_many_ways, latency="80%")
    for scenario in ("main", "long"):
        predicted, parent = (
            answer["solutions"][0]["predicted"][scenario],
            answer["parent"][scenario],
        )
        assert predicted["latency_s"] <= 0.8 * parent["latency_s"] * (1 + 1e-9)


@pytest.mark.training
def test_constraints_can_name_their_scenario(served_in_many_ways):
    free = again(served_in_many_ways, throughput={"main": "1.1x"})
    both = again(served_in_many_ways, throughput={"main": "1.1x", "long": "1.5x"})
    speed = both["solutions"][0]["predicted"]["long"]["throughput_tok_per_s"]
    assert speed >= 1.5 * both["parent"]["long"]["throughput_tok_per_s"] * (1 - 1e-9)
    assert both["solutions"][0]["objective"] >= free["solutions"][0]["objective"]
    with pytest.raises(UserError, match="no scenario 'short'; expected one of main, long"):
        again(served_in_many_ways, throughput={"short": "1.1x"})


@pytest.mark.training
def test_the_best_batch_size_wins_and_is_compared_with_the_parent_at_its_own(served_in_many_ways):
    answer = again(served_in_many_ways, throughput={"main": "1.5x"})
    sweep = {row["batch_size"]: row["objective"] for row in answer["sweep"]}
    assert set(sweep) == {8, 2, 32}
    reached = {size: objective for size, objective in sweep.items() if objective is not None}
    assert (
        answer["solutions"][0]["objective"]
        == min(reached.values())
        == reached[answer["batch_size"]]
    )
    speed = answer["solutions"][0]["predicted"]["main"]["throughput_tok_per_s"]
    assert speed >= 1.5 * answer["parent"]["main"]["throughput_tok_per_s"] * (1 - 1e-9)
    assert answer["batch_size"] == 32
    small = again(served_in_many_ways, throughput={"main": "1.2x"}, kv_cache={"main": "30%"})
    assert small["batch_size"] != 32  # but not cache


@pytest.mark.training
def test_a_child_at_another_batch_size_is_measured_there(served_in_many_ways):
    run = served_in_many_ways
    found = search.artifacts.read_json(run.stage_folder("search") / "solutions.json")
    outcome = pipeline.execute_stage(run, "assemble")
    measured = search.artifacts.read_json(run.stage_folder("assemble") / "measured.json")
    assert outcome["met"] and set(measured["scenarios"]) == {"main", "long"}
    assert found["batch_size"] != run.recipe.cost.scenario.batch_size
    assert all(
        abs(one["prediction_error"]) < 1e-6 for one in measured["scenarios"].values()
    )  # modelled: exact


@pytest.mark.training
def test_no_constraint_at_all_is_a_user_error(finished_run):
    with pytest.raises(UserError, match="no constraint is set"):
        again(finished_run)


def again(run, **constraints):
    """Search a finished run anew with other constraints, in the same folder."""
    empty = dict.fromkeys(search.KINDS)
    config = run.recipe.search.model_validate(
        run.recipe.search.model_dump() | empty | {"margin": 0.0} | constraints
    )
    other = type(run)(run.recipe.model_copy(update={"search": config}), run.folder, run.progress)
    try:
        pipeline.execute_stage(other, "search")
        files = {
            name: run.stage_folder("search") / f"{name}.json"
            for name in ("solutions", "frontier", "baselines")
        }
        found = {name: search.artifacts.read_json(path) for name, path in files.items()}
        return found.pop("solutions") | found
    finally:
        pipeline.execute_stage(run, "search")
