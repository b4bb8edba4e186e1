"""A child in one line: wish, prediction, measurement, retention, disk. Reads folders only."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from puzzle import artifacts
from puzzle.artifacts import Record
from puzzle.assemble import ASSEMBLE, measured
from puzzle.config import CONSTRAINTS
from puzzle.engines.intervals import Interval
from puzzle.evaluate import EVALUATE
from puzzle.evaluate import results as evaluation
from puzzle.run import Run
from puzzle.search import SEARCH, answers
from puzzle.search.constraints import target_in_words
from puzzle.search.promise import Verdict
from puzzle.stage import Child, Job
from puzzle.uptrain import UPTRAIN


class ChildSummary(Record):
    """What is known of a child; None where its stages are not done yet."""

    run: str
    child: str
    place: str
    wish: str
    parameters: int | None = None
    predicted_speedup: float | None = None  # of throughput in the main scenario
    measured_speedup: float | None = None
    verdict: Verdict | None = None
    kl: float | None = None  # of the finished child, nats per token
    retention: Interval | None = None  # of top-1 accuracy
    # Top-1 accuracy minus that of the first child in the list, where both saw the same test text.
    top1_difference: Interval | None = None
    disk_bytes: int = 0
    current: bool = True  # its files are of what is asked of it now


def summarise(job: Job) -> ChildSummary:
    """A child from the files of its stages."""
    child = job.child
    known = ChildSummary(
        run=str(job.run.folder),
        child=child.name,
        place=child.place,
        wish=wish(child),
        disk_bytes=disk_bytes(child.folder),
    )
    updates: dict[str, object] = {}
    if artifacts.read_manifest(job.folder(SEARCH)) is not None:
        answer = answers.read(job)
        updates["parameters"] = answer.best.predicted["main"].parameters
        updates["predicted_speedup"] = answer.predicted_speedup()
    if artifacts.read_manifest(job.folder(ASSEMBLE)) is not None:
        served = measured.read(job)
        if served.scenarios:
            updates["measured_speedup"] = served.scenarios["main"].measurement.speedup.value
            updates["verdict"] = served.verdict
    if artifacts.read_manifest(job.folder(EVALUATE)) is not None:
        results = evaluation.read(job)
        if results.speed is not None:
            updates["measured_speedup"] = results.speedup
            updates["verdict"] = results.verdict
        updates["kl"] = results.uptrained.quality.kl.value
        updates["retention"] = results.uptrained.retention
    for stage in (EVALUATE, UPTRAIN, ASSEMBLE, SEARCH):
        manifest = artifacts.read_manifest(job.folder(stage))
        if manifest is not None:
            updates["current"] = stage.is_current(job, manifest)
            break
    return known.model_copy(update=updates)


def wish(child: Child) -> str:
    """What was asked of a child, in words."""
    parts = []
    for name in CONSTRAINTS:
        asked = getattr(child.search, name)
        if isinstance(asked, str):
            parts.append(f"{name} {asked}")
        elif asked:
            parts += [f"{name} {text} ({scenario})" for scenario, text in asked.items()]
    parts += target_in_words(child.search)
    if child.search.architecture is not None:
        parts.append("a given architecture")
    return ", ".join(parts)


def disk_bytes(folder: Path) -> int:
    """What a folder's files take."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def summaries(runs: list[Run]) -> list[ChildSummary]:
    """Every child of several runs; those that are evaluated against the first that is."""
    jobs = [run.child_job(name) for run in runs for name in run.child_names()]
    found, first = [], None
    for job in jobs:
        child = summarise(job)
        if child.retention is not None:
            shown = evaluation.read_quality(job, "uptrained").text
            if first is None:
                first = shown
            elif shown.is_on_text_of(first):
                updates = {"top1_difference": shown.difference(first, "top1")}
                child = child.model_copy(update=updates)
        found.append(child)
    return found


def print_summaries(children: list[ChildSummary]) -> None:
    """Children side by side, on standard output."""
    several_runs = len({child.run for child in children}) > 1
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("child", overflow="fold")
    table.add_column("asked", min_width=len("throughput"), overflow="fold")
    for column in ("predicted", "measured", "", "KL", "kept", "params", "disk"):
        table.add_column(column, justify="right", no_wrap=True)
    for child in children:
        name = f"{child.run}: {child.child}" if several_runs else child.child
        place = "" if child.place == "here" else f" at {child.place}"
        verdict = {None: "", "missed": "MISSED"}.get(child.verdict, child.verdict)
        if not child.current and child.verdict != "missed":
            verdict = "stale"
        table.add_row(
            name,
            child.wish.replace(", ", ",\n") + place,  # a line for each part
            _figure(child.predicted_speedup, ".2f", "x"),
            _figure(child.measured_speedup, ".2f", "x"),
            verdict,
            _figure(child.kl, ".4f"),
            _figure(None if child.retention is None else child.retention.value, ".1%"),
            "" if child.parameters is None else f"{child.parameters / 1e6:,.1f}M",
            f"{child.disk_bytes / 2**20:,.0f} MiB",
        )
    console = Console(highlight=False)
    console.print(table)
    first = next((child for child in children if child.retention is not None), None)
    for child in children:
        gap = child.top1_difference
        if gap is not None and first is not None:
            console.print(
                f"{child.child} against {first.child}: top-1 accuracy {gap.value:+.2%} "
                f"({gap.low:+.2%} to {gap.high:+.2%} with a confidence of 95 %)",
                soft_wrap=True,
            )
    if any(not child.current for child in children):
        console.print(
            "stale: made for an earlier wish, or from earlier files; `puzzle child` makes it anew",
            soft_wrap=True,
        )


def _figure(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"
