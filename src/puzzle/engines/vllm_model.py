"""vLLM's model of the children that stock vLLM cannot load.

Those are children with linear replacements or without attention in layer 0, and the families whose
attention or norms are not Llama's. `vllm_engine.register`, vLLM's plugin entry point, registers it.

It is stock vLLM's DeciLM with another decoder layer. Tensor parallel: attention and FFNs are cut as
vLLM cuts Llama's, linear replacements are replicated.

Shape legend: T tokens of all sequences of a step, D hidden.
"""

from typing import Any

import torch
from torch import nn
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.gemma3 import Gemma3MLP
from vllm.model_executor.models.nemotron_nas import DeciLMForCausalLM, DeciModel


def norm(size: int, config: Any) -> nn.Module:
    """An RMSNorm over `size` features in the family's style."""
    kind = GemmaRMSNorm if config.norm_style == "gemma" else RMSNorm
    return kind(size, eps=config.rms_norm_eps)


class Linear(nn.Module):
    """Attention or an FFN replaced by one matrix."""

    def __init__(
        self, name: str, size: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        matrix = ReplicatedLinear(
            size, size, bias=False, quant_config=quant_config, prefix=f"{prefix}.{name}"
        )
        self.add_module(name, matrix)
        self.name = name

    def forward(
        self, hidden_states: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[T, D] -> [T, D]; positions do not matter."""
        return getattr(self, self.name)(hidden_states)[0]


class PuzzleAttention(nn.Module):
    """Grouped-query attention; this rank has some of the query heads and at least one KV head."""

    def __init__(
        self,
        config: Any,
        block: Any,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        heads, kv_heads = (
            config.num_attention_heads,
            config.num_attention_heads // block.n_heads_in_group,
        )
        self.head_dim, self.qk_norm = config.head_dim, config.qk_norm
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            heads,
            kv_heads,
            bias=config.qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            heads * config.head_dim,
            config.hidden_size,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        own_heads, own_kv_heads = heads // ranks, max(1, kv_heads // ranks)
        self.copies = max(1, ranks // kv_heads)  # neighbouring ranks that hold the same KV head
        self.sizes = [own_heads * config.head_dim, *[own_kv_heads * config.head_dim] * 2]
        if config.qk_norm == "head":
            self.q_norm, self.k_norm = norm(config.head_dim, config), norm(config.head_dim, config)
        elif config.qk_norm == "projection":
            self.q_norm, self.k_norm = (
                norm(heads * config.head_dim, config),
                norm(kv_heads * config.head_dim, config),
            )
        window, rope = block.get("window_length"), config.rope_parameters
        if window is not None and config.window_rope_theta is not None:
            rope = {"rope_type": "default", "rope_theta": config.window_rope_theta}
        self.rotary_emb = get_rope(
            config.head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters=rope,
            is_neox_style=True,
        )
        self.attn = Attention(
            own_heads,
            config.head_dim,
            config.query_scale or config.head_dim**-0.5,
            num_kv_heads=own_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=window,
            logits_soft_cap=config.attn_logit_softcapping,
            prefix=f"{prefix}.attn",
        )

    def _normed(self, x: torch.Tensor, by: nn.Module, copies: int = 1) -> torch.Tensor:
        """The norm of q or k, x [T, heads of this rank * head_dim].

        `copies`: how many neighbouring ranks hold the same heads.
        """
        if self.qk_norm == "head":
            return by(x.unflatten(-1, (-1, self.head_dim)).contiguous()).flatten(-2, -1)
        parts = tensor_model_parallel_all_gather(x.contiguous()).split(x.shape[-1], dim=-1)
        whole = by(torch.cat(parts[::copies], dim=-1))
        return whole.split(x.shape[-1], dim=-1)[get_tensor_model_parallel_rank() // copies]

    def forward(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[T, D] and positions [T] -> [T, D]."""
        q, k, v = self.qkv_proj(hidden_states)[0].split(self.sizes, dim=-1)
        if self.qk_norm is not None:
            q, k = self._normed(q, self.q_norm), self._normed(k, self.k_norm, self.copies)
        q, k = self.rotary_emb(positions, q, k)
        return self.o_proj(self.attn(q, k, v))[0]


class PuzzleDecoderLayer(nn.Module):
    """The residual stream is the sum of the hidden states and the residual between layers."""

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        cache_config: CacheConfig | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        attention, ffn = (
            config.block_configs[layer_idx].attention,
            config.block_configs[layer_idx].ffn,
        )
        before, after = config.norm_placement != "post", config.norm_placement != "pre"
        size = config.hidden_size
        self._is_no_op_attention = attention.no_op  # read by DeciModel
        self.self_attn: nn.Module | None = None
        self.mlp: nn.Module | None = None
        self.input_layernorm = self.attention_output_layernorm = None
        self.post_attention_layernorm = self.feedforward_output_layernorm = None
        if attention.replace_with_linear:
            self.self_attn = Linear("linear_attn", size, quant_config, f"{prefix}.self_attn")
        elif not attention.no_op:
            self.self_attn = PuzzleAttention(
                config, attention, cache_config, quant_config, f"{prefix}.self_attn"
            )
        if not attention.no_op:
            self.input_layernorm = norm(size, config) if before else None
            self.attention_output_layernorm = norm(size, config) if after else None
        if ffn.replace_with_linear:
            self.mlp = Linear("linear_mlp", size, quant_config, f"{prefix}.mlp")
        elif not ffn.no_op:
            self.mlp = Gemma3MLP(
                size, ffn.intermediate_size, config.hidden_act, quant_config, f"{prefix}.mlp"
            )
        if not ffn.no_op:
            self.post_attention_layernorm = norm(size, config) if before else None
            self.feedforward_output_layernorm = norm(size, config) if after else None

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both subblocks: (hidden states, residual), [T, D] each; layer 0 gets no residual."""
        if self.self_attn is not None:
            x, residual = _into(self.input_layernorm, hidden_states, residual)
            hidden_states = _out_of(
                self.attention_output_layernorm, self.self_attn(x, positions=positions)
            )
        if self.mlp is not None:
            x, residual = _into(self.post_attention_layernorm, hidden_states, residual)
            hidden_states = _out_of(self.feedforward_output_layernorm, self.mlp(x))
        return hidden_states, torch.zeros_like(hidden_states) if residual is None else residual


def _into(
    before: nn.Module | None, hidden_states: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(a subblock's input, the residual stream before it)."""
    if before is not None and residual is not None:
        return before(hidden_states, residual)
    stream = hidden_states if residual is None else hidden_states + residual
    return (stream if before is None else before(stream)), stream


def _out_of(after: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    return x if after is None else after(x)


class PuzzleModel(DeciModel):
    """The decoder without its head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=PuzzleDecoderLayer)
        if isinstance(self.norm, RMSNorm):  # this rank has the last layer
            self.norm: nn.Module = norm(self.config.hidden_size, self.config)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, D], scaled where the family does so."""
        rows, scale = self.embed_tokens(input_ids), self.config.embedding_scale
        return rows if scale is None else rows * torch.tensor(scale, dtype=rows.dtype)


class PuzzleForCausalLM(DeciLMForCausalLM):
    """The decoder and its head, with the family's soft cap on logits."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.config.final_logit_softcapping is not None:
            self.logits_processor = LogitsProcessor(
                self.config.vocab_size, soft_cap=self.config.final_logit_softcapping
            )

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "") -> PuzzleModel:
        return PuzzleModel(vllm_config=vllm_config, prefix=prefix)
