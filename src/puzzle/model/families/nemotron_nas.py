"""Nemotron-NAS: models whose layers differ already, Puzzle's own children and NVIDIA's among them.

`block_configs` says what every layer holds. NVIDIA's older checkpoints give an FFN's width as
`ffn_mult`; their modelling code is not needed.
"""

from transformers import PretrainedConfig

from puzzle.errors import UserError
from puzzle.model import block_configs
from puzzle.model.architecture import Architecture
from puzzle.model.families.family import Family, Settings, Windows, common

WIDTH_MULTIPLE = 256  # FFN widths from `ffn_mult` are rounded up to it
PUZZLE_SETTINGS = (
    "qkv_bias",
    "attention_bias",
    "qk_norm",
    "norm_style",
    "norm_placement",
    "rotate_in_float32",
    "embedding_scale",
    "query_scale",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "window_rope_theta",
    "original_max_position_embeddings",
)


def settings(config: PretrainedConfig) -> Settings:
    """Raises `UserError` for biases in the FFN."""
    if getattr(config, "mlp_bias", False):
        raise UserError("parent: nemotron-nas with mlp_bias is not supported")
    ours = {key: getattr(config, key) for key in PUZZLE_SETTINGS if hasattr(config, key)}
    return common(config) | ours


def windows(config: PretrainedConfig) -> Windows:
    """The sliding window that a layer's own config names."""
    return [block["attention"].get("window_length") for block in config.block_configs]


def blocks(config: PretrainedConfig) -> Architecture:
    """The blocks of every layer. Raises `UserError` where their number is not the layers'."""
    if len(config.block_configs) != config.num_hidden_layers:
        raise UserError(
            f"parent: got {len(config.block_configs)} block_configs, expected one for each of its "
            f"{config.num_hidden_layers} layers"
        )
    configs = [
        {"attention": dict(block["attention"]), "ffn": _with_width(block["ffn"], config)}
        for block in config.block_configs
    ]
    return block_configs.read(configs, config.num_attention_heads)


def _with_width(
    ffn: dict[str, block_configs.Setting], config: PretrainedConfig
) -> dict[str, block_configs.Setting]:
    """The FFN's config with its width in channels, as NVIDIA's code computes it from `ffn_mult`."""
    multiple = ffn.get("ffn_mult")
    if ffn.get("intermediate_size") is not None or multiple is None:
        return {"intermediate_size": None} | dict(ffn)
    width = int(2 * multiple * config.hidden_size / 3)
    rounded = -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    return dict(ffn) | {"intermediate_size": rounded}


FAMILY = Family(settings, windows=windows, blocks=blocks)
