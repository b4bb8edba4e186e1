"""GGUF: a child as one file for llama.cpp and what is built on it.

Reads a child folder, writes `NAME-DTYPE.gguf` of llama.cpp's architecture `deci`, whose layers have
their own numbers of heads, KV heads and FFN width. How a block is written (llama.cpp's
src/models/deci.cpp; docs/log.md):

    attention gqa     its heads and KV heads
              linear  heads, 0 KV heads, the matrix as `attn_output`
              no-op   0 heads, 0 KV heads
    FFN       gated   its width
              no-op   nothing, allowed only where the attention is a no-op too

- A block of two no-ops is left out: as the last layer it would crash llama.cpp.
- llama.cpp takes the head size from layer 0, which therefore cannot be without heads: a no-op
  attention there becomes a linear one with a zero matrix, which adds exactly nothing.

`gguf_child.py` knows which children llama.cpp computes, `gguf_tensors.py` names and orders the
tensors, `gguf_vocabulary.py` and `gguf_splitting.py` write the tokenizer, `gguf_verify.py` reads
the file again.
"""

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from puzzle import artifacts
from puzzle.errors import UserError
from puzzle.export import gguf_vocabulary
from puzzle.export.exporter import Exporter, Options, Written
from puzzle.export.gguf_child import kept_layers, read_child, refuse
from puzzle.export.gguf_tensors import Entry, plan, rope_factors
from puzzle.export.gguf_types import FILE_TYPES, gguf_package
from puzzle.export.gguf_verify import verify
from puzzle.model.architecture import Architecture
from puzzle.model.modeling_puzzle import PuzzleConfig
from puzzle.model.weights import Weights

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURE = "deci"
LARGEST_F16 = 65504.0


class GGUFWritten(Written):
    """`dtype` of the matrices, the number of `tensors`, and the child's `layers` in the file."""

    dtype: str
    tensors: int
    layers: list[int]


def export(source: Path, target: Path, options: Options) -> GGUFWritten:
    """Write the child in `source` to `target/NAME-DTYPE.gguf`.

    The dtype is f32, f16 (the default), bf16 or q8_0 and holds for matrices; norms, biases and RoPE
    factors stay float32, and a matrix whose rows q8_0's blocks of 32 do not fill stays f16. Raises
    `UserError` for another dtype, for a child that llama.cpp does not compute, and for weights that
    f16 cannot hold.
    """
    dtype = options.dtype or "f16"
    if dtype not in FILE_TYPES:
        expected = ", ".join(FILE_TYPES)
        raise UserError(f"export gguf: dtype: got {dtype!r}, expected one of {expected}")
    config, architecture = read_child(source)
    refuse(config, architecture)
    vocabulary = gguf_vocabulary.read(source, config)
    path = target / f"{options.name}-{dtype}.gguf"
    with Weights(source) as weights:
        entries = plan(config, architecture, weights, dtype)
        with artifacts.atomic_path(path) as temporary:
            writer: GGUFWriter = gguf_package().GGUFWriter(temporary, ARCHITECTURE)
            _add_general(writer, options.name, dtype)
            _add_model(writer, config, architecture)
            gguf_vocabulary.add(writer, vocabulary)
            _write(writer, entries, weights)
    return GGUFWritten(
        file=path.name,
        bytes=path.stat().st_size,
        dtype=dtype,
        tensors=len(entries),
        layers=kept_layers(architecture),
        notes=_notes(architecture, entries, dtype) + vocabulary.notes,
    )


def _add_general(writer: "GGUFWriter", name: str, dtype: str) -> None:
    package = gguf_package()
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(package.LlamaFileType[FILE_TYPES[dtype]])
    writer.add_quantization_version(package.GGML_QUANT_VERSION)


def _add_model(writer: "GGUFWriter", config: PuzzleConfig, architecture: Architecture) -> None:
    layers = kept_layers(architecture)
    blocks = [architecture.blocks[layer] for layer in layers]
    # The first layer's heads give llama.cpp the head size, whatever the layer holds
    heads = [config.num_attention_heads]
    for block in blocks[1:]:
        heads.append(0 if block.attention.kind == "no_op" else config.num_attention_heads)
    head_dim, rope_theta = config.head_dim, (config.rope_parameters or {}).get("rope_theta")
    assert head_dim is not None and rope_theta is not None  # transformers fills them in
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(blocks))
    writer.add_head_count(heads)
    writer.add_head_count_kv([block.attention.kv_heads for block in blocks])
    writer.add_feed_forward_length([block.ffn.intermediate_size for block in blocks])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _, scaling = rope_factors(config)
    if scaling != 1.0:
        writer.add_rope_scaling_attn_factors(scaling)
    writer.add_array("puzzle.layers", layers)


def _write(writer: "GGUFWriter", entries: list[Entry], weights: Weights) -> None:
    """Header first, then the tensors, one in memory at a time."""
    package = gguf_package()
    for entry in entries:
        shape_in_bytes = package.quants.quant_shape_to_byte_shape(entry.shape, entry.type)
        writer.add_tensor_info(
            entry.name,
            entry.shape,
            np.dtype(np.float32),
            prod(shape_in_bytes),
            raw_dtype=entry.type,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        values = entry.read(weights)
        if entry.type.name == "F16":
            _refuse_beyond_f16(entry, float(values.abs().max()))
        writer.write_tensor_data(package.quants.quantize(values.contiguous().numpy(), entry.type))
    writer.close()


def _refuse_beyond_f16(entry: Entry, largest: float) -> None:
    if largest > LARGEST_F16:
        raise UserError(
            f"export gguf: {entry.source}: got a weight of {largest:g}, "
            f"expected at most {LARGEST_F16:g} in f16; export with dtype bf16 or f32"
        )


def _notes(architecture: Architecture, entries: list[Entry], dtype: str) -> list[str]:
    notes = []
    kept = kept_layers(architecture)
    left_out = [str(layer) for layer in range(len(architecture)) if layer not in kept]
    if left_out:
        layers = ", ".join(left_out)
        notes.append(f"layers {layers} are no-ops in both halves and are left out of the file")
    constants = [entry.name for entry in entries if entry.constant is not None]
    if "blk.0.attn_output.weight" in constants:
        notes.append(
            "the first layer's no-op attention is written as a linear one with a zero matrix"
        )
    if dtype == "q8_0" and any(entry.type.name == "F16" for entry in entries):
        notes.append("matrices whose rows are no multiple of 32 are f16")
    return notes


EXPORTER = Exporter(
    name="gguf",
    summary="one file for llama.cpp and what is built on it",
    refuse=refuse,
    export=export,
    verify=verify,
)
