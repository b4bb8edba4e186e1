"""What `evaluate` writes: the quality of parent, child and uptrained child, and their speed.

`results.json` holds what people ask for (docs/results.md describes it); `<model>.quality.json` what
each model has shown document by document and question by question, written when it is finished, so
that an interrupted evaluation does not repeat a model, and two children can be compared.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from puzzle.artifacts import Record
from puzzle.assemble.measured import Measured
from puzzle.cost.table import CostHeader
from puzzle.engines.intervals import Interval
from puzzle.engines.turns import Measurement
from puzzle.evaluate import EVALUATE
from puzzle.evaluate.bootstrap import Buckets, UnitSums
from puzzle.model.architecture import Architecture
from puzzle.search.answers import Figures
from puzzle.search.promise import Verdict
from puzzle.stage import Job

RESULTS = "results.json"
GROWS = 1.0  # times the KL of the first positions, from which on a child is said to lose context
Model = Literal["parent", "child", "uptrained"]
MODELS: tuple[Model, ...] = get_args(Model)


class Quality(Record):
    """Means per token on test text, against the parent, each with its 95 % interval."""

    kl: Interval  # KL(parent || model), nats per token
    lm_loss: Interval  # cross entropy of the next token, nats per token
    perplexity: Interval  # exp of it
    top1: Interval  # accuracies
    top5: Interval
    top10: Interval
    cosine: Interval  # 1 - cos of the final hidden states

    @classmethod
    def of(cls, text: UnitSums) -> "Quality":
        """From what a model has shown."""
        means = {metric: text.mean(metric) for metric in text.metrics}
        # rounding may take a KL of 0 just below it
        means["kl"] = each(means["kl"], lambda value: max(0.0, value))
        return cls(**means, perplexity=each(means["lm_loss"], math.exp))


def each(interval: Interval, function: Callable[[float], float]) -> Interval:
    """A growing function of an estimate and of both ends of its interval."""
    low, value, high = map(function, (interval.low, interval.value, interval.high))
    return Interval(value=value, low=low, high=high)


class ModelQuality(Record):
    """`<model>.quality.json`: what one model has shown, unit by unit."""

    text: UnitSums
    by_position: Buckets
    right: dict[str, list[bool]]  # by task, of each question whether the answer was right
    samples: list[str]  # what it wrote


class PositionCurve(Record):
    """Quality by position in a long sequence; see `context.py`."""

    ends: list[int]  # a bucket holds the positions from the end of the one before it
    kl: list[Interval]  # nats per token
    lm_loss: list[Interval]
    growth: Interval | None  # the KL of the last bucket over that of the first

    @classmethod
    def of(cls, buckets: Buckets) -> "PositionCurve":
        """From what a model has shown."""
        kl, lm_loss = (buckets.mean(name) for name in ("kl", "lm_loss"))
        return cls(ends=buckets.ends, kl=kl, lm_loss=lm_loss, growth=buckets.growth())

    @property
    def loses_context(self) -> bool:
        """Whether the loss of quality surely grows with the context."""
        return self.growth is not None and self.growth.low > GROWS


class ModelResult(Record):
    """A model's quality and size."""

    quality: Quality
    retention: Interval | None  # top-1 accuracy over the parent's
    by_position: PositionCurve
    parameters: int
    kv_cache_bytes_per_token: int


class TaskResult(Record):
    """One task: the accuracy (or another metric) of all three models."""

    name: str
    source: Literal["local", "score.task", "lm-eval"]
    questions: int | None  # of lm-eval's tasks its own files say it
    chance: float | None  # what guessing gets right, where that is known
    parent: Interval
    child: Interval
    uptrained: Interval

    def in_words(self, value: Interval) -> str:
        """`71.9 % (56.2 to 84.4)`, or a number where it is no share."""
        is_share = self.source != "lm-eval" or 0 <= value.value <= 1
        form, unit, times = (".1f", " %", 100) if is_share else (".4g", "", 1)
        ends = (
            ""
            if value.low == value.high
            else (f" ({times * value.low:{form}} to {times * value.high:{form}})")
        )
        return f"{times * value.value:{form}}{unit}{ends}"

    @property
    def at_chance(self) -> bool:
        """Whether the parent itself is not surely better than guessing."""
        return self.chance is not None and self.parent.low <= self.chance


class SampleResult(Record):
    """A piece of test text, and how the models go on from its beginning."""

    prompt: str
    text: str  # how it goes on itself
    parent: str
    child: str
    uptrained: str


class Results(Record):
    """`results.json`."""

    parent: ModelResult
    child: ModelResult
    uptrained: ModelResult
    evaluated_tokens: int  # of test text, that quality is measured on
    sources: list[str]  # of the corpus
    from_parent: bool  # whether some of the test text was written by the parent
    tasks: list[TaskResult]
    samples: list[SampleResult]
    architecture: list[str]
    batch_size: int  # of the main scenario
    predicted_parent: Figures  # in the main scenario
    predicted_child: Figures
    served: Measured  # the finished child beside the parent
    costs: CostHeader

    @property
    def speed(self) -> Measurement | None:
        """The main scenario's measurement; None where the place is on another machine."""
        main = self.served.scenarios.get("main")
        return None if main is None else main.measurement

    @property
    def speedup(self) -> float:
        """Of throughput in the main scenario: measured, or else predicted."""
        return self.predicted_speedup if self.speed is None else self.speed.speedup.value

    @property
    def predicted_speedup(self) -> float:
        """Of throughput in the main scenario."""
        parent = self.predicted_parent.throughput_tok_per_s
        return self.predicted_child.throughput_tok_per_s / parent

    @property
    def speed_word(self) -> str:
        """How the speed-up is known: measured, modelled or predicted."""
        if self.speed is None:
            return "predicted"
        return "measured" if self.costs.measured else "modelled"

    @property
    def blocks(self) -> Architecture:
        """The child's architecture."""
        return Architecture.from_names(self.architecture)

    @property
    def models(self) -> dict[Model, ModelResult]:
        """Parent, child and uptrained child."""
        return {"parent": self.parent, "child": self.child, "uptrained": self.uptrained}

    @property
    def warnings(self) -> list[str]:
        """What a user must know before the child is shipped, a sentence each."""
        curve, told = self.uptrained.by_position, []
        if curve.loses_context and curve.growth is not None:
            told.append(
                f"The child loses more quality the longer the context: its KL is "
                f"{curve.kl[0].value:.3f} nats per token in the first {curve.ends[0]} positions "
                f"and {curve.kl[-1].value:.3f} in positions {curve.ends[-2]:,} to "
                f"{curve.ends[-1]:,}, {curve.growth.with_unit('.1f', ' times')} as much. "
                "Uptraining on longer sequences (uptrain.stages) may mend it."
            )
        if self.from_parent:
            told.append(
                "Some of the test text was written by the parent itself; figures on it say how "
                "well the child imitates, not how well it reads other text."
            )
        return told

    @property
    def verdict(self) -> Verdict:
        """Whether the finished child meets what was asked."""
        return self.served.verdict


def read(job: Job) -> Results:
    """The results of a finished child."""
    return Results.read(job.folder(EVALUATE) / RESULTS)


def quality_path(folder: Path, model: Model) -> Path:
    """Where the quality of a model is kept, in the stage's folder."""
    return folder / f"{model}.quality.json"


def read_quality(job: Job, model: Model) -> ModelQuality:
    """What a model of a finished child has shown, unit by unit."""
    return ModelQuality.read(quality_path(job.folder(EVALUATE), model))


def missed(job: Job) -> str:
    """The message of a finished child that misses what was asked."""
    hint = "`puzzle child` with the same wish looks for another"
    if job.child.search.architecture is not None:
        hint = "its architecture was given; ask for less of it"
    return (
        f"run {job.run.folder}: the finished child {job.child.name} misses what was asked: "
        f"{read(job).served.failures}; {hint}"
    )


def undecided(job: Job) -> str:
    """The message of a finished child of which no measurement has decided whether it is met."""
    return (
        f"run {job.run.folder}: the child {job.child.name} is finished, but its wish is undecided: "
        f"{read(job).served.failures}; the machine was too busy: raise cost.starts for narrower "
        "intervals"
    )
