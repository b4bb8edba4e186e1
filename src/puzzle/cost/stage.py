"""Stage `cost`: what every subblock variant takes on the engine that will serve (paper: section
4.1, appendix B).

One probe model holds copies of every distinct variant, each alone in a layer. The engine serves it,
and which layers run is exchanged between its steps: so one engine start serves hundreds of random
architectures in real scheduled prefill and decode steps, interleaved so tightly that the machine's
drift cancels. A regression of the steps' times on the counts of variants gives

- each variant's prefill and decode seconds with a standard error, in the company of other layers
  and warm caches;
- the constant: what a step takes besides its layers (embedding, head, sampling, scheduling). Time
  grows a little faster than the number of layers, because caches fill; the regression is a straight
  line through the region between the parent and a third of it, so the constant is that line's and
  may come out below zero.

Both are scaled so that the parent's whole batches, served in between, come out as measured. KV
bytes are the pages that the engine allocates.

Reads: shapes only, no trained weights. Writes: `cost/costs.jsonl`, a header and one record per
scenario and variant, each figure with its unit in the key. `CostTable` reads it and predicts
architectures.
"""

import itertools
import json
import math
import random
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from puzzle import artifacts
from puzzle.config import ScenarioConfig
from puzzle.engines import Session, Timing
from puzzle.errors import UserError
from puzzle.model import child
from puzzle.model.architecture import FFN, Architecture, Attention, Block, ModelShape, Subblock
from puzzle.run import Run

WARM_UPS = 2  # rounds that do not count
PARENT_EVERY = 3  # rounds
HOLD, SETTLE = (
    4,
    2,
)  # decode steps one random architecture runs, and how many of them warm its caches uncounted
OFF_THE_LINE = 0.1  # of a series' mean cost: how far steps in the hardware's efficiency may bend it
LEAST_SAMPLES = 4  # of each phase, for each unknown
PROBE_BYTES = 256 << 20  # the probe may always have so many; beyond it, no more than the parent
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
        return Cost(
            *(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True))
        )

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.decode_s

    @property
    def memory_bytes(self) -> int:
        return self.parameter_bytes + self.kv_cache_bytes


@dataclass(frozen=True)
class CostTable:
    """Measured or modelled costs in one scenario."""

    header: dict[str, Any]
    scenario: ScenarioConfig
    variants: dict[tuple[str, str], Cost]  # (slot, variant name)
    constant: Cost

    @property
    def tokens(self) -> int:
        """Output tokens of a batch."""
        return self.scenario.batch_size * self.scenario.output_length

    def block(self, block: Block) -> Cost:
        return (
            self.variants["attention", block.attention.name] + self.variants["ffn", block.ffn.name]
        )

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
    """What a table must agree on to be reused: engine, its version, machine, dtype, scenarios,
    shapes.
    """
    engine = run.engine
    return {
        **engine.describe(run.recipe.cost.device_sheet),
        "measured": engine.MEASURED,
        "dtype": serving_dtype(run),
        "scenarios": {
            name: s.model_dump(mode="json") for name, s in run.recipe.cost.measured.items()
        },
        "shape": asdict(run.parent.shape)
        | {"windows": list(run.parent.shape.windows)},  # as JSON gives it back
    }


def given_table(run: Run) -> Path | None:
    """A table to take instead of measuring: the recipe's, or that of the decoupled run inside a
    coupled one.
    """
    if run.recipe.cost.table:
        return Path(run.recipe.cost.table)
    return run.first.stage_folder("cost") / "costs.jsonl" if run.first else None


def inputs(run: Run) -> dict[str, Any]:
    settings = run.recipe.cost
    path = given_table(run)
    table = artifacts.file_fingerprint(path) if path and path.exists() else ""
    names = [[v.slot, v.name] for v in distinct_variants(run)]
    effort = {"precision": settings.precision, "seconds": settings.seconds}
    return header(run) | effort | {"variants": names, "table": table}


def run(run: Run, folder: Path) -> dict[str, Any]:
    path, engine = folder / "costs.jsonl", run.engine
    about = engine.describe(run.recipe.cost.device_sheet)
    run.progress.say(f"  engine: {about['engine']} {about['version']} on {about['device']}")
    if run.recipe.cost.engine == "auto" and engine.NAME != "vllm":
        run.progress.say(
            "  vLLM is not installed or not in deploy: speeds are measured on the built-in torch engine"
        )
    if not engine.MEASURED:
        run.progress.say("  no hardware is measured: every speed is modelled from a device sheet")
    table = given_table(run)
    if table:
        artifacts.write_jsonl(path, reuse(run, table))
    else:
        measure(run, folder, path)
    return {"costs": artifacts.file_fingerprint(path)}


def reuse(run: Run, path: Path) -> list[dict[str, Any]]:
    """The records of another run's table; `UserError` where engine, machine, dtype, scenario or
    shapes differ.
    """
    if not path.exists():
        raise UserError(
            f"cost.table {path}: no such file; expected a costs.jsonl of an earlier run"
        )
    try:
        records = [
            json.loads(line)
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    except (ValueError, OSError) as error:
        raise UserError(f"cost.table {path}: not JSON lines ({error})") from None
    for key, expected in header(run).items():
        got = records[0].get(key) if records else None
        if got != expected:
            raise UserError(
                f"cost.table {path}: {key} is {got!r} there but {expected!r} here; measure again"
            )
    known = {
        (record.get("scenario"), record.get("slot"), record.get("variant"))
        for record in records[1:]
    }
    needed = [(variant.slot, variant.name) for variant in distinct_variants(run)] + [
        (CONSTANT, CONSTANT)
    ]
    for scenario, (slot, name) in itertools.product(run.recipe.cost.measured, needed):
        if (scenario, slot, name) not in known:
            raise UserError(
                f"cost.table {path}: has no {slot} {name} in scenario {scenario}; measure again"
            )
    return records


# ---------------------------------------------------------------------------------------- the probe


@dataclass(frozen=True)
class Probe:
    """A model that holds every costly variant alone in a layer, several times over.

    Layer 0 is a parent's block and always runs: engines take the cache's length from it, and stock
    vLLM cannot start with a no-op attention.
    """

    architecture: Architecture
    places: dict[Subblock, list[int]]
    shape: ModelShape

    @classmethod
    def of(cls, variants: Sequence[Subblock], shape: ModelShape, element_bytes: int) -> "Probe":
        costly = [v for v in variants if v.kind != "no_op"]
        parent_bytes = element_bytes * Architecture.of_parent(shape).parameters(shape)
        copy_bytes = element_bytes * sum(shape.parameters(v) for v in costly)
        copies = min(
            shape.num_hidden_layers, max(1, int(max(parent_bytes, PROBE_BYTES) / copy_bytes))
        )
        blocks = [shape.parent_block]
        places: dict[Subblock, list[int]] = {v: [] for v in costly}
        for variant in costly * copies:
            places[variant].append(len(blocks))
            no_op = FFN("no_op") if isinstance(variant, Attention) else Attention("no_op")
            alone = (
                Block(variant, no_op) if isinstance(variant, Attention) else Block(no_op, variant)
            )  # type: ignore[arg-type]
            blocks.append(alone)
        return cls(Architecture(tuple(blocks)), places, shape)

    def layers_of(self, architecture: Architecture, rng: random.Random) -> list[int]:
        """Layers of the probe that make up an architecture, whose own layer 0 must be the parent's;
        random copies.
        """
        left: dict[Subblock, list[int]] = {}
        chosen = [0]
        for block in architecture.blocks[1:]:
            for variant in (block.attention, block.ffn):
                if variant.kind == "no_op":
                    continue
                if not left.get(variant):
                    left[variant] = rng.sample(self.places[variant], len(self.places[variant]))
                chosen.append(left[variant].pop())
        return chosen

    def random(self, rng: random.Random) -> Architecture:
        """A random share of the parent's attentions and another of its FFNs replaced, a random
        share of these by no-ops: as uneven as what a search chooses, which may drop all attentions
        and keep all FFNs."""
        parent = self.shape.parent_block

        def half(own: Subblock, no_op: Subblock) -> list[Subblock]:
            others = [v for v in self.places if type(v) is type(own)]
            replaced, dropped = (rng.betavariate(0.5, 0.5) for _ in range(2))
            return [
                own
                if rng.random() > replaced
                else no_op
                if rng.random() < dropped
                else rng.choice(others)
                for _ in range(self.shape.num_hidden_layers - 1)
            ]

        halves = zip(
            half(parent.attention, Attention("no_op")), half(parent.ffn, FFN("no_op")), strict=True
        )
        return Architecture((parent, *(Block(attention, ffn) for attention, ffn in halves)))  # type: ignore[arg-type]

    @property
    def series(self) -> list[list[tuple[int, float]]]:
        """The GQA and the gated variants, where there are enough of them to lie on a line or off
        it.
        """
        sizes = [
            (index, v, getattr(v, "kv_heads", getattr(v, "intermediate_size", 0)))
            for index, v in enumerate(self.places)
        ]
        kinds = [
            [(index, float(size)) for index, v, size in sizes if v.kind == kind]
            for kind in ("gqa", "gated")
        ]
        return [kind for kind in kinds if len(kind) > 2]

    def counts(self, architecture: Architecture) -> list[int]:
        """How often each variant occurs, in the order of `places`, and last 1 for the constant."""
        parts = [variant for block in architecture for variant in (block.attention, block.ffn)]
        return [*(parts.count(variant) for variant in self.places), 1]


def write_checkpoint(run: Run, folder: Path, architecture: Architecture) -> None:
    """An architecture as a checkpoint with random weights: cost does not depend on values."""
    config = run.parent.child_config(
        architecture, layers=()
    )  # full attention everywhere: windows cost less
    with torch.device("meta"):
        names = {n: t.shape for n, t in child.PuzzleForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {
        n: torch.randn(size, generator=generator).mul_(0.02).to(config.dtype)
        for n, size in names.items()
    }
    child.save(
        folder, config, architecture, state, run.parent.folder, "Random weights, for measuring.\n"
    )


# ---------------------------------------------------------------------------------------- measuring


Series = Sequence[Sequence[tuple[int, float]]]  # unknowns of one kind: (index, size)


@dataclass
class Samples:
    """What one phase has shown: counts of variants and the seconds of a prefill or of a decode
    step.
    """

    counts: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, counts: list[int], seconds: float) -> None:
        self.counts.append(counts)
        self.seconds.append(seconds)

    def fit(self, series: Series = ()) -> tuple[np.ndarray, np.ndarray]:
        """(seconds of every unknown, their standard errors): least squares of relative errors.

        Within a series the seconds of a variant are expected on a straight line in its size, give
        or take `OFF_THE_LINE` of the series' mean: eleven widths then need hardly more samples than
        two. Samples beyond three robust standard deviations are other people's work on the machine
        and do not count.
        """
        x, y = np.array(self.counts, dtype=float), np.array(self.seconds)
        x = x / y[:, None]
        kept, sigma = np.ones(len(y), dtype=bool), 0.05
        means = [np.median(y) / np.abs(self.counts).sum(axis=1).max()] * len(series)
        for _ in range(6):
            prior = [
                sigma / (OFF_THE_LINE * m) * _off_line(own, x.shape[1])
                for m, own in zip(means, series, strict=True)
            ]
            rows = np.vstack([x[kept], *prior])
            rights = np.concatenate([np.ones(kept.sum()), np.zeros(len(rows) - kept.sum())])
            beta = np.linalg.lstsq(rows, rights, rcond=None)[0]
            residual = x @ beta - 1
            sigma = max(1.48 * float(np.median(np.abs(residual[kept]))), 1e-12)
            kept = np.abs(residual) <= 3 * sigma + 1e-9
            means = [max(float(beta[[index for index, _ in own]].mean()), 1e-12) for own in series]
        variance = residual[kept].var() * np.linalg.pinv(rows.T @ rows).diagonal()
        return beta, np.sqrt(variance.clip(min=0.0))


def _off_line(own: Sequence[tuple[int, float]], unknowns: int) -> np.ndarray:
    """Rows that measure how far the values of a series lie off their best straight line, [len(own),
    unknowns].
    """
    line = np.array([[1.0, size] for _, size in own])
    rows = np.zeros((len(own), unknowns))
    rows[:, [index for index, _ in own]] = np.eye(len(own)) - line @ np.linalg.pinv(line)
    return rows


def element_bytes(run: Run) -> int:
    return torch.empty(0, dtype=getattr(torch, serving_dtype(run))).element_size()


def measure(run: Run, folder: Path, path: Path) -> None:
    """Measure scenario by scenario; what an interrupted stage has measured stays."""
    engine, scenarios = run.engine, run.recipe.cost.measured
    probe = Probe.of(distinct_variants(run), run.parent.shape, element_bytes(run))
    kept = artifacts.read_jsonl(path) or [header(run)]
    done = {record["scenario"] for record in kept[1:]}
    if not (folder / "probe" / "config.json").exists():
        write_checkpoint(run, folder / "probe", probe.architecture)
    for name, scenario in scenarios.items():
        if name in done:
            continue
        # a dtype of its own choice would be the engine's, not the one that costs are counted in
        served = scenario.model_copy(update={"dtype": serving_dtype(run)})
        run.release_models()
        log = run.folder / "logs" / f"{engine.NAME}-cost-{name}.log"
        with engine.open_session(
            folder / "probe", served, log, run.recipe.cost.device_sheet, True
        ) as session:
            kept += [
                {"scenario": name} | record
                for record in _measure_scenario(run, probe, session, name, served)
            ]
        artifacts.write_jsonl(path, kept)
    shutil.rmtree(folder / "probe")


def _measure_scenario(
    run: Run, probe: Probe, session: Session, name: str, scenario: ScenarioConfig
) -> list[dict[str, Any]]:
    """Rounds of a parent's batch, one of many architectures and prefills of others, until precise
    or out of time.
    """
    settings, rng = run.recipe.cost, random.Random(0)
    parent = Architecture.of_parent(probe.shape)
    prefills, steps, whole = Samples(), Samples(), []
    only_prefill = scenario.model_copy(update={"output_length": 1})
    how = "measuring" if run.engine.MEASURED else "modelling"
    with run.progress.task(
        f"{how} {name} ({scenario}) on {run.engine.NAME}", settings.seconds, "s"
    ) as task:
        began, done = time.monotonic(), 0.0
        for rounds in itertools.count():
            if rounds % PARENT_EVERY == 0:
                whole.append(session.time_batch(scenario, [probe.layers_of(parent, rng)]))
            timing = _time_many(probe, session, scenario, rng, prefills, steps)
            for _ in range(min(8, max(1, int(timing.total_s / timing.prefill_s)))):
                architecture = probe.random(rng)
                single = session.time_batch(only_prefill, [probe.layers_of(architecture, rng)])
                prefills.add(probe.counts(architecture), single.prefill_s)
            if rounds < WARM_UPS:
                prefills, steps, whole = Samples(), Samples(), []
            elapsed = min(time.monotonic() - began, settings.seconds)
            task.advance(elapsed - done)
            done = elapsed
            enough = len(whole) >= 3 and _enough(probe, prefills, steps, scenario)
            if enough and (
                done >= settings.seconds
                or _error(probe, prefills, steps, scenario) < settings.precision
            ):
                return _records(run, probe, session, scenario, prefills, steps, whole)
    raise AssertionError("unreachable")


def _time_many(
    probe: Probe,
    session: Session,
    scenario: ScenarioConfig,
    rng: random.Random,
    prefills: Samples,
    steps: Samples,
) -> Timing:
    """One batch: a random architecture in the prefill, another in every `HOLD` decode steps."""
    held = max(1, min(HOLD, scenario.output_length - 1))
    shown = [probe.random(rng) for _ in range(1 + -(-(scenario.output_length - 1) // held))]
    layers = [probe.layers_of(architecture, rng) for architecture in shown]
    plan = layers[:1] + [chosen for chosen in layers[1:] for _ in range(held)]
    timing = session.time_batch(scenario, plan)
    prefills.add(probe.counts(shown[0]), timing.prefill_s)
    for index, architecture in enumerate(shown[1:]):
        own = timing.steps_s[index * held : (index + 1) * held]
        settled = own[SETTLE:] or own[-1:]
        if settled:
            steps.add(probe.counts(architecture), min(settled))
    return timing


def _enough(probe: Probe, prefills: Samples, steps: Samples, scenario: ScenarioConfig) -> bool:
    least = LEAST_SAMPLES * (len(probe.places) + 1)
    return len(prefills.seconds) >= least and (
        scenario.output_length == 1 or len(steps.seconds) >= least
    )


def _fits(
    probe: Probe, prefills: Samples, steps: Samples, scenario: ScenarioConfig
) -> tuple[np.ndarray, ...]:
    """(prefill seconds, decode seconds, standard error of their sum) of every unknown, for a whole
    batch.
    """
    prefill, prefill_error = prefills.fit(probe.series)
    decode, decode_error = (
        steps.fit(probe.series)
        if steps.seconds
        else (np.zeros_like(prefill), np.zeros_like(prefill))
    )
    count = scenario.output_length - 1
    return prefill, count * decode, np.hypot(prefill_error, count * decode_error)


def _error(probe: Probe, prefills: Samples, steps: Samples, scenario: ScenarioConfig) -> float:
    """The largest standard error of a variant, as a share of a parent's block."""
    prefill, decode, error = _fits(probe, prefills, steps, scenario)
    variants = list(probe.places)
    block = [
        variants.index(v)
        for v in (probe.shape.parent_block.attention, probe.shape.parent_block.ffn)
    ]
    return float(error[:-1].max() / (prefill + decode)[block].sum())


def _records(
    run: Run,
    probe: Probe,
    session: Session,
    scenario: ScenarioConfig,
    prefills: Samples,
    steps: Samples,
    whole: list[Timing],
) -> list[dict[str, Any]]:
    prefill, decode, error = _fits(probe, prefills, steps, scenario)
    parent = np.array(probe.counts(Architecture.of_parent(probe.shape)))
    measured = [
        statistics.median(getattr(t, part) for t in whole) for part in ("prefill_s", "decode_s")
    ]
    scales = [
        m / p if p else 1.0
        for m, p in zip(measured, (parent @ prefill, parent @ decode), strict=True)
    ]
    prefill, decode = prefill * scales[0], decode * scales[1]
    element = element_bytes(run)
    unknowns = {v: index for index, v in enumerate(probe.places)}
    records: list[dict[str, Any]] = []
    for variant in distinct_variants(run):
        index = unknowns.get(variant)
        page = session.pages[probe.places[variant][0]] if index is not None else (1, 0)
        parameters = probe.shape.parameters(variant)
        cost = Cost(
            prefill_s=max(0.0, float(prefill[index])) if index is not None else 0.0,
            decode_s=max(0.0, float(decode[index])) if index is not None else 0.0,
            parameters=parameters,
            parameter_bytes=parameters * element,
            kv_cache_bytes=cache_bytes([page], scenario),
        )
        record = {"slot": variant.slot, "variant": variant.name, **asdict(cost)}
        records.append(record | {"stderr_s": float(error[index]) if index is not None else 0.0})
    parameters = probe.shape.constant_parameters
    constant = Cost(float(prefill[-1]), float(decode[-1]), parameters, parameters * element)
    totals = [t.total_s for t in whole]
    about = {
        "stderr_s": float(error[-1]),
        "prefill_scale": scales[0],
        "decode_scale": scales[1],
        "prefill_samples": len(prefills.seconds),
        "decode_samples": len(steps.seconds),
        "parent_batches": len(whole),
        "noise": statistics.pstdev(totals) / statistics.fmean(totals),
    }
    return [*records, {"slot": CONSTANT, "variant": CONSTANT, **asdict(constant), **about}]


Served = tuple[Path, ScenarioConfig]


def time_in_turn(
    run: Run, served: Sequence[Served], repeats: int, on_batch: Callable[[], None], log: str
) -> tuple[list[list[Timing]], list[int]]:
    """Serve checkpoints side by side and time them A B A B ...; the first rounds warm up and do not
    count.

    Also the bytes of KV cache that the engine allocates to each for its whole batch.
    """
    settings, engine, dtype = run.recipe.cost, run.engine, serving_dtype(run)
    served = [(folder, scenario.model_copy(update={"dtype": dtype})) for folder, scenario in served]
    run.release_models()
    sessions: list[Session] = []
    try:
        for index, (folder, scenario) in enumerate(served):
            path = run.folder / "logs" / f"{engine.NAME}-{log}-{index}.log"
            sessions.append(
                engine.open_session(folder, scenario, path, settings.device_sheet, False)
            )
        timings: list[list[Timing]] = [[] for _ in sessions]
        for repeat in range(repeats + WARM_UPS):
            for session, kept, (_, scenario) in zip(sessions, timings, served, strict=True):
                timing = session.time_batch(scenario)
                if repeat >= WARM_UPS:
                    kept.append(timing)
            on_batch()
        caches = [
            cache_bytes(session.pages, s) for session, (_, s) in zip(sessions, served, strict=True)
        ]
    finally:
        for session in sessions:
            session.__exit__(None, None, None)
    return timings, caches


def cache_bytes(pages: Sequence[tuple[int, int]], scenario: ScenarioConfig) -> int:
    """What a batch takes at full length, in whole pages of (tokens, bytes)."""
    length = scenario.input_length + scenario.output_length
    return scenario.batch_size * sum(-(-length // tokens) * size for tokens, size in pages)


@dataclass(frozen=True)
class Paired:
    """A child against the parent, batch by batch in turn: medians of each, and of the ratios of the
    pairs.
    """

    parent: dict[str, float]
    child: dict[str, float]
    speedup: float  # of throughput
    speedups: list[float]
    latency_ratio: float
    time_to_first_token_ratio: float


def measure_pair(
    run: Run,
    child_folder: Path,
    scenarios: tuple[ScenarioConfig, ScenarioConfig],
    pairs: int,
    log: str,
) -> Paired:
    """`scenarios`: the parent's and the child's; with a batch sweep they differ in the batch size."""
    served = list(zip((run.parent.folder, child_folder), scenarios, strict=True))
    name = f"parent against child on {run.engine.NAME} ({scenarios[1]})"
    with run.progress.task(name, pairs + WARM_UPS, "pairs") as task:
        timings, caches = time_in_turn(run, served, pairs, task.advance, log)
    tokens = [s.batch_size * s.output_length for s in scenarios]

    def figures(side: int) -> dict[str, float]:
        total = statistics.median(t.total_s for t in timings[side])
        prefill = statistics.median(t.prefill_s for t in timings[side])
        return {
            "latency_s": total,
            "time_to_first_token_s": prefill,
            "throughput_tok_per_s": tokens[side] / total,
            "kv_cache_bytes": caches[side],
        }

    latencies = [c.total_s / p.total_s for p, c in zip(*timings, strict=True)]
    firsts = [c.prefill_s / p.prefill_s for p, c in zip(*timings, strict=True)]
    speedups = [tokens[1] / tokens[0] / ratio for ratio in latencies]
    medians = (statistics.median(values) for values in (latencies, firsts))
    return Paired(figures(0), figures(1), statistics.median(speedups), speedups, *medians)


# ------------------------------------------------------------------------------------------ reading


def read(run: Run, scenario: str = "main") -> CostTable:
    """The table of one scenario. Raises `UserError` with one line for a figure that is missing or
    impossible.
    """
    path = run.stage_folder("cost") / "costs.jsonl"
    head, *records = artifacts.read_jsonl(path)
    records = [record for record in records if record.get("scenario") == scenario]
    fields = tuple(Cost.__dataclass_fields__)
    variants = {}
    for record, name in itertools.product(records, fields):
        value = record.get(name)
        if (
            not isinstance(value, int | float)
            or not math.isfinite(value)
            or (value < 0 and record["slot"] != CONSTANT)
        ):
            where = f"{record.get('slot')} {record.get('variant')}"
            raise UserError(
                f"{path}: {where}: {name} is {value!r}; expected a number of at least 0"
            )
    for record in records:
        variants[record["slot"], record["variant"]] = Cost(*(record[name] for name in fields))
    needed = [(v.slot, v.name) for v in distinct_variants(run)] + [(CONSTANT, CONSTANT)]
    for slot, name in needed:
        if (slot, name) not in variants:
            raise UserError(
                f"{path}: scenario {scenario} has no {slot} {name}; run `puzzle cost` again"
            )
    constant = variants.pop((CONSTANT, CONSTANT))
    return CostTable(
        head, ScenarioConfig.model_validate(head["scenarios"][scenario]), variants, constant
    )
