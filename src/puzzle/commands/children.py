"""`puzzle child`, `children`, `compare`, `remove`: children of one library, and their settings."""

import contextlib
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer
from pydantic import JsonValue

from puzzle import artifacts, config, locks, pipeline, settings
from puzzle.assemble import ASSEMBLE
from puzzle.commands.options import (
    Json,
    Limit,
    Maximize,
    Minimize,
    PredictedKL,
    Quiet,
    RunArgument,
    Set,
    Wait,
    constraint_changes,
    emit,
    given,
    open_run,
)
from puzzle.commands.summary import print_summaries, summaries
from puzzle.config import ChildConfig, PlaceConfig
from puzzle.cost import COST
from puzzle.errors import Infeasible, UserError
from puzzle.evaluate import EVALUATE
from puzzle.evaluate import results as evaluation
from puzzle.run import Run
from puzzle.score import SCORE
from puzzle.search import SEARCH, answers
from puzzle.stage import Job, Scope, Stage
from puzzle.uptrain import UPTRAIN

RUN_SECTIONS = ("corpus", "library", "score", "device", "precision")
CHILD_SECTIONS = ("search", "uptrain", "evaluate", "place")
PLACE_SECTIONS = ("deploy", "cost")


def _refuse_sections(assignments: list[str], allowed: tuple[str, ...], what: str) -> None:
    for assignment in assignments:
        section = assignment.partition("=")[0].strip().split(".")[0]
        if section not in allowed:
            raise UserError(
                f"--set {assignment!r}: {section!r} is no setting of {what}; expected one of "
                f"{', '.join(allowed)}"
            )


def changed_run(run: Run, stage: Stage, assignments: list[str] | None) -> Run:
    """An existing run, its recipe changed and, if the stage can use it, written."""
    if not assignments:
        return run
    _refuse_sections(assignments, RUN_SECTIONS, "the run itself")
    values = run.recipe.model_dump(mode="json")
    recipe = config.parse(values, str(run.folder / "run.yaml"), assignments)
    changed = Run(recipe, run.folder, run.progress, wait=run.wait)
    stage.work().check(Job(changed))
    artifacts.write_text(run.folder / "run.yaml", settings.to_yaml(recipe))
    return changed


def changed_place(run: Run, name: str, assignments: list[str]) -> Job:
    """A job at a place, which is made or changed if need be."""
    names = run.place_names()
    place = run.place_config(name) if name in names else run.place_config("here")
    if assignments or name not in names:
        _refuse_sections(assignments, PLACE_SECTIONS, "a place")
        config.check_name("place", name)
        values = place.model_dump(mode="json")
        place = settings.validate_changed(PlaceConfig, values, assignments, f"place {name}")
        COST.work().check(run.place_job(name, place))
        run.write_place(name, place)
    return run.place_job(name)


def changed_child(run: Run, name: str, stage: Stage, assignments: list[str] | None) -> Job:
    """A job for an existing child, its settings changed and, if the stage can use it, written."""
    child = run.child_config(name)
    if assignments:
        _refuse_sections(assignments, CHILD_SECTIONS, "a child")
        values = child.model_dump(mode="json")
        child = settings.validate_changed(ChildConfig, values, assignments, f"child {name}")
        stage.work().check(run.job_of(name, child))  # also that there is such a place
        run.write_child(name, child)
    return run.child_job(name)


def child(
    context: typer.Context,
    run_directory: RunArgument,
    name: Annotated[str, typer.Option(help="The child's name; also its folder's.")],
    throughput: Limit = None,
    user_throughput: Limit = None,
    latency: Limit = None,
    time_to_first_token: Limit = None,
    inter_token_latency: Limit = None,
    memory: Limit = None,
    parameters: Limit = None,
    kv_cache: Limit = None,
    maximize: Maximize = None,
    minimize: Minimize = None,
    kl: PredictedKL = None,
    place: Annotated[str | None, typer.Option(help="Where it will be served.")] = None,
    solution: Annotated[
        int | None,
        typer.Option(help="Make this one of the solutions that `puzzle search` lists.", min=0),
    ] = None,
    of: Annotated[
        str | None,
        typer.Option(
            help="With --solution: of this child's solutions, and then of the points of its "
            "frontier, as its report numbers them."
        ),
    ] = None,
    architecture: Annotated[
        Path | None,
        typer.Option(help="Make exactly this: a JSON list of blocks, one per layer."),
    ] = None,
    set_: Set = None,
    wait: Wait = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make one more child from the same library, scores and costs; others are not touched."""
    changes = constraint_changes(context) | given(context, config.TARGETS)
    run = open_run(run_directory, quiet, wait)
    if solution is not None and architecture is not None:
        raise UserError("child: give --solution or --architecture, not both")
    if of is not None and solution is None:
        raise UserError(f"child: --of {of} goes with --solution; give the number of a solution")
    if architecture is not None:
        from puzzle.model.child import read_block_names

        blocks: list[JsonValue] = list(read_block_names(config.expanded(architecture)))
        changes["architecture"] = blocks
    wish = child_settings(run, name, changes, set_ or [], place)
    if solution is not None:
        wish = _with_solution(run, name, wish, solution, of, changes)
    job = run.job_of(name, wish)
    for stage in (SEARCH, ASSEMBLE, UPTRAIN):
        stage.work().check(job)
    if name in run.child_names():
        refuse_infeasible(job)
    run.write_child(name, wish)
    try:
        pipeline.make_child(job)
    except Infeasible:
        print_child(job, as_json)
        raise
    print_child(job, as_json)


def refuse_infeasible(job: Job) -> None:
    """Raise `Infeasible` where the tables that are there say so, before a child is given up."""
    from puzzle.search import stage

    try:
        for earlier in (SCORE, COST):
            job.manifest(earlier)
    except UserError:
        return  # the child's stages are about to be run, or refused
    stage.search(job, stage.read_choices(job))


def child_settings(
    run: Run,
    name: str,
    changes: dict[str, JsonValue],
    assignments: list[str],
    place: str | None,
) -> ChildConfig:
    """The settings of a child that is made or changed.

    A new one has the recipe's settings, and those of its constraints that `changes` do not replace.
    """
    _refuse_sections(assignments, CHILD_SECTIONS, "a child")
    config.check_name("child", name)
    recipe = run.recipe
    if name in run.child_names():
        base = run.child_config(name)
    else:
        base = ChildConfig(search=recipe.search, uptrain=recipe.uptrain, evaluate=recipe.evaluate)
    values = base.model_dump(mode="json")
    values["search"] = config.with_constraints(values["search"], changes)
    values["place"] = place or base.place
    wish = settings.validate_changed(ChildConfig, values, assignments, f"child {name}")
    run.place_config(wish.place)  # a `UserError` where there is no such place
    return wish


def _with_solution(
    run: Run, name: str, wish: ChildConfig, number: int, of: str | None, asked: Collection[str]
) -> ChildConfig:
    """The wish made exact: the solution that `puzzle search`, or a child's report, numbers so.

    What a child's report shows is made for itself: only what is `asked` now is a wish.
    """
    if of is None:
        blocks = _solution(run, name, wish, number)
    else:
        job = run.child_job(of)
        job.manifest(SEARCH)
        listed = answers.architectures(job)
        if number >= len(listed):
            raise UserError(
                f"--solution: got {number}, but child {of} has only {len(listed)} solutions and "
                "points of its frontier, from 0"
            )
        blocks = listed[number]
    inherited = () if of is None else (name for name in config.CONSTRAINTS if name not in asked)
    dropped = dict.fromkeys((*config.TARGETS, *inherited))
    exact = wish.search.model_copy(update={"architecture": blocks} | dropped)
    return wish.model_copy(update={"search": exact})


def _solution(run: Run, name: str, wish: ChildConfig, number: int) -> list[str]:
    """The blocks of the solution that `puzzle search` lists under this number."""
    from puzzle.search import stage

    search = wish.search.model_copy(update={"architecture": None})
    if search.solutions <= number:
        search = search.model_copy(update={"solutions": number + 1})
    job = run.job_of(name, wish.model_copy(update={"search": search}))
    answer, _ = stage.search(job, stage.read_choices(job))
    if number >= len(answer.solutions):
        raise UserError(
            f"--solution: got {number}, but there are only {len(answer.solutions)} solutions, "
            "from 0; lower search.diversity"
        )
    return answer.solutions[number].blocks


def children(run_directory: RunArgument, as_json: Json = False, quiet: Quiet = False) -> None:
    """List the run's children: wish, prediction, measurement, retention, disk."""
    found = summaries([open_run(run_directory, quiet)])
    if not quiet:
        print_summaries(found)
    emit([child.as_json() for child in found], as_json)


def compare(
    run_directories: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories.")
    ],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Children of one or several runs side by side; also as a page, `RUN/compare/index.html`."""
    runs = [open_run(folder, quiet) for folder in run_directories]
    found = summaries(runs)
    page = None
    if any(child.retention is not None for child in found):
        from puzzle.report import compare as comparing

        page = comparing.write(runs[0], found)
    if not quiet:
        print_summaries(found)
        if page is not None:
            print(f"page: {page}")
    emit([child.as_json() for child in found], as_json)


def remove(
    run_directory: RunArgument,
    child: Annotated[str, typer.Option("--child", help="Which child.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove a child and free its disk; library, scores, costs and other children stay."""
    run = open_run(run_directory, quiet)
    job = run.child_job(child)
    folder = job.child.folder
    if not folder.exists():
        raise UserError(f"run {run.folder}: child {child!r} has no folder; nothing to remove")
    removed = folder.with_name(f".{child}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    with contextlib.ExitStack() as held:
        for stage in pipeline.STAGES:
            if stage.scope is Scope.CHILD:
                held.enter_context(
                    locks.hold(job.folder(stage), wait=run.wait, say=run.progress.say)
                )
        folder.replace(removed)  # at once: half a child must not look like an unfinished one
    shutil.rmtree(removed)
    run.progress.say(f"removed child {child} of {run.folder}")
    emit({"run": str(run.folder), "removed": child}, as_json)


def is_finished(job: Job) -> bool:
    """Whether the evaluated child is the one that the last search chose.

    It may have missed what was asked, so that it would be searched again.
    """
    stages = (SEARCH, ASSEMBLE, UPTRAIN, EVALUATE)
    fingerprints: dict[str, JsonValue] = {}
    for stage in stages:
        manifest = artifacts.read_manifest(job.folder(stage))
        if manifest is None:
            return False
        after = manifest.inputs["after"]
        assert isinstance(after, dict)
        if any(after.get(name, made) != made for name, made in fingerprints.items()):
            return False
        fingerprints[stage.name] = manifest.fingerprint
    return True


def print_child(job: Job, as_json: bool) -> None:
    """The closing table of a child that is finished; nothing otherwise."""
    if not is_finished(job):
        return
    from puzzle.report.stage import page
    from puzzle.report.table import print_results

    results = evaluation.read(job)
    print_results(job, results, page(job))
    summary: dict[str, JsonValue] = {"run": str(job.run.folder), "name": job.child.name}
    summary["verdict"] = results.verdict
    emit(summary | results.as_json(), as_json)


def print_finished(run: Run, as_json: bool) -> None:
    """What `puzzle run` ends with: the table of its child, or its children side by side."""
    jobs = [job for job in run.recipe_jobs() if is_finished(job)]
    if len(run.recipe.all_children()) == 1:
        for job in jobs:
            print_child(job, as_json)
    elif jobs:
        found = summaries([run])
        print_summaries(found)
        emit({"run": str(run.folder), "children": [c.as_json() for c in found]}, as_json)


def fail_if_missed(stage: Stage, job: Job) -> None:
    """Raise `Infeasible` where a stage has measured a child that misses its wish."""
    from puzzle.assemble import measured

    if stage is ASSEMBLE and measured.read(job).failed:
        hint = (
            f"`puzzle child {job.run.folder} --name {job.child.name}` corrects and searches again"
        )
        if job.child.search.architecture is not None:
            hint = "this architecture was given, so nothing is searched"
        raise Infeasible(
            f"assemble: the child does not meet what was asked: {measured.read(job).failures}; "
            f"{hint}"
        )
    if stage is EVALUATE and evaluation.read(job).verdict == "missed":
        raise Infeasible(evaluation.missed(job))
