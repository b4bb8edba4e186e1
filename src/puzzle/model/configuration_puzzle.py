"""The config of a child: Llama's settings, its blocks, and what other families do differently.

Copied with `modeling_puzzle.py` beside the weights of every child; it imports nothing of the
package.

`block_configs` holds, per layer, `attention: {no_op, replace_with_linear, n_heads_in_group,
window_length}` and `ffn: {no_op, replace_with_linear, intermediate_size}`.
"""

from typing import Any, Literal

from transformers import LlamaConfig


class Attributes(dict[str, Any]):
    """A JSON object whose keys are attributes too.

    Engines read `block_configs[i].attention.no_op`; in config.json it is a plain object.
    """

    def __getattr__(self, name: str) -> Any:
        """The value of a key; `AttributeError` where there is none."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class PuzzleConfig(LlamaConfig):
    """Llama's settings, the blocks, and what other families do differently.

    The defaults are Llama's.
    """

    model_type = "nemotron-nas"
    block_configs: list[Any] | None = None  # one `Attributes` per layer
    qkv_bias: bool = False  # `attention_bias` is the output projection's
    # "head": a norm over each head of q and k; "projection": over all heads together
    qk_norm: Literal["head", "projection"] | None = None
    # "olmo2": the weight before rounding; "gemma": 1 + weight, before rounding
    norm_style: Literal["llama", "olmo2", "gemma"] = "llama"
    norm_placement: Literal["pre", "post", "both"] = "pre"  # around a subblock
    rotate_in_float32: bool = False
    embedding_scale: float | None = None
    query_scale: float | None = None  # instead of 1 / sqrt(head_dim)
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    # of layers with a `window_length`, which rotate without scaling
    window_rope_theta: float | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From a config.json; NVIDIA's leave a width of null that only `block_configs` say."""
        known = {k: v for k, v in config_dict.items() if k != "intermediate_size" or v is not None}
        return super().from_dict(known, **kwargs)

    def __post_init__(self, **kwargs: object) -> None:
        """Make the blocks `Attributes`."""
        # the same architecture for tools that do not know `block_configs`
        kwargs.pop("per_layer_config", None)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self.block_configs = [
            Attributes({name: Attributes(subblock) for name, subblock in block.items()})
            for block in self.block_configs or []
        ]
