"""What `evaluate` writes: the quality of parent, child and uptrained child, and their speed."""

from puzzle.artifacts import Record
from puzzle.assemble.measured import Measured
from puzzle.cost.table import CostHeader
from puzzle.engines.intervals import Interval
from puzzle.engines.turns import Measurement
from puzzle.evaluate import EVALUATE
from puzzle.evaluate.bootstrap import UnitSums, bootstrap
from puzzle.model.architecture import Architecture
from puzzle.search.answers import Figures
from puzzle.search.promise import Verdict
from puzzle.stage import Job

RESULTS, QUALITY = "results.json", "quality.json"


class Quality(Record):
    """Means per token on test text, against the parent, each with its 95 % interval."""

    kl: Interval  # KL(parent || model), nats per token
    lm_loss: Interval  # cross entropy of the next token, nats per token
    top1: Interval  # accuracies
    top5: Interval
    top10: Interval
    cosine: Interval  # 1 - cos of the final hidden states
    task: Interval | None = None  # accuracy on `score.task`

    @classmethod
    def of(cls, shown: "ModelQuality") -> "Quality":
        """From what a model has shown."""
        means = {metric: shown.text.mean(metric) for metric in shown.text.metrics}
        kl = means["kl"]  # rounding may take a KL of 0 just below it
        means["kl"] = Interval(value=max(0.0, kl.value), low=max(0.0, kl.low), high=kl.high)
        if shown.right is not None:
            columns = [[float(right) for right in shown.right], [1.0] * len(shown.right)]
            means["task"] = bootstrap(columns, lambda sums: sums[0] / sums[1])
        return cls(**means)


class ModelQuality(Record):
    """What one model has shown, unit by unit."""

    text: UnitSums
    right: list[bool] | None  # the answers to the questions of `score.task` that chose nothing


class Qualities(Record):
    """`quality.json`: kept, so that an interrupted measurement does not cost it again.

    Two children that were evaluated on the same text compare by it.
    """

    parent: ModelQuality
    child: ModelQuality
    uptrained: ModelQuality


class ModelResult(Record):
    """A model's quality and size."""

    quality: Quality
    retention: Interval | None  # top-1 accuracy over the parent's
    parameters: int
    kv_cache_bytes_per_token: int


class Results(Record):
    """`results.json`."""

    parent: ModelResult
    child: ModelResult
    uptrained: ModelResult
    evaluated_tokens: int
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
        if self.speed is not None:
            return self.speed.speedup.value
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
    def verdict(self) -> Verdict:
        """Whether the finished child meets what was asked."""
        return self.served.verdict


def read(job: Job) -> Results:
    """The results of a finished child."""
    return Results.read(job.folder(EVALUATE) / RESULTS)


def read_qualities(job: Job) -> Qualities:
    """What the models of a finished child have shown, unit by unit."""
    return Qualities.read(job.folder(EVALUATE) / QUALITY)


def missed(job: Job) -> str:
    """The message of a finished child that misses what was asked."""
    hint = "`puzzle child` with the same wish looks for another"
    if job.child.search.architecture is not None:
        hint = "its architecture was given; ask for less of it"
    return (
        f"run {job.run.folder}: the finished child {job.child.name} misses what was asked: "
        f"{read(job).served.failures}; {hint}"
    )
