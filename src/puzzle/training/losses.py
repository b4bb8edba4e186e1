"""The losses of the paper, and the metrics of scoring and evaluation.

Logits are never held in full: everything over the vocabulary runs in chunks of tokens.

Shape legend: T tokens, B batch, S sequence, D hidden, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from puzzle.device import multiplies_in_bfloat16

HEAD_ROWS = 8192  # of the head that are in float32 at once, where it is not
MOST_ENERGY = 100.0  # of a channel, in medians of all channels


def normalized_mse(child: torch.Tensor, parent: torch.Tensor) -> torch.Tensor:
    """MSE(parent, child) / MSE(parent, 0), a float32 scalar; 0 is perfect.

    Paper: section 3, the BLD loss.
    """
    parent = parent.float()
    return (child.float() - parent).square().mean() / parent.square().mean()


class _SquaredError(torch.autograd.Function):
    """Keeps the difference only, in the child's dtype.

    That is two passes over memory instead of autograd's five.
    """

    @staticmethod
    def forward(
        ctx: Any, child: torch.Tensor, parent: torch.Tensor, roots_D: torch.Tensor
    ) -> torch.Tensor:
        roots_D = roots_D.to(child.dtype)
        difference = (child - parent.to(child.dtype)).mul_(roots_D)
        ctx.save_for_backward(difference, roots_D)
        norm: torch.Tensor = torch.linalg.vector_norm(difference, dtype=torch.float32)
        return norm.square()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        difference, roots_D = ctx.saved_tensors
        return difference * (roots_D * (2 * grad).to(difference.dtype)), None, None


def squared_error(child: torch.Tensor, parent: torch.Tensor, roots_D: torch.Tensor) -> torch.Tensor:
    """Sum of squared differences [..., D], a float32 scalar; no gradient for the parent.

    Args:
        child: what is compared.
        parent: with what.
        roots_D: square roots of the channels' weights, as `channel_roots` has them.
    """
    error: torch.Tensor = _SquaredError.apply(  # type: ignore[no-untyped-call]
        child, parent, roots_D
    )
    return error


def channel_roots(parent: torch.Tensor) -> torch.Tensor:
    """Square roots of the weights of a parent's channels [..., D], float32 [D].

    1 but for massive activations: a channel with more than `MOST_ENERGY` times the median energy
    counts as if it had that much. A few such channels, often at a text's first token only, hold
    nearly all of the squared norm of many LLMs (Sun et al., Massive Activations in Large Language
    Models, arXiv:2402.17762), and an error that is relative to it says nothing of the others.
    """
    energy_D = parent.float().square().flatten(0, -2).sum(0)
    most = MOST_ENERGY * energy_D.median()
    return torch.where((energy_D > most) & (most > 0), most / energy_D, 1.0).sqrt()


def cosine_distance(child_BSD: torch.Tensor, parent_BSD: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of 1 - cos(child, parent), a float32 scalar.

    Paper: section 4.3, the GKD loss of the hidden states.
    """
    return 1 - F.cosine_similarity(child_BSD.float(), parent_BSD.float(), dim=-1).mean()


# Logits of a chunk: 64 MiB of float32 on CPUs, 256 MiB on GPUs
CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}
# Products of fewer tokens are slower. At a vocabulary of 128k a chunk has 523 tokens on a CPU,
# within 6 % of all at once, and 1046 on a GPU: a chunk adds to the gradient of the whole head.
LOSS_ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 27}


@dataclass(frozen=True)
class LogitLoss:
    """The terms over the vocabulary: `kl_weight * KL(parent || child) + lm_weight * LM`.

    The KL is taken at `temperature`. `soft_cap` is the family's `final_logit_softcapping`: both
    sides' logits z become cap * tanh(z / cap).
    """

    kl_weight: float = 1.0
    lm_weight: float = 0.0
    temperature: float = 1.0
    soft_cap: float | None = None
    chunk_elements: int = LOSS_ELEMENTS[
        "cpu"
    ]  # logits of one side that exist at a time, in four buffers


class _DistillationLoss(torch.autograd.Function):
    """The loss and, in the same pass, its gradient.

    That is four matrix products in all, as many as plain torch takes. With z the child's logits, p
    and q the probabilities of parent and child at temperature t, N tokens:

        d KL / dz = t (q - p) / N           (the KL is multiplied by t^2)
        d LM / dz = (softmax(z) - target) / N

    A chunk's dz is turned into gradients of the hidden states and of the head at once, so nothing
    over the vocabulary outlives it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        child_TD: torch.Tensor,
        head_VD: torch.Tensor,
        parent_TD: torch.Tensor | None,
        parent_head_VD: torch.Tensor | None,
        targets_T: torch.Tensor,
        settings: LogitLoss,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        device = child_TD.device.type
        autocast_dtype = torch.get_autocast_dtype(device)
        product_dtype = autocast_dtype if torch.is_autocast_enabled(device) else None
        if product_dtype is None and head_VD.dtype.itemsize == 2:
            product_dtype = head_VD.dtype
        inputs = _Inputs(child_TD, head_VD, parent_TD, parent_head_VD)
        with torch.autocast(device, enabled=False):
            work = _Chunks(inputs, settings, product_dtype, ctx.needs_input_grad[:2])
            for first in range(0, len(child_TD), work.size):
                work.take(slice(first, first + work.size), targets_T)
        ctx.gradients = work.gradients()
        kl, lm = work.kl / len(child_TD), work.lm / len(child_TD)
        total = settings.lm_weight * lm + (settings.kl_weight * kl if settings.kl_weight else 0)
        ctx.mark_non_differentiable(kl, lm)
        return total, kl, lm

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, so they serve once
        if gradients is None:
            raise RuntimeError("the distillation loss can be differentiated once only")
        return (
            *(None if g is None else g.mul_(grads[0].to(g.dtype)) for g in gradients),
            None,
            None,
            None,
            None,
        )


@dataclass(frozen=True)
class _Inputs:
    """Hidden states after the last norm and the head of both sides; the parent's may be missing."""

    child_TD: torch.Tensor
    head_VD: torch.Tensor
    parent_TD: torch.Tensor | None
    parent_head_VD: torch.Tensor | None


class _Chunks:
    """Buffers of `size` tokens' logits, and the sums over the chunks taken so far."""

    def __init__(
        self,
        inputs: _Inputs,
        settings: LogitLoss,
        product_dtype: torch.dtype | None,
        needs_grad: tuple[bool, bool],
    ) -> None:
        """`product_dtype` None: that of the sums. `needs_grad`: of the hidden states, the head."""
        child_TD, head_VD, device = inputs.child_TD, inputs.head_VD, inputs.child_TD.device
        self.settings, self.tokens = settings, len(child_TD)
        self.dtype = torch.float64 if child_TD.dtype == torch.float64 else torch.float32
        self.product_dtype = product_dtype or self.dtype
        self.size = max(1, min(len(child_TD), settings.chunk_elements // len(head_VD)))
        self.child_TD = child_TD.to(self.product_dtype)
        self.head_VD = head_VD.to(self.product_dtype)
        if settings.kl_weight:
            assert inputs.parent_TD is not None and inputs.parent_head_VD is not None
            self.parent_TD = inputs.parent_TD.to(self.product_dtype)
            self.parent_head_VD = inputs.parent_head_VD.to(self.product_dtype)
        shape = (4 if settings.kl_weight else 2, self.size, len(head_VD))
        self.buffers = torch.empty(shape, dtype=self.dtype, device=device)
        kl = 0.0 if settings.kl_weight else torch.nan
        self.kl = torch.full((), kl, dtype=self.dtype, device=device)
        self.lm = torch.zeros((), dtype=self.dtype, device=device)
        self.child_grad_TD = torch.empty_like(child_TD) if needs_grad[0] else None
        self.head_grad_VD = torch.zeros_like(head_VD, dtype=self.dtype) if needs_grad[1] else None
        self.head_dtype = head_VD.dtype

    def take(self, rows: slice, targets_T: torch.Tensor) -> None:
        """Add a chunk's losses and gradients."""
        settings, t = self.settings, self.settings.temperature
        targets_T1 = targets_T[rows, None]
        z_TV, work_TV, *more = self.buffers[:, : len(targets_T1)]
        self._logits(self.child_TD[rows], self.head_VD, z_TV)
        grad_TV = None
        if settings.kl_weight:
            p_TV, q_TV = more
            self._logits(self.parent_TD[rows], self.parent_head_VD, work_TV)
            torch.log_softmax(work_TV.div_(t) if t != 1 else work_TV, -1, out=p_TV)
            torch.log_softmax(torch.div(z_TV, t, out=work_TV) if t != 1 else z_TV, -1, out=q_TV)
            torch.sub(p_TV, q_TV, out=work_TV)
            self.kl += work_TV.mul_(p_TV.exp_()).sum() * t**2
            grad_TV = q_TV.exp_().sub_(p_TV).mul_(settings.kl_weight * t)
        torch.log_softmax(z_TV, -1, out=work_TV)
        self.lm -= work_TV.gather(-1, targets_T1).sum()
        if self.child_grad_TD is None and self.head_grad_VD is None:
            return
        if settings.lm_weight:
            work_TV.exp_().scatter_add_(
                -1, targets_T1, -torch.ones_like(targets_T1, dtype=self.dtype)
            )
            grad_TV = (
                work_TV.mul_(settings.lm_weight)
                if grad_TV is None
                else grad_TV.add_(work_TV, alpha=settings.lm_weight)
            )
        assert grad_TV is not None
        if settings.soft_cap:
            grad_TV.mul_(z_TV.div_(settings.soft_cap).square_().neg_().add_(1))
        self._spread(rows, grad_TV.div_(self.tokens))

    def _logits(self, hidden_TD: torch.Tensor, head_VD: torch.Tensor, out_TV: torch.Tensor) -> None:
        if self.product_dtype == self.dtype:
            torch.mm(hidden_TD, head_VD.T, out=out_TV)
        else:
            out_TV.copy_(hidden_TD @ head_VD.T)
        if self.settings.soft_cap:
            out_TV.div_(self.settings.soft_cap).tanh_().mul_(self.settings.soft_cap)

    def _spread(self, rows: slice, grad_TV: torch.Tensor) -> None:
        """Gradients of the hidden states and of the head from dz.

        The head's is summed in float32, in place.
        """
        hidden_TD, small_TV = self.child_TD[rows], grad_TV.to(self.product_dtype)
        if self.child_grad_TD is not None:
            self.child_grad_TD[rows] = small_TV @ self.head_VD
        if self.head_grad_VD is None:
            return
        if self.product_dtype == self.dtype:
            self.head_grad_VD.addmm_(grad_TV.T, hidden_TD)
        elif grad_TV.device.type == "cpu":
            # inputs rounded, result not, and no second buffer of the head's size
            with _rounded_inputs():
                self.head_grad_VD.addmm_(grad_TV.T, hidden_TD.to(self.dtype))
        else:
            self.head_grad_VD += small_TV.T @ hidden_TD

    def gradients(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Of the child's hidden states and of its head; None where they are not needed."""
        head = self.head_grad_VD
        return self.child_grad_TD, None if head is None else head.to(self.head_dtype)


def distillation_losses(
    child_TD: torch.Tensor,
    child_head_VD: torch.Tensor,
    parent_TD: torch.Tensor | None,
    parent_head_VD: torch.Tensor | None,
    targets_T: torch.Tensor,
    settings: LogitLoss,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weighted sum, KL, LM loss), means over tokens, from hidden states after the last norm.

    Only the weighted sum has a gradient, for the child's hidden states and head (where it is not
    frozen). Without a KL weight the parent's side is not computed, may be None, and the KL is NaN.
    Paper: section 4.3.
    """
    losses: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _DistillationLoss.apply(  # type: ignore[no-untyped-call]
        child_TD, child_head_VD, parent_TD, parent_head_VD, targets_T, settings
    )
    return losses


def tokens_per_chunk(head_VD: torch.Tensor) -> int:
    """How many tokens' logits may exist at once, on the head's device."""
    return max(16, CHUNK_ELEMENTS[head_VD.device.type] // len(head_VD))


METRICS = ("kl", "lm_loss", "top1", "top5", "top10", "cosine")
ACCURACIES = ("top1", "top5", "top10", "task")  # more is better


@torch.no_grad()
def token_metrics(
    parent_TD: torch.Tensor,
    parent_head_VD: torch.Tensor,
    child_CTD: torch.Tensor | Sequence[torch.Tensor],
    child_head_VD: torch.Tensor,
    targets_T: torch.Tensor,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """`METRICS` of C candidates per token, float32 [C, 6, T].

    KL in nats per token; LM loss is the cross entropy of the next token; top1, top5 and top10 are 0
    or 1; cosine is 1 - cos of the final hidden states, and 1 where these differ in width. The
    parent's side is computed once per chunk. At most `CHUNK_ELEMENTS` logits exist at a time, in
    four copies.

    Args:
        parent_TD: the parent's hidden states after the last norm.
        parent_head_VD: the parent's head.
        child_CTD: those of every candidate.
        child_head_VD: the candidates' head.
        targets_T: the next tokens.
        soft_cap: of both sides' logits, as in `LogitLoss`.
    """
    chunks, chunk_tokens = [], tokens_per_chunk(parent_head_VD)
    parent_head_VD, child_head_VD = _product_head(parent_head_VD), _product_head(child_head_VD)
    for first in range(0, len(parent_TD), chunk_tokens):
        rows = slice(first, first + chunk_tokens)
        parent_TV = F.log_softmax(_logits(parent_TD[rows], parent_head_VD, soft_cap), dim=-1)
        p_TV = parent_TV.exp()
        children = (_logits(child_TD[rows], child_head_VD, soft_cap) for child_TD in child_CTD)
        chunks.append(
            torch.stack(
                [_metrics(parent_TV, p_TV, child_TV, targets_T[rows]) for child_TV in children]
            )
        )
    cosine_CT = torch.ones(len(child_CTD), len(parent_TD), device=parent_TD.device)
    if child_CTD[0].shape[-1] == parent_TD.shape[-1]:
        for cosine_T, child_TD in zip(cosine_CT, child_CTD, strict=True):
            cosine_T -= F.cosine_similarity(child_TD.float(), parent_TD.float(), dim=-1)
    return torch.cat([torch.cat(chunks, dim=-1), cosine_CT[:, None]], dim=1)


class KLToParent:
    """KL(parent || child) of any number of children on the same tokens, without other metrics.

    KL = sum_v p_v log p_v - h . sum_v p_v w_v + log sum_v exp z_v for every token, where p is what
    the parent predicts, w_v are the head's rows, h is a child's input of the head and z its logits.
    Both sums over p are computed once; of a child only the last one needs a product with the head.
    Under a soft cap logits are not linear in h, and `token_metrics` does it.
    """

    @torch.no_grad()
    def __init__(
        self, parent_TD: torch.Tensor, head_VD: torch.Tensor, soft_cap: float | None = None
    ) -> None:
        """Ready for children with the parent's head; arguments as those of `token_metrics`."""
        self.parent_TD, self.head_VD, self.soft_cap = parent_TD, head_VD, soft_cap
        if soft_cap is not None:
            return
        head_VD, step = _product_head(head_VD), tokens_per_chunk(head_VD)
        self.mean_TD = torch.zeros(parent_TD.shape, device=parent_TD.device)  # sum_v p_v w_v
        # sum_v p_v log p_v, over all tokens
        self.negentropy = torch.zeros((), dtype=torch.float64, device=parent_TD.device)
        for first in range(0, len(parent_TD), step):
            rows = slice(first, first + step)
            log_p_TV = F.log_softmax(_logits(parent_TD[rows], head_VD), dim=-1)
            p_TV = log_p_TV.exp()
            self.negentropy += log_p_TV.mul_(p_TV).sum(dtype=torch.float64)
            with torch.autocast(parent_TD.device.type, enabled=False):
                for low in range(0, len(head_VD), HEAD_ROWS):
                    part_VD = _as_multiplied(head_VD[low : low + HEAD_ROWS], head_VD)
                    self.mean_TD[rows].addmm_(p_TV[:, low : low + HEAD_ROWS], part_VD)

    @torch.no_grad()
    def sums(self, child_CTD: Sequence[torch.Tensor]) -> torch.Tensor:
        """Of every child's inputs of the head: nats, summed over tokens, float64 [C] on the host.

        They may be negative by as much as rounding where a child predicts what the parent does.
        """
        if self.soft_cap is not None:
            head_VD, targets_T = self.head_VD, torch.zeros(len(self.parent_TD), dtype=torch.int64)
            targets_T = targets_T.to(self.parent_TD.device)
            metrics_CMT = token_metrics(
                self.parent_TD, head_VD, child_CTD, head_VD, targets_T, self.soft_cap
            )
            return metrics_CMT[:, METRICS.index("kl")].double().sum(-1).cpu()
        head_VD, step = _product_head(self.head_VD), tokens_per_chunk(self.head_VD)
        return torch.stack([self._sum(child_TD, head_VD, step) for child_TD in child_CTD]).cpu()

    def _sum(self, child_TD: torch.Tensor, head_VD: torch.Tensor, step: int) -> torch.Tensor:
        rounded_TD = _as_multiplied(child_TD, head_VD)
        total = self.negentropy - (rounded_TD.double() * self.mean_TD).sum()
        for part_TD in child_TD.split(step):
            total += _logits(part_TD, head_VD).logsumexp(-1).sum(dtype=torch.float64)
        return total


def _metrics(
    parent_TV: torch.Tensor, p_TV: torch.Tensor, logits_TV: torch.Tensor, targets_T: torch.Tensor
) -> torch.Tensor:
    """[5, T] of one candidate: all metrics but the cosine.

    `parent_TV` are the parent's log-probabilities, `p_TV` its probabilities.
    """
    normaliser_T = logits_TV.logsumexp(-1)
    target_T1 = logits_TV.gather(-1, targets_T[:, None])
    rank_T = (logits_TV > target_T1).sum(-1, dtype=torch.int32)
    # a dot product would run in bfloat16 under autocast
    kl_T = (p_TV * (parent_TV - logits_TV)).sum(-1) + normaliser_T
    ranks = [(rank_T < first).float() for first in (1, 5, 10)]
    return torch.stack([kl_T, normaliser_T - target_T1[:, 0], *ranks])


def _product_head(head_VD: torch.Tensor) -> torch.Tensor:
    """A head in the dtype in which `_logits` takes it: that is cast once, not for every chunk."""
    device = head_VD.device.type
    if device == "cuda" and torch.is_autocast_enabled(device):
        return head_VD.to(torch.get_autocast_dtype(device))
    return head_VD if device == "cuda" and head_VD.dtype.itemsize == 2 else head_VD.float()


def _as_multiplied(x: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
    """In float32, rounded as `_logits` rounds what it multiplies with such a head."""
    device, dtype = x.device.type, head_VD.dtype
    if device == "cpu" and torch.is_autocast_enabled(device) and multiplies_in_bfloat16(x.device):
        dtype = torch.bfloat16
    return x.to(dtype).float()


def _logits(
    hidden_TD: torch.Tensor, head_VD: torch.Tensor, soft_cap: float | None = None
) -> torch.Tensor:
    """Logits [T, V] in float32, even under autocast; the head is as `_product_head` has it.

    Those in bfloat16 tie often enough to flatter a rank. Autocast only rounds what goes into the
    product, where the device can (half the time on a CPU with bfloat16 instructions).
    """
    device = hidden_TD.device.type
    rounded = _rounded_inputs() if torch.is_autocast_enabled(device) else contextlib.nullcontext()
    with rounded, torch.autocast(device, enabled=False):
        if head_VD.dtype.itemsize == 2:
            hidden_TD = hidden_TD.to(head_VD.dtype)
            logits_TV = torch.mm(hidden_TD, head_VD.T, out_dtype=torch.float32)
        else:
            logits_TV = hidden_TD.float() @ head_VD.T
    return logits_TV if soft_cap is None else logits_TV.div_(soft_cap).tanh_().mul_(soft_cap)


@contextlib.contextmanager
def _rounded_inputs() -> Iterator[None]:
    """Float32 products may round their inputs where that is faster."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
