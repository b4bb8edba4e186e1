"""The plan of an uptraining: its steps by sequence length, and the batch of every step."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from puzzle.stage import Job
from puzzle.training import sharding


@dataclass(frozen=True)
class Phase:
    """Steps [first, last) at one sequence length: `batch` sequences of `join` corpus rows each."""

    first: int
    last: int
    join: int
    batch: int


def phases(job: Job) -> list[Phase]:
    """The sequence-length stages in steps. Every batch has the same number of tokens."""
    settings, length = job.child.uptrain, job.run.recipe.corpus.sequence_length
    batch_tokens = settings.batch_sequences * length
    steps = -(-settings.tokens // batch_tokens)
    planned, first, done = [], 0, 0.0
    stages = [(stage.sequence_length, stage.share) for stage in settings.stages]
    for stage_length, share in stages or [(length, 1.0)]:
        done += share
        last = round(done * steps)
        planned.append(Phase(first, last, stage_length // length, batch_tokens // stage_length))
        first = last
    return planned


class Batches:
    """This process's share of every batch, in micro-batches: a pure function of (seed, step)."""

    def __init__(self, job: Job, schedule: list[Phase], micro_rows: int) -> None:
        """`micro_rows`: of the corpus, in a micro-batch."""
        settings, recipe = job.child.uptrain, job.run.recipe
        self.schedule = schedule
        self.tokens = settings.batch_sequences * recipe.corpus.sequence_length  # of a full batch
        train = job.run.corpus["train"]
        self.views = {phase.join: train.view(phase.join, settings.seed) for phase in schedule}
        # BLD used the first batches of the stream; go on behind them, so that fresh text comes
        # first
        self.offset = 0 if settings.seed else -(-recipe.library.tokens // self.tokens)
        self.micro_rows = micro_rows

    def micro(self, step: int) -> Iterator[tuple[torch.Tensor, float]]:
        """(tokens [B, S], their share of what this process does in the step)."""
        phase = next(phase for phase in self.schedule if step < phase.last)
        batch_NS = self.views[phase.join].batch(self.offset + step, phase.batch)
        rank_NS = batch_NS[sharding.rank() :: sharding.size()]
        for tokens_BS in rank_NS.split(max(1, self.micro_rows // phase.join)):
            yield tokens_BS, len(tokens_BS) / len(rank_NS)
