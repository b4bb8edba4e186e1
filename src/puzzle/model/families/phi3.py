"""Phi-3 and Phi-4: Llama with q, k, v in one stored matrix, and gate, up in another.

`partial_rotary_factor` and long rope scaling are in `rope_parameters`.
"""

from transformers import PretrainedConfig

from puzzle.model.families.family import Family, Settings, common, same_window
from puzzle.model.weights import WHOLE, Tensors


def settings(config: PretrainedConfig) -> Settings:
    """Long rope needs the length that the model was first trained for."""
    original_length = config.original_max_position_embeddings
    return common(config) | {"original_max_position_embeddings": original_length}


def tensors(name: str, config: PretrainedConfig) -> Tensors:
    """The parts of a fused matrix, cut apart by rows; other tensors as they are."""
    fused = name.split(".")[-2]
    rows_of = _rows_by_part(config)
    if fused not in rows_of:
        return [(name, WHOLE)]
    parts: Tensors = []
    first = 0
    for part, rows in rows_of[fused].items():
        parts.append((name.replace(fused, part), slice(first, first + rows)))
        first += rows
    return parts


def _rows_by_part(config: PretrainedConfig) -> dict[str, dict[str, int]]:
    """How many rows of each fused matrix belong to which projection, in the stored order."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query_rows = config.num_attention_heads * head_dim
    key_rows = config.num_key_value_heads * head_dim
    return {
        "qkv_proj": {"q_proj": query_rows, "k_proj": key_rows, "v_proj": key_rows},
        "gate_up_proj": {
            "gate_proj": config.intermediate_size,
            "up_proj": config.intermediate_size,
        },
    }


FAMILY = Family(settings, windows=same_window, tensors=tensors)
