"""Phi-3 and Phi-4: Llama with q, k, v and gate, up stored as one matrix each, which are cut apart
here.

`partial_rotary_factor` and long rope scaling are in `rope_parameters`.
"""

from typing import Any

from puzzle.model.families import Family, Tensors, common, one_window


def settings(config: Any) -> dict[str, Any]:
    longest = {"original_max_position_embeddings": config.original_max_position_embeddings}
    return common(config) | longest


def tensors(name: str, config: Any) -> Tensors:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    wide = config.intermediate_size
    parts = {
        "qkv_proj": {"q_proj": queries, "k_proj": keys, "v_proj": keys},
        "gate_up_proj": {"gate_proj": wide, "up_proj": wide},
    }
    found, first = [], 0
    module = name.split(".")[-2]
    if module not in parts:
        return [(name, slice(None))]
    for part, rows in parts[module].items():
        found.append((name.replace(module, part), slice(first, first + rows)))
        first += rows
    return found


FAMILY = Family(settings, windows=one_window, tensors=tensors)
