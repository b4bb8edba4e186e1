import itertools
import random
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from served import SERVED, give_or_take
from typer.testing import CliRunner

from puzzle import cli, pipeline
from puzzle.assemble import ASSEMBLE, measured
from puzzle.config import ChildConfig, SearchConfig
from puzzle.cost import COST, table
from puzzle.cost.refit import CostModel, Observation, in_own_table
from puzzle.engines.intervals import Percentiles
from puzzle.errors import Infeasible, UserError
from puzzle.model import child
from puzzle.model.architecture import Architecture, parse_block
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.score import results as scores
from puzzle.search import SEARCH, answers, around, stage, tried
from puzzle.search.constraints import KINDS
from puzzle.search.frontier import _undominated, baseline_choices, frontier
from puzzle.search.tried import MeasuredChild
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
        match=r"throughput 99x is out of reach \(best attainable: [0-9.]+x\)",
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


def test_the_best_batch_size_wins_and_is_compared_with_the_parent_at_its_best(served_in_many_ways):
    answer = ask(served_in_many_ways, throughput={"main": "1.5x"})
    sweep = {point.batch_size: point.objective for point in answer.sweep}
    assert set(sweep) == {8, 2, 32}
    reached = {size: objective for size, objective in sweep.items() if objective is not None}
    assert answer.best.objective == min(reached.values()) == reached[answer.batch_size]
    speed = answer.best.predicted["main"].throughput_tok_per_s
    assert speed >= 1.5 * answer.parent["main"].throughput_tok_per_s * (1 - 1e-9)
    assert answer.batch_size == answer.parent_batch_size == 32
    alone = question(served_in_many_ways, throughput={"main": "1.5x"})
    rates = [
        t.tokens / t.predict(Architecture.of_parent(alone.run.parent.shape)).total_s
        for t in (table.read(alone, name) for name in ("main", "main@2", "main@32"))
    ]
    assert answer.parent["main"].throughput_tok_per_s == max(rates) > 2 * rates[0]
    small = ask(served_in_many_ways, kv_cache={"main": "30%"})
    assert small.batch_size != 32  # but not cache


def test_a_child_at_another_batch_size_is_measured_there(served_in_many_ways):
    job = served_in_many_ways.child_job("main")
    pipeline.execute_stage(ASSEMBLE, job)
    served = measured.read(job)
    assert served.verdict == "met" and set(served.scenarios) == {"main", "long"}
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
    assert measured.read(job).verdict == "met"  # nothing was asked of it


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda blocks: blocks[:-1],
            "search.architecture: got 3 blocks, expected 4: one for each layer of the parent",
        ),
        (
            lambda blocks: [*blocks, blocks[-1]],
            "search.architecture: got 5 blocks, expected 4: one for each layer of the parent",
        ),
        (
            lambda blocks: [blocks[0], "gqa_2+gated_95", *blocks[2:]],
            "search.architecture: layer 1: got 'gqa_2+gated_95', which is not in the search "
            "space; expected one of its ",
        ),
        (
            lambda blocks: [*blocks[:-1], "narrow"],
            "search.architecture: block 'narrow': expected <attention>+<ffn>",
        ),
    ],
)
def test_an_architecture_that_cannot_be_made_is_one_clear_line(finished_run, edit, message):
    with pytest.raises(UserError) as raised:
        ask(finished_run, architecture=edit(random_blocks(finished_run, seed=0)))
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


# ------------------------------------------------------------------------ after a measured child


def settle(run, **changes):
    """As the stage searches."""
    job = question(run, **changes)
    return stage.search(job, stage.read_choices(job), settle=True)[0]


def served(job, speedup, **changes):
    """A record of the job's child that is `speedup` times as fast as the parent, as predicted."""
    ratio = give_or_take(1 / speedup, 0.001)
    measurement = SERVED.model_copy(
        update={"time_to_first_token_ratio": ratio, "decode_ratio": ratio}
    )
    values = {
        "source": f"{speedup}",
        "costs": job.manifest(COST).fingerprint,
        "wish": tried.wish(job),
        "asked": ["throughput 1.2x"],
        "blocks": answers.read(job).best.blocks,
        "objective": answers.read(job).best.objective,
        "tables": {"main": "main"},
        "parent_tables": {"main": "main"},
        "measurements": {"main": measurement},
        "verdict": "missed",
        "gives_away": False,
    }
    tried.record_measured(job, MeasuredChild.model_validate(values | changes))


def predicted_speedup(run, blocks):
    """With what serving the child has shown, for what is asked in these tests."""
    job = question(run, throughput="1.2x")
    parent = Architecture.of_parent(run.parent.shape)
    model = CostModel.of(table.read(job), parent, tried.observations(job)["main"])
    seconds = [model.table.predict(a).total_s for a in (parent, Architecture.from_names(blocks))]
    return seconds[0] / seconds[1]


def test_a_child_that_is_slower_than_predicted_makes_the_next_search_aim_higher(copied_run):
    job = question(copied_run, throughput="1.2x")
    inputs, blocks = SEARCH.inputs(job), answers.read(job).best.blocks
    before = answers.read(job).predicted_speedup()
    (job.child.folder / tried.MEASURED).unlink()
    served(job, 0.92 * before)
    assert SEARCH.inputs(job) != inputs  # so the stage runs again
    assert predicted_speedup(copied_run, blocks) == pytest.approx(0.92 * before, rel=0.02)
    answer = settle(copied_run, throughput="1.2x")
    assert answer.best.blocks != blocks and answer.final is None
    assert answer.predicted_speedup() >= 1.2 * (1 - 1e-9)
    assert answer.constraints[0].relative == 1.2  # what was asked is unchanged


def test_a_child_that_is_faster_than_predicted_makes_the_next_search_keep_more(copied_run):
    job = question(copied_run, throughput="1.2x")
    first = ask(copied_run, throughput="1.2x")
    copied = answers.read(job).model_copy(update={"solutions": first.solutions})
    copied.write(job.folder(SEARCH) / answers.ANSWER)
    served(job, 1.2 * first.predicted_speedup(), verdict="met", gives_away=True)
    answer = settle(copied_run, throughput="1.2x")
    assert answer.best.objective < first.best.objective and answer.final is None


def test_an_architecture_that_was_refused_is_not_chosen_again(copied_run):
    job = question(copied_run, throughput="1.2x")
    blocks = ask(copied_run, throughput="1.2x").best.blocks
    served(job, 1.21, blocks=blocks, verdict="missed")
    assert ask(copied_run, throughput="1.2x").best.blocks != blocks
    assert ask(copied_run, throughput="1.1x") is not None  # another wish, another question


def test_the_best_that_was_met_is_final_once_the_attempts_are_used_up(copied_run, monkeypatch):
    job = question(copied_run, throughput="1.2x")
    blocks = answers.read(job).best.blocks
    served(job, 1.6, verdict="met", gives_away=True)
    monkeypatch.delattr(around, "refine")  # nothing is looked for around a child that is not tried
    answer = settle(copied_run, throughput="1.2x", attempts=1)
    assert (answer.final, answer.best.blocks) == ("1.6", blocks)
    assert answer.best.bound <= answer.best.objective  # what is proven is of the best there is
    assert ask(copied_run, throughput="1.2x", attempts=1).final is None  # a question
    assert settle(copied_run, throughput="1.15x", attempts=1).final is None


def test_a_child_beside_the_parent_at_another_batch_size_corrects_its_own_table(
    served_in_many_ways,
):
    """The parent was served at batch 32, the child at 8."""
    job = question(served_in_many_ways, throughput={"main": "1.2x"})
    parent = Architecture.of_parent(job.run.parent.shape)
    tables = {name: table.read(job, name) for name in ("main", "main@32")}
    blocks = ["gqa_2+gated_96", *["no_op+gated_96"] * 3]
    own, beside = tables["main"].predict(Architecture.from_names(blocks)), tables["main@32"]
    factor = 1.1  # of what the table of batch 8 says
    seen = Observation(
        scenario="main",
        blocks=blocks,
        compared_with=parent.names,
        compared_in="main@32",
        prefill=give_or_take(factor * own.prefill_s / beside.predict(parent).prefill_s, 0.001),
        decode=give_or_take(factor * own.decode_s / beside.predict(parent).decode_s, 0.001),
    )
    model = CostModel.of(tables["main"], parent, [in_own_table(seen, tables, parent)])
    corrected = model.table.predict(Architecture.from_names(blocks)).total_s
    assert corrected == pytest.approx(factor * own.total_s, rel=0.01)


def test_near_the_best_attainable_there_is_a_child_without_a_margin(finished_run):
    with pytest.raises(Infeasible) as impossible:
        ask(finished_run, throughput="99x")
    best = float(re.search(r"best attainable: ([0-9.]+)x", str(impossible.value))[1])
    answer = ask(finished_run, throughput=f"{0.99 * best:.4f}x", margin=0.2)
    assert answer.margin == 0.0 and answer.predicted_speedup() >= 0.98 * best
    assert ask(finished_run, throughput="1.2x", margin=0.2).margin == 0.2


@pytest.mark.parametrize("noise", [0.2, 0.0])
def test_the_first_child_is_aimed_beyond_what_a_noisy_machine_leaves_undecided(
    finished_run, monkeypatch, noise
):
    real = table.read

    def noisy(job, scenario="main"):
        read = real(job, scenario)
        header = read.header.model_copy(update={"measured": True})
        return replace(read, header=header, noise=noise)

    monkeypatch.setattr(table, "read", noisy)
    beyond = ask(finished_run, throughput="1.2x", margin=None).margin - stage.LEAST_MARGIN
    if noise:
        assert beyond == pytest.approx(0.022)
    else:  # by the uncertainty of what is predicted
        assert 0.0 < beyond < 0.02


def test_what_is_attainable_is_said_in_the_unit_that_was_asked(finished_run):
    for asked, unit in (("1%", "%"), ("0.01x", "x"), ("1KiB", "KiB"), ("0.001MB", "MB")):
        with pytest.raises(Infeasible, match=rf"best attainable: [0-9.]+{unit}\)"):
            ask(finished_run, memory=asked)


# --------------------------------------------------------------- what operators ask, both ways


def test_user_throughput_and_inter_token_latency_are_of_the_decode_steps(finished_run):
    free = ask(finished_run, throughput="1.01x")
    steps = finished_run.recipe.cost.scenario.output_length - 1
    answer = ask(finished_run, user_throughput="1.3x")
    child, parent = answer.best.predicted["main"], answer.parent["main"]
    assert child.user_throughput_tok_per_s >= 1.3 * parent.user_throughput_tok_per_s * (1 - 1e-9)
    assert child.user_throughput_tok_per_s == pytest.approx(1 / child.inter_token_latency_s)
    decode_s = child.latency_s - child.time_to_first_token_s
    assert child.inter_token_latency_s == pytest.approx(decode_s / steps)
    assert answer.best.objective > free.best.objective
    millis = 1000 * parent.inter_token_latency_s / 1.3
    same = ask(finished_run, inter_token_latency=f"{millis:.9f}ms")
    assert same.best.objective == pytest.approx(answer.best.objective)


def test_a_percentile_asks_for_more_by_what_the_parents_steps_show(finished_run, monkeypatch):
    """Whose slowest steps take 1.25 times the mean one."""
    real = table.read
    stretched = Percentiles(p99=1.25)
    monkeypatch.setattr(
        table, "read", lambda job, name="main": replace(real(job, name), inter_token=stretched)
    )
    mean = real(finished_run.child_job("main")).predict(
        Architecture.of_parent(finished_run.parent.shape)
    )
    millis = 1000 * mean.decode_s / (finished_run.recipe.cost.scenario.output_length - 1) / 1.1
    at_mean = ask(finished_run, inter_token_latency=f"{millis:.9f}ms")
    at_p99 = ask(finished_run, inter_token_latency=f"{1.25 * millis:.9f}ms p99")
    assert at_p99.best.blocks == at_mean.best.blocks
    stricter = ask(finished_run, inter_token_latency=f"{millis:.9f}ms p99")
    assert stricter.best.objective > at_mean.best.objective
    relative = ask(finished_run, user_throughput="1.1x p99")
    assert relative.best.objective == pytest.approx(at_mean.best.objective)


def test_one_token_has_no_latency_between_tokens(finished_run):
    cost = finished_run.recipe.cost
    scenario = cost.scenario.model_copy(update={"output_length": 1})
    recipe = finished_run.recipe.model_copy(
        update={"cost": cost.model_copy(update={"scenario": scenario})}
    )
    run = Run(recipe, finished_run.folder / "nowhere", finished_run.progress)
    (job,) = run.recipe_jobs()
    asking = question(run, user_throughput="2x")
    asking = replace(asking, at=job.at)
    with pytest.raises(UserError, match="search.user_throughput: scenario main puts out one token"):
        SEARCH.work().check(asking)
    frontier_of_steps = replace(
        question(run, throughput="2x", frontier="inter_token_latency"), at=job.at
    )
    with pytest.raises(UserError, match="search.inter_token_latency: scenario main puts out one"):
        SEARCH.work().check(frontier_of_steps)


def by_brute_force(job, kl, figure):
    """The best figure of all architectures whose losses add up to at most `kl`."""
    choices, costs = stage.read_choices(job), table.read(job)
    losses, used = np.zeros(1), np.zeros(1)
    for layer, blocks in enumerate(choices.layers):
        first = choices.starts[layer]
        resources = np.array([figure(costs.block(block, layer)) for block in blocks], dtype=float)
        losses = np.add.outer(losses, choices.losses[first : first + len(blocks)]).ravel()
        used = np.add.outer(used, resources).ravel()
    return used[losses <= kl].min() + figure(costs.constant)


@pytest.mark.parametrize(
    ("target", "figure"),
    [
        ({"maximize": "throughput"}, lambda cost: cost.total_s),
        ({"minimize": "latency"}, lambda cost: cost.total_s),
        ({"minimize": "time_to_first_token"}, lambda cost: cost.prefill_s),
        ({"minimize": "memory"}, lambda cost: cost.memory_bytes),
        ({"minimize": "parameters"}, lambda cost: cost.parameters),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.2, 1.0])
def test_the_other_direction_is_the_best_within_a_loss_of_quality(
    finished_run, target, figure, share
):
    most = max(scores.losses(finished_run).values())
    kl = max(1e-6, share * most)
    job = question(finished_run, kl=kl, gap=0.0, **target)
    answer, _ = stage.search(job, stage.read_choices(job))
    found = figure(table.read(job).predict(answer.best.architecture))
    assert found == pytest.approx(by_brute_force(job, kl, figure), rel=1e-6)
    assert answer.best.objective <= kl * (1 + 1e-6)
    amount = KINDS[job.child.search.target].amount(job.place.cost.scenario)
    assert answer.best.target == pytest.approx(found / amount)
    assert answer.best.bound == pytest.approx(answer.best.target, rel=1e-6)


def test_the_other_direction_keeps_constraints_too(finished_run):
    free = ask(finished_run, minimize="parameters", kl=0.3)
    fast = ask(finished_run, minimize="parameters", kl=0.3, throughput="1.2x")
    assert fast.predicted_speedup() >= 1.2 * (1 - 1e-9)
    assert fast.best.target >= free.best.target
    with pytest.raises(Infeasible, match="throughput 99x is out of reach"):
        ask(finished_run, minimize="parameters", kl=0.3, throughput="99x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maximize": "throughput"}, "kl and one of maximize and minimize go together"),
        ({"kl": 0.1}, "kl and one of maximize and minimize go together"),
        ({"maximize": "throughput", "minimize": "memory", "kl": 0.1}, "are both set"),
        ({"maximize": "memory", "kl": 0.1}, "Input should be 'throughput' or 'user_throughput'"),
    ],
)
def test_a_target_that_is_unclear_is_refused(finished_run, changes, message):
    with pytest.raises(ValueError, match=message):
        question(finished_run, **changes)


def test_a_target_is_asked_on_the_command_line_and_a_child_is_made_of_it(copied_run):
    asked = puzzle("search", copied_run.folder, "--maximize", "throughput", "--kl", 0.2)
    assert asked.exit_code == 0 and "score sum 0.1" in asked.stdout, asked.output
    made = puzzle(
        "child", copied_run.folder, "--name", "fast", "--maximize", "throughput", "--kl", 0.2
    )
    assert made.exit_code == 0, made.output
    job = copied_run.child_job("fast")
    assert answers.read(job).best.objective <= 0.2 and measured.read(job).verdict == "met"
    listed = puzzle("children", copied_run.folder)
    assert "maximize" in listed.stdout and "kl 0.2" in listed.stdout, listed.stdout


def test_a_point_that_another_one_beats_in_both_is_left_out():
    def point(objective):
        return answers.FrontierPoint.model_construct(objective=objective)

    points = [(3.0, point(1.0)), (2.0, point(2.0)), (2.5, point(2.5)), (2.0, point(3.0))]
    assert [p.objective for p in _undominated(points)] == [1.0, 2.0]
