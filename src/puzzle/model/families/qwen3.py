"""Qwen 3: Llama with a norm over each head of q and k.

Where sliding windows are switched on, the upper layers have them.
"""

from transformers import PretrainedConfig

from puzzle.model.families.family import Family, Settings, by_layer_types, common


def settings(config: PretrainedConfig) -> Settings:
    """One switch of the family's config sets the biases of all four projections."""
    return common(config) | {
        "qkv_bias": config.attention_bias,
        "attention_bias": config.attention_bias,
        "qk_norm": "head",
    }


FAMILY = Family(settings, windows=by_layer_types)
