"""What a search writes: solutions with their predictions, the frontier, the baselines."""

from pydantic import Field

from puzzle import artifacts
from puzzle.artifacts import Record
from puzzle.cost.table import CostTable
from puzzle.model.architecture import Architecture
from puzzle.search import SEARCH
from puzzle.search.constraints import Constraint, Tables
from puzzle.stage import Job

ANSWER, FRONTIER, BASELINES = "solutions.json", "frontier.jsonl", "baselines.jsonl"


class Figures(Record):
    """Predicted figures of a whole model in one scenario."""

    throughput_tok_per_s: float
    user_throughput_tok_per_s: float  # of one sequence after its first token; 0 for one token
    latency_s: float
    time_to_first_token_s: float
    inter_token_latency_s: float  # the mean; 0 for one token
    memory_bytes: int
    parameters: int
    kv_cache_bytes: int

    @classmethod
    def of(cls, table: CostTable, architecture: Architecture) -> "Figures":
        """What a table predicts of an architecture."""
        total, steps = table.predict(architecture), table.scenario.output_length - 1
        return cls(
            throughput_tok_per_s=table.tokens / total.total_s,
            user_throughput_tok_per_s=steps / total.decode_s if steps else 0.0,
            latency_s=total.total_s,
            time_to_first_token_s=total.prefill_s,
            inter_token_latency_s=total.decode_s / steps if steps else 0.0,
            memory_bytes=total.memory_bytes,
            parameters=total.parameters,
            kv_cache_bytes=total.kv_cache_bytes,
        )


class Solution(Record):
    """One architecture: the sum of its scores, and what cannot be better."""

    blocks: list[str]
    objective: float  # the sum of the blocks' losses
    missing: float = 0.0  # what the parameters that it lacks count as, beside the losses or the KL
    target: float | None = None  # the least of what is maximized or minimized; seconds or bytes
    # Of the assembled child on the text for scores, nats per token; None where only sums are known.
    kl: float | None = None
    # What the sum stands for, going by assembled children; None where none were assembled.
    predicted_kl: float | None = None
    bound: float  # proven: no choice has less of the target, or else of objective + missing
    gap: float  # of the same, relative
    seconds: float = Field(default=0.0, exclude=True)  # not in the file: no part of the result
    predicted: dict[str, Figures]  # by scenario

    @property
    def loss(self) -> float:
        """The KL of the assembled child, or the sum where that is not known."""
        return self.objective if self.kl is None else self.kl

    @property
    def rank(self) -> float:
        """What is least in the best solution."""
        return self.missing + self.loss if self.target is None else self.target

    @property
    def architecture(self) -> Architecture:
        """The blocks."""
        return Architecture.from_names(self.blocks)


class SweepPoint(Record):
    """What the search makes least at one batch size of `main`; None where nothing fits."""

    batch_size: int
    objective: float | None


class Answer(Record):
    """`solutions.json`: what was asked and the best architectures for it."""

    constraints: list[Constraint]
    margin: float  # by which timed constraints were aimed at beyond what was asked
    uncertainty: float  # standard error of the best solution's seconds, as a share of them
    # The source of an earlier try that goes on, because nothing better will be tried; or None.
    final: str | None
    batch_size: int  # of the main scenario
    parent_batch_size: int  # where it is fastest, of those swept
    sweep: list[SweepPoint]
    parent: dict[str, Figures]  # by scenario
    solutions: list[Solution]  # best first

    @property
    def best(self) -> Solution:
        """The solution that is made into a child."""
        return self.solutions[0]

    def predicted_speedup(self, scenario: str = "main") -> float:
        """Of the best solution's throughput over the parent's."""
        child, parent = self.best.predicted[scenario], self.parent[scenario]
        return child.throughput_tok_per_s / parent.throughput_tok_per_s


class FrontierPoint(Record):
    """The best sum of scores for one limit of the swept resource."""

    objective: float
    gap: float
    blocks: list[str]
    figures: Figures


class BaselineChoice(Record):
    """What another way of choosing reaches within the same limits; None where nothing fits."""

    name: str
    objective: float | None = None
    blocks: list[str] | None = None
    figures: Figures | None = None


def predict(tables: Tables, architecture: Architecture) -> dict[str, Figures]:
    """Predicted figures in every scenario."""
    return {name: Figures.of(table, architecture) for name, table in tables.items()}


def read(job: Job) -> Answer:
    """The answer that the job's child is made from."""
    return Answer.read(job.folder(SEARCH) / ANSWER)


def read_frontier(job: Job) -> list[FrontierPoint]:
    """The frontier, by falling use of its resource."""
    return artifacts.read_records(job.folder(SEARCH) / FRONTIER, FrontierPoint)


def read_baselines(job: Job) -> list[BaselineChoice]:
    """Every baseline."""
    return artifacts.read_records(job.folder(SEARCH) / BASELINES, BaselineChoice)


def architectures(job: Job) -> list[list[str]]:
    """The blocks of every solution and of every point of the frontier."""
    points = read_frontier(job)
    return [s.blocks for s in read(job).solutions] + [point.blocks for point in points]
