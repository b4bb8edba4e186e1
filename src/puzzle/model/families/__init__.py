"""Parent families: how a Hugging Face config and its weights become ours. One small module per
family.

A family module has one name, `FAMILY`. Most of a family is `settings`: the keys of `PuzzleConfig`
besides `block_configs`, in which the differences between families are spelled out. docs/families.md
adds one step by step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from puzzle.errors import UserError

FAMILIES = {  # model_type -> module
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "olmo2": "olmo2",
}
MADE_OF = {  # models that only carry one of these families in another wrapping
    "gemma3": "give its text model alone (model type gemma3_text)",
}
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
Tensors = list[tuple[str, slice]]  # names in a child, and the rows of the stored tensor


def common(config: Any) -> dict[str, Any]:
    """The settings that go by the same name everywhere."""
    return {key: getattr(config, key) for key in COMMON if hasattr(config, key)}


def full_attention(config: Any) -> Sequence[int | None]:
    return [None] * config.num_hidden_layers


def one_window(config: Any) -> Sequence[int | None]:
    """One sliding window in every layer, or none."""
    return [config.sliding_window] * config.num_hidden_layers


def by_layer_types(config: Any) -> Sequence[int | None]:
    """A sliding window in the layers that `layer_types` says."""
    return [
        config.sliding_window if kind == "sliding_attention" else None
        for kind in config.layer_types
    ]


def same_name(name: str, config: Any) -> Tensors:
    return [(name, slice(None))]


def renamed(names: dict[str, str]) -> Callable[[str, Any], Tensors]:
    """Tensors whose last module goes by another name here."""

    def tensors(name: str, config: Any) -> Tensors:
        *path, module, kind = name.split(".")
        return [(".".join([*path, names.get(module, module), kind]), slice(None))]

    return tensors


@dataclass(frozen=True)
class Family:
    """`windows`: sliding-window length by layer. `tensors`: where a stored tensor, or its rows,
    goes in a child.
    """

    settings: Callable[[Any], dict[str, Any]]
    windows: Callable[[Any], Sequence[int | None]] = full_attention
    tensors: Callable[[str, Any], Tensors] = same_name


def family(model_type: str) -> Family:
    """Raises `UserError` for a model type that is not supported."""
    if model_type not in FAMILIES:
        hint = MADE_OF.get(model_type, "docs/families.md shows how to add a family")
        raise UserError(
            f"parent: model type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))} ({hint})"
        )
    found: Family = import_module(f"puzzle.model.families.{FAMILIES[model_type]}").FAMILY
    return found
