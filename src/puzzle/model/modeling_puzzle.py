"""Children in transformers: a decoder in which every layer may differ, whatever family its parent
is of.

This file is self-contained: it is copied next to the weights of every child, so that
`AutoModelForCausalLM.from_pretrained(child, trust_remote_code=True)` works without the puzzle
package.

`config.block_configs` holds, per layer, `attention: {no_op, replace_with_linear, n_heads_in_group,
window_length}` and `ffn: {no_op, replace_with_linear, intermediate_size}`. A no-op subblock has
neither weights nor norms. Layers with real attention are numbered 0, 1, 2, ... for the KV cache, so
that the cache's first entry always exists.

What differs between families are a few settings of the config (`PuzzleConfig`); tests hold that a
parent in this class gives bitwise the logits of the family's own class.
"""

import copy

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding


class Attributes(dict):
    """A JSON object whose keys are attributes too: engines read `block_configs[i].attention.no_op`."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class PuzzleConfig(LlamaConfig):
    """Llama's settings, the blocks, and what other families do differently. The defaults are
    Llama's ways.
    """

    model_type = "nemotron-nas"
    block_configs: list | None = None
    qkv_bias: bool = False  # `attention_bias` is the output projection's
    qk_norm: str | None = None  # "head": over each head; "projection": over all heads together
    norm_style: str = (
        "llama"  # "olmo2": weight before rounding; "gemma": 1 + weight, before rounding
    )
    norm_placement: str = "pre"  # around a subblock: "pre", "post" or "both"
    rotate_in_float32: bool = False
    embedding_scale: float | None = None
    query_scale: float | None = None  # instead of 1 / sqrt(head_dim)
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    window_rope_theta: float | None = (
        None  # of layers with a `window_length`; they rotate without scaling
    )

    def __post_init__(self, **kwargs):
        kwargs.pop(
            "per_layer_config", None
        )  # the same architecture for tools that do not know `block_configs`
        super().__post_init__(**kwargs)
        self.block_configs = [
            Attributes({name: Attributes(part) for name, part in block.items()})
            for block in self.block_configs or []
        ]


class PuzzleEmbedding(nn.Embedding):
    """Scaled where the family does so, in the dtype of the weights."""

    def __init__(self, config):
        super().__init__(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embedding_scale = config.embedding_scale

    def scaled(self, rows):
        if self.embedding_scale is None:
            return rows
        return rows * torch.tensor(self.embedding_scale, dtype=rows.dtype, device=rows.device)

    def forward(self, input_ids):
        return self.scaled(super().forward(input_ids))


class PuzzleRMSNorm(nn.Module):
    """The families agree on the formula but not on where they round to the model's dtype."""

    def __init__(self, size, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon, self.style = config.rms_norm_eps, config.norm_style

    def forward(self, hidden_states):
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        if self.style == "gemma":
            return (x * (1.0 + self.weight.float())).to(hidden_states.dtype)
        if self.style == "olmo2":
            return (self.weight * x).to(hidden_states.dtype)
        return self.weight * x.to(hidden_states.dtype)


def rotate(x, cos, sin):
    """Rotary position embedding of the first `cos.shape[-1]` features of every head; x [B, heads,
    S, head_dim].
    """
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    half = turned.shape[-1] // 2
    other = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    turned = (turned * cos + other * sin).to(x.dtype)
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned


class PuzzleAttention(nn.Module):
    """Grouped-query attention with causal mask; `layer_idx` is its place in the KV cache."""

    def __init__(self, config, block, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups, self.sliding_window = (
            block.n_heads_in_group,
            block.get("window_length"),
        )
        self.scaling = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
        self.is_causal, self.qk_norm = True, config.qk_norm
        width, heads = config.hidden_size, config.num_attention_heads
        queries, keys = heads * config.head_dim, heads // block.n_heads_in_group * config.head_dim
        self.q_proj = nn.Linear(width, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, width, bias=config.attention_bias)
        if config.qk_norm:
            whole = config.qk_norm == "projection"
            self.q_norm = PuzzleRMSNorm(queries if whole else config.head_dim, config)
            self.k_norm = PuzzleRMSNorm(keys if whole else config.head_dim, config)

    def forward(
        self,
        hidden_states,
        position_embeddings,
        attention_mask=None,
        past_key_values=None,
        **kwargs,
    ):
        by_head = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
        if self.qk_norm == "projection":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.view(by_head).transpose(1, 2), key.view(by_head).transpose(1, 2)
        value = self.v_proj(hidden_states).view(by_head).transpose(1, 2)
        if self.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        cos, sin = (part.unsqueeze(1) for part in position_embeddings)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            softcap=self.config.attn_logit_softcapping,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class LinearAttention(nn.Module):
    """Attention replaced by one matrix: every token attends to itself only."""

    def __init__(self, hidden_size):
        super().__init__()
        self.linear_attn = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states):
        return self.linear_attn(hidden_states)


class LinearMLP(nn.Module):
    """An FFN replaced by one matrix."""

    def __init__(self, hidden_size):
        super().__init__()
        self.linear_mlp = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states):
        return self.linear_mlp(hidden_states)


class PuzzleDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx, cache_idx):
        super().__init__()
        attention, ffn = (
            config.block_configs[layer_idx].attention,
            config.block_configs[layer_idx].ffn,
        )
        self.self_attn = self.input_layernorm = self.attention_output_layernorm = None
        self.mlp = self.post_attention_layernorm = self.feedforward_output_layernorm = None
        before, after = config.norm_placement != "post", config.norm_placement != "pre"
        if attention.replace_with_linear:
            self.self_attn = LinearAttention(config.hidden_size)
        elif not attention.no_op:
            self.self_attn = PuzzleAttention(config, attention, cache_idx)
        if not attention.no_op:
            self.input_layernorm = PuzzleRMSNorm(config.hidden_size, config) if before else None
            self.attention_output_layernorm = (
                PuzzleRMSNorm(config.hidden_size, config) if after else None
            )
        if ffn.replace_with_linear:
            self.mlp = LinearMLP(config.hidden_size)
        elif not ffn.no_op:
            own = copy.copy(config)
            own.intermediate_size = ffn.intermediate_size
            self.mlp = LlamaMLP(own)
        if not ffn.no_op:
            self.post_attention_layernorm = (
                PuzzleRMSNorm(config.hidden_size, config) if before else None
            )
            self.feedforward_output_layernorm = (
                PuzzleRMSNorm(config.hidden_size, config) if after else None
            )

    def attention(
        self, hidden_states, attention_mask=None, position_embeddings=None, past_key_values=None
    ):
        """The attention subblock with its norms and residual. Masks and positions come by window
        length.
        """
        if self.self_attn is None:
            return hidden_states
        x = hidden_states if self.input_layernorm is None else self.input_layernorm(hidden_states)
        if isinstance(self.self_attn, LinearAttention):
            x = self.self_attn(x)
        else:
            window = self.self_attn.sliding_window
            x, _ = self.self_attn(
                x, position_embeddings[window], attention_mask[window], past_key_values
            )
        return hidden_states + (
            x if self.attention_output_layernorm is None else self.attention_output_layernorm(x)
        )

    def feed_forward(self, hidden_states):
        """The FFN subblock with its norms and residual."""
        if self.mlp is None:
            return hidden_states
        before, after = self.post_attention_layernorm, self.feedforward_output_layernorm
        x = self.mlp(hidden_states if before is None else before(hidden_states))
        return hidden_states + (x if after is None else after(x))

    def forward(self, hidden_states, **kwargs):
        return self.feed_forward(self.attention(hidden_states, **kwargs))


class PuzzlePreTrainedModel(PreTrainedModel):
    config_class = PuzzleConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PuzzleDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _sdpa_can_dispatch(self, *args, **kwargs):
        if self.config.attn_logit_softcapping is not None:  # it would be left out in silence
            raise ValueError(
                "sdpa has no soft cap for attention scores; use attn_implementation='eager'"
            )
        return super()._sdpa_can_dispatch(*args, **kwargs)


class PuzzleModel(PuzzlePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = PuzzleEmbedding(config)
        self.layers = nn.ModuleList()
        cache_idx = 0
        for layer_idx, block in enumerate(config.block_configs):
            self.layers.append(PuzzleDecoderLayer(config, layer_idx, cache_idx))
            cache_idx += not (block.attention.no_op or block.attention.replace_with_linear)
        self.norm = PuzzleRMSNorm(config.hidden_size, config)
        attentions = [
            layer.self_attn for layer in self.layers if isinstance(layer.self_attn, PuzzleAttention)
        ]
        self.windows = sorted(
            {one.sliding_window for one in attentions}, key=lambda window: window or 0
        )
        self.make_rotary(None)
        self.gradient_checkpointing = False
        self.post_init()

    def make_rotary(self, device):
        """(Re)make what computes the positions' angles; it has no weights."""
        self.rotary_emb = Phi3RotaryEmbedding(self.config).to(device)
        self.window_rotary_emb = None
        if self.config.window_rope_theta is not None:
            own = copy.copy(self.config)
            own.rope_parameters = {
                "rope_type": "default",
                "rope_theta": self.config.window_rope_theta,
            }
            self.window_rotary_emb = Phi3RotaryEmbedding(own).to(device)

    def embed(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
    ):
        """Layer 0's input [B, S, D] and the keyword arguments every layer takes."""
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (
                torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen
            ).unsqueeze(0)
        given = {
            "inputs_embeds": hidden_states,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        like = hidden_states.float() if self.config.rotate_in_float32 else hidden_states
        masks, angles = {}, {}
        for window in self.windows:
            if window is None:
                masks[window] = create_causal_mask(config=self.config, **given)
            else:
                own = copy.copy(self.config)
                own.sliding_window = window
                masks[window] = create_sliding_window_causal_mask(config=own, **given)
            rotary = (
                self.rotary_emb
                if window is None or self.window_rotary_emb is None
                else self.window_rotary_emb
            )
            angles[window] = rotary(like, position_ids=position_ids)
        return hidden_states, {
            "attention_mask": masks,
            "position_embeddings": angles,
            "past_key_values": past_key_values,
        }

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        **kwargs,
    ):
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        hidden_states, context = self.embed(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds
        )
        every_state = [hidden_states]
        for layer in self.layers:
            hidden_states = layer(hidden_states, **context)
            if output_hidden_states:
                every_state.append(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(every_state) if output_hidden_states else None,
        )


class PuzzleForCausalLM(PuzzlePreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = PuzzleModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def soft_cap(self, logits):
        cap = self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        logits_to_keep=0,
        **kwargs,
    ):
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.soft_cap(self.lm_head(outputs.last_hidden_state[:, keep, :]))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


class DeciLMForCausalLM(PuzzleForCausalLM):
    """The name under which stock engines know these checkpoints."""


if (
    __name__ == "puzzle.model.modeling_puzzle"
):  # with the package, a child loads without trusting the copy of this file
    AutoConfig.register(PuzzleConfig.model_type, PuzzleConfig, exist_ok=True)
    AutoModelForCausalLM.register(PuzzleConfig, PuzzleForCausalLM, exist_ok=True)
