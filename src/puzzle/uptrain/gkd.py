"""Global knowledge distillation of one micro-batch, and which weights learn from it (paper: section
4.3).

    loss = w_cos * sum over layers of (1 - cos(h_child, h_parent)) + w_kl * KL(parent || child) + w_lm * LM loss

Child and parent walk through their layers in step, so the parent's hidden states live for one layer
only; logits exist in chunks (losses.py). `Pair` holds both as one module: whatever touches their
weights happens inside its forward, which is what sharding them over processes needs
(distributed.py).

Shape legend: B batch, S sequence, D hidden, T = B * (S - 1) tokens with a next one, V vocabulary.
"""

from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from puzzle.config import UptrainConfig
from puzzle.errors import UserError
from puzzle.model.architecture import Architecture
from puzzle.model.modeling_puzzle import PuzzleForCausalLM
from puzzle.training.losses import LogitLoss, cosine_distance, distillation_losses, token_metrics

TERMS = ("cosine", "kl", "lm_loss")


class Pair(nn.Module):
    """The child that learns and the frozen parent."""

    def __init__(
        self, student: PuzzleForCausalLM, teacher: PuzzleForCausalLM, settings: UptrainConfig
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.settings = student, teacher.eval(), settings
        cap = student.config.final_logit_softcapping
        self.logits = LogitLoss(settings.kl_weight, settings.lm_weight, settings.temperature, cap)
        if settings.activation_checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, tokens_BS: torch.Tensor, metrics: bool = False) -> Any:
        return self.metrics(tokens_BS) if metrics else self.losses(tokens_BS)

    def losses(self, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(the weighted sum, `TERMS` without gradient [3]), means over tokens; a term of weight 0
        may be NaN.
        """
        cosine, own_BSD, target_BSD = self._walk(tokens_BS, bool(self.settings.cosine_weight))
        loss = self.settings.cosine_weight * cosine if self.settings.cosine_weight else cosine
        kl = lm = loss.new_full((), torch.nan)
        if self.logits.kl_weight or self.logits.lm_weight:
            total, kl, lm = distillation_losses(
                self.student.model.norm(own_BSD)[:, :-1].flatten(0, 1),
                self.student.lm_head.weight,
                self.teacher.model.norm(target_BSD)[:, :-1].flatten(0, 1),
                self.teacher.lm_head.weight,
                tokens_BS[:, 1:].flatten(),
                self.logits,
            )
            loss = loss + total
        return loss, torch.stack([cosine.detach(), kl, lm])

    @torch.no_grad()
    def metrics(self, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`losses.METRICS` of the child and of the parent, each summed over tokens, float64 [6]."""
        _, own_BSD, target_BSD = self._walk(tokens_BS, cosine=False)
        target_TD = self.teacher.model.norm(target_BSD)[:, :-1].flatten(0, 1)
        own_TD = self.student.model.norm(own_BSD)[:, :-1].flatten(0, 1)
        sides = ((own_TD, self.student.lm_head.weight), (target_TD, self.teacher.lm_head.weight))
        targets_T, cap = tokens_BS[:, 1:].flatten(), self.logits.soft_cap
        found = (
            token_metrics(
                target_TD, self.teacher.lm_head.weight, own_TD[None], head, targets_T, soft_cap=cap
            )
            for own_TD, head in sides
        )
        child, parent = (metrics[0].double().sum(-1) for metrics in found)
        return child, parent

    def _walk(
        self, tokens_BS: torch.Tensor, cosine: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sum over layers of the cosine distance, the child's and the parent's last hidden states
        [B, S, D]).
        """
        hidden_BSD, context = self.student.model.embed(tokens_BS)
        with torch.no_grad():
            target_BSD, parent_context = self.teacher.model.embed(tokens_BS)
        distance = torch.zeros((), device=tokens_BS.device)
        for layer, parent_layer in zip(
            self.student.model.layers, self.teacher.model.layers, strict=True
        ):
            hidden_BSD = layer(hidden_BSD, **context)
            with torch.no_grad():
                target_BSD = parent_layer(target_BSD, **parent_context)
            if cosine:
                distance = distance + cosine_distance(hidden_BSD, target_BSD)
        return distance, hidden_BSD, target_BSD


# -------------------------------------------------------------------------------------- what learns


def choose(
    student: PuzzleForCausalLM, settings: UptrainConfig, architecture: Architecture, parent: Any
) -> None:
    """Set `requires_grad` as `train` and `freeze` say. `parent` is the parent's block. Raises
    `UserError`.
    """
    replaced = tuple(
        f"model.layers.{i}." for i, block in enumerate(architecture) if block != parent
    )
    frozen = set()
    for name, parameter in student.named_parameters(remove_duplicate=False):
        kept = settings.train == "replaced" and not name.startswith(replaced)
        if kept or any(fnmatch(name, pattern) for pattern in settings.freeze):
            frozen.add(id(parameter))  # tied weights have two names, and either freezes them
    for parameter in student.parameters():
        parameter.requires_grad_(id(parameter) not in frozen)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise UserError(
            "uptrain: train and freeze leave no weight to learn; freeze less, or use train: all"
        )


def add_adapters(student: PuzzleForCausalLM, settings: UptrainConfig) -> None:
    """Low-rank adapters beside every projection of the layers that would learn; nothing else
    learns.
    """
    from peft import LoraConfig, inject_adapter_in_model  # there: uptrain.check has looked

    targets = [
        name
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith("model.layers.")
        and module.weight.requires_grad
    ]
    if not targets:
        raise UserError(
            "uptrain.lora_rank: train and freeze leave no projection to adapt; freeze less"
        )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        lora = LoraConfig(
            r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=targets
        )  # type: ignore[arg-type]
        inject_adapter_in_model(lora, student)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def merge_adapters(student: PuzzleForCausalLM) -> dict[str, torch.Tensor]:
    """The child's weights under their own names, adapters added to them."""
    from peft.tuners.lora import LoraLayer

    for module in student.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    state = student.state_dict()
    return {
        name.replace(".base_layer.", "."): t for name, t in state.items() if ".lora_" not in name
    }
