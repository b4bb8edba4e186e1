"""Gemma 2: norms before and after every subblock, soft caps, scaled embeddings.

Every other layer has a sliding window.
"""

from transformers import PretrainedConfig

from puzzle.errors import UserError
from puzzle.model.families.family import Family, Settings, by_layer_types, common, renamed


def settings(config: PretrainedConfig) -> Settings:
    """Raises `UserError` for a bidirectional model."""
    if getattr(config, "use_bidirectional_attention", False):
        raise UserError(
            "parent: Gemma with use_bidirectional_attention is not supported; "
            "expected a causal decoder"
        )
    return common(config) | {
        "hidden_act": config.hidden_activation,
        "qkv_bias": config.attention_bias,
        "attention_bias": config.attention_bias,
        "norm_style": "gemma",
        "norm_placement": "both",
        "embedding_scale": config.hidden_size**0.5,
        "query_scale": config.query_pre_attn_scalar**-0.5,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }


tensors = renamed(
    {
        "post_attention_layernorm": "attention_output_layernorm",
        "pre_feedforward_layernorm": "post_attention_layernorm",
        "post_feedforward_layernorm": "feedforward_output_layernorm",
    }
)

FAMILY = Family(settings, windows=by_layer_types, tensors=tensors)
