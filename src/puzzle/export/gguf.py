"""GGUF: a child as one file for llama.cpp and what is built on it.

Reads a child folder, writes `NAME-DTYPE.gguf` of llama.cpp's architecture `deci`, whose layers have
their own numbers of heads, KV heads and FFN width. How a block is written (llama.cpp's
src/models/deci.cpp; docs/log.md):

    attention gqa: heads, KV heads    linear: heads, 0 KV heads, the matrix as `attn_output`    no-op: 0 heads, 0
    FFN gated: its width              no-op: nothing, allowed only where the attention is a no-op too

- A block of two no-ops is left out: as the last layer it would crash llama.cpp.
- llama.cpp takes the head size from layer 0, which therefore cannot be without heads: a no-op
  attention there becomes a linear one with a zero matrix, which adds exactly nothing.
- Query and key rows are reordered: transformers rotates dimension j with j + head_dim/2, llama.cpp
  2j with 2j + 1.
- RoPE scaling is written as the factors by which transformers divides each frequency (`rope_freqs`)
  and the factor of cos and sin, so that every scaling that does not depend on the text's length is
  exact.

Memory: one tensor at a time. `verify` also needs the model in memory if llama_cpp is there to
generate with it.
"""

import importlib
import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from puzzle import artifacts
from puzzle.errors import UserError
from puzzle.export import gguf_vocabulary
from puzzle.model import block_configs, child
from puzzle.model.architecture import Architecture, Block
from puzzle.model.modeling_puzzle import PuzzleConfig
from puzzle.model.weights import Weights

NAME = "gguf"
ARCHITECTURE = "deci"
FILE_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
}  # gguf.LlamaFileType
# Standard deviations of the logits that a choice may lie below the best: llama.cpp rounds
# activations as it stores matrices. At least five times the largest seen on random models
# (docs/log.md), which amplify rounding.
GAPS = {"f32": 0.01, "f16": 0.1, "bf16": 0.2, "q8_0": 0.2}
LARGEST_F16 = 65504.0
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
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
ATTENTION = {
    "gqa": (
        "input_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
    ),
    "linear": ("input_layernorm", "self_attn.linear_attn"),
    "no_op": (),
}
FFN = {
    "gated": ("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "no_op": (),
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of the file: its values are those of `source` in the checkpoint, or `constant`."""

    name: str
    shape: tuple[int, ...]
    type: Any  # gguf.GGMLQuantizationType
    source: str = ""
    heads: int = 0  # rows of so many heads are reordered; 0: none
    constant: torch.Tensor | None = None

    def read(self, weights: Weights) -> torch.Tensor:
        """Values in float32, rows in llama.cpp's order."""
        values = self.constant if self.constant is not None else weights[self.source]
        values = values.float()
        return interleave(values, self.heads) if self.heads else values


def library() -> ModuleType:
    """The gguf package, an extra of ours."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise UserError(
            "export gguf: the package gguf is not installed; pip install 'puzzle-nas[gguf]'"
        ) from None


def refuse(config: PuzzleConfig, architecture: Architecture) -> None:
    """Raise `UserError` where llama.cpp's deci graph would compute something else than the child."""
    layers = config.block_configs or []
    for index, block in enumerate(architecture):
        if block.ffn.kind == "linear":
            what, expected = "a linear FFN, which llama.cpp cannot run", "a gated or no-op FFN"
        elif block.ffn.kind == "no_op" and block.attention.kind != "no_op":
            what = f"an FFN no-op after {block.attention.name} attention, whose output llama.cpp would lose"
            expected = "a gated FFN, or no-ops in both halves"
        elif window := layers[index].attention.get("window_length"):
            what, expected = f"attention to a window of {window} tokens", "attention to all tokens"
        else:
            continue
        raise UserError(
            f"export gguf: layer {index}: got {what}; expected {expected}; "
            "search with deploy: [llama.cpp], which leaves such blocks out"
        )
    for key, plain in PLAIN.items():
        if (value := getattr(config, key, plain[0])) not in plain:
            raise UserError(
                f"export gguf: config {key}: got {value!r}, which llama.cpp's deci models do not have; "
                f"expected {plain[-1]!r}; serve this child with another engine"
            )
    _refuse_rope(config)
    if all(block.attention.kind != "gqa" for block in architecture):
        raise UserError(
            "export gguf: got a child without attention in any layer, for which llama.cpp cannot make a KV cache; "
            "expected at least one layer with attention; serve this child with another engine"
        )


def _refuse_rope(config: PuzzleConfig) -> None:
    rope = config.rope_parameters or {}
    kind, share = rope.get("rope_type"), rope.get("partial_rotary_factor", 1.0)
    if kind not in STATIC_ROPE or share != 1.0:
        raise UserError(
            f"export gguf: config rope_parameters: got type {kind!r} on {share} of each head; expected one of "
            f"{', '.join(STATIC_ROPE)} on the whole head; serve this child with another engine"
        )


def written(architecture: Architecture) -> list[bool]:
    """Per layer, whether it is in the file: all but those of two no-ops."""
    return [block.name != "no_op+no_op" for block in architecture]


def export(
    source: Path, target: Path, *, name: str = "child", dtype: str | None = None
) -> dict[str, Any]:
    """Write the child in `source` to `target/NAME-DTYPE.gguf`.

    `dtype` is f32, f16 (the default), bf16 or q8_0 and holds for matrices; norms, biases and RoPE
    factors stay float32, and a matrix whose rows q8_0's blocks of 32 do not fill stays f16.
    """
    dtype = dtype or "f16"
    if dtype not in FILE_TYPES:
        raise UserError(
            f"export gguf: dtype: got {dtype!r}, expected one of {', '.join(FILE_TYPES)}"
        )
    config, architecture = _describe(source)
    refuse(config, architecture)
    vocabulary = gguf_vocabulary.read(source, config)
    path = target / f"{name}-{dtype}.gguf"
    with Weights(source) as weights:
        entries = plan(config, architecture, weights, dtype)
        with artifacts.atomic_path(path) as temporary:
            writer = library().GGUFWriter(temporary, ARCHITECTURE)
            _add_metadata(writer, config, architecture, name, dtype)
            gguf_vocabulary.add(writer, vocabulary)
            _write(writer, entries, weights)
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "dtype": dtype,
        "tensors": len(entries),
        "layers": [index for index, kept in enumerate(written(architecture)) if kept],
        "notes": _notes(architecture, entries, dtype) + vocabulary.notes,
    }


def _describe(source: Path) -> tuple[PuzzleConfig, Architecture]:
    if not (source / "config.json").exists():
        raise UserError(f"export gguf: {source}: no config.json; expected the folder of a child")
    config = PuzzleConfig.from_pretrained(source)
    if not config.block_configs:
        raise UserError(
            f"export gguf: {source}: its config has no block_configs; expected the folder of a child"
        )
    return config, block_configs.read(config.block_configs, config.num_attention_heads)


def _notes(architecture: Architecture, entries: list[Entry], dtype: str) -> list[str]:
    notes = []
    if left_out := [str(index) for index, kept in enumerate(written(architecture)) if not kept]:
        notes.append(
            f"layers {', '.join(left_out)} are no-ops in both halves and are left out of the file"
        )
    if any(
        entry.constant is not None and entry.name.endswith("attn_output.weight")
        for entry in entries
    ):
        notes.append(
            "the first layer's no-op attention is written as a linear one with a zero matrix"
        )
    if dtype == "q8_0" and any(e.type.name == "F16" for e in entries):
        notes.append("matrices whose rows are no multiple of 32 are f16")
    return notes


def plan(
    config: PuzzleConfig, architecture: Architecture, weights: Weights, dtype: str
) -> list[Entry]:
    """The tensors of the file in its order. Every tensor of the checkpoint has its place, or
    `UserError` names it.
    """
    gguf, stored = library(), set(weights)
    blocks = [
        (index, block) for index, block in enumerate(architecture) if written(architecture)[index]
    ]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, len(blocks))
    entries, used = [], set()
    for source, renamed, heads in _sources(config, blocks, stored):
        used.add(source)
        shape = tuple(weights[source].shape)
        name = names.get_name(renamed, try_suffixes=(".weight", ".bias"))
        assert name is not None, renamed
        entries.append(
            Entry(name=name, shape=shape, type=_type(shape, dtype), source=source, heads=heads)
        )
    if unknown := stored - used - ({"lm_head.weight"} if config.tie_word_embeddings else set()):
        raise UserError(
            f"export gguf: got a tensor {min(unknown)!r}, which llama.cpp's deci models do not have; expected Llama's "
            "tensors and linear attention; serve this child with another engine"
        )
    return entries + _constants(config, blocks[0][1], dtype)


def _sources(
    config: PuzzleConfig, blocks: list[tuple[int, Block]], stored: set[str]
) -> Iterator[tuple[str, str, int]]:
    """Of every tensor: its name in the checkpoint, its name as if no layer were left out, its
    reordered heads.
    """
    yield "model.embed_tokens.weight", "model.embed_tokens.weight", 0
    for place, (index, block) in enumerate(blocks):
        heads = {
            "self_attn.q_proj": config.num_attention_heads,
            "self_attn.k_proj": block.attention.kv_heads,
        }
        for module in (*ATTENTION[block.attention.kind], *FFN[block.ffn.kind]):
            for suffix in ("weight", "bias"):
                source = f"model.layers.{index}.{module}.{suffix}"
                if suffix == "weight" or (
                    source in stored and "linear" not in module and "norm" not in module
                ):
                    yield source, f"model.layers.{place}.{module}.{suffix}", heads.get(module, 0)
    yield "model.norm.weight", "model.norm.weight", 0
    if not config.tie_word_embeddings:
        yield "lm_head.weight", "lm_head.weight", 0


def _constants(config: PuzzleConfig, first: Block, dtype: str) -> list[Entry]:
    """Tensors the checkpoint does not have: RoPE's factors, and the zero attention of a first layer
    without heads.
    """
    entries = []
    F32, D = library().GGMLQuantizationType.F32, config.hidden_size
    factors, _ = rope_factors(config)
    if (factors != 1).any():
        entries.append(
            Entry(name="rope_freqs.weight", shape=tuple(factors.shape), type=F32, constant=factors)
        )
    if first.attention.kind == "no_op":
        zeros = torch.zeros(()).expand(D, D)
        entries.append(
            Entry(name="blk.0.attn_norm.weight", shape=(D,), type=F32, constant=torch.ones(D))
        )
        entries.append(
            Entry(
                name="blk.0.attn_output.weight",
                shape=(D, D),
                type=_type((D, D), dtype),
                constant=zeros,
            )
        )
    return entries


def _type(shape: tuple[int, ...], dtype: str) -> Any:
    types = library().GGMLQuantizationType
    if len(shape) == 1:
        return types.F32
    return types.F16 if dtype == "q8_0" and shape[-1] % 32 else types[dtype.upper()]


def rope_factors(config: PuzzleConfig) -> tuple[torch.Tensor, float]:
    """By what each plain RoPE frequency is divided [head_dim/2], and what cos and sin are
    multiplied with.
    """
    rotary = child.skeleton(_without_layers(config), torch.device("cpu"), "eager").model.rotary_emb
    plain, _ = type(rotary).compute_default_rope_parameters(config)
    return plain / rotary.inv_freq, float(rotary.attention_scaling)


def _without_layers(config: PuzzleConfig) -> PuzzleConfig:
    return PuzzleConfig(**{**config.to_dict(), "block_configs": []})


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from transformers' order (all first halves of the pairs, then all second)
    to pair by pair.
    """
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def deinterleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `interleave`, by indices: row 2j + s of a head goes to s * (rows of a head)/2
    + j.
    """
    per_head = rows.shape[0] // heads
    order = torch.arange(per_head).remainder(per_head // 2) * 2 + torch.arange(per_head).div(
        per_head // 2, rounding_mode="floor"
    )
    return rows[(torch.arange(heads)[:, None] * per_head + order).flatten()]


def _add_metadata(
    writer: Any, config: PuzzleConfig, architecture: Architecture, name: str, dtype: str
) -> None:
    gguf = library()
    kept = [index for index, is_kept in enumerate(written(architecture)) if is_kept]
    blocks = [architecture.blocks[index] for index in kept]
    heads = [
        0 if block.attention.kind == "no_op" else config.num_attention_heads for block in blocks
    ]
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(blocks))
    writer.add_head_count(
        [config.num_attention_heads, *heads[1:]]
    )  # the first layer's gives llama.cpp the head size
    writer.add_head_count_kv([block.attention.kv_heads for block in blocks])
    writer.add_feed_forward_length([block.ffn.intermediate_size for block in blocks])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base((config.rope_parameters or {})["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _, scaling = rope_factors(config)
    if scaling != 1.0:
        writer.add_rope_scaling_attn_factors(scaling)
    writer.add_array("puzzle.layers", kept)


def _write(writer: Any, entries: list[Entry], weights: Weights) -> None:
    """Header first, then the tensors, one in memory at a time."""
    gguf = library()
    for entry in entries:
        bytes_shape = gguf.quants.quant_shape_to_byte_shape(entry.shape, entry.type)
        size = torch.Size(bytes_shape).numel()
        writer.add_tensor_info(
            entry.name, entry.shape, torch.empty(0).numpy().dtype, size, raw_dtype=entry.type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        values = entry.read(weights)
        if entry.type.name == "F16" and (largest := float(values.abs().max())) > LARGEST_F16:
            raise UserError(
                f"export gguf: {entry.source}: got a weight of {largest:g}, expected at most {LARGEST_F16:g} in f16; "
                "export with dtype bf16 or f32"
            )
        writer.write_tensor_data(gguf.quants.quantize(values.contiguous().numpy(), entry.type))
    writer.close()


def verify(source: Path, target: Path, *, tokens: int = 32) -> dict[str, Any]:
    """Read the file in `target` again and compare it with the child in `source`.

    Every tensor must be the checkpoint's up to the rounding of its type. Where llama_cpp is
    installed it must also split a test text as transformers does, and `tokens` tokens it generates
    greedily must be ones that our own loader, given the file's weights, finds as likely as its own
    choice: within `GAPS` standard deviations of the logits.
    """
    path = _only_file(target)
    reader = library().GGUFReader(path)
    config, architecture = _describe(source)
    (dtype,) = [
        key
        for key, name in FILE_TYPES.items()
        if library().LlamaFileType[name] == _value(reader, "file_type")
    ]
    stored = {tensor.name: tensor for tensor in reader.tensors}
    generate, state = tokens > 0 and importlib.util.find_spec("llama_cpp") is not None, {}
    with Weights(source) as weights:
        entries = plan(config, architecture, weights, dtype)
        if different := {entry.name for entry in entries} ^ set(stored):
            raise UserError(
                f"{path}: its tensors differ from the child's in {min(different)}; export it again"
            )
        for entry in entries:
            values = _checkpoint_order(stored[entry.name], entry)
            _compare(
                path, entry, values, entry.constant if entry.source == "" else weights[entry.source]
            )
            if generate:
                state[entry.source] = values
    found: dict[str, Any] = {"file": path.name, "dtype": dtype, "tensors": len(entries)}
    if generate:
        found |= _generation(
            path,
            source,
            child.build(config, state, torch.float32, torch.device("cpu")),
            dtype,
            tokens,
        )
    return found


def _only_file(target: Path) -> Path:
    paths = sorted(target.glob("*.gguf"))
    if len(paths) != 1:
        raise UserError(
            f"export gguf: {target}: got {len(paths)} files *.gguf, expected one; verify one folder per export"
        )
    return paths[0]


def _value(reader: Any, key: str) -> Any:
    return reader.fields[f"general.{key}"].contents()


def _checkpoint_order(tensor: Any, entry: Entry) -> torch.Tensor:
    """The values of a tensor of the file, in float32, in the shape and order the checkpoint has."""
    values = torch.from_numpy(library().quants.dequantize(tensor.data, tensor.tensor_type).copy())
    return deinterleave(values, entry.heads) if entry.heads else values


def _compare(path: Path, entry: Entry, values: torch.Tensor, expected: Any) -> None:
    """`UserError` where `values` are not what `entry.type` makes of `expected`."""
    want, kind = expected.float(), entry.type.name
    if kind in ("F16", "BF16"):
        want = want.to(torch.float16 if kind == "F16" else torch.bfloat16).float()
    allowed = torch.zeros(())
    if kind == "Q8_0":  # of a step, half by rounding, the rest by the step's own rounding to f16
        steps = want.reshape(-1, 32).abs().amax(1, keepdim=True) / 127
        allowed = (steps * (0.5 + 127 * 2**-11) + 127 * 2**-25).expand(-1, 32).reshape(want.shape)
    if values.shape != want.shape or bool(((values - want).abs() > allowed).any()):
        raise UserError(
            f"{path}: {entry.name} is not the child's {entry.source or 'constant'}; export it again"
        )


def _generation(path: Path, source: Path, model: Any, dtype: str, count: int) -> dict[str, Any]:
    """What llama.cpp says next to what transformers says; `UserError` where they contradict one
    another.
    """
    llama_cpp = importlib.import_module("llama_cpp")
    tokenizer, text = gguf_vocabulary.load(source, model.config), gguf_vocabulary.TEST_TEXT
    ids = tokenizer(text).input_ids
    prompt = ids[: max(1, min(len(ids), 64, model.config.max_position_embeddings - count))]
    engine = llama_cpp.Llama(
        str(path),
        n_ctx=len(prompt) + count,
        verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    if (theirs := engine.tokenize(text.encode(), add_bos=True, special=False)) != ids:
        raise UserError(
            f"{path}: llama.cpp splits a test text into {theirs}, transformers into {ids}"
        )
    chosen = list(
        itertools.islice(engine.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0), count)
    )
    engine.close()
    with torch.no_grad():
        logits_SV = model(torch.tensor([prompt + chosen])).logits[0, len(prompt) - 1 : -1]
    picked_S = logits_SV.gather(1, torch.tensor(chosen)[:, None])[:, 0]
    gap = float(((logits_SV.amax(1) - picked_S) / logits_SV.std(1)).max())
    if gap > (limit := GAPS[dtype]):
        raise UserError(
            f"{path}: llama.cpp generates tokens that are {gap:.3g} standard deviations below our best, expected at "
            f"most {limit}; this llama.cpp computes another model than the child"
        )
    same = int((logits_SV.argmax(1) == torch.tensor(chosen)).sum())
    return {"generated_tokens": count, "same_tokens": same, "largest_gap_in_deviations": gap}
