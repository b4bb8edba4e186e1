"""Which of the child's weights learn, and how: all, replaced blocks, patterns, or adapters."""

from collections.abc import Sequence
from fnmatch import fnmatch

import torch
from torch import nn

from puzzle.config import UptrainConfig
from puzzle.errors import UserError
from puzzle.model.architecture import Architecture, Block
from puzzle.model.modeling_puzzle import PuzzleForCausalLM
from puzzle.model.parent import Parent

# Of linear replacements and untied heads, which the parent may not have.
CHILDS_OWN_NAMES = (
    "lm_head.weight",
    "model.layers.0.self_attn.linear_attn.weight",
    "model.layers.0.mlp.linear_mlp.weight",
)


def check_patterns(parent: Parent, patterns: list[str]) -> None:
    """Raise `UserError` for a frozen pattern that matches no weight.

    The child is not known yet, and may lack what the parent has: the parent's names count.
    """
    with parent.weights() as weights:
        names = [*weights, *CHILDS_OWN_NAMES]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise UserError(
                f"uptrain.freeze: {pattern!r} matches no weight; expected a pattern such as "
                "'model.layers.0.*' or '*embed_tokens*'"
            )


def select(
    child: PuzzleForCausalLM,
    settings: UptrainConfig,
    architecture: Architecture,
    parent_blocks: Sequence[Block],
) -> None:
    """Set `requires_grad` as `train` and `freeze` say. Raises `UserError` where nothing learns."""
    replaced = tuple(
        f"model.layers.{index}."
        for index, (block, parent) in enumerate(zip(architecture, parent_blocks, strict=True))
        if block != parent
    )
    frozen = set()
    for name, parameter in child.named_parameters(remove_duplicate=False):
        kept = settings.train == "replaced" and not name.startswith(replaced)
        if kept or any(fnmatch(name, pattern) for pattern in settings.freeze):
            frozen.add(id(parameter))  # tied weights have two names, and either freezes them
    for parameter in child.parameters():
        parameter.requires_grad_(id(parameter) not in frozen)
    if not any(parameter.requires_grad for parameter in child.parameters()):
        raise UserError(
            "uptrain: train and freeze leave no weight to learn; freeze less, or use train: all"
        )


def has_muon(settings: UptrainConfig) -> bool:
    """Whether Muon steps the layers' matrices; adapters learn by AdamW."""
    return settings.optimizer == "muon" and not settings.lora_rank


def add_adapters(child: PuzzleForCausalLM, settings: UptrainConfig) -> None:
    """Low-rank adapters beside every projection that would learn; nothing else learns then.

    Raises `UserError` where there is no such projection.
    """
    from peft import LoraConfig, inject_adapter_in_model  # `check` has seen that it is installed

    targets = [
        name
        for name, module in child.named_modules()
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
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,  # a float works; peft declares an int
            target_modules=targets,
        )
        inject_adapter_in_model(lora, child)
    for name, parameter in child.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def merge_adapters(child: PuzzleForCausalLM) -> dict[str, torch.Tensor]:
    """The child's weights under their own names, adapters added to them."""
    from peft.tuners.lora import LoraLayer

    for module in child.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in child.state_dict().items()
        if ".lora_" not in name
    }
