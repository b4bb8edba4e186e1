"""Llama 2 and 3.x, SmolLM and everything else of model type `llama`: the checkpoint's own naming is Llama's."""

from typing import Any

from transformers import LlamaConfig

from puzzle.architecture import ModelShape
from puzzle.errors import UserError

KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "tie_word_embeddings", "rope_parameters", "attention_bias", "mlp_bias", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip


def shape(config: LlamaConfig) -> ModelShape:
    if config.attention_bias or config.mlp_bias:
        raise UserError("parent: Llama with attention_bias or mlp_bias is not supported")
    return ModelShape(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def child_settings(config: LlamaConfig) -> dict[str, Any]:
    return {key: getattr(config, key) for key in KEPT}


def rename(name: str) -> str:
    return name
