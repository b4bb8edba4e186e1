"""Children in transformers: a Llama-like decoder in which every layer may differ.

This file is self-contained: it is copied next to the weights of every child, so that
`AutoModelForCausalLM.from_pretrained(child, trust_remote_code=True)` works without the puzzle package.

`config.block_configs` holds, per layer, `attention: {no_op, replace_with_linear, n_heads_in_group}` and
`ffn: {no_op, replace_with_linear, intermediate_size}`. A no-op subblock has neither weights nor norm. Layers with
real attention are numbered 0, 1, 2, ... for the KV cache, so that the cache's first entry always exists.
"""

import copy

import torch
from torch import nn
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding


class Attributes(dict):
    """A JSON object whose keys are attributes too: engines read `block_configs[i].attention.no_op`."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class PuzzleConfig(LlamaConfig):
    model_type = "nemotron-nas"
    block_configs: list | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.block_configs = [
            Attributes({name: Attributes(part) for name, part in block.items()}) for block in self.block_configs or []
        ]


class LinearAttention(nn.Module):
    """Attention replaced by one matrix: every token attends to itself only."""

    def __init__(self, hidden_size):
        super().__init__()
        self.linear_attn = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states, **kwargs):
        return self.linear_attn(hidden_states), None


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
        attention, ffn = config.block_configs[layer_idx].attention, config.block_configs[layer_idx].ffn
        own = copy.copy(config)
        self.self_attn = self.input_layernorm = self.mlp = self.post_attention_layernorm = None
        if attention.replace_with_linear:
            self.self_attn = LinearAttention(config.hidden_size)
        elif not attention.no_op:
            own.num_key_value_heads = config.num_attention_heads // attention.n_heads_in_group
            self.self_attn = LlamaAttention(own, cache_idx)
        if not attention.no_op:
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if ffn.replace_with_linear:
            self.mlp = LinearMLP(config.hidden_size)
        elif not ffn.no_op:
            own.intermediate_size = ffn.intermediate_size
            self.mlp = LlamaMLP(own)
        if not ffn.no_op:
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def attention(self, hidden_states, **kwargs):
        """The attention subblock with its norm and residual."""
        if self.self_attn is None:
            return hidden_states
        return hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]

    def feed_forward(self, hidden_states):
        """The FFN subblock with its norm and residual."""
        if self.mlp is None:
            return hidden_states
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

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


class PuzzleModel(PuzzlePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList()
        cache_idx = 0
        for layer_idx, block in enumerate(config.block_configs):
            self.layers.append(PuzzleDecoderLayer(config, layer_idx, cache_idx))
            cache_idx += not (block.attention.no_op or block.attention.replace_with_linear)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def embed(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None):
        """Layer 0's input [B, S, D] and the keyword arguments every layer takes."""
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask,
            past_key_values=past_key_values, position_ids=position_ids,
        )  # fmt: skip
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        return hidden_states, {
            "attention_mask": mask, "position_embeddings": position_embeddings, "past_key_values": past_key_values,
        }  # fmt: skip

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        use_cache=None, output_hidden_states=None, **kwargs,
    ):  # fmt: skip
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        hidden_states, context = self.embed(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
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

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, output_hidden_states=None, logits_to_keep=0, **kwargs,
    ):  # fmt: skip
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )  # fmt: skip
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )


class DeciLMForCausalLM(PuzzleForCausalLM):
    """The name under which stock engines know these checkpoints."""
