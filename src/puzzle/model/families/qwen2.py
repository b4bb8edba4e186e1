"""Qwen 2 and 2.5: Llama with biases on q, k and v.

Where sliding windows are switched on, the upper layers have them.
"""

from transformers import PretrainedConfig

from puzzle.model.families.family import Family, Settings, by_layer_types, common


def settings(config: PretrainedConfig) -> Settings:
    """The biases have no switch in the family's config."""
    return common(config) | {"qkv_bias": True}


FAMILY = Family(settings, windows=by_layer_types)
