"""Measuring one scenario: random architectures until every variant is known precisely.

Hundreds of random architectures are served in real scheduled prefills and turns of decode steps,
interleaved so tightly that the machine's drift cancels. A regression of the steps' times on the
counts of variants gives

- each variant's prefill and decode seconds with a standard error, in the company of other layers
  and warm caches;
- the constant: what a step takes besides its layers (embedding, head, sampling, scheduling). Time
  grows a little faster than the number of layers, because caches fill; the regression is a straight
  line through the region between the parent and a third of it, so the constant is that line's and
  may come out below zero.

Both are scaled so that the parent's own prefills and turns, one in four, come out as measured; or
as they are served, where the engine serves otherwise than a probe runs.
"""

import itertools
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

import numpy as np

from puzzle.config import ScenarioConfig
from puzzle.cost.parts import Part
from puzzle.cost.probe import Probe
from puzzle.cost.regression import Samples, Vector
from puzzle.cost.table import CONSTANT, Cost, ScenarioFit, VariantCost
from puzzle.engines import Page, Session, cache_bytes
from puzzle.engines.intervals import Percentiles, Phase, step_percentiles
from puzzle.engines.turns import settled, turn_lengths
from puzzle.model.architecture import Architecture
from puzzle.progress import Task

WARM_UPS = 2  # batches that do not count
PARENT_SHARE = 0.25  # of prefills and turns
LEAST_OF_THE_PARENT = 8  # prefills and turns
LEAST_SAMPLES = 4  # of each phase, for each unknown
# The same once the time is up, where a sample takes long because it begins with capturing a graph
# and its times are even.
FEWEST_SAMPLES = 2
SERVED_BATCHES = 3  # of the parent as it is served; the first does not count
MOST_PREFILLS = 8  # to the turns of a batch


@dataclass(frozen=True)
class Fit:
    """Seconds of every unknown [U] for a batch, and their covariance [U, U].

    The last unknown is the constant.
    """

    prefill: Vector
    decode: Vector
    prefill_covariance: Vector
    decode_covariance: Vector

    @property
    def error(self) -> Vector:
        """The standard error of prefill and decode together [U]."""
        variance = self.prefill_covariance.diagonal() + self.decode_covariance.diagonal()
        error: Vector = np.sqrt(variance.clip(min=0.0))
        return error

    def scaled(self, prefill: float, decode: float) -> "Fit":
        """Seconds and errors times a factor each."""
        return Fit(
            self.prefill * prefill,
            self.decode * decode,
            self.prefill_covariance * prefill**2,
            self.decode_covariance * decode**2,
        )

    def seconds(self, index: int) -> tuple[float, float, float]:
        """(prefill, decode, standard error of their sum) of one unknown."""
        return float(self.prefill[index]), float(self.decode[index]), float(self.error[index])


@dataclass
class ScenarioMeasurement:
    """A probe served in one scenario, and what it has shown so far."""

    name: str
    probe: Probe
    session: Session
    scenario: ScenarioConfig
    element_bytes: int
    is_captured: bool = False  # graphs are captured for every architecture (`scale_by_served`)
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    prefills: Samples = field(default_factory=Samples)
    steps: Samples = field(default_factory=Samples)
    unused: dict[str, dict[Part, list[Part]]] = field(default_factory=dict)  # `random_model`
    parent: dict[str, list[float]] = field(default_factory=lambda: {"prefill": [], "step": []})
    positions: list[int] = field(default_factory=list)  # in the output, of the parent's turns
    first_tokens: list[float] | None = None  # of the parent as it is served
    workspace_bytes: int = 0  # of the parent

    def run(self, seconds: float, precision: float, task: Task) -> None:
        """Serve batches until the standard errors are below `precision`, or `seconds` have passed.

        Never less than what a fit needs, even where that takes longer than `seconds`.
        """
        began, elapsed = time.monotonic(), 0.0
        if not self.is_captured:
            self._take_workspace()
        for number in itertools.count():
            self._batch()
            if number < WARM_UPS:
                self.prefills, self.steps = Samples(), Samples()
                self.parent, self.positions = {"prefill": [], "step": []}, []
            now = min(time.monotonic() - began, seconds)
            task.advance(now - elapsed)
            elapsed = now
            is_over = elapsed >= seconds
            if not self._has_enough_samples(is_over):
                continue
            if is_over or self.largest_error() < precision:
                return

    def scale_by_served(self, session: Session) -> None:
        """Take the scale and the workspace from the parent (`Probe.reference`) as it is served."""
        self.parent, self.positions = {"prefill": [], "step": []}, []
        for number in range(SERVED_BATCHES):
            session.begin(self.scenario)
            prefills_s = session.advance(1)
            turns = turn_lengths(self.scenario.output_length)
            steps_s = [settled(session.advance(count)) for count in turns]
            if number > 0:
                self.parent["prefill"] += prefills_s
                self.parent["step"] += steps_s
                self.positions += range(len(turns))
        self.first_tokens = list(session.first_tokens)
        self.workspace_bytes = self._workspace_of(session, self.probe.reference)

    def _take_workspace(self) -> None:
        """Serve a batch of the parent, before others: freed memory of all that ran stays taken.

        Where graphs are captured the parent is served alone, which tells it.
        """
        layers = self.probe.layers_of(self.reference, random.Random(0))
        self.session.begin(self.scenario)
        self.session.advance(self.scenario.output_length, layers)
        self.workspace_bytes = self._workspace_of(self.session, self.probe.architecture)

    def _batch(self) -> None:
        """A batch, each turn of its output of another architecture; then more prefills, if any.

        A batch takes one prefill of P seconds and some turns of T seconds. Where all samples have
        the same relative error, the time is spent best with sqrt(P / T) prefills to a batch's turns
        (Neyman's allocation).
        """
        prefill_s, turns = self._prefill(), turn_lengths(self.scenario.output_length)
        turns_s = [count * self._turn(position, count) for position, count in enumerate(turns)]
        if not turns_s:
            return
        prefills = math.sqrt(prefill_s / statistics.fmean(turns_s))
        for _ in range(int(min(prefills, MOST_PREFILLS) - 1 + self.rng.random())):
            self._prefill()

    def _model(self, phase: str) -> list[Part]:
        """A random one, or now and then the parent, by which all are scaled.

        At random, for every so many turns would be the same places in every output.
        """
        if self.rng.random() < PARENT_SHARE:
            return self.reference
        return self.probe.random_model(self.rng, self.unused.setdefault(phase, {}))

    @cached_property
    def reference(self) -> list[Part]:
        """The parent, as the probe can serve it."""
        return self.probe.parts(self.probe.reference)

    def _prefill(self) -> float:
        model = self._model("prefill")
        self.session.begin(self.scenario)
        (seconds,) = self.session.advance(1, self.probe.layers_of(model, self.rng))
        self._add("prefill", self.prefills, model, seconds)
        return seconds

    def _turn(self, position: int, count: int) -> float:
        model = self._model("step")
        steps_s = self.session.advance(count, self.probe.layers_of(model, self.rng))
        self._add("step", self.steps, model, settled(steps_s))
        if model == self.reference:
            self.positions.append(position)
        return settled(steps_s)

    def _add(self, phase: str, samples: Samples, model: list[Part], seconds: float) -> None:
        samples.add(self.probe.counts(model), seconds)
        if model == self.reference:
            self.parent[phase].append(seconds)

    def _has_enough_samples(self, is_over: bool) -> bool:
        each = FEWEST_SAMPLES if is_over and self.is_captured else LEAST_SAMPLES
        least = each * (len(self.probe.places) + 1)
        phases = [(self.prefills, "prefill")]
        if self.scenario.output_length > 1:
            phases.append((self.steps, "step"))
        return all(
            len(samples.seconds) >= least
            and all(map(any, zip(*samples.counts, strict=True)))  # every variant was served
            and (self.is_captured or len(self.parent[phase]) >= LEAST_OF_THE_PARENT)
            for samples, phase in phases
        )

    def fit(self) -> "Fit":
        """What the samples say of every unknown, for a batch."""
        series = self.probe.series
        prefill, of_prefill = self.prefills.fit(series)
        step, of_step = np.zeros_like(prefill), np.zeros_like(of_prefill)
        if self.steps.seconds:
            step, of_step = self.steps.fit(series)
        count = self.scenario.output_length - 1
        return Fit(prefill, count * step, of_prefill, count**2 * of_step)

    def largest_error(self) -> float:
        """The largest standard error of a variant, as a share of a parent's block."""
        fit, unknowns = self.fit(), list(self.probe.places)
        block = [unknowns.index(part) for part in self.reference[:2]]
        return float(fit.error[:-1].max() / (fit.prefill + fit.decode)[block].sum())

    def records(self, needed: Sequence[Part]) -> tuple[list[VariantCost], ScenarioFit]:
        """The costs of these variants and of the constant, scaled to the parent's batches."""
        fit = self.fit()
        counts = np.array(self.probe.counts(self.reference))
        steps = self.scenario.output_length - 1
        scales = (
            _scale(self.parent["prefill"], float(counts @ fit.prefill)),
            _scale([steps * s for s in self.parent["step"]], float(counts @ fit.decode)),
        )
        fit = fit.scaled(*scales)
        unknowns = {part: index for index, part in enumerate(self.probe.places)}
        records = []
        for part in needed:
            index = unknowns.get(part)
            seconds = (0.0, 0.0, 0.0) if index is None else fit.seconds(index)
            records.append(self._variant_record(part, seconds))
        constant = self.probe.shape.constant_parameters
        prefill_s, decode_s, stderr_s = fit.seconds(-1)
        cost = Cost(
            prefill_s,
            decode_s,
            constant,
            constant * self.element_bytes,
            workspace_bytes=self.workspace_bytes,
        )
        records.append(
            VariantCost(
                scenario=self.name,
                slot=CONSTANT,
                variant=CONSTANT,
                stderr_s=stderr_s,
                **asdict(cost),
            )
        )
        return records, self._fit_record(fit, scales)

    def _workspace_of(self, session: Session, architecture: Architecture) -> int:
        """What serving has taken besides weights and KV cache."""
        used = session.memory_bytes()
        if used is None:
            return 0
        weights = architecture.parameters(self.probe.shape) * self.element_bytes
        return max(0, used - weights - cache_bytes(session.pages, self.scenario))

    def _variant_record(self, part: Part, seconds: tuple[float, float, float]) -> VariantCost:
        places = self.probe.places.get(part)
        page = self.session.pages[places[0]] if places else Page(1, 0)
        parameters = self.probe.shape.parameters(part.variant)
        return VariantCost(
            scenario=self.name,
            slot=part.variant.slot,
            variant=part.name,
            prefill_s=max(0.0, seconds[0]),
            decode_s=max(0.0, seconds[1]),
            parameters=parameters,
            parameter_bytes=parameters * self.element_bytes,
            kv_cache_bytes=cache_bytes([page], self.scenario),
            stderr_s=seconds[2],
        )

    def _inter_token(self) -> Percentiles:
        if not self.positions:
            return Percentiles()
        steps, positions = np.array(self.parent["step"]), np.array(self.positions, dtype=float)
        return step_percentiles([Phase(1, steps[:, None], positions)])[0]

    def _fit_record(self, fit: Fit, scales: tuple[float, float]) -> ScenarioFit:
        of_parent = self.parent["step"] or self.parent["prefill"]
        return ScenarioFit(
            scenario=self.name,
            prefill_scale=scales[0],
            decode_scale=scales[1],
            prefill_samples=len(self.prefills.seconds),
            decode_samples=len(self.steps.seconds),
            noise=statistics.pstdev(of_parent) / statistics.fmean(of_parent),
            first_token=Percentiles.of(self.first_tokens or self.session.first_tokens, whole=True),
            inter_token=self._inter_token(),
            unknowns=[*(part.key for part in self.probe.places), (CONSTANT, CONSTANT)],
            prefill_covariance=fit.prefill_covariance.tolist(),
            decode_covariance=fit.decode_covariance.tolist(),
        )


def _scale(measured_s: list[float], fitted_s: float) -> float:
    return statistics.median(measured_s) / fitted_s if measured_s and fitted_s else 1.0
