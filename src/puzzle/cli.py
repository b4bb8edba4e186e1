"""The command line. Nothing is computed here.

Exit codes: 0 done, 1 our bug (traceback), 2 the user's input is wrong (one line), 3 infeasible (one
line). Results go to standard output, progress to standard error; `--json` adds a machine-readable
last line. torch takes seconds to import, so a command imports it only when its input is right.
"""

import os
import signal
import sys
import webbrowser
from pathlib import Path
from typing import Annotated, NoReturn, cast

import typer
from pydantic import JsonValue

from puzzle import pipeline
from puzzle.assemble import ASSEMBLE
from puzzle.commands import children, questions, serving
from puzzle.commands.options import (
    ChildOption,
    Json,
    PlaceOption,
    Quiet,
    RecipeArgument,
    RunArgument,
    Set,
    Wait,
    emit,
    open_run,
    read_recipe,
)
from puzzle.cost import COST
from puzzle.errors import Infeasible, UserError, mendable
from puzzle.evaluate import EVALUATE
from puzzle.library import LIBRARY
from puzzle.progress import Progress, duration
from puzzle.report import REPORT
from puzzle.run import Run
from puzzle.score import SCORE
from puzzle.stage import Job, Scope, Stage
from puzzle.uptrain import UPTRAIN

# click's UsageError, which newer versions of typer bring along
USAGE_ERROR = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make a trained LLM cheaper to serve: a child that meets what you ask, as measured.",
)


@app.command()
def run(
    recipe: RecipeArgument = "pocket",
    out: Annotated[
        Path | None, typer.Option(help="The run directory; default: the recipe's `out`.")
    ] = None,
    set_: Set = None,
    wait: Wait = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole job: from a parent to its measured, uptrained, evaluated children. Resumes."""
    made = read_recipe(recipe, out, set_)
    this = Run(made, Path(made.out), Progress(quiet), wait=wait)
    try:
        pipeline.execute(this)
    except Infeasible:
        children.print_finished(this, as_json)
        raise
    children.print_finished(this, as_json)


@app.command()
def plan(
    recipe: RecipeArgument = "pocket",
    device: Annotated[
        str | None,
        typer.Option(
            help="Plan for this device, that need not be here: H100, H200, B200, A100, L40S, "
            "RTX-4090, this-cpu, or a YAML file with the same keys."
        ),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(help="For so many of them, in one machine or several.")
    ] = None,
    device_memory: Annotated[
        str | None, typer.Option(help="Of each, e.g. 80GiB, instead of the device's own.")
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Of each machine, e.g. 256GiB, instead of the usual.")
    ] = None,
    set_: Set = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What each stage will need, and what is chosen to make it fit, before anything is spent.

    With --device, --devices, --device-memory or --host-memory the parent's config.json is enough.
    """
    made = read_recipe(recipe, None, set_)
    from puzzle.commands import planning

    asked = planning.device(
        device, devices=devices, device_memory=device_memory, host_memory=host_memory
    )
    this = Run(made, Path(made.out), Progress(quiet), device=asked)
    if asked is None:
        pipeline.preflight(this)
    planned = planning.plan(this)
    if not quiet:
        planning.print_plan(planned, this.device)
    stages: list[JsonValue] = [one.as_json() for one in planned]
    emit({"stages": stages, "seconds": planning.total_seconds(planned)}, as_json)
    planning.refuse(planned)


@app.command()
def status(run_directory: RunArgument, as_json: Json = False, quiet: Quiet = False) -> None:
    """Where every stage of the run, its places and its children stands; reads folders only."""
    rows = pipeline.status(open_run(run_directory, quiet))
    if not quiet:
        owner = None
        for row in rows:
            if (row.place or row.child) != owner:
                owner = row.place or row.child
                print(f"child {row.child}" if row.child else f"place {row.place}")
            indent = "  " if owner else ""
            seconds = duration(row.seconds) if row.seconds is not None else ""
            print(f"{indent + row.stage:<12} {row.state:<14} {seconds}".rstrip())
    emit([row.as_json() for row in rows], as_json)


def run_stage(stage: Stage, job: Job, as_json: bool) -> None:
    """Run one stage of an existing run."""
    pipeline.execute_stage(stage, job)
    result: dict[str, JsonValue] = {"stage": stage.name, "run": str(job.run.folder)}
    if stage.scope is Scope.PLACE:
        result["place"] = job.place.name
    if stage.scope is Scope.CHILD:
        result["child"] = job.child.name
    result["folder"] = str(job.folder(stage))
    emit(result, as_json)


def _run_stage_command(stage: Stage) -> None:
    def command(
        run_directory: RunArgument,
        set_: Set = None,
        wait: Wait = False,
        as_json: Json = False,
        quiet: Quiet = False,
    ) -> None:
        run = children.changed_run(open_run(run_directory, quiet, wait), stage, set_)
        run_stage(stage, Job(run), as_json)

    app.command(name=stage.name, help=stage.summary)(command)


def _child_stage_command(stage: Stage) -> None:
    def command(
        run_directory: RunArgument,
        child: ChildOption = "main",
        set_: Set = None,
        wait: Wait = False,
        as_json: Json = False,
        quiet: Quiet = False,
    ) -> None:
        this = open_run(run_directory, quiet, wait)
        job = children.changed_child(this, child, stage, set_)
        run_stage(stage, job, as_json)
        children.fail_if_missed(stage, job)

    app.command(name=stage.name, help=stage.summary)(command)


_run_stage_command(LIBRARY)


@app.command()
def score(
    run_directory: RunArgument,
    validate: Annotated[
        int | None,
        typer.Option(help="Compare sums of scores with the KL of so many assembled children."),
    ] = None,
    set_: Set = None,
    wait: Wait = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the parent's quality with each single block replaced."""
    this = children.changed_run(open_run(run_directory, quiet, wait), SCORE, set_)
    run_stage(SCORE, Job(this), as_json and validate is None)
    if validate is not None:
        from puzzle.search import validate as validation

        found = validation.validate(this, validate)
        for line in validation.lines(found):
            this.progress.say(f"  {line}")
        emit(found.overall.as_json(), as_json)


@app.command()
def cost(
    run_directory: RunArgument,
    place: PlaceOption = "here",
    engine: Annotated[
        str | None, typer.Option(help="vllm, torch or roofline; default: as the place has it.")
    ] = None,
    set_: Set = None,
    wait: Wait = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what every variant takes where children are served; makes the place if need be."""
    this = open_run(run_directory, quiet, wait)
    assignments = list(set_ or []) + ([f"cost.engine={engine}"] if engine else [])
    run_stage(COST, children.changed_place(this, place, assignments), as_json)


app.command()(questions.search)
app.command()(children.child)
app.command(name="children")(children.children)
app.command()(children.compare)
app.command()(children.remove)
for _stage in (ASSEMBLE, UPTRAIN, EVALUATE):
    _child_stage_command(_stage)


@app.command()
def report(
    run_directory: RunArgument,
    child: ChildOption = "main",
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser, too.")] = False,
    wait: Wait = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write report/index.html and the model card."""
    job = open_run(run_directory, quiet, wait).child_job(child)
    run_stage(REPORT, job, as_json)
    if open_:
        page = (job.folder(REPORT) / "index.html").resolve()
        if not webbrowser.open(page.as_uri()):
            raise UserError(f"report --open: no browser here; the page is {page}")


app.command()(serving.export)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    serving.serve
)
app.command()(serving.measure)


def main() -> None:
    """Entry point: `UserError` becomes one line and its exit code; anything else is our bug."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    signal.signal(signal.SIGINT, _interrupted)
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="puzzle", standalone_mode=False)
    except UserError as error:
        _stop(str(error), error.exit_code)
    except USAGE_ERROR as error:
        command = error.ctx.command_path if error.ctx else "puzzle"
        name = command.removeprefix("puzzle").strip()
        message = f"{name}: {error.format_message()}" if name else error.format_message()
        _stop(f"{message.rstrip('.')}; see `{command} --help`")
    except OSError as error:
        if (of_the_machine := mendable(error)) is None:
            raise
        _stop(str(of_the_machine))
    sys.exit(code or 0)


def _stop(message: str, exit_code: int = UserError.exit_code) -> NoReturn:
    line = " ".join(message.split())
    # a name in a stranger's file is not for the terminal to obey
    shown = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in line)
    print(f"puzzle: {shown}", file=sys.stderr)
    sys.exit(exit_code)


def _interrupted(*_: object) -> None:
    print("puzzle: interrupted; the same command goes on from here", file=sys.stderr)
    sys.exit(130)


if __name__ == "__main__":
    main()
