import math
from dataclasses import replace

import pytest

from puzzle.config import LibraryConfig
from puzzle.errors import UserError
from puzzle.model import space
from puzzle.model.architecture import FFN, Attention, ModelShape

SHAPE = ModelShape(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
    tie_word_embeddings=False,
)
PAPER = LibraryConfig(ffn_percent=[100, 87, 75, 50, 25, 20, 10], ffn_multiple=256)


def test_the_papers_space_has_54_blocks_a_layer():
    built = space.build(PAPER, SHAPE, [])
    assert {len(layer.blocks) for layer in built.layers} == {54}
    assert built.log10_size == pytest.approx(32 * math.log10(54))
    assert built.left_out == ()


def test_a_narrowed_space_keeps_the_blocks_used_most_and_those_of_every_best_architecture():
    full = space.build(PAPER, SHAPE, [])
    often, seldom, best = (full.layers[0].blocks[index].name for index in (5, 9, 20))
    used = [[name] * 32 for name in (often, often, seldom, best)]
    names = [block.name for block in space.narrow(full, used, 1).layers[3].blocks]
    assert names == [SHAPE.widest_block.name, often]
    kept = space.narrow(full, used, 1, best=[[best] * 32]).layers[3].blocks
    assert [block.name for block in kept] == [SHAPE.widest_block.name, often, best]


def test_the_parents_variants_come_first():
    layer = space.build(PAPER, SHAPE, []).layers[0]
    assert (layer.attention[0], layer.ffn[0]) == (Attention("gqa", 8), FFN("gated", 14336))
    assert layer.blocks[0] == SHAPE.widest_block


def test_sizes_are_rounded_to_the_multiple():
    sizes = [
        v.intermediate_size
        for v in space.ffn_variants(PAPER, SHAPE.widest_block.ffn)
        if v.kind == "gated"
    ]
    assert all(size % 256 == 0 for size in sizes)


def test_vllm_leaves_out_linear_and_a_no_op_attention_in_layer_0_and_says_so():
    built = space.build(PAPER, SHAPE, ["vllm"])
    blocks = [block for layer in built.layers for block in layer.blocks]
    assert not any("linear" in (block.attention.kind, block.ffn.kind) for block in blocks)
    assert Attention("no_op") not in built.layers[0].attention
    assert Attention("no_op") in built.layers[1].attention
    assert len(built.left_out) == 2


def test_the_plugin_serves_everything_and_is_what_other_families_need():
    everything = space.build(PAPER, SHAPE, [])
    assert space.build(PAPER, SHAPE, ["vllm-plugin"]) == everything
    qwen3 = replace(SHAPE, stock=False)
    assert space.build(PAPER, qwen3, ["vllm"]).layers == everything.layers
    with pytest.raises(UserError, match=r"llama.cpp serves children of Llama-like parents only"):
        space.build(PAPER, qwen3, ["llama.cpp"])


def test_llama_cpp_allows_an_ffn_no_op_only_with_an_attention_no_op():
    blocks = space.build(PAPER, SHAPE, ["llama.cpp"]).layers[3].blocks
    kinds = {(b.attention.kind, b.ffn.kind) for b in blocks}
    assert ("no_op", "no_op") in kinds
    assert ("gqa", "no_op") not in kinds
    assert ("linear", "no_op") not in kinds
    assert not any(ffn == "linear" for _, ffn in kinds)


def test_a_layer_can_be_kept_as_the_parents():
    overrides = {0: "parent", 1: {"ffn": ["gated_7168"]}}
    config = LibraryConfig.model_validate(PAPER.model_dump() | {"layers": overrides})
    built = space.build(config, SHAPE, [])
    assert built.layers[0].blocks == (SHAPE.widest_block,)
    assert [b.name for b in built.layers[1].blocks] == ["gqa_8+gated_14336", "gqa_8+gated_7168"]


def test_a_layer_cannot_ask_for_a_variant_outside_the_space():
    config = LibraryConfig.model_validate({"layers": {0: {"ffn": ["gated_500"]}}})
    message = "library.layers.0.ffn: got 'gated_500', expected one of the space's: gated_14336"
    with pytest.raises(UserError, match=message):
        space.build(config, SHAPE, [])


def test_kv_heads_must_divide_the_parents():
    with pytest.raises(UserError, match=r"got 3.*\[8, 4, 2, 1\]"):
        space.build(LibraryConfig(kv_heads=[3]), SHAPE, [])


def test_an_override_of_a_layer_that_does_not_exist_is_a_user_error():
    with pytest.raises(UserError, match="got layer 32, expected 0 to 31"):
        space.build(LibraryConfig.model_validate({"layers": {32: "parent"}}), SHAPE, [])
