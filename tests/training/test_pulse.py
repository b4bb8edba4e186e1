"""A process that no longer counts is missed by the one before it, and slow ones are named."""

import threading
import time

from torch.distributed import HashStore

from puzzle.training.pulse import Pulse, Rates


def test_a_process_that_gives_no_sign_of_life_is_missed_by_the_one_before_it():
    store, told, missed = HashStore(), [], threading.Event()

    def on_death(what: str) -> None:
        told.append(what)
        missed.set()

    pulses = [Pulse(store, rank, 3, on_death) for rank in range(3)]
    for pulse in pulses:
        pulse.start(beat_s=0.02, dead_after_s=0.5)
    time.sleep(1.0)
    assert not told  # all of them live, for longer than a dead one would be waited for
    pulses[2].stop()
    assert missed.wait(timeout=10)
    for pulse in pulses:
        pulse.stop()
    assert "process 2 has given no sign of life" in told[0]


def test_processes_below_most_of_the_median_rate_are_slow():
    rates = [Rates(HashStore(), 0, 1)]
    assert rates[0].slow("BLD", 5.0) == {}
    store = HashStore()
    rates = [Rates(store, rank, 4) for rank in range(4)]
    for rank, rate in enumerate((100.0, 101.0, 40.0, 99.0)):
        slow = rates[rank].slow("BLD", rate)
    assert slow == {2: 40.0}
    assert rates[3].slow("another task", 1.0) == {}
