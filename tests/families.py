"""One tiny random parent per family and variation, made with transformers."""

from pathlib import Path
from typing import Any

import torch
from conftest import make_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1 + 0.1 * i for i in range(12)],
    "long_factor": [2 + 0.1 * i for i in range(12)],
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 64,
}
GEMMA_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}
TYPES = ["sliding_attention", "full_attention"] * 2
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 2": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": False}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "smollm": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 64}),
    "mistral with a window": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {"head_dim": 64}),
    "phi3": ("phi3", {"sliding_window": 16}),
    "phi4": ("phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 64}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 64,
            "query_pre_attn_scalar": 20,
            "sliding_window": 16,
            "layer_types": TYPES,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 6.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 64,
            "query_pre_attn_scalar": 20,
            "sliding_window": 16,
            "layer_types": TYPES,
            "rope_parameters": GEMMA_ROPE,
        },
    ),
    "olmo2": ("olmo2", {}),
}


def make(row: str, folder: Path, dtype: torch.dtype = torch.float32, **saving: Any) -> Path:
    """Write the parent of a row with its tokenizer; `saving` goes to `save_pretrained`.

    Weights are random everywhere, norms and biases too, so that leaving any part out shows.
    """
    model_type, settings = ROWS[row]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**(SIZES | settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, **saving)
    make_tokenizer(folder)
    return folder
