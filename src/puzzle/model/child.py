"""Build, save and load a child: one Hugging Face folder, whatever happens inside its layers.

Written by `assemble` and `uptrain`, read by every engine. See docs/architecture.md for the format.
"""

import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

from puzzle import artifacts
from puzzle.model import block_configs
from puzzle.model.architecture import Architecture
from puzzle.model.modeling_puzzle import PuzzleConfig, PuzzleForCausalLM

MODELING_FILE = "modeling_puzzle.py"
CARRIED_OVER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
    "Notice",
    "USE_POLICY.md",
)


def build(
    config: PuzzleConfig,
    state: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
    attention: str = "sdpa",
) -> PuzzleForCausalLM:
    """A model of `config` with tensors from `state`, moved one at a time: never two copies of the
    weights.
    """
    model = skeleton(config, device, attention)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    names = [name for name in model.state_dict() if name not in tied]
    # clone: a float32 tensor on the CPU would otherwise stay a view of the checkpoint's memory map
    tensors = {name: state[name].to(device=device, dtype=dtype).clone() for name in names}
    model.load_state_dict(tensors, assign=True, strict=False)
    model.tie_weights()
    return model


def skeleton(config: PuzzleConfig, device: torch.device, attention: str) -> PuzzleForCausalLM:
    """A model without weights (on the meta device) that can already compute positions and masks."""
    with torch.device("meta"):
        config._attn_implementation = attention_for(config, attention)
        model = PuzzleForCausalLM(config)
    model.model.make_rotary(device)
    return model.eval()


def attention_for(config: PuzzleConfig, wanted: str) -> str:
    """The fused kernels know no soft cap on attention scores."""
    return wanted if config.attn_logit_softcapping is None else "eager"


def stock(config: PuzzleConfig) -> bool:
    """Whether engines that know `DeciLMForCausalLM` can serve a child of this family, blocks aside."""
    ways = (
        config.qk_norm,
        config.embedding_scale,
        config.query_scale,
        config.attn_logit_softcapping,
    )
    plain = (
        config.norm_placement == "pre"
        and config.norm_style == "llama"
        and config.hidden_act == "silu"
    )
    whole = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0) == 1.0
    return plain and whole and all(way is None for way in (*ways, config.final_logit_softcapping))


def architectures_name(config: PuzzleConfig) -> str:
    """`DeciLMForCausalLM` where stock engines can load the child, otherwise `PuzzleForCausalLM`."""
    halves = [(block.attention, block.ffn) for block in config.block_configs or []]
    linear = any(half.replace_with_linear for both in halves for half in both)
    windows = any(attention.get("window_length") for attention, _ in halves)
    known = stock(config) and not linear and not windows and not halves[0][0].no_op
    return "DeciLMForCausalLM" if known else "PuzzleForCausalLM"


def save(
    folder: Path,
    config: PuzzleConfig,
    architecture: Architecture,
    state: Mapping[str, torch.Tensor],
    parent_folder: Path,
    card: str,
) -> None:
    """Write the checkpoint. The weights come first and `config.json` last: a folder with a config
    is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(config.dtype).contiguous() for name, tensor in state.items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    save_torch_state_dict(tensors, folder, max_shard_size="4GB", metadata={"format": "pt"})
    for path in folder.glob("*.safetensors"):
        artifacts.sync(path)
    for name in CARRIED_OVER:
        if (parent_folder / name).exists():
            shutil.copyfile(parent_folder / name, folder / name)
    artifacts.write_text(
        folder / MODELING_FILE, (files("puzzle.model") / MODELING_FILE).read_text(encoding="utf-8")
    )
    artifacts.write_text(folder / "README.md", card)
    artifacts.write_json(folder / "architecture.json", architecture.names)
    model_class = architectures_name(config)
    settings = config.to_dict() | {
        "architectures": [model_class],
        "auto_map": {
            "AutoConfig": "modeling_puzzle.PuzzleConfig",
            "AutoModelForCausalLM": f"modeling_puzzle.{model_class}",
        },
    }
    settings.pop("_attn_implementation", None)
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    native = block_configs.per_layer_config(architecture, kv_heads, config.intermediate_size)
    if native is not None:
        settings["per_layer_config"] = native
    artifacts.write_json(folder / "config.json", settings)


def read_architecture(folder: Path) -> Architecture:
    return Architecture.from_names(artifacts.read_json(folder / "architecture.json"))


def load(
    folder: Path, dtype: torch.dtype | None, device: torch.device, attention: str = "sdpa"
) -> PuzzleForCausalLM:
    """Load a child written by `save`; `dtype` None keeps the checkpoint's."""
    config = PuzzleConfig.from_pretrained(folder)
    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    return build(config, state, dtype or stored_dtype(config), device, attention)


def stored_dtype(config: PuzzleConfig) -> torch.dtype:
    """The dtype of a checkpoint's weights; a config may hold it or its name."""
    found: torch.dtype = getattr(torch, str(config.dtype).removeprefix("torch."))
    return found
