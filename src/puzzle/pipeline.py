"""The order of work, in one screen. A stage made from the same inputs before is not run again.

library -> score -> cost -> [search -> assemble] until the measured child meets the wish
        -> uptrain -> evaluate -> report

With finalists, [search -> assemble] and a part of uptrain come first for each of them.
"""

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import JsonValue

from puzzle import artifacts, locks
from puzzle.artifacts import Inputs, Manifest
from puzzle.assemble import ASSEMBLE
from puzzle.cost import COST
from puzzle.errors import Infeasible, UserError
from puzzle.evaluate import EVALUATE
from puzzle.library import LIBRARY
from puzzle.progress import duration
from puzzle.report import REPORT
from puzzle.run import NARROWED, NarrowedSpace, Run
from puzzle.score import SCORE
from puzzle.search import SEARCH
from puzzle.stage import Job, Scope, Stage
from puzzle.uptrain import UPTRAIN

STAGES = (LIBRARY, SCORE, COST, SEARCH, ASSEMBLE, UPTRAIN, EVALUATE, REPORT)


BEFORE_RUN_YAML = (
    "parent",
    "logs",
    "checksums.jsonl",
    "datasets.json",
)  # what a run's folder holds first


def execute(run: Run) -> None:
    """From a parent to the recipe's children: measured, uptrained, evaluated, with a report each.

    Raises `Infeasible` at the end where a child could not be made; the others are made all the
    same.
    """
    preflight(run)
    run.write()
    if run.first is not None:
        narrow(run, run.first)
    for stage in (LIBRARY, SCORE):
        execute_stage(stage, Job(run))
    _assemble_some(run)
    missed = []
    for job in run.recipe_jobs():
        try:
            make_child(job)
        except Infeasible as error:
            missed.append(
                f"{job.child.name}: {error}" if len(run.child_names()) > 1 else str(error)
            )
    if missed:
        raise Infeasible("; ".join(missed))


def _assemble_some(run: Run) -> None:
    """Which KL a sum of scores stands for."""
    from puzzle.search import validate

    validate.assemble_some(run)


def make_child(job: Job) -> None:
    """One child from the library and the scores. Raises `Infeasible` where it misses its wish."""
    from puzzle.assemble import measured
    from puzzle.cost import table
    from puzzle.evaluate import results

    if not table.are_from_elsewhere(job):
        execute_stage(COST, job)
    choose_finalist(job)
    search_and_serve(job)
    execute_stage(UPTRAIN, job)
    evaluated = execute_stage(EVALUATE, job)
    execute_stage(REPORT, job)
    served = results.read(job).served
    if served.verdict == "missed":
        measured.record(job, evaluated.fingerprint, served)
        raise Infeasible(results.missed(job))
    if served.verdict == "undecided":
        if measured.read(job).verdict == "undecided":
            raise Infeasible(results.undecided(job))
        job.run.progress.say(
            f"{job.child.name}: met when it was assembled, undecided at the end: {served.failures}"
        )


def choose_finalist(job: Job) -> None:
    """Make and uptrain the finalists that are asked for; the best one decides the child's size.

    Raises `Infeasible` where none of them is met.
    """
    from puzzle.search import answers, finalists, tried

    if not finalists.children(job) or finalists.read(job) is not None:
        return
    run, found, missed = job.run, list[finalists.Finalist](), list[str]()
    for capacity, (name, settings) in finalists.children(job).items():
        run.progress.say(f"finalist {name}")
        run.write_child(name, settings)
        one = run.child_job(name)
        try:
            search_and_serve(one)
        except Infeasible as error:
            missed.append(f"{name}: {error}")
            continue
        execute_stage(UPTRAIN, one)
        solution = answers.read(one).best
        found.append(
            finalists.Finalist(
                child=name,
                capacity=capacity,
                parameters=solution.predicted["main"].parameters,
                before=solution.loss,
                kl=finalists.validation_kl(one),
            )
        )
    if not found:
        raise Infeasible("; ".join(missed))
    tried.inherit(job, run.child_job(min(found, key=lambda one: one.kl).child))
    for line in finalists.describe(finalists.write(job, found)):
        run.progress.say(f"  {line}")


def search_and_serve(job: Job) -> None:
    """Search, assemble and serve until a child is met from just above; the best that is met stays.

    After the last try one that is likely met but undecided will do: it is measured again at the
    end. Raises `Infeasible` where there is none either.
    """
    from puzzle.assemble import measured
    from puzzle.cost import table
    from puzzle.search import answers, neighbours, tried

    is_given, again, exhausted = job.child.search.architecture is not None, False, False
    while True:
        if not is_given and not table.are_from_elsewhere(job):
            neighbours.learn(job)  # of the last try, in an interrupted run, too
        execute_stage(SEARCH, job, again=again)
        assembled = execute_stage(ASSEMBLE, job, again=again)
        served, again = measured.read(job), True
        measured.record(job, assembled.fingerprint, served)
        is_last = is_given or answers.read(job).final is not None
        if is_last and served.is_likely:
            job.run.progress.say("  this one is likely met, and is measured again at the end")
            return
        if not served.scenarios or (served.verdict == "met" and (is_last or not served.gives_away)):
            return
        tries = tried.Tries.of(job)
        if is_given or exhausted or not served.can_be_corrected:
            raise Infeasible(measured.missed(job, max(1, len(tries.children))))
        exhausted = len(tries.children) >= job.child.search.attempts
        if exhausted and not tries.are_used_up(job.child.search.attempts):
            raise Infeasible(measured.missed(job, len(tries.children)))


def execute_stage(stage: Stage, job: Job, *, again: bool = False) -> Manifest:
    """Run one stage where it is not done. `again`: the time of an earlier attempt counts, too.

    The stage's folder is locked meanwhile; see `Run.wait` for what a second writer does.
    """
    folder, progress = job.folder(stage), job.run.progress
    with locks.hold(folder, wait=job.run.wait, say=progress.say):
        return _execute_locked(stage, job, again=again)


def _execute_locked(stage: Stage, job: Job, *, again: bool) -> Manifest:
    from puzzle.training import launch

    folder, inputs = job.folder(stage), stage.inputs(job)
    earlier = artifacts.read_manifest(folder)
    reason = None
    if earlier is not None:
        is_same = earlier.inputs == inputs
        reason = artifacts.damage(folder, earlier) if is_same else _what_changed(earlier, inputs)
        if reason is None:
            artifacts.drop_unfinished(folder)
            job.run.progress.say(f"{stage.name}: up to date")
            return earlier
    job.run.progress.say(stage.name)
    if reason is not None:
        job.run.progress.say(f"  made again: {reason}")
    stage.check(job)  # before an earlier result is removed
    if earlier is not None and earlier.inputs == inputs and stage.repairs:
        artifacts.reopen(folder, earlier)
    artifacts.begin(folder, inputs)
    began = time.perf_counter()
    launch.execute(stage, job, folder)
    seconds = time.perf_counter() - began + (earlier.seconds if again and earlier else 0.0)
    manifest = artifacts.write_manifest(folder, inputs, seconds)
    job.run.progress.say(f"{stage.name}: done in {duration(seconds)}")
    return manifest


def _what_changed(earlier: Manifest, now: Inputs) -> str:
    key, one, other = artifacts.first_difference(earlier.inputs, now)
    if key.startswith("after."):
        return f"{key.removeprefix('after.')} has changed"
    if isinstance(one, str | int | float) and isinstance(other, str | int | float):
        return f"{key} has changed from {one} to {other}"
    return f"{key} has changed"


def narrow(run: Run, first: Run) -> None:
    """Search a decoupled library and keep the blocks that its answers use (appendix F.1.1)."""
    from puzzle.model import space
    from puzzle.search import answers

    run.progress.say("first: decoupled library, scores, costs and search")
    first.write()
    architectures: list[list[str]] = []
    best: list[list[str]] = []
    for job in first.recipe_jobs():
        for stage in (LIBRARY, SCORE, COST, SEARCH):
            execute_stage(stage, job)
        architectures += answers.architectures(job)
        best.append(answers.read(job).best.blocks)
    narrowed = space.narrow(run.full_space, architectures, run.recipe.library.coupled, best)
    names = [[block.name for block in layer.blocks] for layer in narrowed.layers]
    NarrowedSpace(layers=names).write(run.folder / NARROWED)


def preflight(run: Run) -> None:
    """Everything that can be known to be wrong before anything is spent. Raises `UserError`."""
    _check_folder(run.folder)
    if (run.folder / "run.yaml").exists():
        parent = Run.open(run.folder, run.progress).recipe.parent
        if parent != run.recipe.parent:
            raise UserError(
                f"run directory {run.folder}: holds a run of parent {parent!r}; choose another "
                "--out"
            )
    for job in run.recipe_jobs():
        for stage in STAGES:
            stage.check(job)


def _check_folder(folder: Path) -> None:
    """Raise `UserError` for a run directory that cannot be one, or that is somebody else's."""
    hint = "choose another --out"
    there = next(path for path in (folder, *folder.parents) if path.exists())
    above = "" if there == folder else f"{there} "
    if not there.is_dir():
        raise UserError(f"run directory {folder}: {above}is a file; {hint}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"run directory {folder}: {above}cannot be written to; {hint}")
    if folder.is_dir() and not (folder / "run.yaml").exists():
        for path in sorted(folder.iterdir()):
            if path.name in ("children", "places") and path.is_dir():
                raise UserError(
                    f"{folder / 'run.yaml'}: missing, though there are {path.name}; put it back, "
                    f"or {hint}"
                )
            if path.name not in BEFORE_RUN_YAML and not path.name.startswith("."):
                raise UserError(
                    f"run directory {folder}: holds {path.name}, which no run of puzzle wrote; "
                    f"{hint}"
                )


# ------------------------------------------------------------------------------------------- status


@dataclass(frozen=True)
class StageStatus:
    """Where a stage stands: done, out of date, unfinished or not begun."""

    stage: str
    state: str
    seconds: float | None
    place: str | None = None
    child: str | None = None

    def as_json(self) -> dict[str, JsonValue]:
        """As JSON values; without the place and the child where the stage has none."""
        return {
            key: value
            for key, value in asdict(self).items()
            if value is not None or key == "seconds"
        }


def status(run: Run) -> list[StageStatus]:
    """Every stage of the run, of its places and of its children, from the folders alone."""
    rows = [stage_status(stage, Job(run)) for stage in STAGES if stage.scope is Scope.RUN]
    for name in run.place_names():
        rows += [stage_status(s, run.place_job(name)) for s in STAGES if s.scope is Scope.PLACE]
    for name in run.child_names():
        rows += [stage_status(s, run.child_job(name)) for s in STAGES if s.scope is Scope.CHILD]
    return rows


def stage_status(stage: Stage, job: Job) -> StageStatus:
    """Where one stage stands. Needs neither the engine nor the device of the place."""
    folder = job.folder(stage)
    manifest = artifacts.read_manifest(folder)
    seconds = None
    if manifest is not None:
        seconds = manifest.seconds
        state = "done" if stage.is_current(job, manifest) else "out of date"
    else:
        state = "unfinished" if (folder / artifacts.STARTED).exists() else "not begun"
    place = job.place.name if stage.scope is Scope.PLACE else None
    child = job.child.name if stage.scope is Scope.CHILD else None
    return StageStatus(stage.name, state, seconds, place, child)
