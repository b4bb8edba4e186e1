"""What serving a child has shown, judged against what was asked."""

import pytest
from served import SERVED, answer, give_or_take

from puzzle.engines.intervals import Interval, Percentiles
from puzzle.search import promise
from puzzle.search.constraints import Constraint


def judged(name, asked, relative, served=SERVED, **more):
    constraint = Constraint(
        name=name, text="2x", value=asked, relative=asked if relative else None, limit=asked, **more
    )
    (result,) = promise.judge(answer([constraint]), {"main": served})
    return result


@pytest.mark.parametrize(
    ("name", "relative", "measured", "predicted"),
    [
        ("throughput", True, 1.9, 2.0),
        ("latency", True, 0.53, 0.5),
        ("time_to_first_token", True, 0.6, 0.5),
        ("user_throughput", True, 2.0, 2.0),  # one over the ratio of the decode steps
        ("inter_token_latency", True, 0.5, 0.5),
        ("user_throughput", False, 18.75, 20.0),
        ("inter_token_latency", False, 0.8 / 15, 0.05),
        ("throughput", False, 180.0, 200.0),
        ("latency", False, 1.1, 1.0),
        ("time_to_first_token", False, 0.3, 0.25),
    ],
)
def test_a_speed_is_met_missed_or_undecided_by_its_whole_interval(
    name, relative, measured, predicted
):
    direction = 1 if "throughput" in name else -1
    for easier, verdict in ((0.03, "met"), (0.0, "undecided"), (-0.03, "missed")):
        result = judged(name, measured * (1 - direction * easier), relative)
        assert (result.figure.value, result.verdict) == (pytest.approx(measured), verdict)
        assert result.predicted == pytest.approx(predicted)
    edge = judged(name, measured * (1 - direction * 0.0201), relative)
    assert edge.verdict == "met"  # the interval may touch the wish


def test_a_child_is_likely_by_its_estimate_and_as_uncertain_as_its_interval():
    for relative, at_least in ((1.0, True), (1.0, False)):
        result = judged("throughput" if at_least else "latency", relative, True)
        for value, is_likely in ((1.01, True), (0.99, False)):
            value = value if at_least else 1 / value
            figure = Interval(value=value, low=value / 1.03, high=value * 1.03)
            shown = result.model_copy(update={"figure": figure})
            assert shown.is_likely == is_likely
            assert shown.uncertainty == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("name", "relative", "wanted", "predicted"),
    [
        ("inter_token_latency", False, 1.2 * 0.8 / 15, 1.1 * 0.05),
        ("user_throughput", False, 18.75 / 1.2, 20.0 / 1.1),
        ("inter_token_latency", True, 0.5 * 1.2 / 1.1, 0.5),
        ("time_to_first_token", False, 0.6 * 0.3, 0.25 * 1.1),
    ],
)
def test_a_percentile_is_judged_by_what_was_measured_at_it(name, relative, wanted, predicted):
    """Predicted with the parent's percentile, 1.1; the child's steps have 1.2."""
    shape = {"first_token": Percentiles(p95=0.6), "inter_token": Percentiles(p95=1.2)}
    of_parent = {"first_token": Percentiles(p95=0.6), "inter_token": Percentiles(p95=1.1)}
    child, parent = (
        SERVED.child.model_copy(update=shape),
        SERVED.parent.model_copy(update=of_parent),
    )
    served = SERVED.model_copy(update={"child": child, "parent": parent})
    result = judged(name, wanted, relative, served, percentile=95, stretch=1.1)
    assert result.figure.value == pytest.approx(wanted)
    assert result.predicted == pytest.approx(predicted) and result.verdict == "undecided"


@pytest.mark.parametrize(
    ("name", "measured"),
    [
        ("parameters", 500.0),  # counted
        ("kv_cache", 128.0),  # as the engine allocated it, not as predicted
        ("memory", 2128.0),  # the weights and what was allocated
    ],
)
def test_a_size_is_counted_and_has_no_interval(name, measured):
    for asked, verdict in ((measured, "met"), (0.99 * measured, "missed")):
        result = judged(name, asked, relative=False)
        assert (result.figure.value, result.verdict) == (measured, verdict)


def test_memory_is_what_the_engine_took_where_it_can_tell():
    child = SERVED.child.model_copy(update={"memory_bytes": 3000})
    served = SERVED.model_copy(update={"child": child})
    assert judged("memory", 2999.0, False, served).verdict == "missed"
    assert judged("memory", 3000.0, False, served).verdict == "met"


@pytest.mark.parametrize(
    ("speedup", "predicted", "margin", "gives_away"),
    [
        (1.65, 1.53, 0.0, True),
        (1.55, 1.53, 0.0, False),  # its lower bound is not 2 % beyond
        (1.65, 1.63, 0.0, False),  # the search knew, and found nothing better
        (1.65, 1.63, 0.05, True),  # it aimed so far because it was not certain
    ],
)
def test_quality_is_given_away_where_a_child_is_surely_faster_than_asked_and_predicted(
    speedup, predicted, margin, gives_away
):
    served = SERVED.model_copy(update={"speedup": give_or_take(speedup)})
    result = judged("throughput", 1.5, True, served)
    result = result.model_copy(update={"predicted": predicted, "margin": margin})
    assert result.verdict == "met" and promise.give_away([result]) == gives_away
    slower = result.model_copy(
        update={
            "at_least": False,
            "figure": give_or_take(1 / speedup),
            "wanted": 1 / 1.5,
            "predicted": 1 / predicted,
        }
    )
    assert promise.give_away([slower]) == gives_away
    room = judged("parameters", 900.0, False)  # as predicted, with room to spare
    tight = judged("parameters", 500.0, False)
    assert promise.give_away([result, room]) == gives_away
    assert not promise.give_away([result, tight]) and not promise.give_away([])


@pytest.mark.parametrize(
    ("value", "width", "predicted", "settled"),
    [
        (1.59, 0.07, 1.53, False),  # likely, but not surely, far beyond: another look
        (1.59, 0.02, 1.53, True),  # surely
        (1.54, 0.03, 1.53, True),  # met, and hardly beyond
        (1.59, 0.07, 1.60, True),  # as the search has predicted it
        (1.51, 0.05, 1.53, False),  # neither met nor missed
        (1.49, 0.05, 1.53, True),  # nor here, but it will hardly be met
        (1.40, 0.05, 1.53, True),  # missed
    ],
)
def test_a_child_that_is_likely_more_than_was_asked_is_looked_at_again(
    value, width, predicted, settled
):
    interval = Interval(value=value, low=value - width, high=value + width)
    served = SERVED.model_copy(update={"speedup": interval})
    result = judged("throughput", 1.5, True, served)
    result = result.model_copy(update={"predicted": predicted, "margin": 0.0})
    room = judged("parameters", 900.0, False)
    assert promise.is_settled([result]) == promise.is_settled([result, room]) == settled
    changes = {"at_least": False, "figure": interval.inverse, "predicted": 1 / predicted}
    slower = result.model_copy(update=changes | {"wanted": 1 / 1.5})
    assert promise.is_settled([slower]) == settled
    assert promise.is_settled([])


def test_what_cannot_be_measured_here_is_predicted():
    asked = [
        Constraint(name="throughput", text="1.8x", value=180.0, relative=1.8, limit=1.0),
        Constraint(name="memory", text="2000B", value=2000.0, relative=None, limit=2000.0),
    ]
    speed, memory = promise.predict(answer(asked))
    assert speed.in_words == (
        "asked throughput 1.8x, predicted 2.00x the parent's: not measured yet"
    )
    assert (memory.verdict, memory.figure.value) == ("predicted", 2100.0)


def test_words_have_the_interval():
    assert judged("throughput", 1.8, True).in_words == (
        "asked throughput 2x, measured 1.90x (1.86x to 1.94x) the parent's: met"
    )
