"""`puzzle export` and `puzzle serve`: the finished child where it will live."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import JsonValue

from puzzle import config, settings
from puzzle.commands.options import ChildOption, Json, Quiet, RunArgument, Set, emit, open_run
from puzzle.config import PlaceConfig
from puzzle.errors import UserError
from puzzle.progress import Progress


def export(
    run_directory: RunArgument,
    to: Annotated[
        list[str],
        typer.Option("--to", metavar="FORMAT", help="nemotron-nas or gguf; may be repeated."),
    ],
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: f32, f16, bf16, or q8_0 (gguf only).")
    ] = None,
    child: ChildOption = "main",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the finished child in another engine's format, load it again and compare."""
    job = open_run(run_directory, quiet).child_job(child)
    from puzzle.export import stage

    exports = []
    for name in to:
        folder, exported = stage.export(job, name, dtype)
        print(
            f"{name}: {folder / exported.file} ({exported.bytes / 1e6:,.1f} MB), read back and "
            "compared"
        )
        for note in exported.notes:
            print(f"  {note}")
        exports.append({"folder": str(folder), **exported.as_json()})
    emit(exports[0] if len(exports) == 1 else list(exports), as_json)


def serve(
    context: typer.Context,
    run_directory: RunArgument,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.", min=1, max=65535)] = 8000,
    child: ChildOption = "main",
    parent: Annotated[
        bool, typer.Option("--parent", help="Serve the parent instead, to compare.")
    ] = False,
) -> None:
    """Start vLLM's OpenAI-compatible server on a child. Further options go to `vllm serve`."""
    run = open_run(run_directory, quiet=True)
    job = run.child_job(child)
    from puzzle.engines.vllm_engine import Server, serve_openai
    from puzzle.export import stage

    name = run.recipe.parent if parent else stage.model_name(job)
    folder = run.parent.folder if parent else stage.source(job)
    serve_openai(Server(folder, name, host, port, job.place.cost.scenario), context.args)


def measure(
    child_folder: Annotated[
        Path, typer.Argument(metavar="CHILD_FOLDER", help="A child's checkpoint.")
    ],
    parent: Annotated[
        str, typer.Option(help="The parent to compare with: a folder or a hub name.")
    ],
    place: Annotated[
        Path | None,
        typer.Option(help="A place.yaml, or the folder of one; default: an automatic engine."),
    ] = None,
    starts: Annotated[int, typer.Option(help="Starts of both engines.", min=1)] = 4,
    set_: Set = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Serve a child beside its parent where it will live, without the rest of the run."""
    wanted = place_settings(place, set_ or [])
    child_folder = config.expanded(child_folder)
    if not (child_folder / "config.json").exists():
        raise UserError(f"measure {child_folder}: no config.json; expected the folder of a child")
    from puzzle.commands import measuring

    progress = Progress(quiet)
    engine, measurements = measuring.measure(child_folder, parent, wanted, starts, progress)
    for name, measurement in measurements.items():
        print(measuring.describe(name, engine, measurement))
    scenarios: dict[str, JsonValue] = {n: m.as_json() for n, m in measurements.items()}
    emit({"engine": engine.facts.as_json(), "scenarios": scenarios}, as_json)


def place_settings(path: Path | None, assignments: list[str]) -> PlaceConfig:
    """The settings of a place from its file or folder, with changes."""
    values: dict[str, JsonValue] = {}
    if path is not None:
        path = config.expanded(path)
        file = path / "place.yaml" if path.is_dir() else path
        values = settings.read_yaml(file, "place")
    return settings.validate_changed(PlaceConfig, values, assignments, "place")
