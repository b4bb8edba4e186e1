"""The contract of a stage: what it is, what decides its result, what it needs, how it is done.

Every room's `__init__.py` declares its stage as a `Stage`, which is cheap to import: the command
line and `puzzle status` need no torch. The half that computes is a `Work`, in the room's
`stage.py`, imported when it is first used. `pipeline.py` imports the stages and shows their order.

A stage gets a `Job`: the run, and where it applies the place and the child. It reads artifacts of
earlier stages, and writes into the folder it is given and nowhere else.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from puzzle import artifacts, locks
from puzzle.artifacts import Inputs, Manifest
from puzzle.config import CostConfig, EvaluateConfig, SearchConfig, Target, UptrainConfig
from puzzle.errors import UserError

if TYPE_CHECKING:
    from puzzle.device import Memory
    from puzzle.engines import Engine
    from puzzle.model.space import SearchSpace
    from puzzle.run import Run
    from puzzle.training.speed import Speed


class Scope(Enum):
    """What a stage belongs to, and so where its folder is."""

    RUN = "run"  # the parent: made once
    PLACE = "place"  # where children are served
    CHILD = "child"


@dataclass(frozen=True)
class Place:
    """Where children are served: engine, device, scenarios, and what serves them."""

    name: str
    folder: Path
    deploy: list[Target]
    cost: CostConfig


@dataclass(frozen=True)
class Child:
    """A wish at a place, and the settings of its own stages."""

    name: str
    folder: Path
    place: str
    search: SearchConfig
    uptrain: UptrainConfig
    evaluate: EvaluateConfig


@dataclass(frozen=True)
class Job:
    """What a stage works on."""

    run: "Run"
    at: Place | None = None
    wish: Child | None = None

    @property
    def place(self) -> Place:
        """The place, for stages that have one."""
        assert self.at is not None, "this stage has no place"
        return self.at

    @property
    def child(self) -> Child:
        """The child, for stages that make one."""
        assert self.wish is not None, "this stage has no child"
        return self.wish

    @cached_property
    def space(self) -> "SearchSpace":
        """What of the library the place's deployment targets can serve."""
        from puzzle.model import space

        return space.servable(self.run.space, self.place.deploy, self.run.parent.shape)

    @cached_property
    def engine(self) -> "Engine":
        """The engine of the place. Raises `UserError` where it cannot run here."""
        from puzzle import engines

        logs, device = self.run.folder / "logs", self.run.recipe.device
        return engines.choose(self.place.cost, self.place.deploy, logs, device)

    def measuring(self) -> contextlib.AbstractContextManager[None]:
        """Holds the place's device while something is measured on it."""
        if not self.engine.measured:
            return contextlib.nullcontext()
        return locks.hold_device(self.engine.facts.device, self.run.progress.say)

    def folder(self, stage: "Stage") -> Path:
        """Where a stage of this job keeps its files."""
        root = {
            Scope.RUN: lambda: self.run.folder,
            Scope.PLACE: lambda: self.place.folder,
            Scope.CHILD: lambda: self.child.folder,
        }[stage.scope]()
        return root / stage.folder

    def manifest(self, stage: "Stage") -> Manifest:
        """The manifest of an earlier stage that is done for the settings of now.

        Raises `UserError` with the command that is missing, or the file that is damaged.
        """
        manifest = artifacts.read_manifest(self.folder(stage))
        if manifest is None or not stage.is_current(self, manifest):
            state = "not done" if manifest is None else "out of date"
            raise UserError(
                f"run {self.run.folder}: stage {stage.name} is {state}; run "
                f"`puzzle {stage.command(self)}` first"
            )
        damage = artifacts.damage(self.folder(stage), manifest)
        if damage is not None:
            raise UserError(f"{damage}; `puzzle {stage.command(self)}` makes it again")
        return manifest


@dataclass(frozen=True)
class Effort:
    """What takes a stage's time, in amounts that do not depend on the machine, and seconds that do.

    With the speed of this parent's layers here (`training/speed.py`) they become seconds.
    """

    forward: float = 0.0  # parameters of layers times tokens that go through them
    training: float = 0.0  # the same, forward and backward
    judged: float = 0.0  # tokens whose metrics are computed over the vocabulary
    loss: float = 0.0  # tokens whose losses are, forward and backward
    network: float = 0.0  # bytes that a process sends to others
    link: float = 0.0  # bytes between a device and its host
    files: float = 0.0  # bytes that a process reads and writes while it computes
    beside_s: float = 0.0  # engines, searches

    def times(self, factor: float) -> "Effort":
        """So many times as much."""
        return Effort(**{name: factor * amount for name, amount in vars(self).items()})

    def seconds(self, speed: "Speed") -> float:
        """At that speed: what is slowest of computing and moving, which go on together."""
        computing = self.forward * speed.forward_s + self.training * speed.training_s
        computing += self.judged * speed.judged_s + self.loss * speed.loss_s
        sent, moved = self.network * speed.network_s, self.link * speed.link_s
        return max(computing, sent, moved, self.files * speed.file_s) + self.beside_s


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Peaks of memory: of one device, by what it is for, and of its machine beside that."""

    weights: float = 0.0  # of models, in the dtype of products
    optimizer: float = 0.0  # what learning takes: float32 weights, moments, gradients
    activations: float = 0.0  # and logits, and what kernels need
    cache: float = 0.0  # keys and values of what is served
    host: float = 0.0  # of the machine's memory, all its processes together

    @property
    def device(self) -> float:
        """All that one device holds."""
        return self.weights + self.optimizer + self.activations + self.cache

    def times(self, factor: float) -> "Bytes":
        """So many times as much."""
        return Bytes(**{name: factor * size for name, size in vars(self).items()})

    def lacking(self, memory: "Memory") -> str:
        """What is too small for it in machines with this memory; empty where it fits."""
        return memory.lacks(self.device, self.host)


@dataclass(frozen=True)
class Need:
    """What a stage will take, estimated before anything is spent."""

    tokens: int = 0
    flops: float = 0.0  # of all processes together
    memory: Bytes = Bytes()
    disk_bytes: float = 0.0  # what stays, and checkpoints
    effort: Effort = Effort()  # of the process that has most to do
    chosen: str = ""  # what was chosen so that it fits
    instead: str = ""  # where it does not fit: the smallest change with which it would

    @property
    def memory_bytes(self) -> float:
        """Of one device at the peak."""
        return self.memory.device

    def refusal(self, memory: "Memory") -> str:
        """Why a machine with this memory cannot do it, and what could; empty where it can."""
        lack = self.memory.lacking(memory)
        return f"{lack}; {self.instead or 'use a larger machine'}" if lack else ""


def nothing_to_check(job: Job) -> None:
    """For stages whose settings cannot be wrong beyond what the recipe's schema finds."""


def never(job: Job) -> bool:
    """For stages that one process does."""
    return False


def always(job: Job) -> bool:
    """For stages that any number of processes can do."""
    return True


@dataclass(frozen=True)
class Work:
    """The half of a stage that computes.

    `facts` are the inputs that are not settings: fingerprints, engines, devices. `execute` does
    the work in the folder it is given. `check` raises `UserError` for what can be known to be wrong
    before anything is spent. `need` estimates from config and shapes, without loading weights.
    Where the work `is_shared`, every process of a group calls `execute` (`training/launch.py`): it
    is a list of units with names of their own, each takes its share of those that are missing, and
    no file names a process, so that any number of them goes on. What only one of them can do after
    that is `finish`.
    """

    facts: Callable[[Job], Inputs]
    execute: Callable[[Job, Path], None]
    need: Callable[[Job], Need]
    check: Callable[[Job], None] = nothing_to_check
    is_shared: Callable[[Job], bool] = never
    finish: Callable[[Job, Path], None] | None = None


@dataclass(frozen=True)
class Stage:
    """A stage, declared: its name is the command and the section of the recipe."""

    name: str
    folder: str  # in the run's, the place's or the child's folder
    scope: Scope
    summary: str
    after: tuple["Stage", ...]  # the stages whose files it reads
    settings: Callable[[Job], Inputs]  # the settings that decide its result; needs no torch
    packages: tuple[str, ...]  # whose versions decide its result
    work: Callable[[], Work]
    repairs: bool = False  # whether its work makes only those files again that are missing

    def command(self, job: Job) -> str:
        """The arguments of `puzzle` that run this stage for this job."""
        words = [self.name, str(job.run.folder)]
        if self.scope is Scope.PLACE and job.place.name != "here":
            words += ["--place", job.place.name]
        if self.scope is Scope.CHILD:
            if self.name == "search":  # `puzzle search` only asks
                return f"child {job.run.folder} --name {job.child.name}"
            if job.child.name != "main":
                words += ["--child", job.child.name]
        return " ".join(words)

    def inputs(self, job: Job) -> Inputs:
        """Everything that decides the result: settings, versions, facts, and the stages before it.

        Raises `UserError` where a stage before it is not done or out of date.
        """
        return {
            "settings": self.settings(job),
            "versions": dict(artifacts.versions(self.packages)),
            "facts": self.work().facts(job),
            "after": {stage.name: job.manifest(stage).fingerprint for stage in self.after},
        }

    def check(self, job: Job) -> None:
        """Raise `UserError` for what can be known to be wrong or too large for this machine."""
        self.work().check(job)
        if refusal := self.work().need(job).refusal(job.run.device.memory):
            raise UserError(f"{self.name}: {refusal}")

    def is_current(self, job: Job, manifest: Manifest) -> bool:
        """Whether a result is of the settings of now and of the earlier stages' files of now.

        Reads folders only, so it answers on any machine, whatever is installed there; versions and
        facts are compared when the stage runs.
        """
        if manifest.inputs.get("settings") != self.settings(job):
            return False
        for stage in self.after:
            earlier = artifacts.read_manifest(job.folder(stage))
            if earlier is None or not stage.is_current(job, earlier):
                return False
            after = manifest.inputs["after"]
            if not isinstance(after, dict) or after.get(stage.name) != earlier.fingerprint:
                return False
        return True
