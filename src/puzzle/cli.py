"""The command line: `puzzle run`, one command per stage, `plan`, `status`. Nothing is computed
here.

Exit codes: 0 done, 1 our bug (traceback), 2 the user's input is wrong (one line), 3 infeasible (one
line). Results go to standard output, progress to standard error; `--json` adds a machine-readable
last line. torch takes seconds to import, so a command imports it only after the recipe has been
read and found right.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from puzzle.errors import Infeasible, UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a setting, e.g. search.throughput=2x."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print a machine-readable last line.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
RecipeArgument = Annotated[
    str,
    typer.Argument(metavar="[RECIPE.yaml]", help="A recipe file, or the name of a built-in one."),
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
    out: Annotated[
        Path | None, typer.Option(help="The run directory; default: the recipe's `out`.")
    ] = None,
    set_: Set = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole job: from a parent to a measured, uptrained, evaluated child with a report. Resumes
    what is there.
    """
    settings = _recipe(recipe, out, set_)
    from puzzle import pipeline
    from puzzle.evaluate import stage as evaluate
    from puzzle.progress import Progress
    from puzzle.report import stage as report
    from puzzle.run import Run

    this = Run(settings, Path(settings.out), Progress(quiet))
    outcome = pipeline.execute(this)
    results = evaluate.read(this)
    report.print_results(results, report.page(this))
    _finish({"run": str(this.folder), "met": outcome["met"], **results}, as_json)
    if not outcome["met"]:
        missed = "; ".join(
            f"asked {p['asked']}, measured {p['measured']}"
            for p in results["promises"]
            if not p["met"]
        )
        raise Infeasible(
            f"run {this.folder}: the finished child misses what was asked: {missed}; raise search.margin"
        )


@app.command()
def plan(
    recipe: RecipeArgument = "pocket", set_: Set = None, as_json: Json = False, quiet: Quiet = False
) -> None:
    """What each stage will need (tokens, FLOPs, memory, disk, time), before anything is spent."""
    settings = _recipe(recipe, None, set_)
    from puzzle import pipeline
    from puzzle import plan as planning
    from puzzle.progress import Progress
    from puzzle.run import Run

    this = Run(settings, Path(settings.out), Progress(quiet))
    pipeline.preflight(this)
    needs = planning.estimate(this)
    if not quiet:
        planning.print_plan(needs)
        print(planning.library_memory(this))
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


def _run_stage(
    stage: str, folder: Path, assignments: list[str] | None, as_json: bool, quiet: bool
) -> None:
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
        raise Infeasible(
            f"{stage}: the measured child misses what was asked; `puzzle run` corrects and searches again"
        )


def _stage_command(stage: str, summary: str) -> None:
    def command(
        run_directory: RunArgument, set_: Set = None, as_json: Json = False, quiet: Quiet = False
    ) -> None:
        _run_stage(stage, run_directory, set_, as_json, quiet)

    app.command(name=stage, help=summary)(command)


for _stage, _summary in {
    "library": "Train every subblock variant by blockwise local distillation.",
    "cost": "Measure what every variant takes on the serving engine.",
    "assemble": "Put the chosen blocks together and measure the child.",
    "uptrain": "Global knowledge distillation of the child.",
    "evaluate": "Parent against child: quality and measured speed.",
    "report": "Write report/index.html.",
}.items():
    _stage_command(_stage, _summary)


@app.command()
def export(
    run_directory: RunArgument,
    to: Annotated[
        list[str],
        typer.Option("--to", metavar="FORMAT", help="nemotron-nas or gguf; may be repeated."),
    ],
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: f32, f16, bf16, or q8_0 (gguf only).")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the finished child in another engine's format, load it again and compare."""
    from puzzle.export import stage as exporting
    from puzzle.progress import Progress
    from puzzle.run import Run

    this = Run.open(run_directory, Progress(quiet))
    found = [exporting.run(this, name, dtype) for name in to]
    for one in found:
        path = Path(one["folder"]) / one["written"]["file"]
        print(f"{one['format']}: {path} ({one['written']['bytes'] / 1e6:,.1f} MB), checked")
        for note in one["written"]["notes"]:
            print(f"  {note}")
    _finish(found[0] if len(found) == 1 else found, as_json)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    run_directory: RunArgument,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.")] = 8000,
    parent: Annotated[
        bool, typer.Option("--parent", help="Serve the parent instead, to compare.")
    ] = False,
) -> None:
    """Start vLLM's OpenAI-compatible server on the finished child. Further options go to `vllm
    serve`.
    """
    from puzzle.engines import vllm_engine
    from puzzle.export.stage import source
    from puzzle.progress import Progress
    from puzzle.run import Run

    this = Run.open(run_directory, Progress(quiet=True))
    folder = this.parent.folder if parent else source(this)
    name = this.recipe.parent if parent else this.folder.resolve().name
    vllm_engine.serve_openai(folder, name, this.recipe.cost.scenario, host, port, context.args)


@app.command(name="score")
def score_(
    run_directory: RunArgument,
    validate: Annotated[
        int | None,
        typer.Option(
            help="Compare sums of scores with the KL of so many really assembled children."
        ),
    ] = None,
    set_: Set = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the parent's quality with each single block replaced."""
    _run_stage("score", run_directory, set_, as_json and validate is None, quiet)
    if validate is not None:
        from puzzle.progress import Progress
        from puzzle.run import Run
        from puzzle.search import validate as validation

        _finish(validation.run(Run.open(run_directory, Progress(quiet)), validate), as_json)


Limit = Annotated[
    str | None,
    typer.Option(
        help="Absolute with a unit, or relative to the parent (2x, 50%); or by scenario: main=2x,chat=1.5x."
    ),
]


@app.command()
def search(
    run_directory: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A run directory.")
    ] = None,
    throughput: Limit = None,
    latency: Limit = None,
    time_to_first_token: Limit = None,
    memory: Limit = None,
    parameters: Limit = None,
    kv_cache: Limit = None,
    solutions: Annotated[int | None, typer.Option(help="How many architectures.")] = None,
    diversity: Annotated[
        float | None,
        typer.Option(help="In how many layers they must differ: a share, or a number from 1 on."),
    ] = None,
    frontier: Annotated[
        str | None, typer.Option(help="The resource to sweep, e.g. throughput or memory.")
    ] = None,
    points: Annotated[int | None, typer.Option(help="Points of the frontier.")] = None,
    gap: Annotated[float | None, typer.Option(help="Relative gap to prove; 0 is exact.")] = None,
    table: Annotated[
        Path | None, typer.Option(help="Search a published block-library table instead of a run.")
    ] = None,
    minimize: Annotated[
        str | None, typer.Option(metavar="KEY", help="With --table: what to minimise.")
    ] = None,
    maximize: Annotated[
        str | None, typer.Option(metavar="KEY", help="With --table: what to maximise.")
    ] = None,
    max_: Annotated[
        list[str] | None,
        typer.Option("--max", metavar="KEY=VALUE", help="With --table: an upper bound of a sum."),
    ] = None,
    min_: Annotated[
        list[str] | None,
        typer.Option("--min", metavar="KEY=VALUE", help="With --table: a lower bound of a sum."),
    ] = None,
    set_: Set = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose one block per layer within the constraints. Naming a constraint replaces the recipe's
    constraints.
    """
    asked = {
        "throughput": throughput,
        "latency": latency,
        "time_to_first_token": time_to_first_token,
        "memory": memory,
        "parameters": parameters,
        "kv_cache": kv_cache,
    }
    if table is not None:
        if run_directory is not None or set_ or frontier or any(asked.values()):
            raise UserError(
                "search --table: takes --minimize or --maximize, --max, --min, --gap, --solutions, --diversity"
            )
        _search_table(
            table, minimize, maximize, max_ or [], min_ or [], gap, solutions, diversity, as_json
        )
        return
    if run_directory is None or minimize or maximize or max_ or min_:
        raise UserError(
            "search: give a run directory, or --table FILE with --minimize KEY --max KEY=VALUE"
        )
    assignments = list(set_ or [])
    if any(value is not None for value in asked.values()):
        assignments += [f"search.{name}={_by_scenario(value)}" for name, value in asked.items()]
    more = {
        "solutions": solutions,
        "diversity": diversity,
        "frontier": frontier,
        "points": points,
        "gap": gap,
    }
    assignments += [f"search.{name}={value}" for name, value in more.items() if value is not None]
    _run_stage("search", run_directory, assignments, as_json, quiet)


def _by_scenario(text: str | None) -> str:
    """The YAML of a constraint: `2x`, or `main=2x,chat=1.5x`."""
    if text is None or "=" not in text:
        return text or "null"
    return (
        "{"
        + ", ".join(
            f"{part.partition('=')[0]}: {part.partition('=')[2]}" for part in text.split(",")
        )
        + "}"
    )


def _search_table(
    path: Path,
    minimize: str | None,
    maximize: str | None,
    most: list[str],
    least: list[str],
    gap: float | None,
    solutions: int | None,
    diversity: float | None,
    as_json: bool,
) -> None:
    from puzzle.search import published as table

    target = minimize or maximize
    if target is None or (minimize and maximize):
        raise UserError(
            "search --table: expected one of --minimize KEY and --maximize KEY, e.g. --minimize metrics.kl_div"
        )
    if (gap is not None and not gap >= 0) or (solutions is not None and solutions < 1):
        raise UserError(
            f"search --table: got gap {gap}, solutions {solutions}; expected at least 0 and at least 1"
        )
    upper, lower = table.bounds(most, "--max"), table.bounds(least, "--min")
    found = table.read(path)
    share = 0.2 if diversity is None else diversity
    differ = (
        round(share if share >= 1 else share * len(found.layers)) if (solutions or 1) > 1 else 1
    )
    if not 0 < differ <= len(found.layers):
        raise UserError(
            f"--diversity: got {diversity}, expected a share, or 1 to {len(found.layers)} layers"
        )
    answers = table.search(
        found,
        target=target,
        maximize=maximize is not None,
        most=upper,
        least=lower,
        gap=1e-4 if gap is None else gap,
        solutions=solutions or 1,
        differ=differ,
    )
    for answer in answers:
        totals = ", ".join(f"{key} {value:.8g}" for key, value in answer["totals"].items())
        print(
            f"objective {answer['objective']:.8g}, proven gap {answer['gap']:.1e}, {answer['seconds']:.2f} s; {totals}"
        )
    _finish(answers[0] if len(answers) == 1 else {**answers[0], "solutions": answers}, as_json)


def main() -> None:
    """Entry point: `UserError` becomes one line and its exit code; anything else is our bug and
    shows itself.
    """
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
