"""Measuring one scenario: rounds of random architectures until every variant is known precisely.

Hundreds of random architectures are served in real scheduled prefill and decode steps, interleaved
so tightly that the machine's drift cancels. A regression of the steps' times on the counts of
variants gives

- each variant's prefill and decode seconds with a standard error, in the company of other layers
  and warm caches;
- the constant: what a step takes besides its layers (embedding, head, sampling, scheduling). Time
  grows a little faster than the number of layers, because caches fill; the regression is a straight
  line through the region between the parent and a third of it, so the constant is that line's and
  may come out below zero.

Both are scaled so that the parent's whole batches, served in between, come out as measured.
"""

import itertools
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from puzzle.config import ScenarioConfig
from puzzle.cost.probe import Probe
from puzzle.cost.regression import Samples, Vector
from puzzle.cost.table import CONSTANT, Cost, ScenarioFit, VariantCost
from puzzle.engines import Page, Session, Timing, cache_bytes
from puzzle.model.architecture import Subblock
from puzzle.progress import Task

WARM_UPS = 2  # rounds that do not count
PARENT_EVERY = 3  # rounds
STEPS_PER_ARCHITECTURE = 4  # decode steps that one random architecture runs
SETTLING_STEPS = 2  # how many of them warm its caches and do not count
LEAST_PARENT_BATCHES = 3
LEAST_SAMPLES = 4  # of each phase, for each unknown
MOST_PREFILLS = 8  # a round, beside the one of its batch


@dataclass(frozen=True)
class Fit:
    """Seconds of every unknown for a batch, and their standard errors; the last is the constant."""

    prefill: Vector
    decode: Vector
    prefill_error: Vector
    decode_error: Vector

    @property
    def error(self) -> Vector:
        """The standard error of prefill and decode together."""
        return np.hypot(self.prefill_error, self.decode_error)

    def scaled(self, prefill: float, decode: float) -> "Fit":
        """Seconds and errors times a factor each."""
        return Fit(
            self.prefill * prefill,
            self.decode * decode,
            self.prefill_error * prefill,
            self.decode_error * decode,
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
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    prefills: Samples = field(default_factory=Samples)
    steps: Samples = field(default_factory=Samples)
    parent_batches: list[Timing] = field(default_factory=list)

    def run(self, seconds: float, precision: float, task: Task) -> None:
        """Serve rounds until the standard errors are below `precision`, or `seconds` have passed.

        Never less than what a fit needs, even where that takes longer than `seconds`.

        A round is a batch of many architectures and prefills of others; every few rounds the
        parent's own batch comes first.
        """
        began, elapsed = time.monotonic(), 0.0
        for number in itertools.count():
            self._round(with_parent=number % PARENT_EVERY == 0)
            if number < WARM_UPS:
                self.prefills, self.steps, self.parent_batches = Samples(), Samples(), []
            now = min(time.monotonic() - began, seconds)
            task.advance(now - elapsed)
            elapsed = now
            if not self._has_enough_samples():
                continue
            if elapsed >= seconds or self.largest_error() < precision:
                return

    def _round(self, with_parent: bool) -> None:
        if with_parent:
            layers = [self.probe.layers_of(self.probe.reference, self.rng)]
            self.parent_batches.append(self.session.time_batch(self.scenario, layers))
        timing = self._time_many()
        only_prefill = self.scenario.model_copy(update={"output_length": 1})
        as_long = max(1, int(timing.total_s / timing.prefill_s))
        for _ in range(min(MOST_PREFILLS, as_long)):
            architecture = self.probe.random_architecture(self.rng)
            layers = [self.probe.layers_of(architecture, self.rng)]
            single = self.session.time_batch(only_prefill, layers)
            self.prefills.add(self.probe.counts(architecture), single.prefill_s)

    def _time_many(self) -> Timing:
        """One batch: a random architecture for the prefill, then one per few decode steps."""
        probe, decode_steps = self.probe, self.scenario.output_length - 1
        held = max(1, min(STEPS_PER_ARCHITECTURE, decode_steps))
        architectures = [
            probe.random_architecture(self.rng) for _ in range(1 + -(-decode_steps // held))
        ]
        layers = [probe.layers_of(architecture, self.rng) for architecture in architectures]
        held_layers = [indices for indices in layers[1:] for _ in range(held)]
        timing = self.session.time_batch(self.scenario, layers[:1] + held_layers)
        self.prefills.add(probe.counts(architectures[0]), timing.prefill_s)
        for index, architecture in enumerate(architectures[1:]):
            steps_s = timing.steps_s[index * held : (index + 1) * held]
            settled = steps_s[SETTLING_STEPS:] or steps_s[-1:]
            if settled:
                self.steps.add(probe.counts(architecture), min(settled))
        return timing

    def _has_enough_samples(self) -> bool:
        least = LEAST_SAMPLES * (len(self.probe.places) + 1)
        enough_steps = self.scenario.output_length == 1 or len(self.steps.seconds) >= least
        enough_prefills = len(self.prefills.seconds) >= least
        return len(self.parent_batches) >= LEAST_PARENT_BATCHES and enough_prefills and enough_steps

    def fit(self) -> "Fit":
        """What the samples say of every unknown, for a batch."""
        series = self.probe.series
        prefill, prefill_error = self.prefills.fit(series)
        step, step_error = np.zeros_like(prefill), np.zeros_like(prefill)
        if self.steps.seconds:
            step, step_error = self.steps.fit(series)
        count = self.scenario.output_length - 1
        return Fit(prefill, count * step, prefill_error, count * step_error)

    def largest_error(self) -> float:
        """The largest standard error of a variant, as a share of a parent's block."""
        fit, variants = self.fit(), list(self.probe.places)
        block = [variants.index(half) for half in self.probe.shape.widest_block.subblocks]
        return float(fit.error[:-1].max() / (fit.prefill + fit.decode)[block].sum())

    def records(self, variants: Sequence[Subblock]) -> tuple[list[VariantCost], ScenarioFit]:
        """The costs of these variants and of the constant, scaled to the parent's batches."""
        fit = self.fit()
        counts = np.array(self.probe.counts(self.probe.reference))
        scales = (
            _scale([t.prefill_s for t in self.parent_batches], float(counts @ fit.prefill)),
            _scale([t.decode_s for t in self.parent_batches], float(counts @ fit.decode)),
        )
        fit = fit.scaled(*scales)
        unknowns = {variant: index for index, variant in enumerate(self.probe.places)}
        records = []
        for variant in variants:
            index = unknowns.get(variant)
            seconds = (0.0, 0.0, 0.0) if index is None else fit.seconds(index)
            records.append(self._variant_record(variant, seconds))
        constant = self.probe.shape.constant_parameters
        prefill_s, decode_s, stderr_s = fit.seconds(-1)
        cost = Cost(prefill_s, decode_s, constant, constant * self.element_bytes)
        records.append(
            VariantCost(
                scenario=self.name,
                slot=CONSTANT,
                variant=CONSTANT,
                stderr_s=stderr_s,
                **asdict(cost),
            )
        )
        return records, self._fit_record(scales)

    def _variant_record(
        self, variant: Subblock, seconds: tuple[float, float, float]
    ) -> VariantCost:
        places = self.probe.places.get(variant)
        page = self.session.pages[places[0]] if places else Page(1, 0)
        parameters = self.probe.shape.parameters(variant)
        return VariantCost(
            scenario=self.name,
            slot=variant.slot,
            variant=variant.name,
            prefill_s=max(0.0, seconds[0]),
            decode_s=max(0.0, seconds[1]),
            parameters=parameters,
            parameter_bytes=parameters * self.element_bytes,
            kv_cache_bytes=cache_bytes([page], self.scenario),
            stderr_s=seconds[2],
        )

    def _fit_record(self, scales: tuple[float, float]) -> ScenarioFit:
        totals = [timing.total_s for timing in self.parent_batches]
        return ScenarioFit(
            scenario=self.name,
            prefill_scale=scales[0],
            decode_scale=scales[1],
            prefill_samples=len(self.prefills.seconds),
            decode_samples=len(self.steps.seconds),
            parent_batches=len(totals),
            noise=statistics.pstdev(totals) / statistics.fmean(totals),
        )


def _scale(measured_s: list[float], fitted_s: float) -> float:
    return statistics.median(measured_s) / fitted_s if fitted_s else 1.0
