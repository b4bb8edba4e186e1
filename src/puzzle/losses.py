"""The losses of the paper. Logits are never held whole: everything over the vocabulary runs in chunks of tokens.

Shape legend: T tokens, B batch, S sequence, D hidden, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def normalized_mse(child: torch.Tensor, parent: torch.Tensor) -> torch.Tensor:
    """MSE(parent, child) / MSE(parent, 0), a float32 scalar; 0 is perfect. Paper: section 3, the BLD loss."""
    parent = parent.float()
    return (child.float() - parent).square().mean() / parent.square().mean()


class _SquaredError(torch.autograd.Function):
    """Keeps the difference only, in the child's dtype: two passes over memory instead of autograd's five."""

    @staticmethod
    def forward(ctx: Any, child: torch.Tensor, parent: torch.Tensor) -> torch.Tensor:
        difference = child - parent.to(child.dtype)
        ctx.save_for_backward(difference)
        return torch.linalg.vector_norm(difference, dtype=torch.float32).square()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * (2 * grad).to(difference.dtype), None


def squared_error(child: torch.Tensor, parent: torch.Tensor) -> torch.Tensor:
    """Sum of squared differences, a float32 scalar; no gradient for the parent."""
    return _SquaredError.apply(child, parent)


def cosine_distance(child_BSD: torch.Tensor, parent_BSD: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of 1 - cos(child, parent), a float32 scalar. Paper: section 4.3, the GKD hidden-state loss."""
    return 1 - F.cosine_similarity(child_BSD.float(), parent_BSD.float(), dim=-1).mean()


def kl_divergence(parent_logits_TV: torch.Tensor, child_logits_TV: torch.Tensor) -> torch.Tensor:
    """KL(parent || child) per token in nats, float32 [T]."""
    parent = F.log_softmax(parent_logits_TV.float(), dim=-1)
    child = F.log_softmax(child_logits_TV.float(), dim=-1)
    return (parent.exp() * (parent - child)).sum(-1)


def _chunk_losses(
    child_TD: torch.Tensor,
    child_head_VD: torch.Tensor,
    parent_TD: torch.Tensor,
    parent_head_VD: torch.Tensor,
    targets_T: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    child_logits = child_TD @ child_head_VD.T
    with torch.no_grad():
        parent_logits = parent_TD @ parent_head_VD.T
    kl = kl_divergence(parent_logits / temperature, child_logits / temperature).sum() * temperature**2
    return torch.stack([kl, F.cross_entropy(child_logits.float(), targets_T, reduction="sum")])


def distillation_losses(
    child_TD: torch.Tensor,
    child_head_VD: torch.Tensor,
    parent_TD: torch.Tensor,
    parent_head_VD: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 2048,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL(parent || child), LM loss), means over tokens, from final hidden states (after the last norm).

    The logits of a chunk are recomputed in the backward pass, so at most `chunk_tokens` x V of each side exist.
    """
    total = torch.zeros(2, dtype=torch.float32, device=child_TD.device)
    for part in range(0, len(child_TD), chunk_tokens):
        rows = slice(part, part + chunk_tokens)
        total = total + checkpoint(
            _chunk_losses, child_TD[rows], child_head_VD, parent_TD[rows], parent_head_VD, targets_T[rows],
            temperature, use_reentrant=False,
        )  # fmt: skip
    kl, lm = total / len(child_TD)
    return kl, lm


CHUNK_ELEMENTS = 1 << 24  # 64 MiB of float32


def tokens_per_chunk(vocabulary: int) -> int:
    """How many tokens' logits may exist at once."""
    return max(16, CHUNK_ELEMENTS // vocabulary)


METRICS = ("kl", "lm_loss", "top1", "top5", "top10", "cosine")
ACCURACIES = ("top1", "top5", "top10", "task")  # more is better


@torch.no_grad()
def token_metrics(
    parent_TD: torch.Tensor,
    parent_head_VD: torch.Tensor,
    child_CTD: torch.Tensor,
    child_head_VD: torch.Tensor,
    targets_T: torch.Tensor,
    chunk_tokens: int | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """`METRICS` of C candidates per token, float32 [C, 6, T]; the parent's side is computed once per chunk.

    KL in nats per token; LM loss is the cross entropy of the next token; top1, top5 and top10 are 0 or 1; cosine is
    1 - cos of the final hidden states. At most `CHUNK_ELEMENTS` logits exist at a time, in four copies.
    """
    chunks, chunk_tokens = [], chunk_tokens or tokens_per_chunk(len(parent_head_VD))
    for first in range(0, len(parent_TD), chunk_tokens):
        rows = slice(first, first + chunk_tokens)
        parent_TV = F.log_softmax(_logits(parent_TD[rows], parent_head_VD, soft_cap), dim=-1)
        p_TV = parent_TV.exp()
        children = (_logits(child_TD[rows], child_head_VD, soft_cap) for child_TD in child_CTD)
        chunks.append(torch.stack([_metrics(parent_TV, p_TV, child_TV, targets_T[rows]) for child_TV in children]))
    cosine_CT = 1 - F.cosine_similarity(child_CTD.float(), parent_TD.float()[None], dim=-1)
    return torch.cat([torch.cat(chunks, dim=-1), cosine_CT[:, None]], dim=1)


def _metrics(
    parent_TV: torch.Tensor, p_TV: torch.Tensor, logits_TV: torch.Tensor, targets_T: torch.Tensor
) -> torch.Tensor:
    """[5, T] of one candidate, all but the cosine; the parent's log-probabilities and probabilities are given."""
    normaliser_T = logits_TV.logsumexp(-1)
    own_T1 = logits_TV.gather(-1, targets_T[:, None])
    rank_T = (logits_TV > own_T1).sum(-1, dtype=torch.int32)
    kl_T = (p_TV * (parent_TV - logits_TV)).sum(-1) + normaliser_T  # a dot product would run in bfloat16 under autocast
    ranks = [(rank_T < first).float() for first in (1, 5, 10)]
    return torch.stack([kl_T, normaliser_T - own_T1[:, 0], *ranks])


def _logits(hidden_TD: torch.Tensor, head_VD: torch.Tensor, soft_cap: float | None = None) -> torch.Tensor:
    """Float32 even under autocast: bfloat16 logits tie often enough to flatter a rank. Autocast only rounds what goes
    into the product, where the device can (half the time on a CPU with bfloat16 instructions)."""
    device = hidden_TD.device.type
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if torch.is_autocast_enabled(device) else before)
    try:
        with torch.autocast(device, enabled=False):
            logits_TV = hidden_TD.float() @ head_VD.float().T
            return logits_TV if soft_cap is None else logits_TV.div_(soft_cap).tanh_().mul_(soft_cap)
    finally:
        torch.set_float32_matmul_precision(before)
