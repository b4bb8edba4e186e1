"""Stage `cost`: what every subblock variant takes on the engine that will serve.

One probe model holds copies of every distinct variant, each alone in a layer (`probe.py`). The
engine serves it, and which layers run is exchanged between its steps (`measure.py`); a regression
gives every variant's seconds with a standard error (`regression.py`). KV bytes are the pages that
the engine allocates. Paper: section 4.1, appendix B.

Reads: shapes only, no trained weights. Writes: `places/<place>/cost/` (see `table.py`).
"""

import shutil
from dataclasses import asdict
from pathlib import Path

from pydantic import JsonValue

from puzzle import artifacts
from puzzle.artifacts import Inputs
from puzzle.config import ScenarioConfig
from puzzle.cost import COST, table
from puzzle.cost.measure import ScenarioMeasurement
from puzzle.cost.probe import Probe, write_checkpoint
from puzzle.cost.scenarios import element_bytes, served_scenarios
from puzzle.cost.table import COSTS, FITS, HEADER, CostHeader, ScenarioFit, VariantCost
from puzzle.engines import ENGINE_OVERHEAD_BYTES
from puzzle.errors import UserError
from puzzle.model.architecture import Architecture
from puzzle.stage import Bytes, Effort, Job, Need, Work

PROBE, REFERENCE = "probe", "reference"  # checkpoints to be served, removed at the end


def header(job: Job) -> CostHeader:
    """What a table must agree on to be used for this job."""
    shape: dict[str, JsonValue] = asdict(job.run.parent.shape)
    shape["windows"] = list(job.run.parent.shape.windows)  # as JSON gives it back
    shape["blocks"] = [block.name for block in job.run.parent.shape.blocks]
    return CostHeader(
        engine=job.engine.facts,
        measured=job.engine.measured,
        scenarios=served_scenarios(job),
        shape=shape,
        windows=list(table.windows(job)),
    )


def _given_table(job: Job) -> Path | None:
    """A table to take instead of measuring: the recipe's, or that of a coupled run's first part."""
    if job.place.cost.table:
        return Path(job.place.cost.table)
    first = job.run.first
    if first is not None and job.place.name in first.place_names():
        measured = first.place_job(job.place.name).folder(COST) / COSTS
        return measured if measured.exists() else None
    return None


def _facts(job: Job) -> Inputs:
    path = _given_table(job)
    given = artifacts.file_fingerprint(path) if path and path.is_file() else ""
    variants: list[JsonValue] = [list(part.key) for part in table.distinct_parts(job)]
    return {"header": header(job).as_json(), "variants": variants, "table": given}


def _check(job: Job) -> None:
    positions = job.run.parent.hf_config.max_position_embeddings
    for name, scenario in job.place.cost.measured.items():
        length = scenario.input_length + scenario.output_length
        if length > positions:
            raise UserError(
                f"cost scenario {name} (input_length + output_length): got {length}, but the "
                f"parent takes at most {positions} positions"
            )
    if not table.are_from_elsewhere(job):
        _ = job.engine
    if job.place.cost.table:
        _reuse(job, Path(job.place.cost.table))


def _reuse(job: Job, path: Path) -> tuple[CostHeader, list[VariantCost], list[ScenarioFit]]:
    """Another run's table; `UserError` where engine, machine, scenario or shapes differ."""
    given, records, fits = table.read_given(path)
    expected = header(job)
    theirs, ours = given.as_json(), expected.as_json()
    if theirs != ours:
        key, there, here = artifacts.first_difference(theirs, ours)
        raise UserError(
            f"cost.table {path}: {key} is {there!r} there but {here!r} here; measure again"
        )
    needed = table.distinct_parts(job)
    table.check_complete(records, expected.scenarios, needed, f"cost.table {path}")
    return given, records, fits


def _execute(job: Job, folder: Path) -> None:
    facts, say = job.engine.facts, job.run.progress.say
    say(f"  engine: {facts.engine} {facts.version} on {facts.device}")
    if job.place.cost.engine == "auto" and job.engine.name != "vllm":
        say("  vLLM is not installed or not in deploy: speeds are measured on the torch engine")
    if not job.engine.measured:
        say("  no hardware is measured: every speed is modelled from a device sheet")
    dtypes = {scenario.dtype for scenario in served_scenarios(job).values()}
    device = job.run.device
    slow = device.type == "cpu" and not device.has_bfloat16
    if job.engine.measured and "bfloat16" in dtypes and slow:
        say(
            "  this CPU has no bfloat16 products: serving in float32 may be faster "
            "(cost.scenario.dtype: float32)"
        )
    path = _given_table(job)
    if path is None:
        _measure(job, folder)
        return
    given, records, fits = _reuse(job, path)
    given.write(folder / HEADER)
    artifacts.write_records(folder / FITS, fits)
    artifacts.write_records(folder / COSTS, records)


def _measure(job: Job, folder: Path) -> None:
    """Measure scenario by scenario; what an interrupted stage has measured stays."""
    scenarios = served_scenarios(job)
    parent, windows = job.run.parent, table.windows(job)
    element = element_bytes(scenarios["main"])
    probe = Probe.of(table.distinct_parts(job), parent.shape, windows, element)
    header(job).write(folder / HEADER)
    records = artifacts.read_records(folder / COSTS, VariantCost)
    fits = artifacts.read_records(folder / FITS, ScenarioFit)
    done = {record.scenario for record in records}
    checkpoints = {PROBE: (probe.architecture, probe.windows)}
    if not job.engine.probes_as_served:
        checkpoints[REFERENCE] = (probe.reference, windows)
    for checkpoint, (architecture, its_windows) in checkpoints.items():
        if not (folder / checkpoint / "config.json").exists():
            weights = not job.engine.makes_weights
            path = folder / checkpoint
            write_checkpoint(parent, path, architecture, its_windows, weights=weights)
    for name, scenario in scenarios.items():
        if name in done:
            continue
        measurement = _measure_scenario(job, probe, name, scenario, folder)
        costs, fit = measurement
        fits = [*(known for known in fits if known.scenario != name), fit]
        records += costs
        artifacts.write_records(folder / FITS, fits)
        artifacts.write_records(folder / COSTS, records)
    for checkpoint in checkpoints:
        shutil.rmtree(folder / checkpoint)


def _measure_scenario(
    job: Job, probe: Probe, name: str, scenario: ScenarioConfig, folder: Path
) -> tuple[list[VariantCost], ScenarioFit]:
    settings, engine = job.place.cost, job.engine
    verb = "measuring" if engine.measured else "modelling"
    title = f"{verb} {name} ({scenario}) on {engine.name}"
    job.run.release_models()
    with (
        job.measuring(),
        engine.probe(folder / PROBE, scenario) as session,
        job.run.progress.task(title, settings.seconds, "s") as task,
    ):
        measurement = ScenarioMeasurement(
            name,
            probe,
            session,
            scenario,
            element_bytes(scenario),
            is_captured=not engine.probes_as_served,
        )
        measurement.run(settings.seconds, settings.precision, task)
        if engine.probes_as_served:
            return measurement.records(table.distinct_parts(job))
    # one engine after the other: both may not fit
    with job.measuring(), engine.serve(folder / REFERENCE, scenario) as session:
        measurement.scale_by_served(session)
    return measurement.records(table.distinct_parts(job))


def _need(job: Job) -> Need:
    parent = job.run.parent
    model_bytes = Architecture.of_parent(parent.shape).parameters(parent.shape)
    model_bytes *= parent.dtype.itemsize
    scenarios, is_modelled = len(job.place.cost.measured), job.place.cost.engine == "roofline"
    shared = model_bytes / job.place.cost.scenario.tensor_parallel  # the probe is about as large
    served = Bytes(weights=shared, activations=ENGINE_OVERHEAD_BYTES)
    return Need(
        memory=Bytes() if is_modelled else served,
        disk_bytes=model_bytes,
        effort=Effort(beside_s=0.0 if is_modelled else scenarios * job.place.cost.seconds),
    )


WORK = Work(facts=_facts, execute=_execute, need=_need, check=_check)
