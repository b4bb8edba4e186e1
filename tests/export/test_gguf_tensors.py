"""The tensors of a GGUF file against the checkpoint, hand-made orders of rows, and transformers."""

import itertools

import numpy as np
import pytest
import torch
from children import write_child
from conftest import make_parent
from gguf_exports import MIXED, ROPE, checkpoint, exported
from safetensors.torch import save_file

from puzzle.errors import UserError
from puzzle.export import gguf as gguf_exporter
from puzzle.export.exporter import Options
from puzzle.model import child, parent


def pairs_together(rows, heads):
    """Row by row: output row 2j + s of a head is input row j + s * head_dim/2."""
    half = rows.shape[0] // heads // 2
    return np.stack(
        [
            rows[h * 2 * half + s * half + j]
            for h in range(heads)
            for j in range(half)
            for s in (0, 1)
        ]
    )


def test_f32_holds_the_checkpoint_bit_by_bit(tiny, tmp_path):
    folder = write_child(tiny, tmp_path / "child", MIXED)
    _, tensors, types, _ = exported(folder, tmp_path / "out", dtype="f32")
    source = {name: tensor.numpy() for name, tensor in checkpoint(folder).items()}
    expected = {
        "token_embd.weight": source["model.embed_tokens.weight"],
        "output_norm.weight": source["model.norm.weight"],
    }
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_v": "self_attn.v_proj",
    }
    for layer, (gguf_name, module) in itertools.product(range(4), names.items()):
        name = f"model.layers.{layer}.{module}.weight"
        if name in source:
            expected[f"blk.{layer}.{gguf_name}.weight"] = source[name]
    for layer, kv_heads in ((0, 1), (3, 2)):
        attention = f"model.layers.{layer}.self_attn."
        queries, keys = source[attention + "q_proj.weight"], source[attention + "k_proj.weight"]
        expected[f"blk.{layer}.attn_q.weight"] = pairs_together(queries, 4)
        expected[f"blk.{layer}.attn_k.weight"] = pairs_together(keys, kv_heads)
        expected[f"blk.{layer}.attn_output.weight"] = source[attention + "o_proj.weight"]
    expected["blk.2.attn_output.weight"] = source["model.layers.2.self_attn.linear_attn.weight"]
    assert set(tensors) == set(expected) and set(types.values()) == {"F32"}
    assert all(np.array_equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_half_precision_is_the_checkpoint_rounded_once(tiny, tmp_path, dtype):
    folder = write_child(tiny, tmp_path / "child", MIXED)
    _, exact, _, _ = exported(folder, tmp_path / "exact", dtype="f32")
    _, tensors, types, _ = exported(folder, tmp_path / "out", dtype=dtype)
    half = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for name, values in exact.items():
        is_matrix = values.ndim == 2
        rounded = torch.from_numpy(values.copy()).to(half).float().numpy() if is_matrix else values
        assert np.array_equal(tensors[name], rounded), name
        assert types[name] == (dtype.upper() if is_matrix else "F32")


def test_q8_0_is_within_half_a_step_of_the_checkpoint(tiny, tmp_path):
    folder = write_child(tiny, tmp_path / "child", MIXED)
    _, exact, _, _ = exported(folder, tmp_path / "exact", dtype="f32")
    _, tensors, types, _ = exported(folder, tmp_path / "out", dtype="q8_0")
    for name, values in exact.items():
        if values.ndim == 1:
            assert types[name] == "F32" and np.array_equal(tensors[name], values)
            continue
        step = np.abs(values.reshape(-1, 32)).max(1, keepdims=True) / 127
        error = np.abs(tensors[name] - values).reshape(-1, 32)
        assert types[name] == "Q8_0" and (error <= 0.57 * step).all() and error.max() > 0


def test_q8_0_leaves_rows_that_are_no_multiple_of_32_in_f16(tmp_path):
    make_parent(tmp_path / "parent", intermediate_size=80)
    wide = parent.describe(str(tmp_path / "parent"))
    folder = write_child(wide, tmp_path / "child", ["gqa_2+gated_80"] * 4)
    written, _, types, _ = exported(folder, tmp_path / "out", dtype="q8_0")
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q8_0"
    assert any("f16" in note for note in written.notes)


def test_an_untied_head_is_written_and_a_tied_one_is_not(tiny, tmp_path):
    _, tied, _, _ = exported(write_child(tiny, tmp_path / "tied", MIXED), tmp_path / "out")
    make_parent(tmp_path / "parent", tie_word_embeddings=False)
    folder = write_child(parent.describe(str(tmp_path / "parent")), tmp_path / "child", MIXED)
    _, untied, _, _ = exported(folder, tmp_path / "out2", dtype="f32")
    assert "output.weight" not in tied
    assert np.array_equal(untied["output.weight"], checkpoint(folder)["lm_head.weight"].numpy())


@pytest.mark.parametrize("kind", ROPE)
def test_rope_factors_give_the_frequencies_of_transformers(tmp_path, kind):
    make_parent(tmp_path / "parent", rope_parameters={"rope_type": kind, **ROPE[kind]})
    scaled = parent.describe(str(tmp_path / "parent"))
    folder = write_child(scaled, tmp_path / "child", ["gqa_2+gated_96"] * 4)
    _, tensors, _, keys = exported(folder, tmp_path / "out")
    rotary = child.load(folder, torch.float32, torch.device("cpu")).model.rotary_emb
    plain = keys["deci.rope.freq_base"] ** (-np.arange(0, 16, 2) / 16)
    frequencies = plain / tensors.get("rope_freqs.weight", 1.0)
    assert np.allclose(frequencies, rotary.inv_freq.numpy(), rtol=1e-5)
    assert keys.get("deci.rope.scaling.attn_factor", 1.0) == pytest.approx(rotary.attention_scaling)
    assert ("rope_freqs.weight" in tensors) == (kind != "default")


def test_a_tensor_without_a_place_is_refused_by_name(tiny, tmp_path):
    folder = write_child(tiny, tmp_path / "child", MIXED)
    state = checkpoint(folder) | {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"self_attn\.q_norm\.weight"):
        gguf_exporter.export(folder, tmp_path / "out", Options())
