"""Children that llama.cpp would compute wrongly are refused by layer and by name."""

import json

import pytest
from children import write_child
from gguf_exports import MIXED, change_config

from puzzle.errors import UserError
from puzzle.export import gguf as gguf_exporter
from puzzle.export.exporter import Options


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["gqa_2+gated_96", "gqa_2+gated_96", "gqa_1+linear", "gqa_2+linear"],
            "layer 2: got a linear FFN",
        ),
        (
            ["gqa_2+gated_96", "gqa_1+no_op", "gqa_2+gated_96", "gqa_2+linear"],
            "layer 1: got an FFN no-op after gqa_1",
        ),
        (
            ["gqa_2+gated_96", "gqa_2+gated_96", "linear+no_op", "gqa_1+no_op"],
            "layer 2: got an FFN no-op after linear",
        ),
        (
            ["no_op+gated_96", "linear+gated_96", "no_op+no_op", "linear+gated_32"],
            "without attention in any layer",
        ),
        (["no_op+no_op"] * 4, "without attention in any layer"),
    ],
)
def test_blocks_that_llama_cpp_gets_wrong_are_refused(tiny, tmp_path, names, message):
    folder = write_child(tiny, tmp_path / "child", names)
    with pytest.raises(UserError, match=message) as refusal:
        gguf_exporter.export(folder, tmp_path / "out", Options())
    assert "expected" in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qk_norm", True),
        ("norm_style", "gemma"),
        ("norm_placement", "post"),
        ("embedding_scale", 8.0),
        ("query_scale", 0.1),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    ],
)
def test_what_other_families_do_is_refused_by_name(tiny, tmp_path, key, value):
    folder = write_child(tiny, tmp_path / "child", MIXED)
    change_config(folder, **{key: value})
    with pytest.raises(UserError, match=key):
        gguf_exporter.export(folder, tmp_path / "out", Options())


def test_a_window_of_attention_is_refused_with_its_layer(tiny, tmp_path):
    folder = write_child(tiny, tmp_path / "child", MIXED)
    blocks = json.loads((folder / "config.json").read_text())["block_configs"]
    blocks[3]["attention"]["window_length"] = 128
    change_config(folder, block_configs=blocks)
    with pytest.raises(UserError, match="layer 3: got attention to a window of 128 tokens"):
        gguf_exporter.export(folder, tmp_path / "out", Options())
