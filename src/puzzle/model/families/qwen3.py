"""Qwen 3: Llama with a norm over each head of q and k; sliding windows in the upper layers where
switched on.
"""

from typing import Any

from puzzle.model.families import Family, by_layer_types, common


def settings(config: Any) -> dict[str, Any]:
    biases = {"qkv_bias": config.attention_bias, "attention_bias": config.attention_bias}
    return common(config) | biases | {"qk_norm": "head"}


FAMILY = Family(settings, windows=by_layer_types)
