"""What `evaluate` writes: the quality of parent, child and uptrained child, and their speed."""

from puzzle.artifacts import Record
from puzzle.assemble.measured import Measured
from puzzle.cost.table import CostHeader
from puzzle.engines.turns import Measurement
from puzzle.evaluate import EVALUATE
from puzzle.model.architecture import Architecture
from puzzle.search.answers import Figures
from puzzle.search.promise import Verdict
from puzzle.stage import Job

RESULTS, QUALITY = "results.json", "quality.json"


class Quality(Record):
    """Means per token on held-out text, against the parent."""

    kl: float  # KL(parent || model), nats per token
    lm_loss: float  # cross entropy of the next token, nats per token
    top1: float  # accuracies
    top5: float
    top10: float
    cosine: float  # 1 - cos of the final hidden states
    task: float | None = None  # accuracy on `score.task`


class Qualities(Record):
    """`quality.json`: kept, so that an interrupted measurement does not cost it again."""

    parent: Quality
    child: Quality
    uptrained: Quality


class ModelResult(Record):
    """A model's quality and size."""

    quality: Quality
    retention: float | None  # top-1 accuracy over the parent's
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


def missed(job: Job) -> str:
    """The message of a finished child that misses what was asked."""
    hint = "`puzzle child` with the same wish looks for another"
    if job.child.search.architecture is not None:
        hint = "its architecture was given; ask for less of it"
    return (
        f"run {job.run.folder}: the finished child {job.child.name} misses what was asked: "
        f"{read(job).served.failures}; {hint}"
    )
