"""OLMo 2: norms after the subblocks instead of before, and over all heads of q and of k at once."""

from transformers import PretrainedConfig

from puzzle.model.families.family import Family, Settings, common, renamed


def settings(config: PretrainedConfig) -> Settings:
    """Everything that differs from Llama has a switch in `PuzzleConfig`."""
    return common(config) | {
        "qkv_bias": config.attention_bias,
        "attention_bias": config.attention_bias,
        "qk_norm": "projection",
        "norm_style": "olmo2",
        "norm_placement": "post",
        "rotate_in_float32": True,
    }


tensors = renamed(
    {
        "post_attention_layernorm": "attention_output_layernorm",
        "post_feedforward_layernorm": "feedforward_output_layernorm",
    }
)

FAMILY = Family(settings, tensors=tensors)
