"""Blockwise local distillation: what one variant learns from one batch (paper: section 3).

A trainee sees the parent's activations and learns to give the parent's block output o, from the
block's input x or, where only its FFN is trained, from the parent's attention output h:

    attention a_j:  o' = f_parent(a_j(x))      FFN f_k:  o' = f_k(h)      pair (coupled):  o' = f_k(a_j(x))
    loss = |o' - o|^2 / |o|^2

Trainees are independent: each has its own optimiser, budget, history and checkpoint file, so they
may be trained together or one by one, in any grouping, and come out the same. What all of a layer
share in a batch (`Lesson`) is computed once. The FFN path folds a norm's weight into the
projections that follow: the input then needs no gradient, which leaves out a third of the backward
products (14 instead of 18 FLOPs per weight pair and token).

Shape legend: B batch, S sequence, D hidden, T = B * S.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from puzzle.config import LibraryConfig
from puzzle.model.architecture import FFN, Attention, Block
from puzzle.model.modeling_puzzle import LinearMLP, PuzzleDecoderLayer
from puzzle.training import checkpoint
from puzzle.training.losses import squared_error

# Adam moves every weight by about its learning rate, however small the error that is left, so a
# variant that starts nearly perfect would get worse. Its noise floor grows with the square of the
# rate: the rate falls with the root of the first loss below this one (docs/log.md).
FULL_RATE_NMSE = 0.02


@dataclass
class Trainee:
    """One variant of one layer in training. A half that is None is the parent's and stays as it is."""

    layer: int
    attention: Attention | None
    ffn: FFN | None
    steps: int
    module: PuzzleDecoderLayer | None = None  # None while it lies on disk
    optimizer: torch.optim.Optimizer | None = None
    step: int = 0
    stopped: str = ""
    history: list[dict[str, float]] = field(
        default_factory=list
    )  # one record a chunk: tokens, train, validation

    @property
    def slot(self) -> str:
        return "block" if self.attention and self.ffn else "attention" if self.attention else "ffn"

    @property
    def variant(self) -> str:
        if self.attention and self.ffn:
            return Block(self.attention, self.ffn).name
        return (self.attention or self.ffn).name  # type: ignore[union-attr]

    @property
    def key(self) -> str:
        return f"{self.layer:03d}.{self.slot}.{self.variant}"

    @property
    def done(self) -> bool:
        return bool(self.stopped) or self.step >= self.steps

    @property
    def rate_share(self) -> float:
        """The share of the learning rate that this variant's first validation loss allows."""
        return min(1.0, (self.history[0]["validation"] / FULL_RATE_NMSE) ** 0.5)

    # -------------------------------------------------------------------------------------- on disk

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
        self.recall(path)

    def recall(self, path: Path) -> None:
        """Take only the progress from a checkpoint: no tensors are read."""
        self.step, notes = checkpoint.peek(path)
        self.stopped, self.history = notes["stopped"], notes["history"]

    def save(self, path: Path) -> None:
        assert self.module is not None and self.optimizer is not None
        notes = {"stopped": self.stopped, "history": self.history}
        checkpoint.save(path, self.step, {"variant": self.module}, {"adamw": self.optimizer}, notes)

    def release(self) -> None:
        self.module = self.optimizer = None

    # ------------------------------------------------------------------------------------- learning

    def error(self, lesson: "Lesson") -> torch.Tensor:
        """|o' - o|^2 / |o|^2, a float32 scalar."""
        assert self.module is not None
        if self.attention is None and lesson.foldable:
            return (
                squared_error(ffn_output(self.module, lesson.normed_TD), lesson.ffn_target_TD)
                / lesson.power
            )
        if self.attention is None:
            return (
                squared_error(self.module.feed_forward(lesson.h_BSD), lesson.o_BSD) / lesson.power
            )
        attended = self.module.attention(lesson.x_BSD, **lesson.context)
        second = lesson.parent if self.ffn is None else self.module
        return squared_error(second.feed_forward(attended), lesson.o_BSD) / lesson.power

    def learn(self, lesson: "Lesson", settings: LibraryConfig) -> torch.Tensor:
        """One step; the loss. A gradient that is not finite stops this trainee alone, before it
        does harm.
        """
        assert self.module is not None and self.optimizer is not None
        loss = self.error(lesson)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), settings.gradient_clip)
        if torch.isfinite(norm):
            factor = checkpoint.cosine_schedule(self.step, self.steps, settings.warmup_share)
            checkpoint.set_learning_rate(
                self.optimizer, settings.learning_rate * factor * self.rate_share
            )
            self.optimizer.step()
            self.step += 1
        else:
            self.stopped = f"gradient not finite at step {self.step}"
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def take_stock(
        self, train_loss: float, validation: float, tokens: int, settings: LibraryConfig
    ) -> None:
        """Close a chunk: note the losses and stop where the validation loss no longer falls."""
        self.history.append({"tokens": tokens, "train": train_loss, "validation": validation})
        flat, patience = settings.stop_when_flat, settings.stop_patience
        seen = [record["validation"] for record in self.history]
        if flat and not self.done and len(seen) > patience:
            gains = [
                1 - now / before
                for before, now in zip(seen[-patience - 1 :], seen[-patience:], strict=False)
            ]
            if max(gains) < flat:
                self.stopped = f"validation loss flat after {tokens} tokens"


@dataclass
class Lesson:
    """What the parent's block does with one batch, and what all its variants share of it."""

    parent: PuzzleDecoderLayer
    x_BSD: torch.Tensor
    h_BSD: torch.Tensor
    o_BSD: torch.Tensor
    context: dict[str, Any]

    @classmethod
    @torch.no_grad()
    def of(
        cls, parent: PuzzleDecoderLayer, x_BSD: torch.Tensor, context: dict[str, Any]
    ) -> "Lesson":
        h_BSD = parent.attention(x_BSD, **context)
        return cls(parent, x_BSD, h_BSD, parent.feed_forward(h_BSD), context)

    @cached_property
    def power(self) -> torch.Tensor:
        return torch.linalg.vector_norm(self.o_BSD, dtype=torch.float32).square()

    @property
    def foldable(self) -> bool:
        """Whether an FFN's only norm stands before it, as Llama's."""
        norm = self.parent.post_attention_layernorm
        return (
            norm is not None
            and norm.style == "llama"
            and self.parent.feedforward_output_layernorm is None
        )

    @cached_property
    def normed_TD(self) -> torch.Tensor:
        """h over its root mean square, without the norm's weight, in the dtype of matrix products."""
        norm = self.parent.post_attention_layernorm
        normed = F.rms_norm(
            self.h_BSD.float(), self.h_BSD.shape[-1:], eps=norm.variance_epsilon
        ).flatten(0, 1)
        device = self.h_BSD.device.type
        return (
            normed.to(torch.get_autocast_dtype(device))
            if torch.is_autocast_enabled(device)
            else normed
        )

    @cached_property
    def ffn_target_TD(self) -> torch.Tensor:
        """What an FFN must add to h: o - h."""
        return (self.o_BSD.float() - self.h_BSD.float()).flatten(0, 1)

    def no_op_error(self, slot: str) -> float:
        """The loss of leaving a subblock out, for comparison."""
        out = self.h_BSD if slot == "ffn" else self.parent.feed_forward(self.x_BSD)
        return (squared_error(out, self.o_BSD) / self.power).item()


def ffn_output(module: PuzzleDecoderLayer, normed_TD: torch.Tensor) -> torch.Tensor:
    """What the module's FFN adds to the residual stream, [T, D], its norm's weight folded into the
    projections.
    """
    mlp, scale_D = module.mlp, module.post_attention_layernorm.weight
    if isinstance(mlp, LinearMLP):
        return F.linear(normed_TD, mlp.linear_mlp.weight * scale_D)
    gate = F.linear(normed_TD, mlp.gate_proj.weight * scale_D)
    up = F.linear(normed_TD, mlp.up_proj.weight * scale_D)
    return mlp.down_proj(mlp.act_fn(gate) * up)


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else float("nan")
