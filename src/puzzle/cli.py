"""The command line: `puzzle run`, one command per stage, `plan`, `status`. Nothing is computed here.

Exit codes: 0 done, 1 our bug (traceback), 2 the user's input is wrong (one line), 3 infeasible (one line).
Results go to standard output, progress to standard error; `--json` adds a machine-readable last line.
torch takes seconds to import, so a command imports it only after the recipe has been read and found right.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from puzzle.errors import Infeasible, UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. search.throughput=2x.")
]
Json = Annotated[bool, typer.Option("--json", help="Print a machine-readable last line.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
RecipeArgument = Annotated[
    str, typer.Argument(metavar="[RECIPE.yaml]", help="A recipe file, or the name of a built-in one.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]


def _recipe(name: str, out: Path | None, assignments: list[str] | None) -> Any:
    from importlib.resources import files

    from puzzle import config

    built_in = Path(str(files("puzzle") / "recipes" / f"{name}.yaml"))
    path = built_in if built_in.is_file() else Path(name)
    values = config.override(config.read_yaml(path), assignments or [])
    values.setdefault("out", f"runs/{path.stem}")
    if out is not None:
        values["out"] = str(out)
    return config.parse(values, str(path))


def _finish(result: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))


@app.command()
def run(
    recipe: RecipeArgument = "pocket",
    out: Annotated[Path | None, typer.Option(help="The run directory; default: the recipe's `out`.")] = None,
    set_: Set = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole job: from a parent to a measured, uptrained, evaluated child with a report. Resumes what is there."""
    settings = _recipe(recipe, out, set_)
    from puzzle import evaluate, pipeline, report
    from puzzle.progress import Progress
    from puzzle.run import Run

    this = Run(settings, Path(settings.out), Progress(quiet))
    outcome = pipeline.execute(this)
    results = evaluate.read(this)
    report.print_results(results, report.page(this))
    _finish({"run": str(this.folder), "met": outcome["met"], **results}, as_json)
    if not outcome["met"]:
        missed = "; ".join(f"asked {p['asked']}, measured {p['measured']}" for p in results["promises"] if not p["met"])
        raise Infeasible(f"run {this.folder}: the finished child misses what was asked: {missed}; raise search.margin")


@app.command()
def plan(recipe: RecipeArgument = "pocket", set_: Set = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """What each stage will need (tokens, FLOPs, memory, disk, time), before anything is spent."""
    settings = _recipe(recipe, None, set_)
    from puzzle import pipeline
    from puzzle import plan as planning
    from puzzle.progress import Progress
    from puzzle.run import Run

    this = Run(settings, Path(settings.out), Progress(quiet))
    pipeline.preflight(this)
    needs = planning.estimate(this)
    planning.print_plan(needs)
    _finish(planning.as_dict(needs), as_json)


@app.command()
def status(run_directory: RunArgument, as_json: Json = False, quiet: Quiet = False) -> None:
    """Which stages of a run are done."""
    from puzzle import pipeline
    from puzzle.progress import Progress, duration
    from puzzle.run import Run

    rows = pipeline.status(Run.open(run_directory, Progress(quiet)))
    if not quiet:
        for row in rows:
            seconds = duration(row["seconds"]) if row["seconds"] is not None else ""
            print(f"{row['stage']:<10} {row['state']:<24} {seconds}".rstrip())
    _finish(rows, as_json)


def _run_stage(stage: str, folder: Path, assignments: list[str] | None, as_json: bool, quiet: bool) -> None:
    from puzzle import config, pipeline
    from puzzle.progress import Progress
    from puzzle.run import Run

    this = Run.open(folder, Progress(quiet))
    if assignments:
        values = config.override(this.recipe.model_dump(mode="json"), assignments)
        this = Run.open(folder, Progress(quiet), config.parse(values, "--set"))
        this.write_recipe()
    outputs = pipeline.execute_stage(this, stage)
    _finish({"stage": stage, "run": str(folder), **outputs}, as_json)
    if outputs.get("met") is False:
        raise Infeasible(f"{stage}: the measured child misses what was asked; `puzzle run` corrects and searches again")


def _stage_command(stage: str, summary: str) -> None:
    def command(run_directory: RunArgument, set_: Set = None, as_json: Json = False, quiet: Quiet = False) -> None:
        _run_stage(stage, run_directory, set_, as_json, quiet)

    app.command(name=stage, help=summary)(command)


for _stage, _summary in {
    "library": "Train every subblock variant by blockwise local distillation.",
    "score": "Measure the parent's quality with each single block replaced.",
    "cost": "Measure what every variant takes on the serving engine.",
    "assemble": "Put the chosen blocks together and measure the child.",
    "uptrain": "Global knowledge distillation of the child.",
    "evaluate": "Parent against child: quality and measured speed.",
    "report": "Write report/index.html.",
}.items():
    _stage_command(_stage, _summary)

Limit = Annotated[str | None, typer.Option(help="Absolute with a unit, or relative to the parent (2x, 50%).")]


@app.command()
def search(
    run_directory: RunArgument,
    throughput: Limit = None,
    latency: Limit = None,
    time_to_first_token: Limit = None,
    memory: Limit = None,
    parameters: Limit = None,
    kv_cache: Limit = None,
    solutions: Annotated[int | None, typer.Option(help="How many architectures.")] = None,
    diversity: Annotated[float | None, typer.Option(help="The share of layers in which they must differ.")] = None,
    set_: Set = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose one block per layer within the constraints. Naming a constraint replaces the recipe's constraints."""
    from puzzle.search import KINDS

    asked = {
        "throughput": throughput, "latency": latency, "time_to_first_token": time_to_first_token, "memory": memory,
        "parameters": parameters, "kv_cache": kv_cache,
    }  # fmt: skip
    assignments = list(set_ or [])
    if any(value is not None for value in asked.values()):
        assignments += [f"search.{name}={asked[name] or 'null'}" for name in KINDS]
    assignments += [f"search.{k}={v}" for k, v in (("solutions", solutions), ("diversity", diversity)) if v is not None]
    _run_stage("search", run_directory, assignments, as_json, quiet)


def main() -> None:
    """Entry point: `UserError` becomes one line and its exit code; anything else is our bug and shows itself."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    signal.signal(signal.SIGINT, _interrupted)
    try:
        app()
    except UserError as error:
        print(f"puzzle: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)


def _interrupted(*_: object) -> None:
    print("puzzle: interrupted; the same command goes on from here", file=sys.stderr)
    sys.exit(130)


if __name__ == "__main__":
    main()
