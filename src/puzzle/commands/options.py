"""What commands have in common: options, opening a run, the machine-readable last line."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from pydantic import JsonValue

from puzzle import config, settings
from puzzle.config import CONSTRAINTS
from puzzle.progress import Progress
from puzzle.run import Run

Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a setting, e.g. search.throughput=2x."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print a machine-readable last line.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Wait = Annotated[
    bool, typer.Option("--wait", help="Wait for folders that another process is writing.")
]
RecipeArgument = Annotated[
    str,
    typer.Argument(metavar="[RECIPE.yaml]", help="A recipe file, or the name of a built-in one."),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
ChildOption = Annotated[str, typer.Option("--child", help="Which of the run's children.")]
PlaceOption = Annotated[str, typer.Option("--place", help="Where children are served.")]
Limit = Annotated[
    str | None,
    typer.Option(
        help="Absolute with a unit, or relative to the parent (2x, 50%); or by scenario: "
        "main=2x,chat=1.5x."
    ),
]


Maximize = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="Make this as large as --kl allows: throughput. With --table: a key.",
    ),
]
Minimize = Annotated[
    str | None,
    typer.Option(
        metavar="KEY", help="Make this as small as --kl allows: memory... With --table: a key."
    ),
]
PredictedKL = Annotated[
    float | None,
    typer.Option(
        "--kl", help="With --maximize or --minimize: the predicted KL, nats per token, at most."
    ),
]


def read_recipe(name: str, out: Path | None, assignments: list[str] | None) -> config.Recipe:
    """A recipe by the name of a built-in one or the path of a file, with changes."""
    path = settings.recipe_path(name)
    values = {"out": f"runs/{path.stem}"} | settings.read_yaml(path)
    if out is not None:
        values["out"] = str(config.expanded(out))
    return config.parse(values, str(path), assignments or [])


def open_run(folder: Path, quiet: bool, wait: bool = False) -> Run:
    """An existing run. Raises `UserError` where there is none."""
    return Run.open(folder, Progress(quiet), wait=wait)


def emit(result: JsonValue, as_json: bool) -> None:
    """The last line of `--json`."""
    if as_json:
        print(json.dumps(result))


def given(context: typer.Context, names: Iterable[str]) -> dict[str, JsonValue]:
    """Those of these options that were given on the command line, by name."""
    return {name: v for name in names if (v := context.params[name]) is not None}


def constraint_changes(context: typer.Context) -> dict[str, JsonValue]:
    """The constraints that were given on the command line, by name."""
    return {name: constraint(str(text)) for name, text in given(context, CONSTRAINTS).items()}


def constraint(text: str) -> JsonValue:
    """A constraint as settings have it: `2x`, or by scenario from `main=2x,chat=1.5x`."""
    if "=" not in text:
        return text
    parts = [part.partition("=") for part in text.split(",")]
    return {scenario.strip(): value.strip() for scenario, _, value in parts}
