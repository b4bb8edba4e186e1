"""Which children llama.cpp's architecture `deci` computes as transformers does.

What it gets wrong was measured against llama.cpp itself: docs/log.md, "What llama.cpp computes of a
child". The graph is llama.cpp's src/models/deci.cpp.
"""

from pathlib import Path

from puzzle.errors import UserError
from puzzle.model import block_configs
from puzzle.model.architecture import Architecture, Block
from puzzle.model.modeling_puzzle import PuzzleConfig

# What a config may say besides Llama's own settings, and the values that change nothing
PLAIN = {
    "qk_norm": (None, False),
    "norm_style": (None, "llama"),
    "norm_placement": (None, "pre"),
    "embedding_scale": (None, 1, 1.0),
    "query_scale": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "hidden_act": ("silu",),
}
# RoPE scalings that do not depend on the text's length
STATIC_ROPE = ("default", "linear", "llama3", "yarn")


def read_child(folder: Path) -> tuple[PuzzleConfig, Architecture]:
    """Config and architecture. Raises `UserError` where the folder holds no child."""
    if not (folder / "config.json").exists():
        raise UserError(f"export gguf: {folder}: no config.json; expected the folder of a child")
    config = PuzzleConfig.from_pretrained(folder)
    if not config.block_configs:
        raise UserError(
            f"export gguf: {folder}: its config has no block_configs; "
            "expected the folder of a child"
        )
    return config, block_configs.read(config.block_configs, config.num_attention_heads)


def kept_layers(architecture: Architecture) -> list[int]:
    """The layers that are in the file: all but those of two no-ops."""
    return [index for index, block in enumerate(architecture) if not block.is_no_op]


def refuse(config: PuzzleConfig, architecture: Architecture) -> None:
    """Raise `UserError` where llama.cpp's deci graph would not compute what the child does."""
    for index, block in enumerate(architecture):
        window = (config.block_configs or [])[index].attention.get("window_length")
        _refuse_block(index, block, window)
    for key, plain_values in PLAIN.items():
        value = getattr(config, key, plain_values[0])
        if value not in plain_values:
            raise UserError(
                f"export gguf: config {key}: got {value!r}, which llama.cpp's deci models do not "
                f"have; expected {plain_values[-1]!r}; serve this child with another engine"
            )
    _refuse_rope(config)
    if all(block.attention.kind != "gqa" for block in architecture):
        raise UserError(
            "export gguf: got a child without attention in any layer, for which llama.cpp cannot "
            "make a KV cache; expected at least one layer with attention; "
            "serve this child with another engine"
        )


def _refuse_block(index: int, block: Block, window: int | None) -> None:
    if block.ffn.kind == "linear":
        got, expected = "a linear FFN, which llama.cpp cannot run", "a gated or no-op FFN"
    elif block.ffn.kind == "no_op" and block.attention.kind != "no_op":
        attention = block.attention.name
        got = f"an FFN no-op after {attention} attention, whose output llama.cpp would lose"
        expected = "a gated FFN, or no-ops in both halves"
    elif window:
        got, expected = f"attention to a window of {window} tokens", "attention to all tokens"
    else:
        return
    raise UserError(
        f"export gguf: layer {index}: got {got}; expected {expected}; "
        "search with deploy: [llama.cpp], which leaves such blocks out"
    )


def _refuse_rope(config: PuzzleConfig) -> None:
    rope = config.rope_parameters or {}
    kind, share = rope.get("rope_type"), rope.get("partial_rotary_factor", 1.0)
    if kind not in STATIC_ROPE or share != 1.0:
        raise UserError(
            f"export gguf: config rope_parameters: got type {kind!r} on {share} of each head; "
            f"expected one of {', '.join(STATIC_ROPE)} on the whole head; "
            "serve this child with another engine"
        )
