"""The order of work, in one screen. A stage runs unless its folder already holds what these inputs
give.
"""

import shutil
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from puzzle import artifacts
from puzzle.cost import stage as cost
from puzzle.data import corpus
from puzzle.errors import Infeasible, UserError
from puzzle.progress import duration
from puzzle.run import Run
from puzzle.search import stage as search
from puzzle.training import checkpoint
from puzzle.uptrain import stage as uptrain

STAGES = ("library", "score", "cost", "search", "assemble", "uptrain", "evaluate", "report")


def execute(run: Run) -> dict[str, Any]:
    """From a parent to a measured, uptrained, evaluated child with a report. Returns the outputs of
    `evaluate`.
    """
    preflight(run)
    run.write_recipe()
    if (
        run.first is not None
    ):  # coupled BLD: a decoupled library and a search narrow the space first
        run.progress.say("first: decoupled library, scores, costs and search")
        run.first.write_recipe()
        for stage in ("library", "score", "cost", "search"):
            execute_stage(run.first, stage)
    for stage in ("library", "score", "cost"):
        execute_stage(run, stage)
    for attempt in range(
        run.recipe.search.attempts
    ):  # a missed promise corrects the costs; then search again
        execute_stage(run, "search", again=attempt > 0)
        if execute_stage(run, "assemble", again=attempt > 0)["met"]:
            break
    else:
        raise Infeasible(_missed(run, run.recipe.search.attempts))
    execute_stage(run, "uptrain")
    outcome = execute_stage(run, "evaluate")
    execute_stage(run, "report")
    return outcome


def preflight(run: Run) -> None:
    """Everything that can be known to be wrong before anything is spent. Raises `UserError`."""
    recipe, parent = run.recipe, run.parent
    earlier = run.folder / "run.yaml"
    if run.folder.exists() and not run.folder.is_dir():
        raise UserError(f"run directory {run.folder}: is a file; choose another --out")
    if (
        earlier.exists()
        and (other := Run.open(run.folder, run.progress).recipe.parent) != recipe.parent
    ):
        raise UserError(
            f"run directory {run.folder}: holds a run of parent {other!r}; choose another --out"
        )
    positions = parent.hf_config.max_position_embeddings
    lengths = {"corpus.sequence_length": recipe.corpus.sequence_length}
    for name, scenario in recipe.cost.measured.items():
        lengths[f"cost scenario {name} (input_length + output_length)"] = (
            scenario.input_length + scenario.output_length
        )
    for name, length in lengths.items():
        if length > positions:
            raise UserError(
                f"{name}: got {length}, but the parent takes at most {positions} positions"
            )
    if len(parent.tokenizer) > parent.shape.vocab_size:
        raise UserError(
            f"parent {parent.name}: its tokenizer has {len(parent.tokenizer)} tokens, its embedding only "
            f"{parent.shape.vocab_size}; give it the tokenizer it was trained with"
        )
    run.engine.describe(recipe.cost.device_sheet)
    if recipe.cost.table:
        cost.reuse(run, Path(recipe.cost.table))
    search.check(recipe.search, ["main", *recipe.cost.scenarios])
    uptrain.check(run)
    corpus.source_marks(recipe.corpus)
    assert run.full_space.layers


def execute_stage(run: Run, stage: str, again: bool = False) -> dict[str, Any]:
    """Run one stage where it is not done, and return its outputs. `again` adds its seconds to those
    before.
    """
    module, folder = import_module(f"puzzle.{stage}.stage"), run.stage_folder(stage)
    inputs = run.inputs_of(stage)
    if not artifacts.is_done(folder, inputs):
        run.progress.say(f"{stage}")
        before = _seconds(run, stage) if again else 0.0
        _set_status(run, stage, "running")
        artifacts.begin(folder, inputs)
        began = time.perf_counter()
        artifacts.write_manifest(folder, inputs, module.run(run, folder))
        shutil.rmtree(folder / checkpoint.FOLDER, ignore_errors=True)
        seconds = time.perf_counter() - began + before
        _set_status(run, stage, "done", seconds)
        run.progress.say(f"{stage}: done in {duration(seconds)}")
    else:
        run.progress.say(f"{stage}: done before, nothing changed")
    found = artifacts.manifest(folder)
    assert found is not None
    return found["outputs"]


def _seconds(run: Run, stage: str) -> float:
    path = run.folder / "status.json"
    return artifacts.read_json(path).get(stage, {}).get("seconds", 0.0) if path.exists() else 0.0


def _set_status(run: Run, stage: str, state: str, seconds: float | None = None) -> None:
    path = run.folder / "status.json"
    status = artifacts.read_json(path) if path.exists() else {}
    record = {"state": state, "at": time.strftime("%Y-%m-%d %H:%M:%S")}
    status[stage] = record if seconds is None else record | {"seconds": round(seconds, 2)}
    artifacts.write_json(path, status)


def status(run: Run) -> list[dict[str, Any]]:
    """Per stage: done (its inputs are those of now), running or interrupted, stale (inputs
    changed), or not begun.
    """
    path = run.folder / "status.json"
    known = artifacts.read_json(path) if path.exists() else {}
    rows = []
    for stage in STAGES:
        record, state = known.get(stage, {}), "not begun"
        if artifacts.manifest(run.stage_folder(stage)) is not None:
            try:
                inputs = run.inputs_of(stage)
                state = (
                    "done"
                    if artifacts.is_done(run.stage_folder(stage), inputs)
                    else "stale: settings or inputs changed"
                )
            except UserError as error:
                state = f"stale: {error}"
        elif record.get("state") == "running":
            state = "running or interrupted"
        rows.append(
            {
                "stage": stage,
                "state": state,
                "seconds": record.get("seconds"),
                "at": record.get("at"),
            }
        )
    return rows


def _missed(run: Run, attempts: int) -> str:
    measured = artifacts.read_json(run.stage_folder("assemble") / "measured.json")
    missed = "; ".join(
        f"asked {p['asked']}, measured {p['measured']}"
        for p in measured["promises"]
        if not p["met"]
    )
    return (
        f"search: after {attempts} attempts the measured child still misses: {missed}; "
        "ask for less, or raise search.margin or search.attempts"
    )
