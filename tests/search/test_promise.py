"""What serving a child has shown: judged against what was asked, recorded, and what follows."""

import pytest

from puzzle.engines.turns import Measurement, ServedFigures
from puzzle.search import SEARCH, answers, promise
from puzzle.search.answers import Answer, Figures, Solution
from puzzle.search.constraints import Constraint
from puzzle.search.promise import REPEATED_MISS, Promise

FIRST = ["gqa_2+gated_96", "gqa_1+no_op"]
SECOND = ["gqa_1+no_op", "gqa_1+no_op"]


def answer(blocks=FIRST, constraints=()):
    """The child is predicted to be twice as fast, with half the parameters and a quarter cache."""
    parent = Figures(
        throughput_tok_per_s=100.0,
        latency_s=2.0,
        time_to_first_token_s=0.5,
        memory_bytes=4400,
        parameters=1000,
        kv_cache_bytes=400,
    )
    child = Figures(
        throughput_tok_per_s=200.0,
        latency_s=1.0,
        time_to_first_token_s=0.25,
        memory_bytes=2100,
        parameters=500,
        kv_cache_bytes=100,
    )
    solution = Solution(
        blocks=blocks, objective=1.0, bound=1.0, gap=0.0, seconds=0.1, predicted={"main": child}
    )
    return Answer(
        constraints=list(constraints),
        time_factor=1.0,
        margin=0.0,
        batch_size=8,
        sweep=[],
        parent={"main": parent},
        solutions=[solution],
    )


def searched(run, name="main", blocks=FIRST):
    """A job whose search has chosen these blocks."""
    job = run.job_of(name, run.recipe.all_children()["main"])
    answer(blocks).write(job.folder(SEARCH) / answers.ANSWER)
    return job


def judged(slower=1.0, *, met):
    return Promise(
        constraint="throughput",
        scenario="main",
        asked="throughput 2x",
        measured="in words",
        value=2 / slower,
        met=met,
        slower_than_predicted=slower,
    )


def record(job, source, *promises):
    promise.record(job, source, {"main": 1.9}, promises)


def test_nothing_measured_corrects_nothing(tiny_run):
    job = searched(tiny_run)
    assert promise.read_measured(job) == [] and promise.time_factor(job) == 1.0


def test_a_repeated_source_is_recorded_once(tiny_run):
    job = searched(tiny_run)
    for _ in range(2):
        record(job, "a", judged(1.1, met=False))
    (measured,) = promise.read_measured(job)
    assert (measured.source, measured.blocks, measured.met) == ("a", FIRST, False)
    assert measured.speedups == {"main": 1.9}
    assert promise.time_factor(job) == pytest.approx(1.1)


def test_a_miss_raises_the_time_factor_to_how_much_slower_the_child_was(tiny_run):
    job = searched(tiny_run)
    record(job, "a", judged(1.05, met=False), judged(1.2, met=False), judged(1.4, met=True))
    assert promise.time_factor(job) == pytest.approx(1.2)  # only what was missed counts
    searched(tiny_run, blocks=SECOND)
    record(job, "b", judged(1.1, met=False))
    assert promise.time_factor(job) == pytest.approx(1.2)  # the largest so far
    assert [miss.blocks for miss in promise.misses(job)] == [FIRST, SECOND]


def test_a_child_that_meets_its_wish_leaves_the_time_factor(tiny_run):
    job = searched(tiny_run)
    record(job, "a", judged(1.3, met=True))
    assert promise.time_factor(job) == 1.0 and promise.misses(job) == []
    record(job, "b", judged(1.2, met=False))
    record(job, "c", judged(1.3, met=True))
    assert promise.time_factor(job) == pytest.approx(1.2)
    assert [measured.met for measured in promise.read_measured(job)] == [True, False, True]


def test_an_architecture_that_misses_again_is_avoided_by_more(tiny_run):
    """Otherwise the same search would give the same child once more."""
    job = searched(tiny_run)
    record(job, "a", judged(1.1, met=False))
    record(job, "b", judged(1.0, met=False))
    assert promise.time_factor(job) == pytest.approx(1.1 * REPEATED_MISS)


def test_a_miss_corrects_no_other_child(tiny_run):
    job, other = searched(tiny_run), searched(tiny_run, "other")
    record(job, "a", judged(1.1, met=False))
    assert promise.time_factor(other) == 1.0 and promise.read_measured(other) == []


# ------------------------------------------------------------------------------------ judging

SERVED = Measurement(  # the ratios are medians over pairs, so not the ratios of the medians
    parent=ServedFigures(
        latency_s=2.0, time_to_first_token_s=0.5, throughput_tok_per_s=100.0, kv_cache_bytes=480
    ),
    child=ServedFigures(
        latency_s=1.1, time_to_first_token_s=0.3, throughput_tok_per_s=180.0, kv_cache_bytes=128
    ),
    speedup=1.9,
    speedups=[1.8, 1.9, 2.0],
    latency_ratio=0.53,
    time_to_first_token_ratio=0.6,
)


@pytest.mark.parametrize(
    ("name", "asked", "relative", "measured", "slower"),
    [
        ("throughput", 1.85, True, 1.9, 2.0 / 1.9),
        ("latency", 0.55, True, 0.53, 0.53 / 0.5),
        ("time_to_first_token", 0.65, True, 0.6, 0.6 / 0.5),
        ("throughput", 175.0, False, 180.0, 200.0 / 180.0),
        ("latency", 1.2, False, 1.1, 1.1 / 1.0),
        ("time_to_first_token", 0.32, False, 0.3, 0.3 / 0.25),
        ("parameters", 500.0, False, 500.0, 1.0),  # counted
        ("kv_cache", 128.0, False, 128.0, 1.0),  # as the engine allocated it, not as predicted
        ("memory", 2128.0, False, 2128.0, 1.0),  # the weights and what was allocated
    ],
)
def test_a_constraint_is_judged_by_what_was_measured(name, asked, relative, measured, slower):
    tighter = asked * (1.1 if name == "throughput" else 0.9)
    for value, met in ((asked, True), (tighter, False)):
        constraint = Constraint(
            name=name,
            text="in words",
            value=value,
            relative=value if relative else None,
            limit=value,
        )
        (result,) = promise.judge(answer(constraints=[constraint]), {"main": SERVED})
        assert (result.value, result.met) == (pytest.approx(measured), met)
        assert result.slower_than_predicted == pytest.approx(slower)
