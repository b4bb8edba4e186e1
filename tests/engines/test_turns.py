"""Turns of steps: what is asked of the engines, and what is made of the times."""

import itertools

import numpy as np
import pytest
from conftest import DEVICE_SHEET
from numpy.random import default_rng

from puzzle import engines
from puzzle.config import CostConfig, ScenarioConfig
from puzzle.engines import Engine, EngineFacts, Page, intervals, turns
from puzzle.engines.intervals import Phase
from puzzle.engines.turns import (
    SETTLING_STEPS,
    TURN_STEPS,
    Served,
    measure_pair,
    serve_in_turn,
    turn_lengths,
)

SCENARIO = ScenarioConfig(batch_size=4, input_length=16, output_length=64)


class ScriptedSession:
    """Takes the seconds that a function gives for its side and its count of steps."""

    def __init__(self, side, log, seconds, on_start=lambda: None):
        self.side, self.log, self.seconds, self.on_start = side, log, seconds, on_start
        self.pages, self.first_tokens = [Page(1, 100)], [0.25, 0.5, 0.75, 1.0]
        on_start()

    def __enter__(self):
        return self

    def __exit__(self, *exception): ...

    def memory_bytes(self):
        return 1000 + self.side

    def restart(self):
        self.on_start()

    def begin(self, scenario):
        self.position = 0

    def advance(self, steps, layers=()):
        spent = []
        for index in range(steps):
            self.log.append((self.side, self.position))
            spent.append(self.seconds(self.side, self.position, index))
            self.position += 1
        return spent


def scripted(seconds, measured=True, log=None):
    """An engine whose parent is served from a folder `0` and whose child from a folder `1`."""
    log = [] if log is None else log

    def serve(folder, scenario):
        return ScriptedSession(int(folder.name), log, seconds)

    facts = EngineFacts(engine="scripted", version="1", device="none", count=1)
    return Engine("scripted", measured=measured, facts=facts, serve=serve, probe=serve)


def measured(engine, tmp_path, starts=4, decided=lambda m: True, output=64):
    scenario = SCENARIO.model_copy(update={"output_length": output})
    sides = []
    for name in "01":
        (tmp_path / name).mkdir(exist_ok=True)
        sides.append(Served(tmp_path / name, scenario, 0))
    return measure_pair(engine, *sides, starts, decided, on_start=lambda: None)


@pytest.mark.parametrize("output", [1, 2, 7, 8, 9, 16, 64, 100, 1024])
def test_turns_make_up_a_batch(output):
    lengths = turn_lengths(output)
    assert sum(lengths) == output - 1
    assert all(length > SETTLING_STEPS for length in lengths) or len(lengths) <= 1


def test_percentiles_of_what_a_batch_shows(tmp_path):
    """The child's steps grow with the context; a quarter of the sequences is ready at a time."""

    def seconds(side, position, index):
        return 1.0 + side * position / 100

    child = (shown := measured(scripted(seconds), tmp_path, output=256)).child
    steps = np.array([seconds(1, position, 0) for position in range(1, 256)])
    for percentile in (50, 90, 95, 99):
        found = child.inter_token_latency(percentile).value
        # within a turn, which is timed as a whole
        assert found == pytest.approx(np.percentile(steps, percentile), abs=TURN_STEPS / 100)
        # the median turn of a part of the output stands for its mean, of a child that slows down
        assert shown.parent.inter_token_latency(percentile).value == pytest.approx(1.0, rel=0.005)
    assert child.inter_token_latency().value == pytest.approx(steps.mean(), rel=0.02)
    assert shown.inter_token_latency_ratio(99).value == pytest.approx(
        np.percentile(steps, 99), 0.03
    )
    first = child.time_to_first_token_s.value
    shares = [child.time_to_first_token(p).value / first for p in (None, 50, 90, 99)]
    assert shares == pytest.approx([1.0, 0.75, 1.0, 1.0])
    assert child.user_throughput_tok_per_s(99).value < child.user_throughput_tok_per_s().value


def test_sides_take_turns_and_a_batch_is_served_in_order(tmp_path):
    log = []
    measured(scripted(lambda *_: 1.0, log=log), tmp_path, starts=1)
    assert {side for side, _ in log} == {0, 1}
    switches = [a[0] != b[0] for a, b in itertools.pairwise(log)]
    assert sum(switches) > 30  # not batch by batch
    for side in (0, 1):
        positions = [position for at, position in log if at == side]
        assert all(b in (a + 1, 0) for a, b in itertools.pairwise(positions))
        assert positions.count(63) >= 2  # whole batches


def test_steps_after_a_switch_and_the_first_prefill_do_not_count(tmp_path):
    def seconds(side, position, index):
        settles = 5.0 if index < SETTLING_STEPS and position > 0 else 1.0
        return (2.0 - side) * settles

    assert measured(scripted(seconds), tmp_path).speedup.value == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("seconds", "turns"),
    [(1.0, 14), (0.03, 14), (0.024, 21), (0.02, 28), (0.001, 56)],  # a batch of both has 7
)
def test_a_start_has_more_turns_where_they_are_fast(seconds, turns):
    sessions = [ScriptedSession(side, [], lambda *_: seconds) for side in (0, 1)]
    _, *decode = serve_in_turn(sessions, [SCENARIO] * 2)
    assert sum(len(phase.turns) for phase in decode) == turns


@pytest.mark.parametrize("output", [1, 5, 64, 1000])
def test_drift_and_longer_contexts_cancel_and_a_batch_is_summed(tmp_path, output):
    """A step takes longer as the context grows; on both sides the machine slows from step to step.

    The prefill is three times as fast in the child, a decode step twice.
    """
    clock = itertools.count()

    def seconds(side, position, index):
        drift = 1 + 1e-7 * next(clock)
        quiet = 30.0 if position == 0 else 1 + position / 1000
        return drift * quiet / (1 + side * (2 if position == 0 else 1))

    parent = 30.0 + sum(1 + p / 1000 for p in range(1, output))
    child = 10.0 + sum(1 + p / 1000 for p in range(1, output)) / 2
    result = measured(scripted(seconds), tmp_path, output=output)
    assert result.speedup.value == pytest.approx(parent / child, rel=0.005)
    assert result.time_to_first_token_ratio.value == pytest.approx(1 / 3, rel=0.005)
    assert result.parent.latency_s.value == pytest.approx(parent, rel=0.01)
    assert (result.decode_ratio is None) == (output == 1)
    tokens = SCENARIO.batch_size * output
    throughput = result.child.throughput_tok_per_s.value
    assert throughput == pytest.approx(tokens / result.child.latency_s.value)
    assert result.child.kv_cache_bytes == 4 * (16 + output) * 100
    assert (result.parent.memory_bytes, result.child.memory_bytes) == (1000, 1001)


def noisy(seed, true=2.0, start_sd=0.01, step_sd=0.03, contended=0.5):
    """A child `true` times as fast, on a machine that other work slows now and then.

    Every start of the engines has a speed of its own; a contended turn is slowed by 2 to 6, on
    either side by another factor.
    """
    rng = default_rng(seed)
    left, slow, starts = 0, False, {}

    def seconds(side, position, index):
        nonlocal left, slow
        if left == 0:
            slow, left = rng.random() < contended, int(rng.integers(20, 200))
        left -= 1
        own = starts[side] * (true if side == 0 else 1.0)
        return own * (rng.uniform(2, 6) if slow else 1.0) * rng.normal(1, step_sd)

    def serve(folder, scenario):
        side = int(folder.name)

        def start():
            starts[side] = rng.normal(1, start_sd)

        return ScriptedSession(side, [], seconds, start)

    facts = EngineFacts(engine="scripted", version="1", device="none", count=1)
    return Engine("scripted", measured=True, facts=facts, serve=serve, probe=serve)


@pytest.mark.training
def test_under_contention_the_figure_is_that_of_a_quiet_machine(tmp_path):
    """Nine of ten intervals hold the quiet value, and their centres scatter little."""
    results = [measured(noisy(seed), tmp_path) for seed in range(20)]
    values = np.array([result.speedup.value for result in results])
    assert values.std() / 2.0 < 0.015 and abs(values.mean() / 2.0 - 1) < 0.006
    held = sum(result.speedup.low <= 2.0 <= result.speedup.high for result in results)
    assert held >= 18
    assert np.mean([result.disturbed for result in results]) > 0.3
    assert measured(noisy(0, contended=0.0), tmp_path).disturbed < 0.02


def lasting(seed, busy):
    """A child twice as fast on a machine that is slowed for seconds, both sides by one factor."""
    rng, clock = default_rng(seed), itertools.count()

    def seconds(side, position, index):
        slowed = busy and next(clock) // 150 % 3  # two thirds of the time
        return (2.0 - side) * (1.8 if slowed else 1.0) * rng.normal(1, 0.03)

    return scripted(seconds)


@pytest.mark.training
def test_what_slows_both_sides_for_long_hardly_widens_the_interval(tmp_path):
    """The slowed turns count, too: a busy machine is about as certain of a ratio as a quiet one."""

    def widths(busy):
        found = [measured(lasting(seed, busy), tmp_path).speedup for seed in range(10)]
        assert np.mean([one.value for one in found]) == pytest.approx(2.0, rel=0.005)
        return np.mean([one.high - one.low for one in found])

    assert widths(True) < 1.5 * widths(False)
    assert measured(lasting(0, True), tmp_path).child.latency_s.value == pytest.approx(64, rel=0.03)


@pytest.mark.training
def test_an_interval_narrows_with_more_starts_and_widens_with_their_differences(tmp_path):
    def width(**changes):
        starts = changes.pop("starts", 3)
        widths = []
        for seed in range(5):
            speedup = measured(noisy(seed, contended=0, **changes), tmp_path, starts=starts).speedup
            widths.append(speedup.high - speedup.low)
        return float(np.mean(widths))

    assert width(starts=9) < 0.8 * width(starts=3)
    assert width(start_sd=0.04) > 2 * width(start_sd=0.005)


def test_a_measurement_goes_on_until_it_decides_or_the_looks_are_used_up(tmp_path):
    engine = scripted(lambda side, *_: 2.0 - side)
    for decides_at in (2, 4, 6, 100):
        result = measured(engine, tmp_path, starts=2, decided=lambda m, n=decides_at: m.starts >= n)
        assert result.starts == min(decides_at, 2 * turns.LOOKS)


def test_each_look_has_its_share_of_the_error(tmp_path):
    phases = [[Phase.of(1, default_rng(s).normal(1, 0.1, size=(40, 2)))] for s in range(3)]
    figures = {"ratio": lambda s: s.prefill[0] / s.prefill[1]}
    one, three = (intervals.intervals(phases, figures, looks)["ratio"] for looks in (1, 3))
    assert one.value == three.value and three.low < one.low < one.high < three.high


def test_a_modelled_engine_is_started_once_and_has_no_interval(tmp_path):
    engine = engines.make("roofline", CostConfig(device_sheet=str(DEVICE_SHEET)), tmp_path)
    assert not engine.measured
    result = measured(scripted(lambda side, *_: 2.0 - side, measured=False), tmp_path)
    assert result.starts == 1 and result.speedup.low == result.speedup.high == 2.0
    assert result.speedup.with_unit(".2f", "x") == "2.00x"


def test_two_that_do_not_fit_take_turns_whole(tmp_path, monkeypatch):
    log = []
    engine = scripted(lambda side, *_: 2.0 - side, log=log)
    monkeypatch.setattr(turns, "available_bytes", lambda gpu: turns.overhead_bytes())
    result = measured(engine, tmp_path, starts=2)
    assert not result.in_turn and result.speedup.value == pytest.approx(2.0)
    sides = [side for side, _ in log]
    assert sum(a != b for a, b in itertools.pairwise(sides)) == 3  # 0, 1, 0, 1


def test_a_faster_side_alone_may_have_more_prefills(tmp_path):
    slow, fast = (
        serve_in_turn([ScriptedSession(0, [], lambda *_, f=f: f)], [SCENARIO]) for f in (9.0, 1.0)
    )
    fast[0] = Phase.of(1, np.ones((30, 1)))
    joined = turns._side_by_side([slow[0], fast[0]])
    assert joined.turns.shape == (len(slow[0].turns), 2)


def test_every_start_of_the_engines_counts():
    starts = [[Phase.of(1, [[seconds, 2 * seconds]] * 8)] for seconds in (1.0, 1.04)]
    figures = {"seconds": lambda seconds: seconds.total[0]}
    assert intervals.intervals(starts, figures, looks=1)["seconds"].value == pytest.approx(1.02)
