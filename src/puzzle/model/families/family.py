"""What a family is: functions of a Hugging Face config, and the usual choice for each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from puzzle.model.architecture import FFN, Architecture, Attention, Block
from puzzle.model.weights import WHOLE, Tensors

COMMON = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
Settings = dict[str, Any]  # keyword arguments of `PuzzleConfig`
Windows = Sequence[int | None]  # sliding-window length in tokens by layer; None: full attention


def common(config: PretrainedConfig) -> Settings:
    """The settings that have the same name in every family and in `PuzzleConfig`."""
    return {key: getattr(config, key) for key in COMMON if hasattr(config, key)}


def full_attention(config: PretrainedConfig) -> Windows:
    """No sliding window in any layer."""
    return [None] * config.num_hidden_layers


def same_window(config: PretrainedConfig) -> Windows:
    """The same sliding window in every layer, or none anywhere."""
    return [config.sliding_window] * config.num_hidden_layers


def by_layer_types(config: PretrainedConfig) -> Windows:
    """A sliding window in the layers that `layer_types` names."""
    return [
        config.sliding_window if layer_type == "sliding_attention" else None
        for layer_type in config.layer_types
    ]


def same_blocks(config: PretrainedConfig) -> Architecture:
    """Every layer has the heads and the width that the config names."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    block = Block(Attention("gqa", heads), FFN("gated", config.intermediate_size))
    return Architecture((block,) * config.num_hidden_layers)


def same_name(name: str, config: PretrainedConfig) -> Tensors:
    """A stored tensor keeps its name in a child."""
    return [(name, WHOLE)]


def renamed(names: dict[str, str]) -> Callable[[str, PretrainedConfig], Tensors]:
    """Tensors whose last module has another name in a child. `names`: theirs -> a child's."""

    def tensors(name: str, config: PretrainedConfig) -> Tensors:
        *path, module, kind = name.split(".")  # kind: weight or bias
        return [(".".join([*path, names.get(module, module), kind]), WHOLE)]

    return tensors


@dataclass(frozen=True)
class Family:
    """How the models of one family become a child's.

    Attributes:
        settings: the keys of `PuzzleConfig` besides `block_configs`, from the family's config.
        windows: the sliding-window length of every layer.
        blocks: what every layer holds.
        tensors: where a stored tensor, or some of its rows, goes in a child.
    """

    settings: Callable[[PretrainedConfig], Settings]
    windows: Callable[[PretrainedConfig], Windows] = full_attention
    blocks: Callable[[PretrainedConfig], Architecture] = same_blocks
    tensors: Callable[[str, PretrainedConfig], Tensors] = same_name
