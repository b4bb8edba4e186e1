"""Architectures in a checkpoint's config: `block_configs`, as the nemotron-nas model type has it.

Per layer `attention: {no_op, replace_with_linear, n_heads_in_group}` and
`ffn: {no_op, replace_with_linear, intermediate_size}`, with `window_length` beside the attention's
where the layer has a sliding window. `per_layer_config` is transformers' own convention, which can
say sizes only.
"""

from collections.abc import Mapping, Sequence

from puzzle.model.architecture import FFN, Architecture, Attention, Block

Setting = int | bool | None
BlockConfig = dict[str, dict[str, Setting]]


def write(
    architecture: Architecture, num_attention_heads: int, windows: Sequence[int | None] = ()
) -> list[BlockConfig]:
    """One entry per layer. `windows`: sliding-window length by layer, in tokens."""
    windows = windows or [None] * len(architecture)
    return [
        {"attention": _attention(block.attention, num_attention_heads, window), "ffn": _ffn(block)}
        for block, window in zip(architecture, windows, strict=True)
    ]


def _attention(variant: Attention, heads: int, window: int | None) -> dict[str, Setting]:
    group = None
    if variant.kind == "gqa":
        group = heads // variant.kv_heads
    elif variant.kind == "linear":
        group = 1  # without meaning, but vLLM reads it of the first block that is no no-op
    config: dict[str, Setting] = {
        "no_op": variant.kind == "no_op",
        "replace_with_linear": variant.kind == "linear",
        "n_heads_in_group": group,
    }
    if window is not None and variant.kind == "gqa":
        config["window_length"] = window
    return config


def _ffn(block: Block) -> dict[str, Setting]:
    ffn = block.ffn
    return {
        "no_op": ffn.kind == "no_op",
        "replace_with_linear": ffn.kind == "linear",
        "intermediate_size": ffn.intermediate_size if ffn.kind == "gated" else None,
    }


def read(
    configs: Sequence[Mapping[str, Mapping[str, Setting]]], num_attention_heads: int
) -> Architecture:
    """The architecture that `block_configs` describes."""
    blocks = []
    for config in configs:
        attention, ffn = config["attention"], config["ffn"]
        kind = _kind_without_size(attention)
        if kind is None:
            group = int(attention["n_heads_in_group"] or 1)
            half = Attention("gqa", num_attention_heads // group)
        else:
            half = Attention(kind)
        kind = _kind_without_size(ffn)
        width = int(ffn["intermediate_size"] or 0)
        blocks.append(Block(half, FFN("gated", width) if kind is None else FFN(kind)))
    return Architecture(tuple(blocks))


def _kind_without_size(half: Mapping[str, Setting]) -> str | None:
    if half["no_op"]:
        return "no_op"
    return "linear" if half["replace_with_linear"] else None


def per_layer_config(
    architecture: Architecture, num_key_value_heads: int, intermediate_size: int
) -> dict[str, dict[str, int]] | None:
    """What differs from the parent's sizes, by layer, as transformers' own configs say it.

    It knows sizes only, hence None for an architecture with a no-op or a linear replacement.
    """
    if any(b.attention.kind != "gqa" or b.ffn.kind != "gated" for b in architecture):
        return None
    parent = {"num_key_value_heads": num_key_value_heads, "intermediate_size": intermediate_size}
    layers = {}
    for index, block in enumerate(architecture):
        sizes = {
            "num_key_value_heads": block.attention.kv_heads,
            "intermediate_size": block.ffn.intermediate_size,
        }
        different = {key: size for key, size in sizes.items() if size != parent[key]}
        if different:
            layers[str(index)] = different
    return layers
