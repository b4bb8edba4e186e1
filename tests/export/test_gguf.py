"""The keys of a GGUF file, what is left out of it, and what the exporter refuses to write."""

import sys

import numpy as np
import pytest
from children import write_child
from gguf_exports import MIXED, SERVED, checkpoint, exported
from safetensors.torch import save_file

from puzzle.errors import UserError
from puzzle.export import gguf as gguf_exporter
from puzzle.export.exporter import Options
from puzzle.export.gguf_types import gguf_package
from puzzle.model.modeling_puzzle import PuzzleConfig


def test_layers_have_their_own_sizes_and_empty_ones_are_left_out(tiny, tmp_path):
    names = ["no_op+no_op", "linear+gated_96", "gqa_1+gated_32", "no_op+gated_64"]
    folder = write_child(tiny, tmp_path / "child", names)
    written, tensors, _, keys = exported(folder, tmp_path / "out")
    assert keys["deci.block_count"] == 3
    assert written.layers == keys["puzzle.layers"] == [1, 2, 3]
    assert keys["deci.attention.head_count"] == [4, 4, 0]
    assert keys["deci.attention.head_count_kv"] == [0, 1, 0]
    assert keys["deci.feed_forward_length"] == [96, 32, 64]
    assert not any(name.startswith("blk.3.") for name in tensors)
    assert "blk.2.attn_norm.weight" not in tensors
    assert any("layers 0 are no-ops" in note for note in written.notes)


def test_a_no_op_attention_in_layer_0_becomes_a_zero_matrix(tiny, tmp_path):
    folder = write_child(tiny, tmp_path / "child", SERVED["no-ops first and last"])
    written, tensors, _, keys = exported(folder, tmp_path / "out")
    assert keys["deci.attention.head_count"] == [4, 4, 4]
    assert keys["deci.attention.head_count_kv"] == [0, 2, 1]
    assert not tensors["blk.0.attn_output.weight"].any()
    assert (tensors["blk.0.attn_norm.weight"] == 1).all()
    assert any("zero matrix" in note for note in written.notes)


def test_the_keys_are_the_config(tiny, tmp_path):
    folder = write_child(tiny, tmp_path / "child", MIXED)
    _, _, _, keys = exported(folder, tmp_path / "out", name="pocket-half", dtype="q8_0")
    config = PuzzleConfig.from_pretrained(folder)
    expected = {
        "general.architecture": "deci",
        "general.name": "pocket-half",
        "general.file_type": 7,
        "deci.context_length": 256,
        "deci.embedding_length": 64,
        "deci.attention.key_length": 16,
        "deci.attention.value_length": 16,
        "deci.rope.dimension_count": 16,
        "deci.rope.freq_base": 10000.0,
        "deci.vocab_size": 320,
        "deci.attention.layer_norm_rms_epsilon": np.float32(config.rms_norm_eps),
    }
    assert {key: keys[key] for key in expected} == expected


def test_weights_beyond_f16_are_refused_and_no_file_is_left(tiny, tmp_path):
    folder = write_child(tiny, tmp_path / "child", MIXED)
    state = checkpoint(folder)
    state["model.layers.3.mlp.up_proj.weight"][5, 7] = 1e5
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.3\.mlp\.up_proj.*bf16"):
        gguf_exporter.export(folder, tmp_path / "out", Options(dtype="f16"))
    assert list((tmp_path / "out").iterdir()) == []


def test_unknown_types_and_folders_that_hold_no_child_are_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="expected one of f32, f16, bf16, q8_0"):
        gguf_exporter.export(tmp_path, tmp_path, Options(dtype="q4_0"))
    with pytest.raises(UserError, match=r"no config\.json"):
        gguf_exporter.export(tmp_path, tmp_path, Options())
    with pytest.raises(UserError, match="no block_configs"):
        gguf_exporter.export(tiny.folder, tmp_path, Options())


def test_without_the_gguf_package_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'puzzle-nas\[gguf\]'"):
        gguf_package()
