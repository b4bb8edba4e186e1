from types import SimpleNamespace

import pytest

from puzzle.config import ScenarioConfig, SearchConfig
from puzzle.errors import UserError
from puzzle.search.constraints import KINDS, asked_in_words, parse_quantity


def test_parameters_are_asked_once_and_what_differs_between_scenarios_in_each():
    asked = SearchConfig(parameters="50%", kv_cache="60%")
    assert asked_in_words(asked, ["main", "chat"]) == [
        "parameters 50%",
        "kv_cache 60%",
        "chat kv_cache 60%",
    ]


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
    number, relative, percentile = parse_quantity(name, text)
    assert (number, relative, percentile) == (pytest.approx(expected[0]), expected[1], None)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("inter_token_latency", "30ms p95", (0.03, False, 95)),
        ("time_to_first_token", " 2 s  p50 ", (2.0, False, 50)),
        ("user_throughput", "1.5x p99", (1.5, True, 99)),
        ("inter_token_latency", "80% p90", (0.8, True, 90)),
    ],
)
def test_latencies_may_be_asked_at_a_percentile(name, text, expected):
    assert parse_quantity(name, text) == (pytest.approx(expected[0]), *expected[1:])


def test_a_percentile_of_what_has_none_is_a_user_error():
    with pytest.raises(UserError, match="expected a percentile of p50, p90, p95, p99"):
        parse_quantity("inter_token_latency", "30ms p42")
    takes = "user_throughput, time_to_first_token, inter_token_latency"
    with pytest.raises(UserError, match=f"it has no percentiles, which {takes} have"):
        parse_quantity("memory", "40GiB p95")


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
        parse_quantity(name, text)


def test_a_unit_in_other_letters_is_answered_with_the_right_one():
    with pytest.raises(UserError, match=r"did you mean 40GiB\?$"):
        parse_quantity("memory", "40gib")
    with pytest.raises(UserError, match=r"\(2x, 50%\)$"):
        parse_quantity("memory", "40parsecs")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        (
            "memory",
            "B=1 KB=1000 MB=1000000 GB=1000000000 TB=1000000000000 "
            "KiB=1024 MiB=1048576 GiB=1073741824 TiB=1099511627776",
        ),
        ("latency", "s=1 ms=0.001 us=0.000001 min=60"),
        ("throughput", "tok/s=1 ktok/s=1000"),
        ("parameters", "K=1000 M=1000000 B=1000000000"),
    ],
)
def test_every_unit_is_as_large_as_it_says(name, sizes):
    for each in sizes.split():
        unit, size = each.split("=")
        assert parse_quantity(name, f"2{unit}").number == 2 * float(size)


def test_what_is_timed_and_what_is_asked_for_at_least():
    """The rest is counted, or measured in bytes, and asked for at most."""
    speeds = {"throughput", "user_throughput"}
    times = {"latency", "time_to_first_token", "inter_token_latency"}
    assert {name for name, kind in KINDS.items() if kind.timed} == speeds | times
    assert {name for name, kind in KINDS.items() if kind.at_least} == speeds


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_limit_is_where_the_figure_is_what_was_asked_at_a_percentile_too(name):
    kind = KINDS[name]
    table = SimpleNamespace(scenario=ScenarioConfig(batch_size=2, input_length=8, output_length=4))
    assert kind.figure(table, kind.limit(table, 40.0, 1.25), 1.25) == pytest.approx(40.0)
    stretched = kind.figure(table, 2.0, 1.25) / kind.figure(table, 2.0)
    assert stretched == pytest.approx(1 / 1.25 if kind.at_least else 1.25)


def test_throughput_is_of_the_batch_and_of_each_sequence_after_its_first_token():
    table = SimpleNamespace(scenario=ScenarioConfig(batch_size=3, input_length=8, output_length=5))
    assert KINDS["throughput"].figure(table, 2.0) == 3 * 5 / 2
    assert KINDS["user_throughput"].figure(table, 2.0) == (5 - 1) / 2
