"""What processes of a group tell one another beside tensors: that they live, and how fast they are.

A process that dies closes its connections, and the others fail at once. A machine that loses its
power closes nothing: so every process counts in the store that the group has met in, and looks at
the next one's count. The wait for tensors may then be as long as anything takes.
"""

import json
import threading
import time
from collections.abc import Callable
from statistics import median

from torch._C._distributed_c10d import Store

BEAT_S = 10.0
DEAD_AFTER_S = 900.0  # longer than any write that keeps an interpreter from running its threads
SLOW_SHARE = 0.8  # of the median rate


class Pulse:
    """Counts for this process, and watches the next one."""

    def __init__(self, store: Store, rank: int, size: int, on_death: Callable[[str], None]) -> None:
        """`on_death` is told, in words, when the next process or the store is gone."""
        self.store, self.rank, self.watched = store, rank, (rank + 1) % size
        self.on_death, self.ended = on_death, threading.Event()
        self.thread: threading.Thread | None = None

    def start(self, beat_s: float = BEAT_S, dead_after_s: float = DEAD_AFTER_S) -> None:
        """Count and watch from now on."""
        arguments = (beat_s, dead_after_s)
        self.thread = threading.Thread(target=self._run, args=arguments, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """No longer."""
        self.ended.set()
        if self.thread is not None:
            self.thread.join()

    def _run(self, beat_s: float, dead_after_s: float) -> None:
        count, seen, seen_at = 0, b"", time.monotonic()
        while not self.ended.wait(beat_s):
            count += 1
            try:
                self.store.set(f"puzzle/pulse/{self.rank}", str(count))
                key = f"puzzle/pulse/{self.watched}"
                now = self.store.get(key) if self.store.check([key]) else b""
            except RuntimeError:
                self.on_death("the machine that the group has met on is gone")
                return
            if now != seen:
                seen, seen_at = now, time.monotonic()
            elif time.monotonic() - seen_at > dead_after_s:
                self.on_death(
                    f"process {self.watched} has given no sign of life for {dead_after_s:.0f} s"
                )
                return


class Rates:
    """How fast every process of a group does its share."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size

    def slow(self, task: str, rate: float) -> dict[int, float]:
        """Tell the others this process's rate, in units/s; the rates of those that are slow."""
        self.store.set(f"puzzle/rate/{self.rank}", json.dumps([task, rate]))
        rates = {self.rank: rate}
        for rank in range(self.size):
            key = f"puzzle/rate/{rank}"
            if rank != self.rank and self.store.check([key]):
                of, value = json.loads(self.store.get(key))
                if of == task:
                    rates[rank] = value
        least = SLOW_SHARE * median(rates.values())
        return {rank: value for rank, value in sorted(rates.items()) if value < least}
