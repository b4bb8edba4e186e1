"""Llama 2 and 3.x, SmolLM, SmolLM2 and everything else of model type `llama`."""

from transformers import PretrainedConfig

from puzzle.errors import UserError
from puzzle.model.families.family import Family, Settings, common


def settings(config: PretrainedConfig) -> Settings:
    """Raises `UserError` for biases in the FFN."""
    if config.mlp_bias:
        raise UserError("parent: Llama with mlp_bias is not supported")
    return common(config) | {
        "qkv_bias": config.attention_bias,
        "attention_bias": config.attention_bias,
    }


FAMILY = Family(settings)
