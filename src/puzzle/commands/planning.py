"""`puzzle plan`: what each stage will need, before anything is spent. Sums and prints.

Every stage estimates its own need from config and shapes alone, without loading weights, and says
what it chooses so that it fits the memory. Time is its effort at the speed of the parent's layers,
timed now on this machine (training/speed.py), or at a rate assumed for a GPU that is not here, for
which it is an order of magnitude. benchmarks/plan.py compares it with what stages took.
"""

from dataclasses import asdict, dataclass

from pydantic import JsonValue
from rich.console import Console
from rich.table import Table

from puzzle.device import Device, Memory
from puzzle.errors import UserError
from puzzle.pipeline import STAGES
from puzzle.progress import duration
from puzzle.run import Run
from puzzle.search.constraints import parse_quantity
from puzzle.stage import Job, Need, Scope


@dataclass(frozen=True)
class PlannedStage:
    """A stage of the run, of a place or of a child, and what it will need."""

    stage: str
    need: Need
    seconds: float
    refusal: str  # why it does not fit; empty where it does
    child: str | None = None
    place: str | None = None

    def as_json(self) -> dict[str, JsonValue]:
        """As JSON values, every figure with its unit in the key."""
        owner = {"child": self.child, "place": self.place}
        named = {key: name for key, name in owner.items() if name is not None}
        need = {key: value for key, value in asdict(self.need).items() if key != "effort"}
        found = {"stage": self.stage, **named, **need, "seconds": self.seconds}
        return found | {"refusal": self.refusal}

    @property
    def name(self) -> str:
        """The stage, and whose it is where there are several."""
        owner = self.child or self.place
        return f"{self.stage} ({owner})" if owner else self.stage


def gpu(device_memory: str, host_memory: str) -> Device:
    """A GPU of so much memory, in a machine of so much. Raises `UserError` for other texts."""
    sizes = []
    for name, text in (("device-memory", device_memory), ("host-memory", host_memory)):
        try:
            asked = parse_quantity("memory", text)
        except UserError:
            asked = None
        if asked is None or asked.is_relative:
            raise UserError(f"--{name}: got {text!r}; expected bytes with a unit, such as 80GiB")
        sizes.append(int(asked.number))
    return Device.gpu(Memory(device_bytes=sizes[0], host_bytes=sizes[1]))


def plan(run: Run) -> list[PlannedStage]:
    """The needs of every stage of a recipe, in the order of work."""
    jobs = list(run.recipe_jobs())
    several, places = len(jobs) > 1, set[str]()
    memory = run.device.memory

    def stages(scope: Scope, job: Job, **owner: str | None) -> list[PlannedStage]:
        needs = [(stage.name, stage.work().need(job)) for stage in STAGES if stage.scope is scope]
        return [
            PlannedStage(name, need, need.effort.seconds(run.speed), need.refusal(memory), **owner)
            for name, need in needs
        ]

    planned = stages(Scope.RUN, Job(run))
    for job in jobs:
        if job.place.name not in places:
            place = job.place.name if job.place.name != "here" else None
            planned += stages(Scope.PLACE, job, place=place)
        places.add(job.place.name)
        planned += stages(Scope.CHILD, job, child=job.child.name if several else None)
    return planned


def refuse(planned: list[PlannedStage]) -> None:
    """Raise `UserError` for the first stage that does not fit."""
    for one in planned:
        if one.refusal:
            raise UserError(f"{one.name}: {one.refusal}")


def total_seconds(planned: list[PlannedStage]) -> float:
    """Of all stages, one after the other."""
    return sum(one.seconds for one in planned)


def print_plan(planned: list[PlannedStage], device: Device) -> None:
    """The table, on standard output, then what is chosen and what does not fit."""
    table = Table(title=f"what each stage will need{_where(device)}", title_justify="left")
    for name in ("stage", "tokens", "FLOPs", "device memory", "host memory", "disk", "time"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for one in planned:
        need = one.need
        table.add_row(
            one.name,
            f"{need.tokens:,}" if need.tokens else "",
            f"{need.flops:.1e}" if need.flops else "",
            _size(need.memory_bytes),
            _size(need.host_bytes),
            _size(need.disk_bytes),
            duration(one.seconds),
        )
    table.add_row("all", "", "", "", "", "", duration(total_seconds(planned)))
    Console(highlight=False).print(table)
    told = {
        "how it is done": {one.name: one.need.chosen for one in planned if not one.refusal},
        "what does not fit": {one.name: one.refusal for one in planned},
    }
    for title, texts in told.items():
        if lines := [f"  {name}: {text}" for name, text in texts.items() if text]:
            print("\n".join([f"{title}:", *lines]))


def _where(device: Device) -> str:
    """Of a GPU that is not here: its memory, and what the times assume."""
    if device.planned is None:
        return " (estimates)"
    gpu_gib, host_gib = (n / 2**30 for n in (device.memory.device_bytes, device.memory.host_bytes))
    rate = device.training_flops_per_s / 1e12
    return (
        f" on a GPU of {gpu_gib:.4g} GiB in a machine of {host_gib:.4g} GiB "
        f"(estimates; times at {rate:.0f} TFLOP/s)"
    )


def _size(number: float) -> str:
    """Bytes as a reader wants them; empty for none."""
    if not number:
        return ""
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.0f} MiB"
