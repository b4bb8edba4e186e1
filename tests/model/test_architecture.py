import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puzzle.errors import UserError
from puzzle.model import block_configs
from puzzle.model import variants as subblocks
from puzzle.model.architecture import (
    FFN,
    Architecture,
    Attention,
    Block,
    parse_attention,
    parse_block,
    parse_ffn,
)

HEADS = 8
attentions = st.sampled_from(
    [Attention("gqa", n) for n in (8, 4, 2, 1)] + [Attention("linear"), Attention("no_op")]
)
ffns = st.integers(1, 10_000).map(lambda n: FFN("gated", n)) | st.sampled_from(
    [FFN("linear"), FFN("no_op")]
)
architectures = st.lists(st.builds(Block, attentions, ffns), min_size=1, max_size=8).map(
    lambda blocks: Architecture(tuple(blocks))
)


@given(architectures)
def test_names_and_block_configs_keep_every_architecture(architecture):
    assert Architecture.from_names(architecture.names) == architecture
    configs = block_configs.write(architecture, HEADS)
    assert block_configs.read(configs, HEADS) == architecture


@pytest.mark.parametrize("name", ["", "gqa", "gqa_0", "gqa_-1", "gqa_x", "gated_4", "no-op"])
def test_an_unknown_attention_name_is_a_user_error(name):
    with pytest.raises(UserError, match="expected gqa_"):
        parse_attention(name)


@pytest.mark.parametrize("name", ["", "gated", "gated_0", "gqa_2", "noop"])
def test_an_unknown_ffn_name_is_a_user_error(name):
    with pytest.raises(UserError, match="expected gated_"):
        parse_ffn(name)


def test_a_block_needs_both_halves():
    with pytest.raises(UserError, match="expected <attention>"):
        parse_block("gqa_2")


@pytest.mark.parametrize(
    "variant",
    [
        Attention("gqa", 2),
        Attention("gqa", 1),
        Attention("linear"),
        Attention("no_op"),
        FFN("gated", 96),
        FFN("gated", 32),
        FFN("linear"),
        FFN("no_op"),
    ],
)
def test_counted_parameters_are_those_of_the_real_module(tiny, variant):
    module = subblocks.block_module(tiny, 0, variant.alone, "sdpa")
    assert tiny.shape.parameters(variant) == sum(p.numel() for p in module.parameters())


def test_the_parents_parameter_count_is_transformers(tiny, tiny_folder):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_folder)
    assert Architecture.of_parent(tiny.shape).parameters(tiny.shape) == sum(
        p.numel() for p in model.parameters()
    )


def test_counted_kv_elements_are_those_of_the_real_cache(tiny):
    model = tiny.load(torch.float32, torch.device("cpu"))
    cache = model(torch.ones(1, 7, dtype=torch.long), use_cache=True).past_key_values
    elements = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert Architecture.of_parent(tiny.shape).kv_elements_per_token(tiny.shape) * 7 == elements
