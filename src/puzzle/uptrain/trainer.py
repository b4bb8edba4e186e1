"""The training loop of uptraining (paper: section 4.3; on one micro-batch: gkd.py).

AdamW on float32 weights, bf16 autocast, warm-up, then cosine or warm-up-stable-decay. The gradients
of micro-batches add up to those of the batch. A step whose gradient is not finite is skipped and
counted. Of several processes each takes every n-th sequence of every batch, and all losses are
means over the whole batch, so the curve is the same however many there are.

Writes: `curve.jsonl`, a checkpoint of the last state, the weights with the best validation KL.

Shape legend: N sequences of a batch, B of a micro-batch, S sequence.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from puzzle import artifacts
from puzzle.config import UptrainConfig
from puzzle.run import Run
from puzzle.training import checkpoint, distributed
from puzzle.training.losses import METRICS
from puzzle.uptrain import gkd

VALIDATION_SEQUENCES = 32
CURVE_EVERY = 5


@dataclass(frozen=True)
class Phase:
    """Steps [first, last) at one sequence length: `batch` sequences of `join` rows of the corpus
    each.
    """

    first: int
    last: int
    join: int
    batch: int


@dataclass
class State:
    """What a checkpoint keeps beside weights and moments."""

    skipped: int = 0
    best_kl: float = math.inf
    stale: int = 0  # validations since the best one


def phases(run: Run) -> list[Phase]:
    """The sequence-length stages in steps. Every batch has the same number of tokens."""
    settings, length = run.recipe.uptrain, run.recipe.corpus.sequence_length
    batch_tokens = settings.batch_sequences * length
    asked = [(s.sequence_length, s.tokens) for s in settings.stages] or [(length, settings.tokens)]
    found, first = [], 0
    for own_length, tokens in asked:
        steps = -(-tokens // batch_tokens)
        found.append(Phase(first, first + steps, own_length // length, batch_tokens // own_length))
        first += steps
    return found


def train(run: Run, folder: Path, pair: gkd.Pair) -> None:
    """The loop; goes on from the last checkpoint in `folder`, whatever number of processes wrote
    it.
    """
    settings, student, schedule = run.recipe.uptrain, pair.student.train(), phases(run)
    learning = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    path = folder / checkpoint.FOLDER / "uptrain.safetensors"
    start, notes = checkpoint.restore(path, {"student": student}, {"adamw": optimizer})
    state, steps, batches = State(**notes), schedule[-1].last, Batches(run, schedule)
    if distributed.rank() == 0:
        artifacts.keep_jsonl(folder / "curve.jsonl", lambda record: record["step"] <= start)
    with run.progress.task("uptraining", steps * batches.tokens, "tokens") as task:
        task.skip(start * batches.tokens)
        for step in range(start, steps):
            checkpoint.set_learning_rate(
                optimizer, settings.learning_rate * rate_factor(settings, step, steps)
            )
            terms = torch.zeros(len(gkd.TERMS), device=run.device)
            for tokens_BS, share in batches.micro(step):
                with run.autocast():
                    loss, found = pair(tokens_BS.to(run.device))
                (loss * share).backward()
                terms += found * share
            norm = checkpoint.whole(
                torch.nn.utils.clip_grad_norm_(learning, settings.gradient_clip)
            )
            if torch.isfinite(norm):
                optimizer.step()
            else:
                state.skipped += 1
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            validated = done % settings.validate_steps == 0 or done == steps
            figures = take_stock(run, folder, pair, state, done) if validated else {}
            if validated or done % CURVE_EVERY == 0:
                note(run, folder, done, done * batches.tokens, state, terms, figures)
            if 0 < settings.patience <= state.stale:
                run.progress.say(
                    f"  stopped at step {done}: {state.stale} validations without a better KL"
                )
                break
            if done % settings.checkpoint_steps == 0 and done < steps:
                checkpoint.save(
                    path, done, {"student": student}, {"adamw": optimizer}, asdict(state)
                )
            task.advance(batches.tokens, f"loss {loss.item():.4f}")
    if state.skipped == done:
        raise RuntimeError("uptraining diverged: every step was non-finite")


class Batches:
    """This process's share of every batch, in micro-batches: a pure function of (seed, step)."""

    def __init__(self, run: Run, schedule: list[Phase]) -> None:
        settings, self.schedule = run.recipe.uptrain, schedule
        self.tokens = (
            settings.batch_sequences * run.recipe.corpus.sequence_length
        )  # of a whole batch
        self.views = {
            phase.join: run.corpus["train"].view(phase.join, settings.seed) for phase in schedule
        }
        # BLD used the first batches of the stream; go on where it stopped, so that fresh text comes
        # first
        self.offset = 0 if settings.seed else -(-run.recipe.library.tokens // self.tokens)
        self.micro_rows = settings.micro_batch_sequences or settings.batch_sequences

    def micro(self, step: int) -> Iterator[tuple[torch.Tensor, float]]:
        """(tokens [B, S], their share of what this process does in the step)."""
        phase = next(phase for phase in self.schedule if step < phase.last)
        whole_NS = self.views[phase.join].batch(self.offset + step, phase.batch)
        own_NS = whole_NS[distributed.rank() :: distributed.size()]
        for tokens_BS in own_NS.split(max(1, self.micro_rows // phase.join)):
            yield tokens_BS, len(tokens_BS) / len(own_NS)


def rate_factor(settings: UptrainConfig, step: int, steps: int) -> float:
    if settings.schedule == "wsd":
        return checkpoint.wsd_schedule(step, steps, settings.warmup_share, settings.decay_share)
    return checkpoint.cosine_schedule(step, steps, settings.warmup_share)


def take_stock(run: Run, folder: Path, pair: gkd.Pair, state: State, done: int) -> dict[str, float]:
    """Validate; keep the weights where they are the best so far."""
    figures = validate(run, pair)
    if figures["kl"] < state.best_kl:
        state.best_kl, state.stale = figures["kl"], 0
        if run.recipe.uptrain.keep == "best":
            checkpoint.save(
                folder / checkpoint.FOLDER / "best.safetensors", done, {"student": pair.student}, {}
            )
    else:
        state.stale += 1
    return figures


def validate(run: Run, pair: gkd.Pair) -> dict[str, float]:
    """Means per token of the child's `METRICS` on held-out text, and its retention of the parent's
    top-1 accuracy.
    """
    pair.student.eval()
    tokens_NS, size = run.corpus["validation"].head(VALIDATION_SEQUENCES), distributed.size()
    sums = torch.zeros(2, len(METRICS), dtype=torch.float64)
    round_rows = run.recipe.evaluate.batch_sequences * size
    for first in range(0, len(tokens_NS), round_rows):
        own_BS = tokens_NS[first : first + round_rows][distributed.rank() :: size]
        with (
            torch.no_grad(),
            run.autocast(),
        ):  # sharded layers need all processes, also one that has nothing to count
            found = torch.stack(
                pair((own_BS if len(own_BS) else tokens_NS[:1]).to(run.device), metrics=True)
            ).cpu()
        sums += found if len(own_BS) else 0
    distributed.reshard(pair)
    pair.student.train()
    means, parent = (distributed.summed(sums.to(run.device)) / tokens_NS[:, 1:].numel()).tolist()
    figures = dict(zip(METRICS, means, strict=True))
    best = parent[METRICS.index("top1")]
    figures |= {"kl": max(0.0, figures["kl"])} | (
        {"retention": figures["top1"] / best} if best else {}
    )
    return figures


def note(
    run: Run,
    folder: Path,
    step: int,
    tokens: int,
    state: State,
    terms: torch.Tensor,
    figures: dict[str, float],
) -> None:
    """Write a point of the training curve: the terms of this step's loss, means over all processes."""
    settings = run.recipe.uptrain
    logits = settings.kl_weight + settings.lm_weight
    weights = dict(
        zip(gkd.TERMS, (settings.cosine_weight, settings.kl_weight, logits), strict=True)
    )
    means = zip(gkd.TERMS, (distributed.summed(terms) / distributed.size()).tolist(), strict=True)
    losses = {name: value for name, value in means if weights[name]}
    if distributed.rank() == 0:
        record = {"step": step, "tokens": tokens, "skipped_steps": state.skipped} | losses
        record |= {f"validation_{name}": value for name, value in figures.items()}
        artifacts.append_jsonl(folder / "curve.jsonl", record)
        run.curve(
            "uptrain", step, {"training": losses} | ({"validation": figures} if figures else {})
        )
