"""The search around an incumbent: measured in the company of the other chosen blocks."""

import itertools
import shutil

import numpy as np
import pytest
import torch

from puzzle import artifacts, config, pipeline
from puzzle.config import ChildConfig, SearchConfig
from puzzle.model import child
from puzzle.model.architecture import Architecture, parse_block
from puzzle.run import Run
from puzzle.score import assembled
from puzzle.score.assembled import AssembledKL
from puzzle.score.stage import all_shards
from puzzle.search import SEARCH, answers, around, stage
from puzzle.search.answers import Solution
from puzzle.search.interactions import Interactions
from puzzle.search.program import Program, starts_of
from puzzle.search.space_program import Choices
from puzzle.training.losses import METRICS, token_metrics

WISH = {"parameters": "70%", "capacity": 0.0}
pytestmark = pytest.mark.training


@pytest.fixture
def run(finished_run, tmp_path):
    shutil.copytree(
        finished_run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("children")
    )
    recipe = finished_run.recipe.model_dump(mode="json")
    recipe["search"] = WISH | {"refinements": 3}
    copied = Run(config.parse(recipe), tmp_path / "run", finished_run.progress)
    copied.write()
    return copied


def start(job):
    """What the sum of scores alone would choose, and the limits it keeps."""
    choices = stage.read_choices(job)
    _, best = stage.search(job, choices)
    return choices, best


@torch.no_grad()
def really_assembled_kl(run, tmp_path, blocks):
    """Oracle: a child in a folder, loaded by transformers' rules and run over the text."""
    job = run.job_of("oracle", ChildConfig(search=SearchConfig(architecture=blocks)))
    run.write_child("oracle", ChildConfig(search=SearchConfig(architecture=blocks)))
    from puzzle.assemble.stage import ChildState

    architecture = Architecture.from_names(blocks)
    folder = tmp_path / "oracle"
    state = ChildState(job.run, architecture)
    config = run.parent.child_config(architecture)
    child.save(folder, config, architecture, state, run.parent.folder, "")
    model, parent = child.load(folder, torch.float32, torch.device("cpu")), run.parent_model
    total, count = 0.0, 0
    for shard in all_shards(run):
        hidden = [m.model(shard.tokens_BS).last_hidden_state[:, :-1] for m in (parent, model)]
        metrics = token_metrics(
            hidden[0].flatten(0, 1),
            parent.lm_head.weight,
            hidden[1].flatten(0, 1)[None],
            model.lm_head.weight,
            shard.tokens_BS[:, 1:].flatten(),
        )
        total += float(metrics[0, METRICS.index("kl")].sum())
        count += metrics.shape[-1]
    return total / count


def test_assembled_kls_and_exchanges_are_those_of_really_assembled_children(run, tmp_path):
    job = run.child_job("main")
    choices, best = start(job)
    blocks = best.solutions[0].blocks
    measured = AssembledKL(run, all_shards(run))
    expected = really_assembled_kl(run, tmp_path, blocks)
    assert measured.kl(Architecture.from_names(blocks)) == pytest.approx(expected, rel=1e-4)
    calls = []
    exchanged = list(
        measured.exchanged(Architecture.from_names(blocks), choices.layers, lambda: calls.append(1))
    )
    assert len(calls) == len(choices.losses) * len(measured.texts)
    for index in (0, 2):
        block = choices.layers[index][-1].name
        other = [*blocks[:index], block, *blocks[index + 1 :]]
        expected = measured.kl(Architecture.from_names(other))
        assert exchanged[index][block] == pytest.approx(expected, rel=1e-4)
        assert exchanged[index][blocks[index]] == pytest.approx(
            measured.kl(Architecture.from_names(blocks)), rel=1e-4
        )


def test_children_that_share_first_layers_run_them_once(run, monkeypatch):
    choices, best = start(run.child_job("main"))
    blocks = best.solutions[0].blocks
    measured = AssembledKL(run, all_shards(run)[:1])
    children = [blocks]
    for index, layer in enumerate(choices.layers):
        children += [[*blocks[:index], b.name, *blocks[index + 1 :]] for b in layer[-2:]]
    architectures = [Architecture.from_names(child) for child in children]
    alone = [measured.kl(architecture) for architecture in architectures]
    real, layers = assembled._ChildLayers.layer, []
    monkeypatch.setattr(
        assembled._ChildLayers, "layer", lambda self, i: (layers.append(i), real(self, i))[1]
    )
    found = dict(measured.kls(architectures))
    assert [found[index] for index in range(len(children))] == alone
    prefixes = {tuple(child[: index + 1]) for child in children for index in range(len(child))}
    assert len(layers) == len(prefixes) < 0.7 * sum(map(len, children))


def test_no_child_begins_after_layers_whose_states_are_not_kept():
    """Random children: each begins where the one before has kept what they share, not later."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        children = [list(row) for row in rng.choice(["a", "b", "c"], (rng.integers(1, 9), 5))]
        order = assembled._sharing_order(children)
        assert sorted(child for child, _ in order) == list(range(len(children)))
        states, begin, runs = {0: ()}, 0, 0
        for number, kept in order:
            assert states[begin] == tuple(children[number][:begin])
            runs += 5 - begin
            reached = {d: tuple(children[number][:d]) for d in range(begin + 1, 6)}
            states = {d: reached.get(d, states.get(d)) for d in kept}
            begin = max(kept)
        prefixes = {tuple(child[: d + 1]) for child in children for d in range(5)}
        assert runs == len(prefixes)


def test_the_child_keeps_its_limits_and_is_never_worse_than_the_best_sum(run):
    job = run.child_job("main")
    choices, best = start(job)
    first = best.solutions[0].blocks
    found = around.refine(job, choices, best.limits, [first], [])
    assert found.kl <= found.first_kl
    assert best.program.feasible(choices.columns(found.blocks))
    kl = AssembledKL(run, all_shards(run)).kl(Architecture.from_names(found.blocks))
    assert found.kl == pytest.approx(kl, rel=1e-5)


def test_no_single_exchange_within_the_limits_is_better_in_the_end(run):
    """Oracle: every exchange of one block, measured one by one."""
    job = run.child_job("main")
    choices, best = start(job)
    found = around.refine(job, choices, best.limits, [best.solutions[0].blocks], [])
    measured = AssembledKL(run, all_shards(run))
    near = around._candidates(job, choices, [found.blocks])
    better = 0
    for index, layer in enumerate(near.layers):
        for block in layer:
            other = [*found.blocks[:index], block.name, *found.blocks[index + 1 :]]
            if best.program.feasible(choices.columns(other)):
                kl = measured.kl(Architecture.from_names(other))
                better += kl < found.kl * (1 - around.LEAST_GAIN) - 1e-9
    assert better == 0


def test_around_the_parent_there_is_nothing_better_and_the_search_ends(run):
    """A wish that the parent keeps: its KL is zero but for rounding, of either sign."""
    job = run.job_of("parent", ChildConfig(search=SearchConfig(parameters="100%")))
    choices, best = start(job)
    parent = Architecture.of_parent(run.parent.shape).names
    assert best.solutions[0].blocks == parent
    for rounding in (-3e-6, 0.0, 3e-6):
        measurement = around.Measurement(job)
        measurement.known |= {(whole, *parent): rounding for whole in (True, False)}
        walk = around._Walk.among(choices, measurement, best.limits, [])
        assert walk.best_of([parent], parent) is parent, rounding
        assert walk.best_of([], parent) is parent, rounding
    found = around.refine(job, choices, best.limits, [parent], [])
    assert (found.blocks, found.steps) == (parent, 0)
    assert abs(found.kl) < 1e-4


def test_parameters_that_count_make_the_child_larger_at_the_same_speed(run):
    """Oracle: the value of every exchange of one block, measured and counted one by one."""
    wish = {"throughput": "1.5x", "refinements": 3}
    values, sizes = [], []
    shape, whole = run.parent.shape, Architecture.of_parent(run.parent.shape)
    for capacity in (0.0, 4.0):
        settings = SearchConfig.model_validate(wish | {"capacity": capacity})
        run.write_child("sized", ChildConfig(search=settings))
        job = run.child_job("sized")
        choices, best = start(job)
        solution = best.solutions[0]
        assert solution.bound <= solution.objective + solution.missing + 1e-9
        found = around.refine(job, choices, best.limits, [solution.blocks], [])
        measured = AssembledKL(run, all_shards(run))

        def value(blocks):
            architecture = Architecture.from_names(blocks)
            lost = 1 - architecture.parameters(shape) / whole.parameters(shape)
            return measured.kl(architecture) + capacity * lost  # noqa: B023

        near = around._candidates(job, choices, [found.blocks])
        ours = value(found.blocks)
        for index, layer in enumerate(near.layers):
            for block in layer:
                other = [*found.blocks[:index], block.name, *found.blocks[index + 1 :]]
                if best.program.feasible(choices.columns(other)):
                    assert value(other) >= ours * (1 - around.LEAST_GAIN) - 1e-9
        given = SearchConfig(architecture=found.blocks, capacity=capacity)
        run.write_child("given", ChildConfig(search=given))
        _, of_given = stage.search(run.child_job("given"), choices)
        lost = of_given.solutions[0].missing
        assert found.kl + lost == pytest.approx(ours, rel=1e-5)
        values.append(ours)
        sizes.append(Architecture.from_names(found.blocks).parameters(shape))
    assert sizes[1] > sizes[0]


def test_where_parameters_count_it_also_begins_at_halves_of_the_parents_layers(run, monkeypatch):
    """Without them only at the best sum; the better end is taken, and the limits are kept."""
    begun = []
    real = around._Walk.improve
    monkeypatch.setattr(
        around._Walk, "improve", lambda walk, start: begun.append(start) or real(walk, start)
    )
    parts = [{half.name for half in block.subblocks} for block in run.parent.shape.parent_blocks]
    for capacity, starts in ((0.0, 1), (4.0, 3)):
        begun.clear()
        settings = SearchConfig(throughput="1.5x", capacity=capacity)
        run.write_child("sized", ChildConfig(search=settings))
        job = run.child_job("sized")
        choices, best = start(job)
        found = around.refine(job, choices, best.limits, [best.solutions[0].blocks], [])
        assert len(begun) == starts
        assert best.program.feasible(choices.columns(found.blocks))
        walk = around._Walk(around.Measurement(job), choices, best.program)
        assert walk.value(found.blocks) <= min(map(walk.value, begun))
        for blocks in begun[::2] if capacity else []:  # where that search begins, and ends
            halves = zip(parts, Architecture.from_names(blocks).blocks, strict=True)
            assert all({half.name for half in b.subblocks} <= own | {"no_op"} for own, b in halves)


def test_what_was_refused_is_not_taken_and_the_best_start_is(run):
    job = run.child_job("main")
    choices, best = start(job)
    first = best.solutions[0].blocks
    found = around.refine(job, choices, best.limits, [first], [])
    other = around.refine(job, choices, best.limits, [first, found.blocks], [])
    assert other.kl <= found.kl
    if found.blocks != first:
        refused = around.refine(job, choices, best.limits, [first], [found.blocks])
        assert refused.blocks != found.blocks


def test_proposals_differ_in_few_layers_first_and_keep_the_limits():
    """A program of three layers whose best choice is known for every number of changes.

    The limit allows one of the large blocks at a time: no single exchange is better, two are.
    """
    layers = [[parse_block(f"gqa_2+gated_{width}") for width in (96, 64, 32)] for _ in range(3)]
    costs = np.array([0.0, 1.0, 1.5, -2.0, 1.0, 0.0, 5.0, 0.5, 0.0])
    sizes = np.array([3.0, 2.0, 1.0] * 3)[None]
    program = Program(starts_of([3] * 3), costs, sizes, np.array([5.0]))
    choices, incumbent = (
        Choices(layers, costs),
        ["gqa_2+gated_96", "gqa_2+gated_32", "gqa_2+gated_32"],
    )
    form = Interactions(costs, np.zeros(9))
    solved = around._solved(program, choices, incumbent)
    assert solved == [["gqa_2+gated_32", "gqa_2+gated_96", "gqa_2+gated_32"]]
    for blocks in (*solved, *around._exchanges_of_two(program, form, choices, incumbent)):
        columns = choices.columns(blocks)
        assert program.feasible(columns) and blocks != incumbent
    best, *_ = around._exchanges_of_two(program, form, choices, incumbent)
    by_hand = min(
        (
            sum(costs[columns])
            for columns in map(np.array, itertools.product(range(3), range(3, 6), range(6, 9)))
            if program.feasible(columns) and sum(columns != choices.columns(incumbent)) == 2
        ),
    )
    assert sum(costs[choices.columns(best)]) == pytest.approx(by_hand)


def test_a_killed_search_goes_on_with_what_it_measured(run, monkeypatch):
    job = run.child_job("main")
    choices, best = start(job)
    first = best.solutions[0].blocks
    real, done = AssembledKL.exchanged, []

    def dies(self, *args):
        for layer in real(self, *args):
            if len(done) == 2:
                raise KeyboardInterrupt
            done.append(1)
            yield layer

    monkeypatch.setattr(AssembledKL, "exchanged", dies)
    with pytest.raises(KeyboardInterrupt):
        around.refine(job, choices, best.limits, [first], [])
    records = artifacts.read_records(job.child.folder / around.ASSEMBLED, around.AssembledScore)
    asked = []

    def counted(self, architecture, others, on_block):
        asked.append([len(layer) for layer in others])
        return real(self, architecture, others, on_block)

    monkeypatch.setattr(AssembledKL, "exchanged", counted)
    resumed = around.refine(job, choices, best.limits, [first], [])
    assert asked[0][:2] == [0, 0] and sum(asked[0][2:]) > 0 and len(records) > 2
    monkeypatch.setattr(AssembledKL, "exchanged", real)
    (job.child.folder / around.ASSEMBLED).unlink()
    assert around.refine(job, choices, best.limits, [first], []) == resumed


def test_a_child_that_is_made_says_its_assembled_kl_and_a_question_does_not(run):
    pipeline.execute_stage(SEARCH, run.child_job("main"))
    best = answers.read(run.child_job("main")).best
    assert best.kl is not None and best.rank == best.kl
    assert best.bound <= best.objective + 1e-9
    _, asked = start(run.child_job("main"))
    assert asked.solutions[0].kl is None


def test_the_rank_is_the_kl_where_it_is_known():
    solution = Solution(blocks=[], objective=0.4, bound=0.3, gap=0.1, predicted={})
    assert solution.rank == 0.4
    assert solution.model_copy(update={"kl": 0.9}).rank == 0.9
    assert solution.model_copy(update={"kl": 0.9, "target": 2.0}).rank == 2.0
