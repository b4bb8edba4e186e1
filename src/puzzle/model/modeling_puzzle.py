"""Children in transformers: a decoder in which every layer may differ, for parents of all families.

This file and `configuration_puzzle.py` are copied beside the weights of every child, so that
`AutoModelForCausalLM.from_pretrained(child, trust_remote_code=True)` works without the puzzle
package. They import nothing else of it.

A no-op subblock has neither weights nor norms. Layers with real attention are numbered 0, 1, 2, ...
for the KV cache, so that the cache's first entry always exists. What differs between families are a
few settings of the config; tests hold that a parent in this class gives bitwise the logits of the
family's own class.

Shape legend: B batch, S sequence, T positions attended to (cached ones and S), D hidden size,
H query heads, K KV heads, d head size, r rotated features of a head, V vocabulary.
"""

import copy
from typing import Any, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from .configuration_puzzle import Attributes
from .configuration_puzzle import PuzzleConfig as PuzzleConfig  # whoever needs both imports it here

Masks = dict[int | None, torch.Tensor | None]  # by window length in tokens; None: full attention
Angles = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, [B or 1, S, r]


class PuzzleEmbedding(nn.Embedding):
    """Token embeddings, scaled where the family does so, in the dtype of the weights."""

    def __init__(self, config: PuzzleConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embedding_scale = config.embedding_scale

    def scaled(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [..., D] of the embedding as layer 0 takes them."""
        if self.embedding_scale is None:
            return rows
        return rows * torch.tensor(self.embedding_scale, dtype=rows.dtype, device=rows.device)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [B, S, D]."""
        return self.scaled(super().forward(input_ids))


class PuzzleRMSNorm(nn.Module):
    """RMSNorm. Families agree on the formula, not on where they round to the model's dtype."""

    def __init__(self, size: int, config: PuzzleConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon, self.style = config.rms_norm_eps, config.norm_style

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., size] -> [..., size], in the input's dtype."""
        if hidden_states.is_cuda and self.style == "llama":
            return self.fused(hidden_states)
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        if self.style == "gemma":
            return (x * (1.0 + self.weight.float())).to(hidden_states.dtype)
        if self.style == "olmo2":
            return (self.weight * x).to(hidden_states.dtype)
        return self.weight * x.to(hidden_states.dtype)

    def fused(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Llama's in one kernel, where memory traffic counts; rounds once, after the weight."""
        if torch.is_autocast_enabled("cuda"):  # which would take and give float32
            with torch.autocast("cuda", enabled=False):
                return self.fused(hidden_states)
        weight = self.weight.to(hidden_states.dtype)
        return F.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of the first r features of every head; the others stay.

    x [B, heads, S, d]; cos and sin [B or 1, 1, S, r].
    """
    rotated, unchanged = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    half = rotated.shape[-1] // 2
    partner = torch.cat((-rotated[..., half:], rotated[..., :half]), dim=-1)
    rotated = (rotated * cos + partner * sin).to(x.dtype)
    return torch.cat((rotated, unchanged), dim=-1) if unchanged.shape[-1] else rotated


class PuzzleAttention(nn.Module):
    """Grouped-query attention with a causal mask; `layer_idx` is its place in the KV cache."""

    def __init__(self, config: PuzzleConfig, block: Attributes, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        # the attention functions of transformers read these names
        self.num_key_value_groups = block.n_heads_in_group
        self.sliding_window: int | None = block.get("window_length")
        self.scaling = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
        self.is_causal, self.qk_norm = True, config.qk_norm
        heads = config.num_attention_heads
        query_size = heads * config.head_dim
        key_size = heads // block.n_heads_in_group * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        if config.qk_norm:
            all_heads = config.qk_norm == "projection"
            self.q_norm = PuzzleRMSNorm(query_size if all_heads else config.head_dim, config)
            self.k_norm = PuzzleRMSNorm(key_size if all_heads else config.head_dim, config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Angles,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            hidden_states: [B, S, D].
            position_embeddings: cosines and sines, [B or 1, S, r] each.
            attention_mask: as the attention implementation takes it; None: plain causal.
            past_key_values: the KV cache, which is extended.
            kwargs: ignored.

        Returns:
            [B, S, D], and the attention weights [B, H, S, T] where the implementation gives them.
        """
        batch_and_sequence = hidden_states.shape[:-1]
        by_head = (*batch_and_sequence, -1, self.head_dim)
        query = self.q_proj(hidden_states)  # [B, S, H * d]
        key = self.k_proj(hidden_states)  # [B, S, K * d]
        if self.qk_norm == "projection":
            query, key = self.q_norm(query), self.k_norm(key)
        query = query.view(by_head).transpose(1, 2)  # [B, H, S, d]
        key = key.view(by_head).transpose(1, 2)  # [B, K, S, d]
        value = self.v_proj(hidden_states).view(by_head).transpose(1, 2)  # [B, K, S, d]
        if self.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        cos, sin = (part.unsqueeze(1) for part in position_embeddings)  # [B or 1, 1, S, r]
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # [B, K, T, d]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(  # [B, S, H, d] and [B, H, S, T] or None
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
        output = output.reshape(*batch_and_sequence, -1)  # [B, S, H * d]
        return self.o_proj(output), weights  # [B, S, D]


class LinearAttention(nn.Module):
    """Attention replaced by one matrix: every token attends to itself only."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_attn = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]."""
        return self.linear_attn(hidden_states)


class LinearMLP(nn.Module):
    """An FFN replaced by one matrix."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_mlp = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]."""
        return self.linear_mlp(hidden_states)


class LayerContext(TypedDict):
    """The keyword arguments that every layer takes; see `PuzzleModel.embed`."""

    attention_mask: Masks
    position_embeddings: dict[int | None, Angles]  # by window length
    past_key_values: Cache | None


class PuzzleDecoderLayer(GradientCheckpointingLayer):
    """One block: an attention and an FFN subblock, either of which may be missing (a no-op).

    `layer_idx` is the layer's place in `block_configs`, `cache_idx` its place in the KV cache.
    """

    def __init__(self, config: PuzzleConfig, layer_idx: int, cache_idx: int) -> None:
        super().__init__()
        block = config.block_configs[layer_idx]
        attention, ffn = block.attention, block.ffn
        self.self_attn: PuzzleAttention | LinearAttention | None = None
        self.input_layernorm: PuzzleRMSNorm | None = None
        self.attention_output_layernorm: PuzzleRMSNorm | None = None
        self.mlp: LlamaMLP | LinearMLP | None = None
        self.post_attention_layernorm: PuzzleRMSNorm | None = None
        self.feedforward_output_layernorm: PuzzleRMSNorm | None = None
        norm_before = config.norm_placement in ("pre", "both")
        norm_after = config.norm_placement in ("post", "both")
        if attention.replace_with_linear:
            self.self_attn = LinearAttention(config.hidden_size)
        elif not attention.no_op:
            self.self_attn = PuzzleAttention(config, attention, cache_idx)
        if not attention.no_op and norm_before:
            self.input_layernorm = PuzzleRMSNorm(config.hidden_size, config)
        if not attention.no_op and norm_after:
            self.attention_output_layernorm = PuzzleRMSNorm(config.hidden_size, config)
        if ffn.replace_with_linear:
            self.mlp = LinearMLP(config.hidden_size)
        elif not ffn.no_op:
            ffn_config = copy.copy(config)
            ffn_config.intermediate_size = ffn.intermediate_size
            self.mlp = LlamaMLP(ffn_config)
        if not ffn.no_op and norm_before:
            self.post_attention_layernorm = PuzzleRMSNorm(config.hidden_size, config)
        if not ffn.no_op and norm_after:
            self.feedforward_output_layernorm = PuzzleRMSNorm(config.hidden_size, config)

    def attention(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Masks | None = None,
        position_embeddings: dict[int | None, Angles] | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """The attention subblock with its norms and residual, [B, S, D] -> [B, S, D].

        Masks and positions come by window length; only real attention needs them.
        """
        if self.self_attn is None:
            return hidden_states
        x = hidden_states
        if self.input_layernorm is not None:
            x = self.input_layernorm(x)
        if isinstance(self.self_attn, LinearAttention):
            x = self.self_attn(x)
        else:
            window = self.self_attn.sliding_window
            x, _ = self.self_attn(
                x, position_embeddings[window], attention_mask[window], past_key_values
            )
        if self.attention_output_layernorm is not None:
            x = self.attention_output_layernorm(x)
        return hidden_states + x

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The FFN subblock with its norms and residual, [B, S, D] -> [B, S, D]."""
        if self.mlp is None:
            return hidden_states
        x = hidden_states
        if self.post_attention_layernorm is not None:
            x = self.post_attention_layernorm(x)
        x = self.mlp(x)
        if self.feedforward_output_layernorm is not None:
            x = self.feedforward_output_layernorm(x)
        return hidden_states + x

    def forward(self, hidden_states: torch.Tensor, **context: Unpack[LayerContext]) -> torch.Tensor:
        """Both subblocks, [B, S, D] -> [B, S, D]."""
        return self.feed_forward(self.attention(hidden_states, **context))


class PuzzlePreTrainedModel(PreTrainedModel):
    """What transformers asks of a model class."""

    config: PuzzleConfig
    config_class = PuzzleConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PuzzleDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _sdpa_can_dispatch(self, *args: object, **kwargs: object) -> bool:
        """Refuse PyTorch's fused attention where it would silently leave the soft cap out."""
        if self.config.attn_logit_softcapping is not None:
            raise ValueError(
                "sdpa has no soft cap for attention scores; use attn_implementation='eager'"
            )
        return super()._sdpa_can_dispatch(*args, **kwargs)


class PuzzleModel(PuzzlePreTrainedModel):
    """The decoder without its head: embedding, layers, final norm."""

    def __init__(self, config: PuzzleConfig) -> None:
        super().__init__(config)
        self.embed_tokens = PuzzleEmbedding(config)
        # `PuzzleDecoderLayer`s; a type checker would see mere modules in a ModuleList
        self.layers: Any = nn.ModuleList()
        cache_idx = 0
        for layer_idx, block in enumerate(config.block_configs):
            self.layers.append(PuzzleDecoderLayer(config, layer_idx, cache_idx))
            if not block.attention.no_op and not block.attention.replace_with_linear:
                cache_idx += 1
        self.norm = PuzzleRMSNorm(config.hidden_size, config)
        windows = {
            layer.self_attn.sliding_window
            for layer in self.layers
            if isinstance(layer.self_attn, PuzzleAttention)
        }
        self.windows: list[int | None] = sorted(windows, key=lambda window: window or 0)
        self.make_rotary(None)
        self.gradient_checkpointing = False
        self.post_init()

    def make_rotary(self, device: torch.device | None) -> None:
        """(Re)make what computes the positions' angles; it has no weights."""
        # typed loosely: transformers declares that its config is a Phi3Config
        self.rotary_emb: Any = Phi3RotaryEmbedding(self.config).to(device)
        self.window_rotary_emb: Any = None
        if self.config.window_rope_theta is not None:
            window_config = copy.copy(self.config)
            window_config.rope_parameters = {
                "rope_type": "default",
                "rope_theta": self.config.window_rope_theta,
            }
            self.window_rotary_emb = Phi3RotaryEmbedding(window_config).to(device)

    def embed(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, LayerContext]:
        """Layer 0's input [B, S, D] and the keyword arguments that every layer takes.

        Args:
            input_ids: [B, S]; not needed with `inputs_embeds`.
            attention_mask: [B, T], 1 for real tokens and 0 for padding; None: no padding.
            position_ids: [B or 1, S]; None: the positions after the cached ones.
            past_key_values: the KV cache.
            inputs_embeds: [B, S, D], the scaled embeddings.
        """
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        # Masks look for packed sequences in positions that are given, which waits for a GPU
        mask_inputs = {
            "inputs_embeds": hidden_states,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        if position_ids is None:
            cached = past_key_values.get_seq_length() if past_key_values is not None else 0
            positions = torch.arange(hidden_states.shape[1], device=hidden_states.device) + cached
            position_ids = positions.unsqueeze(0)
        # the angles get the dtype of this tensor, of which nothing else is used
        like = hidden_states.float() if self.config.rotate_in_float32 else hidden_states
        masks: Masks = {}
        angles: dict[int | None, Angles] = {}
        for window in self.windows:
            rotary = self.rotary_emb
            if window is None:
                masks[window] = create_causal_mask(config=self.config, **mask_inputs)
            else:
                window_config = copy.copy(self.config)
                window_config.sliding_window = window
                masks[window] = create_sliding_window_causal_mask(
                    config=window_config, **mask_inputs
                )
                if self.window_rotary_emb is not None:
                    rotary = self.window_rotary_emb
            angles[window] = rotary(like, position_ids=position_ids)
        return hidden_states, {
            "attention_mask": masks,
            "position_embeddings": angles,
            "past_key_values": past_key_values,
        }

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast:
        """Final hidden states [B, S, D], after the last norm. The arguments are transformers' own.

        With `output_hidden_states` also every layer's input and the last layer's output, before
        the last norm.
        """
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        hidden_states, context = self.embed(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds
        )
        all_hidden_states = [hidden_states]
        for layer in self.layers:
            hidden_states = layer(hidden_states, **context)
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
        )


class PuzzleForCausalLM(PuzzlePreTrainedModel, GenerationMixin):
    """A child (or the parent as the all-parent child): the decoder and its head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PuzzleConfig) -> None:
        super().__init__(config)
        self.model: PuzzleModel = PuzzleModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head: nn.Linear = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def soft_cap(self, logits: torch.Tensor) -> torch.Tensor:
        """cap * tanh(logits / cap) where the family caps its logits [..., V]."""
        cap = self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V], and the loss where there are labels.

        The arguments are transformers' own. `logits_to_keep` is how many of the last
        positions get logits (0: all), or their indices.
        """
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


# with the puzzle package a child loads without trusting the copies of these files beside it
if __name__ == "puzzle.model.modeling_puzzle":
    AutoConfig.register(PuzzleConfig.model_type, PuzzleConfig, exist_ok=True)
    AutoModelForCausalLM.register(PuzzleConfig, PuzzleForCausalLM, exist_ok=True)
