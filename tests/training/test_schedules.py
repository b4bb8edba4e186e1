"""Schedules of the learning rate."""

import pytest

from puzzle.training import schedules


def test_schedules_warm_up_and_end_at_zero():
    wsd = [schedules.warmup_stable_decay(step, 100, 0.1, 0.2) for step in range(100)]
    assert wsd[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert set(wsd[10:80]) == {1.0}
    assert wsd[80:] == pytest.approx([(20 - i) / 20 for i in range(20)])
    cosine = [schedules.cosine(step, 100, 0.1) for step in range(100)]
    assert cosine[9] == cosine[10] == 1.0
    assert cosine[55] == pytest.approx(0.5, abs=1e-6)
    assert 0 < cosine[99] < 1e-3


def test_default_rates_fall_with_width_and_given_ones_stay():
    assert schedules.peak(None, 1e-3, 64) == schedules.peak(None, 1e-3, 256) == 1e-3
    assert schedules.peak(None, 1e-3, 4096) == 1e-3 / 16
    assert schedules.peak(3e-4, 1e-3, 4096) == 3e-4
