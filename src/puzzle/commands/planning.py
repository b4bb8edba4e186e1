"""`puzzle plan`: what each stage will need, before anything is spent. Sums and prints.

Every stage estimates its own need from config and shapes alone, without loading weights, and says
what it chooses so that it fits the memory. Time is its effort at the speed of the parent's layers,
timed now on this machine (training/speed.py), or by the sheet of devices that are not here
(engines/devices.yaml), for which it is an order of magnitude. benchmarks/plan.py compares it with
what stages took.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue
from rich.console import Console
from rich.table import Table

from puzzle.device import Device, Memory, Sheet
from puzzle.engines import roofline_engine
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
        need, memory = self.need, self.need.memory
        return {
            "stage": self.stage,
            **named,
            "tokens": need.tokens,
            "flops": need.flops,
            "memory_bytes": need.memory_bytes,
            "weights_bytes": memory.weights,
            "optimizer_bytes": memory.optimizer,
            "activations_bytes": memory.activations,
            "cache_bytes": memory.cache,
            "host_bytes": memory.host,
            "disk_bytes": need.disk_bytes,
            "network_bytes": need.effort.network,
            "link_bytes": need.effort.link,
            "file_bytes": need.effort.files,
            "seconds": self.seconds,
            "chosen": need.chosen,
            "instead": need.instead,
            "refusal": self.refusal,
        }

    @property
    def name(self) -> str:
        """The stage, and whose it is where there are several."""
        owner = self.child or self.place
        return f"{self.stage} ({owner})" if owner else self.stage


def device(
    name: str | None = None,
    *,
    devices: int | None = None,
    device_memory: str | None = None,
    host_memory: str | None = None,
) -> Device | None:
    """Devices that need not be here, to plan for; None where nothing is given.

    Raises `UserError` for an unknown device, a sheet that lacks a figure, and unclear sizes.

    Args:
        name: in `engines/devices.yaml`, or of a file with the same keys; by default an H100.
        devices: how many; more than are in one machine are on several.
        device_memory: with a unit, of each, instead of the sheet's.
        host_memory: with a unit, of each machine, instead of the sheet's.
    """
    if all(given is None for given in (name, devices, device_memory, host_memory)):
        return None
    name, count = name or "H100", 1 if devices is None else devices
    figures = roofline_engine.sheet(name, roofline_engine.PLAN_KEYS, "--device")
    in_machine = int(figures["devices"])
    if in_machine != figures["devices"]:
        raise UserError(
            f"--device {name}: devices: got {figures['devices']:g}; expected a whole number"
        )
    if count < 1 or (count > in_machine and count % in_machine):
        several = "1" if in_machine == 1 else f"1 to {in_machine}"
        raise UserError(
            f"--devices: got {count}; expected {several}, or a multiple of {in_machine}, which is "
            f"how many {name} are in a machine"
        )
    is_shared, machines = figures["host_bytes"] == 0, -(-count // in_machine)
    if is_shared and host_memory is not None:
        raise UserError(f"--host-memory: {name} is the host's own device; use --device-memory")
    memory = Memory(
        device_bytes=_bytes("device-memory", device_memory) or int(figures["memory_bytes"]),
        host_bytes=_bytes("host-memory", host_memory)
        or int(figures["host_bytes"] or figures["memory_bytes"]) * (count // machines),
        devices=count,
        machines=machines,
        is_shared=is_shared,
    )
    network = "interconnect_bytes_per_s" if machines == 1 else "network_bytes_per_s"
    sheet = Sheet(
        name=Path(name).stem,
        memory=memory,
        flops=figures["flops_per_s"],
        network_bytes=figures[network],
        link_bytes=figures["host_link_bytes_per_s"],
        disk_bytes=figures["disk_bytes_per_s"],
    )
    return Device.of_sheet(sheet)


def _bytes(option: str, text: str | None) -> int:
    """A memory; 0 where it is not given."""
    if text is None:
        return 0
    try:
        asked = parse_quantity("memory", text)
    except UserError:
        asked = None
    if asked is None or asked.is_relative:
        raise UserError(f"--{option}: got {text!r:.80}; expected bytes with a unit, such as 80GiB")
    return int(asked.number)


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
    """The tables, on standard output, then what is chosen and what does not fit."""
    # one width everywhere, so that what a page quotes is what everyone sees
    console = Console(highlight=False, width=110)
    table = _table(
        f"what each stage will need{_where(device)}",
        ("tokens", "FLOPs", "device", "host", "disk", "network", "time"),
    )
    for one in planned:
        need = one.need
        table.add_row(
            one.name,
            f"{need.tokens:,}" if need.tokens else "",
            f"{need.flops:.1e}" if need.flops else "",
            _size(need.memory_bytes),
            _size(need.memory.host),
            _size(need.disk_bytes),
            _size(need.effort.network),
            duration(one.seconds),
        )
    table.add_row("all", "", "", "", "", "", "", duration(total_seconds(planned)))
    console.print(table)
    parts = ("weights", "optimizer", "activations", "cache")
    table = _table("what is in the memory of a device at the peak", parts)
    for one in planned:
        if one.need.memory_bytes:
            table.add_row(one.name, *(_size(getattr(one.need.memory, part)) for part in parts))
    console.print(table)
    told = {
        "how it is done": {one.name: one.need.chosen for one in planned if not one.refusal},
        "what does not fit": {one.name: one.refusal for one in planned},
    }
    for title, texts in told.items():
        if lines := [f"  {name}: {text}" for name, text in texts.items() if text]:
            print("\n".join([f"{title}:", *lines]))


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("stage", *columns):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    return table


def _where(device: Device) -> str:
    """Of devices that are not here: how many, their memory, and what the times assume."""
    if (sheet := device.planned) is None:
        return " (estimates)"
    memory, rate = sheet.memory, device.training_flops_per_s / 1e12
    count = f"{memory.devices} x " if memory.devices > 1 else ""
    machines = f"{memory.machines} machines" if memory.machines > 1 else "a machine"
    where = "" if memory.is_shared else f" in {machines} of {memory.host_bytes / 2**30:,.4g} GiB"
    return (
        f" on {count}{sheet.name} of {memory.device_bytes / 2**30:.4g} GiB{where} "
        f"(estimates; times at {rate:.3g} TFLOP/s a device)"
    )


def _size(number: float) -> str:
    """Bytes as a reader wants them; empty for none."""
    for power, unit in ((50, "PiB"), (40, "TiB"), (30, "GiB")):
        if number >= 2**power:
            return f"{number / 2**power:,.1f} {unit}"
    return f"{number / 2**20:,.0f} MiB" if number else ""
