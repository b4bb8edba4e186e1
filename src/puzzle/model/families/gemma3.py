"""Gemma 3, text: Gemma 2 with a norm over each head of q and k instead of soft caps.

Layers with a sliding window have a rope of their own.
"""

from transformers import PretrainedConfig

from puzzle.errors import UserError
from puzzle.model.families import gemma2
from puzzle.model.families.family import Family, Settings, by_layer_types


def settings(config: PretrainedConfig) -> Settings:
    """Raises `UserError` for a bidirectional model and for scaled rope in sliding windows."""
    rope = config.rope_parameters
    if rope["sliding_attention"]["rope_type"] != "default":
        raise UserError("parent: Gemma 3 with scaled rope in its sliding windows is not supported")
    return gemma2.settings(config) | {
        "qk_norm": "head",
        "rope_parameters": rope["full_attention"],
        "window_rope_theta": rope["sliding_attention"]["rope_theta"],
        "attn_logit_softcapping": None,  # the family's own code ignores it
    }


FAMILY = Family(settings, windows=by_layer_types, tensors=gemma2.tensors)
