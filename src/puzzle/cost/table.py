"""The table of costs of a place: records on disk, and predictions of architectures from them.

`header.json` says what the costs are of; `costs.jsonl` has one record per scenario and variant (and
one for the constant: embedding, head, sampling, scheduling), each figure with its unit in the key;
`fits.jsonl` says how well each scenario was measured.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from puzzle import artifacts
from puzzle.artifacts import Inputs, Record
from puzzle.config import ScenarioConfig
from puzzle.cost import COST, parts
from puzzle.cost.parts import Key, Part, Windows
from puzzle.cost.scenarios import served_scenarios
from puzzle.engines import EngineFacts
from puzzle.engines.intervals import Percentiles
from puzzle.errors import UserError
from puzzle.model.architecture import Architecture, Block
from puzzle.stage import Job

CONSTANT: Literal["constant"] = "constant"
COSTS, HEADER, FITS = "costs.jsonl", "header.json", "fits.jsonl"


@dataclass(frozen=True)
class Cost:
    """Resources of a variant, a block or a whole model for one batch of the scenario."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    parameters: int = 0
    parameter_bytes: int = 0
    kv_cache_bytes: int = 0  # of the whole batch at full length
    workspace_bytes: int = 0  # activations, graphs, buffers: what serving takes besides

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.prefill_s + other.prefill_s,
            self.decode_s + other.decode_s,
            self.parameters + other.parameters,
            self.parameter_bytes + other.parameter_bytes,
            self.kv_cache_bytes + other.kv_cache_bytes,
            self.workspace_bytes + other.workspace_bytes,
        )

    @property
    def total_s(self) -> float:
        """Seconds of a batch."""
        return self.prefill_s + self.decode_s

    @property
    def memory_bytes(self) -> int:
        """Weights, KV cache and workspace."""
        return self.parameter_bytes + self.kv_cache_bytes + self.workspace_bytes


class VariantCost(Record):
    """One line of `costs.jsonl`."""

    scenario: str
    slot: Literal["attention", "ffn", "constant"]
    variant: str  # of attention with a window: `gqa_2@4096`
    prefill_s: float
    decode_s: float
    parameters: int
    parameter_bytes: int
    kv_cache_bytes: int
    workspace_bytes: int = 0  # of the constant only
    stderr_s: float  # of prefill and decode seconds together

    @property
    def cost(self) -> Cost:
        """The figures without their names."""
        return Cost(
            self.prefill_s,
            self.decode_s,
            self.parameters,
            self.parameter_bytes,
            self.kv_cache_bytes,
            self.workspace_bytes,
        )


class ScenarioFit(Record):
    """One line of `fits.jsonl`: how one scenario was measured."""

    scenario: str
    prefill_scale: float  # from the regression to the parent as it was measured
    decode_scale: float
    prefill_samples: int
    decode_samples: int
    noise: float  # standard deviation of the parent's steps over their mean
    first_token: Percentiles  # of the parent's batches
    inter_token: Percentiles
    unknowns: list[Key]  # U: the variants that were measured, and the constant
    prefill_covariance: list[list[float]]  # of their seconds [U, U]
    decode_covariance: list[list[float]]


@dataclass(frozen=True)
class Covariance:
    """Of the seconds of prefill and decode, for these unknowns; what is not named is exact."""

    unknowns: Sequence[Key] = ()
    prefill: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    decode: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))

    @classmethod
    def of(cls, fit: ScenarioFit, place: str) -> "Covariance":
        """As a scenario was measured. Raises `UserError` for matrices that are none."""
        count = len(fit.unknowns)
        matrices = []
        for rows in (fit.prefill_covariance, fit.decode_covariance):
            if [len(row) for row in rows] != [count] * count or not np.isfinite(rows).all():
                raise UserError(
                    f"{place}: scenario {fit.scenario}: expected covariances of {count} x {count} "
                    "finite numbers; measure again (`puzzle cost`)"
                )
            matrices.append(np.array(rows, dtype=float).reshape(count, count))
        return cls(fit.unknowns, *matrices)

    def among(self, unknowns: Sequence[Key], phase: str) -> NDArray[np.float64]:
        """Of these, in this order, in `prefill` or `decode`."""
        known = [self.unknowns.index(one) if one in self.unknowns else -1 for one in unknowns]
        matrix: NDArray[np.float64] = np.pad(getattr(self, phase), ((0, 1), (0, 1)))
        return matrix[np.ix_(known, known)]


class CostHeader(Record):
    """What a table must agree on to be used for a run."""

    engine: EngineFacts
    measured: bool
    scenarios: dict[str, ScenarioConfig]  # each with the dtype it is served in
    shape: dict[str, JsonValue]  # of the parent
    windows: list[int | None]  # of every layer, that matter in these scenarios


@dataclass(frozen=True)
class CostTable:
    """Measured or modelled costs in one scenario."""

    header: CostHeader
    scenario: ScenarioConfig
    variants: dict[Key, Cost]
    constant: Cost
    covariance: Covariance = field(default_factory=Covariance, compare=False)
    first_token: Percentiles = field(default_factory=Percentiles)  # over the prefill
    inter_token: Percentiles = field(default_factory=Percentiles)  # over the mean decode step
    noise: float = 0.0  # standard deviation of the parent's steps over their mean

    @property
    def tokens(self) -> int:
        """Output tokens of a batch."""
        return self.scenario.batch_size * self.scenario.output_length

    def window(self, layer: int) -> int | None:
        """The window of a layer's attention; None where it is at least as long as a scenario."""
        return self.header.windows[layer] if self.header.windows else None

    def knows(self, block: Block, layer: int) -> bool:
        """Whether it has the costs of this block in this layer."""
        keys = (part.key for part in parts.of_block(block, self.window(layer)))
        return all(key in self.variants for key in keys)

    def halves(self, block: Block, layer: int) -> list[Cost]:
        """The costs of attention and FFN of one layer."""
        return [self.variants[part.key] for part in parts.of_block(block, self.window(layer))]

    def block(self, block: Block, layer: int) -> Cost:
        """The cost of one layer."""
        attention, ffn = self.halves(block, layer)
        return attention + ffn

    def predict(self, architecture: Architecture) -> Cost:
        """The cost of a whole model."""
        layers = (self.block(block, layer) for layer, block in enumerate(architecture))
        return sum(layers, self.constant)


def windows(job: Job) -> Windows:
    """Of every layer, those that matter at the job's place."""
    return parts.served_windows(job.run.parent.shape.windows, served_scenarios(job).values())


def distinct_parts(job: Job) -> list[Part]:
    """Every variant that occurs in any layer, with the window it has there."""
    layers, of_layers = job.space.layers, windows(job)
    by_layer = zip(layers, of_layers or [None] * len(layers), strict=True)
    return list(
        dict.fromkeys(Part.of(v, window) for layer, window in by_layer for v in layer.subblocks)
    )


def check_complete(
    records: Sequence[VariantCost],
    scenarios: Iterable[str],
    needed: Sequence[Part],
    place: str,
) -> None:
    """Raise `UserError` for a variant without costs in some scenario, or with impossible ones."""
    names = [part.key for part in needed] + [(CONSTANT, CONSTANT)]
    known = {(record.scenario, record.slot, record.variant) for record in records}
    for scenario, (slot, name) in itertools.product(scenarios, names):
        if (scenario, slot, name) not in known:
            raise UserError(
                f"{place}: scenario {scenario} has no {slot} {name}; measure again (`puzzle cost`)"
            )
    for record in records:
        for key, value in asdict(record.cost).items():
            is_impossible = value < 0 and record.slot != CONSTANT
            if is_impossible or not math.isfinite(value):
                raise UserError(
                    f"{place}: {record.slot} {record.variant}: {key} is {value!r}; expected a "
                    "number of at least 0"
                )


def read_header(job: Job) -> CostHeader:
    """What the costs of the job's place are of."""
    return CostHeader.read(job.folder(COST) / HEADER)


def read(job: Job, scenario: str = "main") -> CostTable:
    """The costs in one scenario. Raises `UserError` for figures that are missing or impossible."""
    path = job.folder(COST) / COSTS
    header = read_header(job)
    if scenario not in header.scenarios:
        known = ", ".join(header.scenarios)
        raise UserError(f"{path}: has no scenario {scenario!r}; expected one of {known}")
    records = [r for r in artifacts.read_records(path, VariantCost) if r.scenario == scenario]
    check_complete(records, [scenario], distinct_parts(job), str(path))
    variants: dict[Key, Cost] = {(r.slot, r.variant): r.cost for r in records}
    constant = variants.pop((CONSTANT, CONSTANT))
    fits = artifacts.read_records(path.with_name(FITS), ScenarioFit)
    fit = next((fit for fit in fits if fit.scenario == scenario), None)
    if fit is None:
        raise UserError(
            f"{path.with_name(FITS)}: has no scenario {scenario}; measure again (`puzzle cost`)"
        )
    return CostTable(
        header,
        header.scenarios[scenario],
        variants,
        constant,
        Covariance.of(fit, str(path.with_name(FITS))),
        fit.first_token,
        fit.inter_token,
        fit.noise,
    )


def are_from_elsewhere(job: Job) -> bool:
    """Whether the job's place was measured on another machine, and its folder copied here.

    A child there stays "predicted" until it has been measured there.
    """
    manifest = artifacts.read_manifest(job.folder(COST))
    if job.place.name == "here" or manifest is None or not COST.is_current(job, manifest):
        return False
    try:
        return read_header(job).engine != job.engine.facts
    except UserError:  # the place's engine is not installed here
        return True


def serving_facts(job: Job) -> Inputs:
    """What a child's measured speed depends on; no engine where its place is another machine."""
    return {"engine": None if are_from_elsewhere(job) else job.engine.facts.as_json()}


def read_given(path: Path) -> tuple[CostHeader, list[VariantCost], list[ScenarioFit]]:
    """Another run's table, from the path of its `costs.jsonl`."""
    if not path.is_file():
        raise UserError(f"cost.table {path}: no such file; expected a {COSTS} of an earlier run")
    return (
        CostHeader.read(path.with_name(HEADER)),
        artifacts.read_records(path, VariantCost),
        artifacts.read_records(path.with_name(FITS), ScenarioFit),
    )
