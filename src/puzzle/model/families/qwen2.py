"""Qwen 2 and 2.5: Llama with biases on q, k and v; sliding windows in the upper layers where they
are switched on.
"""

from typing import Any

from puzzle.model.families import Family, by_layer_types, common


def settings(config: Any) -> dict[str, Any]:
    return common(config) | {"qkv_bias": True}


FAMILY = Family(settings, windows=by_layer_types)
