"""Llama 2 and 3.x, SmolLM, SmolLM2 and everything else of model type `llama`."""

from typing import Any

from puzzle.errors import UserError
from puzzle.model.families import Family, common


def settings(config: Any) -> dict[str, Any]:
    if config.mlp_bias:
        raise UserError("parent: Llama with mlp_bias is not supported")
    return common(config) | {
        "qkv_bias": config.attention_bias,
        "attention_bias": config.attention_bias,
    }


FAMILY = Family(settings)
