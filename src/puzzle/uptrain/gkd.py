"""Global knowledge distillation of one micro-batch (paper: section 4.3).

    loss = w_cos * sum over layers of (1 - cos(h_child, h_parent))
           + w_kl * KL(parent || child) + w_lm * LM loss

Child and parent go through their layers in step, so the parent's hidden states live for one layer
only; logits exist in chunks (losses.py). `Pair` holds both as one module: whatever touches their
weights happens inside its forward, which is what sharding them over processes needs.

Shape legend: B batch, S sequence, D hidden, T = B * (S - 1) tokens with a next one, V vocabulary.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from puzzle.config import UptrainConfig
from puzzle.model.modeling_puzzle import PuzzleForCausalLM
from puzzle.training import sharding
from puzzle.training.losses import (
    LOSS_ELEMENTS,
    LogitLoss,
    cosine_distance,
    distillation_losses,
    token_metrics,
)

TERMS = ("cosine", "kl", "lm_loss")


class Pair(nn.Module):
    """The child that learns and the frozen parent."""

    def __init__(
        self,
        child: PuzzleForCausalLM,
        parent: PuzzleForCausalLM,
        settings: UptrainConfig,
        checkpointing: bool = False,
    ) -> None:
        """`checkpointing`: a layer's activations are computed again in the backward pass."""
        super().__init__()
        self.child, self.parent, self.settings = child, parent.eval(), settings
        self.checkpointing = checkpointing
        cap = child.config.final_logit_softcapping
        self.logits = LogitLoss(
            settings.kl_weight,
            settings.lm_weight,
            settings.temperature,
            cap,
            LOSS_ELEMENTS[child.device.type],
        )

    def forward(
        self, tokens_BS: torch.Tensor, metrics: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`metrics`, or `losses`, of a micro-batch."""
        return self.metrics(tokens_BS) if metrics else self.losses(tokens_BS)

    def losses(self, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(the weighted sum, `TERMS` without gradient [3]), means over tokens.

        A term of weight 0 may be NaN.
        """
        settings = self.settings
        cosine, child_BSD, parent_BSD = self._walk(tokens_BS, bool(settings.cosine_weight))
        loss = settings.cosine_weight * cosine if settings.cosine_weight else cosine
        kl = lm = loss.new_full((), torch.nan)
        if self.logits.kl_weight or self.logits.lm_weight:
            with sharding.head(self.child) as child_head, sharding.head(self.parent) as parent_head:
                total, kl, lm = distillation_losses(
                    self.child.model.norm(child_BSD)[:, :-1].flatten(0, 1),
                    child_head,
                    self.parent.model.norm(parent_BSD)[:, :-1].flatten(0, 1),
                    parent_head,
                    tokens_BS[:, 1:].flatten(),
                    self.logits,
                )
            loss = loss + total
        return loss, torch.stack([cosine.detach(), kl, lm])

    @torch.no_grad()
    def metrics(self, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`losses.METRICS` of the child and of the parent, summed over tokens, float64 [6] each."""
        _, child_BSD, parent_BSD = self._walk(tokens_BS, cosine=False)
        parent_TD = self.parent.model.norm(parent_BSD)[:, :-1].flatten(0, 1)
        child_TD = self.child.model.norm(child_BSD)[:, :-1].flatten(0, 1)
        targets_T, sums = tokens_BS[:, 1:].flatten(), []
        with sharding.head(self.child) as child_head, sharding.head(self.parent) as parent_head:
            for model_TD, head in ((child_TD, child_head), (parent_TD, parent_head)):
                metrics_CMT = token_metrics(
                    parent_TD,
                    parent_head,
                    model_TD[None],
                    head,
                    targets_T,
                    soft_cap=self.logits.soft_cap,
                )
                sums.append(metrics_CMT[0].double().sum(-1))
        return sums[0], sums[1]

    def _walk(
        self, tokens_BS: torch.Tensor, cosine: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sum over layers of the cosine distance, last hidden states of child and parent)."""
        child_BSD, context = self.child.model.embed(tokens_BS)
        with torch.no_grad():
            parent_BSD, parent_context = self.parent.model.embed(tokens_BS)
        distance = torch.zeros((), device=tokens_BS.device)
        layers = zip(self.child.model.layers, self.parent.model.layers, strict=True)
        for layer, parent_layer in layers:
            with torch.no_grad():
                parent_BSD = parent_layer(parent_BSD, **parent_context)

            def step(
                x_BSD: torch.Tensor, y_BSD: torch.Tensor, layer: nn.Module = layer
            ) -> tuple[torch.Tensor, torch.Tensor | None]:
                x_BSD = layer(x_BSD, **context)
                return x_BSD, cosine_distance(x_BSD, y_BSD) if cosine else None

            if self.checkpointing and torch.is_grad_enabled():
                child_BSD, of_layer = checkpoint(step, child_BSD, parent_BSD, use_reentrant=False)
            else:
                child_BSD, of_layer = step(child_BSD, parent_BSD)
            if of_layer is not None:
                distance = distance + of_layer
        return distance, child_BSD, parent_BSD
