"""Stage `cost`: what every subblock variant takes on the engine that will serve (paper: section 4.1, appendix B).

One probe model holds several copies of every distinct variant, each alone in a layer; the engine serves it and
times its layers during real prefill and decode steps. The parent is served beside it, in turn. From the two:

- a variant's prefill and decode seconds: the median over copies and repeats, scaled so that the parent's own
  layers, predicted from the probe, come out as measured in the parent;
- the constant: the parent's batch time outside its layers (embedding, head, sampling, scheduling).

Reads: shapes only, no trained weights. Writes: `cost/costs.jsonl`, a header and one record per variant, each figure
with its unit in the key. `CostTable` reads it and predicts architectures.
"""

import itertools
import json
import math
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from puzzle import artifacts, child, subblocks
from puzzle.architecture import FFN, Architecture, Attention, Block, ModelShape, Subblock
from puzzle.config import ScenarioConfig
from puzzle.engines import Timing
from puzzle.errors import UserError
from puzzle.run import Run

WARM_UPS = 2  # rounds that do not count
COPIES = 3  # of every variant in the probe, in shuffled order: no variant profits from its neighbours' caches
CONSTANT = "constant"


@dataclass(frozen=True)
class Cost:
    """Resources of a variant, a block or a whole model for one batch of the scenario."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    parameters: int = 0
    parameter_bytes: int = 0
    kv_cache_bytes: int = 0  # of the whole batch at full length

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.decode_s

    @property
    def memory_bytes(self) -> int:
        return self.parameter_bytes + self.kv_cache_bytes

    def throughput_tok_per_s(self, scenario: ScenarioConfig) -> float:
        """Output tokens per second."""
        return scenario.batch_size * scenario.output_length / self.total_s


@dataclass(frozen=True)
class CostTable:
    """Measured or modelled costs of one scenario."""

    header: dict[str, Any]
    variants: dict[tuple[str, str], Cost]  # (slot, variant name)
    constant: Cost

    @property
    def scenario(self) -> ScenarioConfig:
        return ScenarioConfig.model_validate(self.header["scenario"])

    def block(self, block: Block) -> Cost:
        return self.variants["attention", block.attention.name] + self.variants["ffn", block.ffn.name]

    def predict(self, architecture: Architecture) -> Cost:
        return sum((self.block(block) for block in architecture), self.constant)


def distinct_variants(run: Run) -> list[Subblock]:
    """Every variant that occurs in any layer: equal shapes cost the same, whatever the layer."""
    found: dict[Subblock, None] = {}
    for options in run.space.layers:
        found |= dict.fromkeys(options.subblocks)
    return list(found)


def serving_dtype(run: Run) -> str:
    dtype = run.recipe.cost.scenario.dtype
    return str(run.parent.dtype).removeprefix("torch.") if dtype == "auto" else dtype


def header(run: Run) -> dict[str, Any]:
    """What a table must agree on to be reused: engine, its version, machine, dtype, scenario, shapes."""
    engine = run.engine
    return {
        **engine.describe(run.recipe.cost.device_sheet),
        "measured": engine.MEASURED,
        "dtype": serving_dtype(run),
        "scenario": run.recipe.cost.scenario.model_dump(mode="json"),
        "shape": asdict(run.parent.shape),
    }


def given_table(run: Run) -> Path | None:
    """A table to take instead of measuring: the recipe's, or that of the decoupled run inside a coupled one."""
    if run.recipe.cost.table:
        return Path(run.recipe.cost.table)
    return run.first.stage_folder("cost") / "costs.jsonl" if run.first else None


def inputs(run: Run) -> dict[str, Any]:
    settings = run.recipe.cost
    path = given_table(run)
    table = artifacts.file_fingerprint(path) if path and path.exists() else ""
    names = [[subblocks.slot(v), v.name] for v in distinct_variants(run)]
    return header(run) | {"repeats": settings.repeats, "variants": names, "table": table}


def run(run: Run, folder: Path) -> dict[str, Any]:
    path, engine = folder / "costs.jsonl", run.engine
    about = engine.describe(run.recipe.cost.device_sheet)
    run.progress.say(f"  engine: {about['engine']} {about['version']} on {about['device']}")
    if run.recipe.cost.engine == "auto" and engine.NAME != "vllm":
        run.progress.say("  vLLM is not installed or not in deploy: speeds are measured on the built-in torch engine")
    if not engine.MEASURED:
        run.progress.say("  no hardware is measured: every speed is modelled from a device sheet")
    table = given_table(run)
    records = reuse(run, table) if table else measure(run, folder)
    artifacts.write_jsonl(path, records)
    return {"costs": artifacts.file_fingerprint(path)}


def reuse(run: Run, path: Path) -> list[dict[str, Any]]:
    """The records of another run's table; `UserError` where engine, machine, dtype, scenario or shapes differ."""
    if not path.exists():
        raise UserError(f"cost.table {path}: no such file; expected a costs.jsonl of an earlier run")
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (ValueError, OSError) as error:
        raise UserError(f"cost.table {path}: not JSON lines ({error})") from None
    for key, expected in header(run).items():
        got = records[0].get(key) if records else None
        if got != expected:
            raise UserError(f"cost.table {path}: {key} is {got!r} there but {expected!r} here; measure again")
    known = {(record.get("slot"), record.get("variant")) for record in records[1:]}
    needed = [(subblocks.slot(variant), variant.name) for variant in distinct_variants(run)]
    for slot, name in [*needed, (CONSTANT, CONSTANT)]:
        if (slot, name) not in known:
            raise UserError(f"cost.table {path}: has no {slot} {name}; measure again")
    return records


# ------------------------------------------------------------------------------------------------ measuring


def probe_architecture(variants: Sequence[Subblock], shape: ModelShape) -> tuple[Architecture, list[Subblock | None]]:
    """A model with `COPIES` of every costly variant alone in a layer, and which layer measures what.

    Layer 0 is a parent block that measures nothing: stock vLLM cannot start with a no-op attention.
    """
    costly = [v for v in variants if v.kind != "no_op"]
    blocks, measures = [shape.parent_block], [None]
    for copy in range(COPIES):
        turned = costly[copy:] + costly[:copy]
        for variant in turned if copy % 2 == 0 else reversed(turned):
            alone = (
                Block(variant, FFN("no_op")) if isinstance(variant, Attention) else Block(Attention("no_op"), variant)
            )
            blocks.append(alone)
            measures.append(variant)  # type: ignore[arg-type]
    return Architecture(tuple(blocks)), measures  # type: ignore[return-value]


def write_probe(run: Run, folder: Path, architecture: Architecture) -> None:
    """The probe as a checkpoint with random weights: cost does not depend on values."""
    config = run.parent.child_config(architecture)
    config.num_hidden_layers = len(architecture)
    with torch.device("meta"):
        names = {n: t.shape for n, t in child.PuzzleForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {n: torch.randn(size, generator=generator).mul_(0.02).to(config.dtype) for n, size in names.items()}
    child.save(folder, config, architecture, state, run.parent.folder, "A probe with random weights for measuring.\n")


def measure(run: Run, folder: Path) -> list[dict[str, Any]]:
    settings, engine = run.recipe.cost, run.engine
    variants = distinct_variants(run)
    architecture, measures = probe_architecture(variants, run.parent.shape)
    write_probe(run, folder / "probe", architecture)
    how = "measuring" if engine.MEASURED else "modelling"
    with run.progress.task(f"{how} on {engine.NAME}", settings.repeats + WARM_UPS, "batches") as task:
        timings = time_in_turn(
            run, [folder / "probe", run.parent.folder], settings.repeats, task.advance, "cost", time_layers=True
        )
    shutil.rmtree(folder / "probe")
    probe, parent = timings
    return [header(run), *_records(run, variants, measures, probe, parent)]


def time_in_turn(
    run: Run, checkpoints: Sequence[Path], repeats: int, on_batch: Callable[[], None], log: str, time_layers: bool
) -> list[list[Timing]]:
    """Serve the checkpoints side by side and time them A B A B ...; the first rounds warm up and do not count."""
    settings, engine = run.recipe.cost, run.engine
    # a dtype of its own choice would be the engine's, not the one that costs are counted in
    scenario = settings.scenario.model_copy(update={"dtype": serving_dtype(run)})
    run.release_models()
    sessions = []
    try:
        for index, folder in enumerate(checkpoints):
            path = run.folder / "logs" / f"{engine.NAME}-{log}-{index}.log"
            sessions.append(engine.open_session(folder, scenario, path, settings.device_sheet, time_layers))
        timings: list[list[Timing]] = [[] for _ in sessions]
        for repeat in range(repeats + WARM_UPS):
            for session, kept in zip(sessions, timings, strict=True):
                timing = session.time_batch(scenario)
                if repeat >= WARM_UPS:
                    kept.append(timing)
            on_batch()
    finally:
        for session in sessions:
            session.__exit__(None, None, None)
    return timings


def _median_per_layer(timings: list[Timing], part: str) -> list[float]:
    return [statistics.median(values) for values in zip(*(getattr(t, part) for t in timings), strict=True)]


def _records(
    run: Run,
    variants: Sequence[Subblock],
    measures: Sequence[Subblock | None],
    probe: list[Timing],
    parent: list[Timing],
) -> list[dict[str, Any]]:
    shape, scenario = run.parent.shape, run.recipe.cost.scenario
    element = torch.empty(0, dtype=getattr(torch, serving_dtype(run))).element_size()
    raw: dict[str, dict[Subblock, float]] = {}
    spread: dict[Subblock, float] = {}
    for part in ("layer_prefill_s", "layer_decode_s"):
        layers = _median_per_layer(probe, part)
        for variant in variants:
            values = [s for s, measured in zip(layers, measures, strict=True) if measured == variant] or [0.0]
            raw.setdefault(part, {})[variant] = statistics.median(values)
            if part == "layer_decode_s" and statistics.median(values):
                spread[variant] = (max(values) - min(values)) / statistics.median(values)
    block, scale = shape.parent_block, {}
    for part in raw:
        predicted = shape.num_hidden_layers * (raw[part][block.attention] + raw[part][block.ffn])
        measured = sum(_median_per_layer(parent, part))
        scale[part] = measured / predicted if predicted else 1.0
    tokens = scenario.batch_size * (scenario.input_length + scenario.output_length)
    records: list[dict[str, Any]] = []
    for variant in variants:
        cost = Cost(
            prefill_s=raw["layer_prefill_s"][variant] * scale["layer_prefill_s"],
            decode_s=raw["layer_decode_s"][variant] * scale["layer_decode_s"],
            parameters=shape.parameters(variant),
            parameter_bytes=shape.parameters(variant) * element,
            kv_cache_bytes=shape.kv_elements_per_token(variant) * element * tokens,
        )
        record = {"slot": subblocks.slot(variant), "variant": variant.name, **asdict(cost)}
        records.append(record | {"decode_spread": round(spread.get(variant, 0.0), 4)})
    outside_prefill = statistics.median(t.prefill_s - sum(t.layer_prefill_s) for t in parent)
    outside_decode = statistics.median(t.decode_s - sum(t.layer_decode_s) for t in parent)
    constant = Cost(
        prefill_s=outside_prefill,
        decode_s=outside_decode,
        parameters=shape.constant_parameters,
        parameter_bytes=shape.constant_parameters * element,
    )
    scales = {"prefill_scale": scale["layer_prefill_s"], "decode_scale": scale["layer_decode_s"]}
    return [*records, {"slot": CONSTANT, "variant": CONSTANT, **asdict(constant), **scales}]


@dataclass(frozen=True)
class Paired:
    """A child against the parent, batch by batch in turn: medians of each, and of the ratios of the pairs."""

    parent: dict[str, float]
    child: dict[str, float]
    speedup: float
    speedups: list[float]
    time_to_first_token_ratio: float


def measure_pair(run: Run, child_folder: Path, pairs: int, log: str) -> Paired:
    scenario = run.recipe.cost.scenario
    with run.progress.task(f"parent against child on {run.engine.NAME}", pairs + WARM_UPS, "pairs") as task:
        parent, own = time_in_turn(run, [run.parent.folder, child_folder], pairs, task.advance, log, time_layers=False)
    tokens = scenario.batch_size * scenario.output_length

    def figures(timings: list[Timing]) -> dict[str, float]:
        total = statistics.median(t.total_s for t in timings)
        prefill = statistics.median(t.prefill_s for t in timings)
        return {"latency_s": total, "time_to_first_token_s": prefill, "throughput_tok_per_s": tokens / total}

    speedups = [p.total_s / c.total_s for p, c in zip(parent, own, strict=True)]
    first = statistics.median(c.prefill_s / p.prefill_s for p, c in zip(parent, own, strict=True))
    return Paired(figures(parent), figures(own), statistics.median(speedups), speedups, first)


# ------------------------------------------------------------------------------------------------ reading


def read(run: Run) -> CostTable:
    """The table of a run. Raises `UserError` with one line for a figure that is missing, negative or not finite."""
    path = run.stage_folder("cost") / "costs.jsonl"
    head, *records = artifacts.read_jsonl(path)
    fields = tuple(Cost.__dataclass_fields__)
    variants = {}
    for record, field in itertools.product(records, fields):
        value = record.get(field)
        if not isinstance(value, int | float) or not math.isfinite(value) or (value < 0 and record["slot"] != CONSTANT):
            where = f"{record.get('slot')} {record.get('variant')}"
            raise UserError(f"{path}: {where}: {field} is {value!r}; expected a number of at least 0")
    for record in records:
        variants[record["slot"], record["variant"]] = Cost(*(record[field] for field in fields))
    return CostTable(head, variants, variants.pop((CONSTANT, CONSTANT)))
