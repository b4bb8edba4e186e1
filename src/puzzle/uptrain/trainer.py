"""The training loop of uptraining (paper: section 4.3; one micro-batch: gkd.py).

Muon for the matrices of layers and AdamW for the rest, on float32 weights, products in bf16,
warm-up, then cosine or warm-up-stable-decay. Gradients of micro-batches add up to those of the
batch. A step whose gradient is not finite is skipped and counted. Of several processes each takes
every n-th sequence of every batch, and all losses are means over the full batch, so the curve is
the same however many there are.

Writes: `curve.jsonl`, a checkpoint of the last state, the weights with the best validation KL.

Shape legend: N sequences of a batch, B of a micro-batch, S sequence.
"""

import contextlib
import math
import time
from pathlib import Path

import torch

from puzzle import artifacts
from puzzle.artifacts import Record
from puzzle.config import UptrainConfig
from puzzle.device import Device
from puzzle.model.modeling_puzzle import PuzzleForCausalLM
from puzzle.stage import Job
from puzzle.training import checkpoint, schedules, sharding
from puzzle.training.losses import METRICS
from puzzle.training.muon import Muon
from puzzle.training.offload import HostWeights
from puzzle.training.snapshots import Snapshots
from puzzle.uptrain import UPTRAIN, trained_weights
from puzzle.uptrain.gkd import TERMS, Pair
from puzzle.uptrain.memory import Choice
from puzzle.uptrain.phases import Batches, Phase, phases

VALIDATION_SEQUENCES = 32
CURVE_EVERY = 5  # steps
BETAS = (0.9, 0.95)
CURVE, LAST, BEST = "curve.jsonl", "uptrain", "best"
MUON, ADAMW = "muon", "adamw"


class CurvePoint(Record):
    """One line of `curve.jsonl`. Losses are means over tokens; terms of weight 0 are missing."""

    step: int
    tokens: int
    skipped_steps: int
    losses: dict[str, float]  # of this step's batch
    validation: dict[str, float] | None = None  # metrics on validation text, and retention


class TrainerNotes(Record):
    """What a checkpoint keeps beside weights and moments."""

    skipped: int = 0
    best_kl: float | None = None
    stale: int = 0  # validations since the best one


def read_curve(job: Job) -> list[CurvePoint]:
    """The training curve of a child."""
    return artifacts.read_records(job.folder(UPTRAIN) / CURVE, CurvePoint)


class Trainer:
    """The uptraining of one child in its folder."""

    def __init__(
        self,
        job: Job,
        folder: Path,
        pair: Pair,
        choice: Choice,
        masters: PuzzleForCausalLM | None = None,
    ) -> None:
        """Ready to train.

        Args:
            job: the child's.
            folder: of the stage.
            pair: child and parent.
            choice: how it is done.
            masters: the child in float32 in the host's memory, where the optimiser is there.
        """
        self.job, self.folder, self.pair, self.choice = job, folder, pair, choice
        self.settings = job.child.uptrain
        self.checkpoints = folder / artifacts.UNFINISHED
        self.stored = pair.child if masters is None else masters  # whose weights are kept
        self.learning = [p for p in pair.child.parameters() if p.requires_grad]
        self.host = None if masters is None else HostWeights(masters, pair.child)
        self.optimizers = optimizers(self.stored, self.settings, job.run.device)
        self.skipped, self.best_kl, self.stale = 0, math.inf, 0
        self.snapshots, self.saved_at = Snapshots(self.checkpoints), time.monotonic()

    def train(self) -> None:
        """The loop; goes on from the last checkpoint, whatever number of processes wrote it."""
        with contextlib.closing(self.snapshots):
            self._train()
            self.snapshots.wait()

    def _train(self) -> None:
        settings, schedule = self.settings, phases(self.job)
        steps, batches = schedule[-1].last, self._batches(schedule)
        progress, width = self.job.run.progress, self.job.run.parent.shape.hidden_size
        default = schedules.MUON_RATE if MUON in self.optimizers else schedules.ADAMW_RATE
        peak = schedules.peak(settings.learning_rate, default, width)
        self.pair.child.train()
        start = self._restore()
        done = start
        with progress.task("uptraining", steps * batches.tokens, "tokens") as task:
            task.skip(start * batches.tokens)
            for step in range(start, steps):
                rate = peak * rate_factor(settings, step, steps)
                self._set_learning_rate(rate)
                loss, terms = self._step(batches, step)
                done = step + 1
                is_validation_step = done % settings.validate_steps == 0 or done == steps
                metrics = self._validate(done) if is_validation_step else None
                if metrics is not None or done % CURVE_EVERY == 0:
                    self._record(done, done * batches.tokens, terms, metrics)
                if 0 < settings.patience <= self.stale:
                    progress.say(
                        f"  stopped at step {done}: {self.stale} validations without a better KL"
                    )
                    break
                if done < steps and self._is_due(done):
                    self._save(done)
                task.advance(batches.tokens, f"loss {loss:.4f}")
        if self.skipped == done:
            raise RuntimeError("uptraining diverged: every step was non-finite")

    def _set_learning_rate(self, rate: float) -> None:
        """Muon's, and a share of it for what AdamW steps beside it; where AdamW is alone, its."""
        for name, optimizer in self.optimizers.items():
            is_beside = name == ADAMW and MUON in self.optimizers
            share = schedules.ADAMW_SHARE if is_beside else 1.0
            schedules.set_learning_rate(optimizer, share * rate)

    def _batches(self, schedule: list[Phase]) -> Batches:
        return Batches(self.job, schedule, self.choice.micro_batch_sequences)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        """Float32 weights compute in bf16; sharded ones are gathered in the dtype of products."""
        return contextlib.nullcontext() if sharding.size() > 1 else self.job.run.device.autocast()

    def _step(self, batches: Batches, step: int) -> tuple[float, torch.Tensor]:
        """One optimiser step: (the last micro-batch's loss, `TERMS` of this process [3])."""
        device = self.job.run.device
        terms = torch.zeros(len(TERMS), device=device.torch_device)
        loss = terms.new_zeros(())
        for tokens_BS, share in batches.micro(step):
            with self._autocast():
                loss, micro_terms = self.pair(tokens_BS.to(device.torch_device))
            (loss * share).backward()
            terms += micro_terms * share
        norm = torch.nn.utils.clip_grad_norm_(self.learning, self.settings.gradient_clip)
        if torch.isfinite(checkpoint.gathered(norm)):
            if self.host is not None:
                self.host.step(self.optimizers.values())
            else:
                for optimizer in self.optimizers.values():
                    optimizer.step()
        else:
            self.skipped += 1
        self.pair.child.zero_grad(set_to_none=True)
        return loss.item(), terms

    def _restore(self) -> int:
        """The step to go on from; the curve is cut there."""
        last = self.snapshots.restore(LAST, {"child": self.stored}, self.optimizers)
        if self.host is not None:
            self.host.publish()
        start = 0 if last is None else last.step
        notes = TrainerNotes.model_validate({} if last is None else last.notes)
        self.skipped, self.stale = notes.skipped, notes.stale
        self.best_kl = math.inf if notes.best_kl is None else notes.best_kl
        if sharding.rank() == 0:
            curve = self.folder / CURVE
            artifacts.keep_records(curve, CurvePoint, lambda point: point.step <= start)
        return start

    def _is_due(self, done: int) -> bool:
        """Whether it is time for a checkpoint, by the clock of process 0."""
        settings = self.settings
        if settings.checkpoint_steps is not None:
            return done % settings.checkpoint_steps == 0
        passed = time.monotonic() - self.saved_at
        return sharding.shared(passed >= 60 * settings.checkpoint_minutes)

    def _save(self, step: int) -> None:
        best = None if math.isinf(self.best_kl) else self.best_kl
        notes = TrainerNotes(skipped=self.skipped, best_kl=best, stale=self.stale)
        self.snapshots.save(LAST, step, {"child": self.stored}, self.optimizers, notes.as_json())
        self.saved_at = time.monotonic()

    def _validate(self, step: int) -> dict[str, float]:
        """Measure on validation text; keep the weights where they are the best so far."""
        metrics = self.validation_metrics()
        if metrics["kl"] < self.best_kl:
            self.best_kl, self.stale = metrics["kl"], 0
            if self.settings.keep == "best":
                self.snapshots.save(BEST, step, {"child": self.stored}, {}, {})
        else:
            self.stale += 1
        return metrics

    def validation_metrics(self) -> dict[str, float]:
        """Means of the child's `METRICS` on validation text, and its retention of top-1."""
        self.pair.child.eval()
        run, size = self.job.run, sharding.size()
        tokens_NS = run.corpus["validation"].head(VALIDATION_SEQUENCES)
        sums = torch.zeros(2, len(METRICS), dtype=torch.float64)
        round_rows = self.job.child.evaluate.batch_sequences * size
        device = run.device.torch_device
        for first in range(0, len(tokens_NS), round_rows):
            rank_BS = tokens_NS[first : first + round_rows][sharding.rank() :: size]
            # sharded layers need all processes, also one that has nothing to count
            counted_BS = rank_BS if len(rank_BS) else tokens_NS[:1]
            with torch.no_grad(), self._autocast():
                metrics = torch.stack(self.pair(counted_BS.to(device), metrics=True)).cpu()
            sums += metrics if len(rank_BS) else 0
        sharding.reshard(self.pair)
        self.pair.child.train()
        sums = sharding.summed(sums.to(device))
        child, parent = (sums / tokens_NS[:, 1:].numel()).tolist()
        means = dict(zip(METRICS, child, strict=True))
        means["kl"] = max(0.0, means["kl"])  # rounding may take a KL of 0 just below it
        parent_top1 = parent[METRICS.index("top1")]
        if parent_top1:
            means["retention"] = means["top1"] / parent_top1
        return means

    def _record(
        self, step: int, tokens: int, terms: torch.Tensor, metrics: dict[str, float] | None
    ) -> None:
        """Write a point of the training curve; losses are means over all processes."""
        settings = self.settings
        logits = settings.kl_weight + settings.lm_weight
        weights = (settings.cosine_weight, settings.kl_weight, logits)
        means = (sharding.summed(terms) / sharding.size()).tolist()
        if sharding.rank() != 0:
            return
        losses = {
            name: mean for name, mean, weight in zip(TERMS, means, weights, strict=True) if weight
        }
        point = CurvePoint(
            step=step,
            tokens=tokens,
            skipped_steps=self.skipped,
            losses=losses,
            validation=metrics,
        )
        artifacts.append_record(self.folder / CURVE, point)
        logged = {"training": losses} | ({"validation": metrics} if metrics else {})
        name = f"uptrain-{self.job.child.name}"
        self.job.run.metrics.log(name, step, logged, wandb=settings.wandb)


def optimizers(
    model: PuzzleForCausalLM, settings: UptrainConfig, device: Device
) -> dict[str, torch.optim.Optimizer]:
    """By name, those that step what learns; adapters learn by AdamW alone."""
    learning = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in model.model.layers.parameters() if p.requires_grad and p.ndim == 2]
    if not trained_weights.has_muon(settings):
        matrices = []
    found: dict[str, torch.optim.Optimizer] = {}
    if matrices:
        products = torch.bfloat16 if device.bfloat16 else torch.float32
        found[MUON] = Muon(matrices, products, device.torch_device)
    others = {id(matrix) for matrix in matrices}
    rest = [p for p in learning if id(p) not in others]
    if rest:
        found[ADAMW] = torch.optim.AdamW(rest, betas=BETAS, weight_decay=0.0, fused=True)
    return found


def rate_factor(settings: UptrainConfig, step: int, steps: int) -> float:
    """The share of the learning rate at a step."""
    if settings.schedule == "wsd":
        return schedules.warmup_stable_decay(
            step, steps, settings.warmup_share, settings.decay_share
        )
    return schedules.cosine(step, steps, settings.warmup_share)
