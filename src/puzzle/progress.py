"""Progress for people: bars with an ETA on a terminal, a line every few seconds elsewhere.

Nothing is shown when quiet. Everything goes to standard error; standard output carries results
only.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

LINE_EVERY_S = 10.0


def duration(seconds: float) -> str:
    """2.5 s, 47 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return (
        f"{minutes} min {seconds:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


class Task:
    """One measured piece of work. `advance` may be called often; what is drawn is rate-limited."""

    def __init__(self, owner: "Progress", name: str, total: float, unit: str) -> None:
        self.owner, self.name, self.total, self.unit = owner, name, total, unit
        self.done = 0.0
        self.resumed = 0.0  # work found finished on disk: counts as done, not as speed
        self.waited_s = 0.0  # for other processes: counts as time, not as this one's speed
        self.started = self.last_line = time.perf_counter()
        self.bar: TaskID | None = None

    def skip(self, amount: float) -> None:
        """Count work that an earlier, interrupted run has finished."""
        self.resumed += amount
        self.advance(amount)

    def extend(self, amount: float) -> None:
        """There is more to do than was thought."""
        self.total += amount
        if self.owner.bars is not None and self.bar is not None:
            self.owner.bars.update(self.bar, total=self.total)

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Count work that has just been done; `note` stands beside the bar, e.g. the loss."""
        self.done += amount
        if self.owner.bars is not None and self.bar is not None:
            self.owner.bars.update(self.bar, completed=self.done, note=note)
        now = time.perf_counter()
        if now - self.last_line < LINE_EVERY_S or self.done <= self.resumed:
            return
        self.last_line, done = now, self.done - self.resumed
        others = self.owner.others(self.name, done / (now - self.started - self.waited_s))
        slow = [f"{name} {r:,.4g} {self.unit}/s" for name, r in others.items()]
        note = ", ".join([note] * bool(note) + slow)
        if self.owner.bars is not None and self.bar is not None and others:
            self.owner.bars.update(self.bar, note=note)
        if self.owner.plain:
            rate = done / (now - self.started)
            left = duration(max(0.0, self.total - self.done) / rate)
            share = min(1.0, self.done / self.total) if self.total else 1.0
            detail = f", {note}" if note else ""
            self.owner.say(
                f"  {self.name}: {share:.0%}, {rate:,.4g} {self.unit}/s, {left} left{detail}"
            )


class Progress:
    """Where stages report. `say` prints a line; `task` opens a bar."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self.plain = not quiet and not self.console.is_terminal
        self.bars: Bars | None = None
        # told this process's rate at a task, it gives the rates of processes that are slow at it
        self.slow: Callable[[str, float], dict[int, float]] = lambda task, rate: {}

    def others(self, task: str, rate: float) -> dict[str, float]:
        """Rates of the processes of a group that are slow at a task, by name."""
        return {f"process {number}:": r for number, r in self.slow(task, rate).items()}

    def say(self, line: str) -> None:
        """Print a line, whether a bar is open or not; nothing when quiet."""
        self.console.print(line, markup=False)

    @contextlib.contextmanager
    def task(self, name: str, total: float, unit: str = "steps") -> Iterator[Task]:
        """A bar for work of `total` units, open inside the `with` block."""
        task = Task(self, name, total, unit)
        if self.quiet or self.plain:
            yield task
            return
        columns = (
            TextColumn("  {task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Bars(*columns, console=self.console, transient=True) as self.bars:
            task.bar = self.bars.add_task(name, total=total, note="")
            try:
                yield task
            finally:
                self.bars = None


def say_to_stderr(line: str) -> None:
    """For lines that must be seen even when quiet: warnings and errors."""
    print(line, file=sys.stderr, flush=True)
