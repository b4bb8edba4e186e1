"""Parent families: how a Hugging Face config and its weights become ours; a small module for each.

A family module defines `FAMILY`. Most of a family is its `settings`: the keys of `PuzzleConfig`
besides `block_configs`, in which the differences between families are spelled out.
docs/families.md adds a family step by step.
"""

from puzzle.errors import UserError
from puzzle.model.families import (
    gemma2,
    gemma3,
    llama,
    mistral,
    nemotron_nas,
    olmo2,
    phi3,
    qwen2,
    qwen3,
)
from puzzle.model.families.family import Family

FAMILIES: dict[str, Family] = {  # by model_type
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "phi3": phi3.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3.FAMILY,
    "olmo2": olmo2.FAMILY,
    "nemotron-nas": nemotron_nas.FAMILY,
}
HINTS = {  # for models that contain a supported one, by model_type
    "gemma3": "give its text model alone (model type gemma3_text)",
}


def family_of(model_type: str) -> Family:
    """The family of a model type. Raises `UserError` where it is not supported."""
    if model_type not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        hint = HINTS.get(model_type, "docs/families.md shows how to add a family")
        raise UserError(
            f"parent: model type {model_type!r} is not supported; supported: {supported} ({hint})"
        )
    return FAMILIES[model_type]
