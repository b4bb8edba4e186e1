"""Build, save and load a child: one Hugging Face folder, whatever happens inside its layers.

Written by `assemble` and `uptrain`, read by every engine. See docs/architecture.md for the format.
"""

import shutil
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from pydantic import JsonValue

from puzzle import artifacts
from puzzle.errors import UserError
from puzzle.model import block_configs
from puzzle.model.architecture import Architecture
from puzzle.model.modeling_puzzle import PuzzleConfig, PuzzleForCausalLM
from puzzle.model.weight_files import weight_files
from puzzle.model.weights import Weights

MODEL_CODE = ("configuration_puzzle.py", "modeling_puzzle.py")  # what a child loads with alone
CARRIED_OVER = (  # from the parent's folder
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
    """A model of `config` in evaluation mode with the weights in `state`.

    Tensors are moved one at a time: there are never two copies of the weights.

    Args:
        config: with its blocks.
        state: tensors by name; `lm_head.weight` is not read where embeddings are tied.
        dtype: of the model, whatever the tensors have.
        device: of the model.
        attention: the attention implementation, as transformers names it.
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
    model.eval()
    return model


def attention_for(config: PuzzleConfig, requested: str) -> str:
    """The attention implementation to use: the fused kernels know no soft cap on scores."""
    return requested if config.attn_logit_softcapping is None else "eager"


def stock(config: PuzzleConfig) -> bool:
    """Whether engines that know `DeciLMForCausalLM` can serve this family, blocks aside."""
    rope = config.rope_parameters or {}
    return (
        config.norm_placement == "pre"
        and config.norm_style == "llama"
        and config.hidden_act == "silu"
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and config.qk_norm is None
        and config.embedding_scale is None
        and config.query_scale is None
        and config.attn_logit_softcapping is None
        and config.final_logit_softcapping is None
    )


def architectures_name(config: PuzzleConfig) -> str:
    """`DeciLMForCausalLM` where stock engines can load the child, otherwise `PuzzleForCausalLM`."""
    blocks = config.block_configs or []
    linear = any(
        block.attention.replace_with_linear or block.ffn.replace_with_linear for block in blocks
    )
    windows = any(block.attention.get("window_length") for block in blocks)
    if not stock(config) or linear or windows or blocks[0].attention.no_op:
        return "PuzzleForCausalLM"
    return "DeciLMForCausalLM"


def save(
    folder: Path,
    config: PuzzleConfig,
    architecture: Architecture,
    state: Mapping[str, torch.Tensor],
    parent_folder: Path,
    card: str,
) -> None:
    """Write the checkpoint.

    The weights come first and `config.json` last: a folder with a config is complete.

    Args:
        folder: where to write.
        config: the child's, whose dtype the weights get.
        architecture: the blocks that `config` describes.
        state: the weights by name.
        parent_folder: where tokenizer, generation config and licence are copied from.
        card: the text of README.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(config.dtype).contiguous() for name, tensor in state.items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    if tensors:
        with artifacts.naming(folder):
            save_torch_state_dict(tensors, folder, max_shard_size="4GB", metadata={"format": "pt"})
        for path in weight_files(folder):
            artifacts.sync(path)
    for name in CARRIED_OVER:
        if (parent_folder / name).exists():
            shutil.copyfile(parent_folder / name, folder / name)
    for name in MODEL_CODE:
        code = (files("puzzle.model") / name).read_text(encoding="utf-8")
        artifacts.write_text(folder / name, code)
    artifacts.write_text(folder / "README.md", card)
    artifacts.write_json(folder / "architecture.json", architecture.names)
    artifacts.write_json(folder / "config.json", _config_json(config, architecture))


def _config_json(config: PuzzleConfig, architecture: Architecture) -> dict[str, JsonValue]:
    """The content of config.json, with the same architecture in transformers' own words if it can.

    See `block_configs.per_layer_config`.
    """
    model_class = architectures_name(config)
    settings: dict[str, JsonValue] = config.to_dict()
    settings["architectures"] = [model_class]
    settings["auto_map"] = {
        "AutoConfig": "configuration_puzzle.PuzzleConfig",
        "AutoModelForCausalLM": f"modeling_puzzle.{model_class}",
    }
    settings.pop("_attn_implementation", None)
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    sizes = block_configs.per_layer_config(architecture, kv_heads, config.intermediate_size)
    if sizes is not None:
        settings["per_layer_config"] = {layer: dict(size) for layer, size in sizes.items()}
    return settings


def read_architecture(folder: Path) -> Architecture:
    """The architecture of a child written by `save`."""
    return Architecture.from_names(read_block_names(folder / "architecture.json"))


def read_block_names(path: Path) -> list[str]:
    """Block names from a JSON list, or from a JSON object with `blocks`. `UserError` otherwise."""
    if not path.is_file():
        raise UserError(f"architecture {path}: no such file; expected a JSON list of blocks")
    value = artifacts.read_json(path)
    names = value.get("blocks") if isinstance(value, dict) else value
    if not isinstance(names, list) or not names:
        raise UserError(
            f"architecture {path}: expected a JSON list of blocks, one per layer, such as "
            '["gqa_2+gated_384", ...]'
        )
    return [str(name) for name in names]


def load(
    folder: Path, dtype: torch.dtype | None, device: torch.device, attention: str = "sdpa"
) -> PuzzleForCausalLM:
    """Load a child written by `save`; `dtype` None keeps the checkpoint's."""
    config = PuzzleConfig.from_pretrained(folder)
    with Weights(folder) as state:
        return build(config, state, dtype or stored_dtype(config), device, attention)


class RandomWeights(Mapping[str, torch.Tensor]):
    """Random weights for a child of a config by name, in its dtype, drawn when they are asked for.

    They are drawn on a device, so that none of them has to pass through the host's memory.
    """

    def __init__(self, config: PuzzleConfig, device: torch.device, scale: float = 0.02) -> None:
        with torch.device("meta"):
            state = PuzzleForCausalLM(config).state_dict()
        self.sizes = {name: tensor.shape for name, tensor in state.items()}
        self.dtype, self.device, self.scale = stored_dtype(config), device, scale
        self.generator = torch.Generator(device).manual_seed(0)

    def __getitem__(self, name: str) -> torch.Tensor:
        """The next numbers, in the shape of this tensor."""
        size = self.sizes[name]
        drawn = torch.randn(size, generator=self.generator, device=self.device)
        return drawn.mul_(self.scale).to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)


def stored_dtype(config: PuzzleConfig) -> torch.dtype:
    """The dtype of a checkpoint's weights; a config may hold it or its name."""
    dtype: torch.dtype = getattr(torch, str(config.dtype).removeprefix("torch."))
    return dtype
