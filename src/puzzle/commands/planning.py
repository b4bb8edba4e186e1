"""`puzzle plan`: what each stage will need, before anything is spent. Sums and prints.

Every stage estimates its own need from config and shapes alone, without loading weights. Time is
FLOPs over the rate of a matrix product measured now on this machine, at the efficiency that the
pocket run reached (docs/log.md); treat it as an order of magnitude on other machines.
"""

from dataclasses import asdict, dataclass

from pydantic import JsonValue
from rich.console import Console
from rich.table import Table

from puzzle.pipeline import STAGES
from puzzle.progress import duration
from puzzle.run import Run
from puzzle.stage import Job, Need, Scope


@dataclass(frozen=True)
class PlannedStage:
    """A stage of the run, of a place or of a child, and what it will need."""

    stage: str
    need: Need
    child: str | None = None
    place: str | None = None

    def as_json(self) -> dict[str, JsonValue]:
        """As JSON values, every figure with its unit in the key."""
        owner = {"child": self.child, "place": self.place}
        named = {key: name for key, name in owner.items() if name is not None}
        return {"stage": self.stage, **named, **asdict(self.need)}


def plan(run: Run) -> list[PlannedStage]:
    """The needs of every stage of a recipe, in the order of work."""
    jobs = list(run.recipe_jobs())
    several = len(jobs) > 1
    planned = [
        PlannedStage(stage.name, stage.work().need(Job(run)))
        for stage in STAGES
        if stage.scope is Scope.RUN
    ]
    places: set[str] = set()
    for job in jobs:
        for stage in STAGES:
            if stage.scope is Scope.PLACE and job.place.name not in places:
                place = job.place.name if job.place.name != "here" else None
                planned.append(PlannedStage(stage.name, stage.work().need(job), place=place))
        places.add(job.place.name)
        child = job.child.name if several else None
        planned += [
            PlannedStage(stage.name, stage.work().need(job), child=child)
            for stage in STAGES
            if stage.scope is Scope.CHILD
        ]
    return planned


def total_seconds(planned: list[PlannedStage]) -> float:
    """Of all stages, one after the other."""
    return sum(one.need.seconds for one in planned)


def print_plan(planned: list[PlannedStage]) -> None:
    """The table, on standard output."""
    table = Table(title="what each stage will need (estimates)", title_justify="left")
    for name in ("stage", "tokens", "FLOPs", "memory", "disk", "time"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for one in planned:
        need, owner = one.need, one.child or one.place
        table.add_row(
            f"{one.stage} ({owner})" if owner else one.stage,
            f"{need.tokens:,}" if need.tokens else "",
            f"{need.flops:.1e}" if need.flops else "",
            f"{need.memory_bytes / 2**30:.2f} GiB",
            f"{need.disk_bytes / 2**20:,.0f} MiB",
            duration(need.seconds),
        )
    table.add_row("all", "", "", "", "", duration(total_seconds(planned)))
    Console(highlight=False).print(table)
