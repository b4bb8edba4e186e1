import itertools
import random
import shutil

import pytest
from typer.testing import CliRunner

from puzzle import artifacts, cli, pipeline
from puzzle.assemble import ASSEMBLE, measured
from puzzle.config import ChildConfig, SearchConfig
from puzzle.cost import COST
from puzzle.errors import Infeasible, UserError
from puzzle.model import child
from puzzle.model.architecture import Architecture, parse_block
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.score import results as scores
from puzzle.search import SEARCH, answers, promise, stage
from puzzle.search.constraints import KINDS
from puzzle.search.frontier import baseline_choices, frontier
from puzzle.search.promise import MEASURED, MeasuredChild
from puzzle.stage import Job

pytestmark = pytest.mark.training


def question(run: Run, **changes) -> Job:
    """A job that asks for nothing but these constraints, without a margin."""
    settings = run.recipe.search.model_dump() | dict.fromkeys(KINDS) | {"margin": 0.0} | changes
    return run.job_of("main", ChildConfig(search=SearchConfig.model_validate(settings)))


def ask(run, **changes):
    """The answer to a question to a finished run."""
    job = question(run, **changes)
    return stage.search(job, stage.read_choices(job))[0]


def frontier_of(job):
    choices = stage.read_choices(job)
    _, best = stage.search(job, choices)
    parent = Architecture.of_parent(job.run.parent.shape)
    return frontier(choices, best.tables["main"], parent, job.child.search, best.limits)


def baselines_of(job):
    choices = stage.read_choices(job)
    _, best = stage.search(job, choices)
    return baseline_choices(best.program, choices, job.run.parent.shape, best.tables["main"])


def test_an_impossible_wish_says_what_binds_and_the_best_attainable(finished_run):
    with pytest.raises(
        Infeasible,
        match=r"throughput 99x is out of reach \(best attainable: [0-9.e+]+ tokens per second\)",
    ):
        ask(finished_run, throughput="99x")


def test_every_constraint_of_an_impossible_wish_is_judged_on_its_own(finished_run):
    with pytest.raises(Infeasible) as raised:
        ask(finished_run, throughput="1.1x", parameters="1%")
    assert "throughput 1.1x is reachable alone" in str(raised.value)
    assert "parameters 1% is out of reach" in str(raised.value)


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
    answer = ask(finished_run, **{name: text})
    parent = getattr(answer.parent["main"], figure)
    assert getattr(answer.best.predicted["main"], figure) <= share * parent * (1 + 1e-9)


def test_diverse_solutions_differ_in_enough_layers_and_get_no_better(finished_run):
    solutions = ask(finished_run, throughput="1.2x", solutions=4, diversity=0.5).solutions
    assert len(solutions) >= 2
    for a, b in itertools.combinations(solutions, 2):
        assert sum(x != y for x, y in zip(a.blocks, b.blocks, strict=True)) >= 2
    objectives = [solution.objective for solution in solutions]
    assert objectives == sorted(objectives)


def test_the_frontier_never_gets_better_with_more_throughput(finished_run):
    points = frontier_of(question(finished_run, throughput="1.3x"))
    assert len(points) > 2
    objectives = [point.objective for point in points]
    assert objectives == sorted(objectives) and objectives[0] == pytest.approx(0.0, abs=1e-6)


def test_a_limit_on_changed_layers_order_of_widths_and_one_block_everywhere(finished_run):
    parent = finished_run.parent.shape.widest_block.name
    least = ask(finished_run, throughput="1.15x").best.objective - 1e-9
    few = ask(finished_run, throughput="1.15x", changed_layers=2).best
    assert sum(name != parent for name in few.blocks) <= 2 and few.objective >= least
    ordered = ask(finished_run, throughput="1.15x", monotone=True).best
    widths = [parse_block(name).ffn.intermediate_size for name in ordered.blocks]
    assert widths == sorted(widths, reverse=True) and ordered.objective >= least
    same = ask(finished_run, throughput="1.15x", homogeneous=True).best
    assert len(set(same.blocks)) == 1 and same.objective >= least


@pytest.mark.parametrize("kind", ["memory", "latency", "kv_cache"])
def test_a_frontier_of_any_resource_has_no_dominated_point(finished_run, kind):
    points = frontier_of(question(finished_run, throughput="1.1x", frontier=kind, points=8))
    figure = {"memory": "memory_bytes", "latency": "latency_s", "kv_cache": "kv_cache_bytes"}[kind]
    values = [(getattr(point.figures, figure), point.objective) for point in points]
    assert len(values) > 2
    assert not [a for a in values for b in values if a != b and b[0] <= a[0] and b[1] <= a[1]]


def test_the_baselines_stand_beside_the_solution(finished_run):
    rows = baselines_of(question(finished_run, throughput="1.2x"))
    assert {row.name for row in rows} == {
        "greedy",
        "most parameters",
        "random",
        "no-op only",
        "evolutionary",
        "homogeneous",
    }
    assert sum(row.objective is not None for row in rows) >= 4


def test_no_constraint_at_all_is_a_user_error(finished_run):
    with pytest.raises(UserError, match="no constraint is set"):
        ask(finished_run)


# ------------------------------------------------------------------- more scenarios and batches


@pytest.fixture(scope="module")
def served_in_many_ways(finished_run, tmp_path_factory):
    """The finished run's library and scores with more scenarios and batch sizes measured."""
    folder = tmp_path_factory.mktemp("ways") / "run"
    ignored = shutil.ignore_patterns("places", "children")
    shutil.copytree(finished_run.folder, folder, ignore=ignored)
    sheet = folder.parent / "memory_bound.yaml"  # here a larger batch gives throughput for nothing
    sheet.write_text("{flops_per_s: 1.0e+12, bytes_per_s: 1.0e+9, step_overhead_s: 1.0e-6}")
    more = {
        "device_sheet": str(sheet),
        "batch_sizes": [2, 32],
        "scenarios": {"long": {"batch_size": 2, "input_length": 128, "output_length": 8}},
    }
    recipe = finished_run.recipe
    costs = recipe.cost.model_validate(recipe.cost.model_dump() | more)
    run = Run(recipe.model_copy(update={"cost": costs}), folder, finished_run.progress)
    run.write()
    for each in (COST, SEARCH):
        pipeline.execute_stage(each, run.child_job("main"))
    return run


def test_one_text_holds_in_every_scenario(served_in_many_ways):
    answer = ask(served_in_many_ways, latency="80%")
    for scenario in ("main", "long"):
        predicted, parent = answer.best.predicted[scenario], answer.parent[scenario]
        assert predicted.latency_s <= 0.8 * parent.latency_s * (1 + 1e-9)


def test_constraints_can_name_their_scenario(served_in_many_ways):
    free = ask(served_in_many_ways, throughput={"main": "1.1x"})
    both = ask(served_in_many_ways, throughput={"main": "1.1x", "long": "1.5x"})
    speed = both.best.predicted["long"].throughput_tok_per_s
    assert speed >= 1.5 * both.parent["long"].throughput_tok_per_s * (1 - 1e-9)
    assert both.best.objective >= free.best.objective
    with pytest.raises(UserError, match="no scenario 'short'; expected one of main, long"):
        ask(served_in_many_ways, throughput={"short": "1.1x"})


def test_the_best_batch_size_wins_and_is_compared_with_the_parent_at_its_own(served_in_many_ways):
    answer = ask(served_in_many_ways, throughput={"main": "1.5x"})
    sweep = {point.batch_size: point.objective for point in answer.sweep}
    assert set(sweep) == {8, 2, 32}
    reached = {size: objective for size, objective in sweep.items() if objective is not None}
    assert answer.best.objective == min(reached.values()) == reached[answer.batch_size]
    speed = answer.best.predicted["main"].throughput_tok_per_s
    assert speed >= 1.5 * answer.parent["main"].throughput_tok_per_s * (1 - 1e-9)
    assert answer.batch_size == 32
    small = ask(served_in_many_ways, throughput={"main": "1.2x"}, kv_cache={"main": "30%"})
    assert small.batch_size != 32  # but not cache


def test_a_child_at_another_batch_size_is_measured_there(served_in_many_ways):
    job = served_in_many_ways.child_job("main")
    pipeline.execute_stage(ASSEMBLE, job)
    served = measured.read(job)
    assert served.met and set(served.scenarios) == {"main", "long"}
    assert answers.read(job).batch_size != job.place.cost.scenario.batch_size
    errors = [abs(scenario.prediction_error) for scenario in served.scenarios.values()]
    assert max(errors) < 1e-6  # modelled: exact


# --------------------------------------------------------------------------------- questions


@pytest.fixture
def copied_run(finished_run, tmp_path):
    """A copy of the finished run that a test may change."""
    shutil.copytree(finished_run.folder, tmp_path / "run")
    return Run.open(tmp_path / "run", Progress(quiet=True))


def content(folder):
    """The bytes and the time of change of every file by its path; None for folders."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
        for path in folder.rglob("*")
    }


def puzzle(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_a_question_changes_no_file_of_the_run(copied_run):
    before = content(copied_run.folder)
    assert len(before) > 50
    asked = puzzle("search", copied_run.folder, "--throughput", "1.2x", "--solutions", 2)
    assert asked.exit_code == 0 and asked.stdout.count("score sum") == 2
    assert isinstance(
        puzzle("search", copied_run.folder, "--throughput", "99x").exception, Infeasible
    )
    blocks = ask(copied_run, memory="60%").best.blocks
    exactly = f"search.architecture=[{', '.join(blocks)}]"
    asked = puzzle("search", copied_run.folder, "--set", exactly)
    assert asked.exit_code == 0 and " ".join(blocks) in asked.stdout
    assert content(copied_run.folder) == before


def test_the_stage_writes_what_a_question_answers(finished_run):
    job = finished_run.child_job("main")
    answer, _ = stage.search(job, stage.read_choices(job))
    assert answers.read(job).as_json() == answer.as_json()  # the search's seconds are in neither
    assert answers.read_frontier(job) == frontier_of(job)
    assert answers.read_baselines(job) == baselines_of(job)


# --------------------------------------------------------------------- exactly this architecture


def random_blocks(run, seed):
    """A scored block for every layer."""
    rng = random.Random(seed)
    return [rng.choice(layer).name for layer in scores.scored_layers(run, scores.losses(run))]


@pytest.mark.parametrize("constraints", [{}, {"throughput": "1.1x"}, {"throughput": "99x"}])
def test_a_given_architecture_is_the_answer_whatever_else_is_asked(finished_run, constraints):
    """What is asked is not searched for, but it is judged when the child is measured."""
    losses, shape = scores.losses(finished_run), finished_run.parent.shape
    for seed in range(3):
        blocks = random_blocks(finished_run, seed)
        answer = ask(finished_run, architecture=blocks, **constraints)
        (solution,) = answer.solutions
        assert solution.blocks == blocks and solution.gap == 0.0
        assert solution.objective == pytest.approx(sum(losses[pair] for pair in enumerate(blocks)))
        parameters = Architecture.from_names(blocks).parameters(shape)
        assert solution.predicted["main"].parameters == parameters
        assert [constraint.name for constraint in answer.constraints] == list(constraints)


def test_exactly_the_given_child_is_made(copied_run):
    blocks = random_blocks(copied_run, seed=7)
    job = question(copied_run, architecture=blocks)
    for each in (SEARCH, ASSEMBLE):
        pipeline.execute_stage(each, job)
    assert answers.read(job).best.blocks == blocks
    assert child.read_architecture(job.folder(ASSEMBLE)).names == blocks
    assert measured.read(job).met  # nothing was asked of it


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda blocks: blocks[:-1],
            "search.architecture: got 3 layers, expected the parent's 4",
        ),
        (
            lambda blocks: [*blocks, blocks[-1]],
            "search.architecture: got 5 layers, expected the parent's 4",
        ),
        (
            lambda blocks: [blocks[0], "gqa_2+gated_95", *blocks[2:]],
            "search.architecture: layer 1: got 'gqa_2+gated_95', which has no score; expected one "
            "of gqa_2+gated_96, ",
        ),
        (
            lambda blocks: [*blocks[:-1], "narrow"],
            "block 'narrow': expected <attention>+<ffn>",
        ),
    ],
)
def test_an_architecture_that_cannot_be_made_is_one_clear_line(finished_run, edit, message):
    with pytest.raises(UserError) as raised:
        ask(finished_run, architecture=edit(random_blocks(finished_run, seed=0)))
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


# ------------------------------------------------------------------------ after a measured child


def append_measured(job, *, met, time_factor):
    record = MeasuredChild(
        source=str(met),
        costs=job.manifest(COST).fingerprint,
        blocks=answers.read(job).best.blocks,
        speedups={},
        met=met,
        time_factor=time_factor,
    )
    artifacts.append_record(job.child.folder / MEASURED, record)


def test_a_miss_makes_the_next_search_aim_higher_and_a_met_child_does_not(copied_run):
    job = question(copied_run, throughput="1.2x")
    inputs = SEARCH.inputs(job)
    append_measured(job, met=True, time_factor=1.0)
    assert SEARCH.inputs(job) == inputs and promise.time_factor(job) == 1.0
    append_measured(job, met=False, time_factor=1.1)
    assert SEARCH.inputs(job) != inputs  # so the stage runs again
    answer = ask(copied_run, throughput="1.2x")
    speed = answer.best.predicted["main"].throughput_tok_per_s
    assert answer.time_factor == 1.1
    assert speed >= 1.1 * 1.2 * answer.parent["main"].throughput_tok_per_s * (1 - 1e-9)
    assert answer.constraints[0].value == pytest.approx(
        1.2 * answer.parent["main"].throughput_tok_per_s
    )  # what was asked is unchanged
