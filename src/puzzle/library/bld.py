"""Blockwise local distillation: what one variant learns from one batch (paper: section 3).

A variant sees the parent's activations and learns to give the parent's block output o, from the
block's input x or, where only its FFN is trained, from the parent's attention output h:

    attention a_j:     o' = f_parent(a_j(x))
    FFN f_k:           o' = f_k(h)
    pair (coupled):    o' = f_k(a_j(x))
    loss = |o' - o|^2 / |o|^2

Trainers are independent: each has its own optimiser, budget, history and checkpoint file, so they
may be run together or one by one, in any grouping, and come out the same. What all variants of a
layer share in a batch (`ParentBatch`) is computed once. The FFN path folds a norm's weight into the
projections that follow: the input then needs no gradient, which leaves out a third of the backward
products (14 instead of 18 FLOPs per weight pair and token).

Shape legend: B batch, S sequence, D hidden, T = B * S.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

from puzzle.artifacts import Record
from puzzle.config import LibraryConfig
from puzzle.library.records import LossPoint
from puzzle.model.architecture import FFN, Attention, Block, Slot, Subblock, file_stem
from puzzle.model.modeling_puzzle import LayerContext, LinearMLP, PuzzleDecoderLayer
from puzzle.training import checkpoint, schedules
from puzzle.training.losses import channel_roots, squared_error

# Adam moves every weight by about its learning rate, however small the error that is left, so a
# variant that starts nearly perfect would get worse. Its noise floor grows with the square of the
# rate: the rate falls with the root of the first loss below this one (docs/log.md).
FULL_RATE_NMSE = 0.02


class TrainerNotes(Record):
    """What a variant's checkpoint keeps beside its tensors."""

    stopped: str
    history: list[LossPoint]


@dataclass
class VariantTrainer:
    """One variant of one layer in training: a subblock, or a block whose halves learn together."""

    layer: int
    variant: Subblock | Block
    steps: int
    module: PuzzleDecoderLayer | None = None  # None while it is on disk
    optimizer: torch.optim.Optimizer | None = None
    step: int = 0
    stopped: str = ""
    history: list[LossPoint] = field(default_factory=list)  # one point a chunk

    @property
    def key(self) -> str:
        """Its name in files, logs and messages: `007.attention.gqa_2`."""
        return file_stem(self.layer, self.variant)

    @property
    def block(self) -> Block:
        """The block that its module is: the variant with a no-op as its other half, or the pair."""
        return self.variant if isinstance(self.variant, Block) else self.variant.alone

    @property
    def done(self) -> bool:
        """Whether its budget is spent or it has stopped early."""
        return bool(self.stopped) or self.step >= self.steps

    @property
    def rate_share(self) -> float:
        """The share of the learning rate that this variant's first validation loss allows."""
        return min(1.0, math.sqrt(self.history[0].validation / FULL_RATE_NMSE))

    # ----------------------------------------------------------------------------------- on disk

    def begin(self, module: PuzzleDecoderLayer) -> None:
        """Go on with the weights of `module` and a fresh optimiser."""
        self.module = module.train()
        self.optimizer = torch.optim.AdamW(
            module.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )

    def restore(self, path: Path, module: PuzzleDecoderLayer) -> None:
        """Take weights, optimiser state and progress from a checkpoint into `module`."""
        self.begin(module)
        assert self.module is not None and self.optimizer is not None
        checkpoint.restore(path, {"variant": self.module}, {"adamw": self.optimizer})
        self.read_progress(path)

    def read_progress(self, path: Path) -> None:
        """Take only the progress from a checkpoint: no tensors are read."""
        self.step, values = checkpoint.peek(path)
        notes = TrainerNotes.model_validate(values)
        self.stopped, self.history = notes.stopped, notes.history

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        assert self.module is not None and self.optimizer is not None
        notes = TrainerNotes(stopped=self.stopped, history=self.history).as_json()
        modules, optimizers = {"variant": self.module}, {"adamw": self.optimizer}
        checkpoint.save(path, self.step, modules, optimizers, notes)

    def release(self) -> None:
        """Free the memory; `restore` goes on."""
        self.module = self.optimizer = None

    # ---------------------------------------------------------------------------------- learning

    def error(self, batch: "ParentBatch") -> torch.Tensor:
        """|o' - o|^2 / |o|^2, a float32 scalar, with the channels' weights (`channel_roots`)."""
        assert self.module is not None
        if isinstance(self.variant, FFN):
            if batch.foldable:
                added_TD = folded_ffn_output(self.module, batch.normed_TD)
                return batch.relative(added_TD, batch.ffn_target_TD)
            return batch.relative(self.module.feed_forward(batch.h_BSD), batch.o_BSD)
        attended_BSD = self.module.attention(batch.x_BSD, **batch.context)
        second = batch.parent if isinstance(self.variant, Attention) else self.module
        return batch.relative(second.feed_forward(attended_BSD), batch.o_BSD)

    def train_step(self, batch: "ParentBatch", settings: LibraryConfig) -> torch.Tensor:
        """One optimiser step; returns the loss.

        A gradient that is not finite stops this variant alone, before it does harm.
        """
        assert self.module is not None and self.optimizer is not None
        loss = self.error(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), settings.gradient_clip)
        if torch.isfinite(norm):
            factor = schedules.cosine(self.step, self.steps, settings.warmup_share)
            width = batch.x_BSD.shape[-1]
            peak = schedules.peak(settings.learning_rate, schedules.LIBRARY_RATE, width)
            rate = peak * factor * self.rate_share
            schedules.set_learning_rate(self.optimizer, rate)
            self.optimizer.step()
            self.step += 1
        else:
            self.stopped = f"gradient not finite at step {self.step}"
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def end_chunk(self, point: LossPoint, settings: LibraryConfig) -> None:
        """Record the losses of a chunk and stop where the validation loss no longer falls."""
        self.history.append(point)
        flat, patience = settings.stop_when_flat, settings.stop_patience
        losses = [earlier.validation for earlier in self.history]
        if not flat or self.done or len(losses) <= patience:
            return
        last = losses[-patience - 1 :]
        gains = [1 - now / before for before, now in itertools.pairwise(last)]
        if max(gains) < flat:
            self.stopped = f"validation loss flat after {point.tokens} tokens"


@dataclass
class ParentBatch:
    """What the parent's block does with one batch, and what all its variants share of it."""

    parent: PuzzleDecoderLayer
    x_BSD: torch.Tensor
    h_BSD: torch.Tensor
    o_BSD: torch.Tensor
    context: LayerContext

    @classmethod
    @torch.no_grad()
    def from_layer(
        cls, parent: PuzzleDecoderLayer, x_BSD: torch.Tensor, context: LayerContext
    ) -> "ParentBatch":
        """Run the parent's block on one batch of its inputs."""
        h_BSD = parent.attention(x_BSD, **context)
        return cls(parent, x_BSD, h_BSD, parent.feed_forward(h_BSD), context)

    @cached_property
    def roots_D(self) -> torch.Tensor:
        """Square roots of the channels' weights."""
        return channel_roots(self.o_BSD)

    @cached_property
    def power(self) -> torch.Tensor:
        """|o|^2 with the channels' weights, a float32 scalar."""
        norm: torch.Tensor = torch.linalg.vector_norm(
            self.o_BSD * self.roots_D, dtype=torch.float32
        )
        return norm.square()

    def relative(self, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The squared error of an output, or of a part of it, relative to `power`."""
        return squared_error(out, target, self.roots_D) / self.power

    @property
    def foldable(self) -> bool:
        """Whether the FFN's only norm stands before it, as Llama's does."""
        norm = self.parent.post_attention_layernorm
        if norm is None or self.parent.feedforward_output_layernorm is not None:
            return False
        return bool(norm.style == "llama")

    @cached_property
    def normed_TD(self) -> torch.Tensor:
        """h over its root mean square, without the norm's weight, in the dtype of products."""
        norm = self.parent.post_attention_layernorm
        assert norm is not None
        size = self.h_BSD.shape[-1:]
        normed = F.rms_norm(self.h_BSD.float(), size, eps=norm.variance_epsilon).flatten(0, 1)
        device = self.h_BSD.device.type
        if torch.is_autocast_enabled(device):
            return normed.to(torch.get_autocast_dtype(device))
        return normed

    @cached_property
    def ffn_target_TD(self) -> torch.Tensor:
        """What an FFN must add to h: o - h."""
        return (self.o_BSD.float() - self.h_BSD.float()).flatten(0, 1)

    def no_op_error(self, slot: Slot) -> float:
        """The loss of leaving a subblock out, for comparison."""
        out = self.h_BSD if slot == "ffn" else self.parent.feed_forward(self.x_BSD)
        return float(self.relative(out, self.o_BSD))


def folded_ffn_output(module: PuzzleDecoderLayer, normed_TD: torch.Tensor) -> torch.Tensor:
    """What the FFN adds to the residual stream [T, D], its norm folded into the projections."""
    mlp, norm = module.mlp, module.post_attention_layernorm
    assert mlp is not None and norm is not None
    scale_D = norm.weight
    if isinstance(mlp, LinearMLP):
        return F.linear(normed_TD, mlp.linear_mlp.weight * scale_D)
    gate = F.linear(normed_TD, mlp.gate_proj.weight * scale_D)
    up = F.linear(normed_TD, mlp.up_proj.weight * scale_D)
    output: torch.Tensor = mlp.down_proj(mlp.act_fn(gate) * up)
    return output


def mean(values: Sequence[float]) -> float:
    """The exact mean; NaN of nothing."""
    return math.fsum(values) / len(values) if values else math.nan
