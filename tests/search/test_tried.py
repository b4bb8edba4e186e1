"""What serving a child has shown: kept, and what it does to the next search."""

from dataclasses import replace

import pytest
from served import SERVED, answer, give_or_take

from puzzle.cost.refit import Observation
from puzzle.run import Run
from puzzle.search import SEARCH, answers, tried
from puzzle.search.tried import MeasuredChild, Tries

FIRST = ["gqa_2+gated_96", "gqa_1+no_op"]
SECOND = ["gqa_1+no_op", "gqa_1+no_op"]


def measured(source, blocks=FIRST, objective=1.0, verdict="met", gives_away=False, **changes):
    values = {"costs": "", "wish": "of the test", "asked": ["throughput 1.3x"]}
    values |= {"tables": {"main": "main"}, "parent_tables": {"main": "main"}}
    values |= {"measurements": {"main": SERVED}}
    return MeasuredChild(
        source=source,
        blocks=blocks,
        objective=objective,
        verdict=verdict,
        gives_away=gives_away,
        **(values | changes),
    )


@pytest.fixture
def job(tiny_run, monkeypatch):
    monkeypatch.setattr(tried, "wish", lambda job: "of the test")
    job = tiny_run.job_of("main", tiny_run.recipe.all_children()["main"])
    answer().write(job.folder(SEARCH) / answers.ANSWER)
    return job


def test_nothing_served_corrects_nothing(job):
    assert tried.observations(job) == {} and tried.corrections(job) == []
    assert Tries.of(job).best is None and tried.measured_before(job, "a") is None


def test_a_repeated_source_is_recorded_once(job):
    for _ in range(2):
        tried.record_measured(job, measured("a"))
    assert [child.source for child in tried.read_measured(job)] == ["a"]


def test_a_child_of_other_costs_or_of_another_child_corrects_nothing(job, tiny_run):
    tried.record_measured(job, measured("a", costs="older"))
    assert tried.read_measured(job) == [] and tried.observations(job) == {}
    tried.record_measured(job, measured("b", verdict="missed"))
    assert len(tried.observations(job)) == 1
    other = tiny_run.job_of("other", tiny_run.recipe.all_children()["main"])
    assert tried.read_measured(other) == []


def test_only_children_of_this_wish_that_were_not_accepted_correct_its_search(job):
    tried.record_measured(job, measured("a"))
    tried.record_measured(job, measured("b", verdict="missed", wish="another"))
    assert tried.corrections(job) == [] and tried.observations(job) == {}
    tried.record_measured(job, measured("c", verdict="missed"))
    assert len(tried.corrections(job)) == 1
    tried.record_measured(job, measured("d", gives_away=True))
    assert len(tried.corrections(job)) == 2
    assert [child.source for child in Tries.of(job).children] == ["c", "d"]


def test_observations_are_of_the_tables_that_the_child_was_served_in(job):
    tables = {"tables": {"main": "main@32"}, "parent_tables": {"main": "main@8"}}
    tried.record_measured(job, measured("a", verdict="missed", **tables))
    ((name, (seen,)),) = tried.observations(job).items()
    assert (name, seen.scenario, seen.compared_in) == ("main@32", "main@32", "main@8")
    assert seen.blocks == FIRST and seen.decode == SERVED.decode_ratio
    assert seen.prefill == SERVED.time_to_first_token_ratio
    assert len(seen.compared_with) == job.run.parent.shape.num_hidden_layers


def test_neighbours_join_and_are_known_by_their_child(job):
    child = measured("a", verdict="missed")
    tried.record_measured(job, child)
    seen = Observation(
        scenario="main",
        blocks=SECOND,
        compared_with=FIRST,
        prefill=give_or_take(0.9),
        decode=give_or_take(0.8),
    )
    assert not tried.has_neighbours(job, child)
    tried.record_neighbours(job, "a", [seen])
    tried.record_neighbours(job, "b", [seen])  # of a child that is not there: it does not count
    assert tried.has_neighbours(job, child) and not tried.has_neighbours(job, measured("c"))
    assert tried.observations(job)["main"][1] == seen and len(tried.corrections(job)) == 2


# ----------------------------------------------------------------------- the child that goes on


def settled(children, objective, attempts=3, blocks=SECOND):
    following = None
    if objective is not None:
        solution = answer().best
        following = solution.model_copy(update={"objective": objective, "blocks": blocks})
    child = Tries(children).settle(following, attempts)
    return None if child is None else child.source


def test_where_none_is_met_another_is_tried():
    assert settled([], 0.5) is None
    assert settled([measured("a", verdict="missed")], 0.5) is None
    assert settled([measured("a", verdict="undecided")], 0.5) is None


def test_a_child_faster_than_asked_goes_on_only_where_no_better_one_is_left_to_try():
    fast = measured("a", objective=1.0, gives_away=True)
    assert settled([fast], 0.9) is None
    assert settled([fast], 0.995) == "a"  # not worth another child
    assert settled([fast], 1.0) == "a" and settled([fast], None) == "a"
    assert settled([fast], 0.9, attempts=1) == "a"
    assert settled([fast], 0.9, blocks=FIRST) == "a"  # it is the same


@pytest.mark.parametrize("objective", [-1.0, 0.0])
def test_what_is_least_may_be_zero_or_less(objective):
    fast = measured("a", objective=objective, gives_away=True)
    assert settled([fast], objective) == "a" and settled([fast], objective - 0.5) is None


def test_the_best_in_score_that_is_met_goes_on():
    children = [
        measured("fast", objective=1.0, gives_away=True),
        measured("slow", SECOND, objective=0.7, verdict="missed"),
        measured("better", ["a", "b"], objective=0.9, gives_away=True),
    ]
    assert settled(children, 0.8) == "better"
    assert Tries(children).refused == [SECOND]


def test_a_likely_child_goes_on_after_the_last_try_where_none_is_met():
    likely = [
        measured("a", objective=1.0, verdict="undecided", is_likely=True),
        measured("b", SECOND, objective=0.8, verdict="undecided"),
    ]
    assert settled(likely, 0.5) is None  # another may be met
    assert settled(likely, 0.5, attempts=2) == "a" and settled(likely, None) == "a"
    assert not Tries(likely[1:]).are_used_up(1)
    met = measured("c", ["a", "b"], objective=1.5, gives_away=True)
    assert settled([*likely, met], 0.5, attempts=3) == "c"
    missed = measured("d", verdict="missed")  # the same as "a", at the end
    assert settled([likely[0], missed], 0.5, attempts=2) is None


def test_what_is_measured_is_as_uncertain_as_the_widest_interval():
    assert Tries([]).uncertainty == 0.0
    assert Tries([measured("a", uncertainty=0.03), measured("b")]).uncertainty == 0.03


def test_a_child_that_a_later_measurement_refutes_is_not_taken_again():
    """`assemble` found it met, `evaluate` missed."""
    children = [measured("a", gives_away=True), measured("b", verdict="missed")]
    assert Tries(children).best is None and settled(children, 0.9) is None


def test_another_wish_or_other_scores_are_another_question(finished_run):
    job = finished_run.child_job("main")
    same = [{"attempts": 9}, {"margin": 0.3}, {"points": 3}, {"solutions": 4}]
    other = [{"throughput": "3x"}, {"changed_layers": 1}, {"monotone": True}, {"homogeneous": True}]
    for changes, is_same in [(c, True) for c in same] + [(c, False) for c in other]:
        search = job.child.search.model_copy(update=changes)
        asking = replace(job, wish=replace(job.child, search=search))
        assert (tried.wish(asking) == tried.wish(job)) == is_same, changes
    score = finished_run.recipe.score.model_copy(update={"metric": "top1"})
    recipe = finished_run.recipe.model_copy(update={"score": score})
    run = Run(recipe, finished_run.folder, finished_run.progress)
    assert tried.wish(run.child_job("main")) != tried.wish(job)
