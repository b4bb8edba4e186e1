"""The conformance suite of parent families: every row of `families.ROWS` keeps every claim."""

import json
import types
from pathlib import Path

import families
import pytest
import torch
from children import generate, write_child
from transformers import AutoModelForCausalLM

from puzzle.device import Placement
from puzzle.errors import UserError
from puzzle.model import child, layers, parent, variants
from puzzle.model.architecture import FFN, Architecture, Attention
from puzzle.model.families import FAMILIES

CPU = torch.device("cpu")
MIXED = ["gqa_1+gated_32", "no_op+gated_96", "linear+no_op", "gqa_2+linear"]
LONG = 50  # beyond every window of the rows


@pytest.fixture(params=families.ROWS)
def row(request):
    return request.param


def attention_of(row):
    return ["eager"] if row == "gemma2" else ["eager", "sdpa"]  # sdpa has no soft cap


def tokens(batch=3):
    return torch.randint(0, 320, (batch, LONG), generator=torch.Generator().manual_seed(1))


def same_logits(folder, dtype, attention):
    """Whether the parent's logits in our class are bitwise those in its own."""
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention
    ).eval()
    ours = parent.describe(str(folder)).load(dtype, CPU, attention)
    with torch.no_grad():
        return torch.equal(ours(tokens()).logits, theirs(tokens()).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_all_parent_child_is_bitwise_the_parent(row, dtype, tmp_path):
    folder = families.make(row, tmp_path, dtype)
    for attention in attention_of(row):
        assert same_logits(folder, dtype, attention), attention


def test_every_part_of_the_family_matters(row, tmp_path):
    """Guards the test above: each setting that is not Llama's changes the logits."""
    described = parent.describe(str(families.make(row, tmp_path)))
    ours = described.load(torch.float32, CPU, "eager")
    reference = ours(tokens()).logits
    changes = {
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "window_rope_theta": 3e4,
    }
    for name, value in changes.items():
        config = described.child_config(Architecture.of_parent(described.shape))
        if getattr(config, name) is None:
            continue
        setattr(config, name, value)
        other = child.build(config, described.weights(), torch.float32, CPU, "eager")
        assert (other(tokens()).logits - reference).abs().max() > 1e-4, name


def test_a_mixed_child_generates_the_same_with_and_without_a_cache(row, tmp_path):
    described = parent.describe(str(families.make(row, tmp_path / "parent")))
    folder = write_child(described, tmp_path / "child", MIXED)
    model = child.load(folder, torch.float32, CPU)
    prompt = tokens(1)[:, :20]
    assert generate(model, prompt, True).tolist() == generate(model, prompt, False).tolist()


def test_a_saved_child_loads_in_transformers_with_the_same_logits(row, tmp_path):
    described = parent.describe(str(families.make(row, tmp_path / "parent")))
    folder = write_child(described, tmp_path / "child", MIXED)
    ours = child.load(folder, torch.float32, CPU, attention_of(row)[-1])
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        assert torch.equal(ours(tokens()).logits, theirs(tokens()).logits)


def test_saved_again_it_is_the_same(row, tmp_path):
    described = parent.describe(str(families.make(row, tmp_path / "parent")))
    folder = write_child(described, tmp_path / "child", MIXED)
    first, architecture = child.load(folder, torch.float32, CPU), child.read_architecture(folder)
    child.save(tmp_path / "again", first.config, architecture, first.state_dict(), folder, "card\n")
    second = child.load(tmp_path / "again", torch.float32, CPU)
    assert torch.equal(first(tokens()).logits, second(tokens()).logits)


def test_a_sharded_checkpoint_loads_the_same(row, tmp_path):
    single = parent.describe(str(families.make(row, tmp_path / "single")))
    sharded = parent.describe(str(families.make(row, tmp_path / "sharded", max_shard_size="50KB")))
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    parameters = [model.load(torch.float32, CPU).parameters() for model in (single, sharded)]
    assert all(torch.equal(a, b) for a, b in zip(*parameters, strict=True))


def test_counted_parameters_are_those_of_the_real_modules(row, tmp_path):
    described = parent.describe(str(families.make(row, tmp_path)))
    shape = described.shape
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    counted = sum(parameter.numel() for parameter in theirs.parameters())
    assert Architecture.of_parent(shape).parameters(shape) == counted
    attention = (Attention("gqa", 1), Attention("linear"))
    for variant in (*attention, FFN("gated", 32), FFN("linear"), FFN("no_op")):
        module = variants.block_module(described, 1, variant.alone, "eager")
        assert shape.parameters(variant) == sum(p.numel() for p in module.parameters())


def test_the_parent_layer_by_layer_is_the_parent(row, tmp_path):
    described = parent.describe(str(families.make(row, tmp_path)))
    model = described.load(torch.float32, CPU, "eager")
    config = described.child_config(Architecture.of_parent(described.shape))
    placement = Placement(torch.float32, CPU, "eager")
    streamed = layers.StreamedLayers(config, described.weights, placement)
    with torch.no_grad():
        hidden, context = streamed.embed(tokens())
        for index in range(described.shape.num_hidden_layers):
            with streamed.layer(index) as layer:
                hidden = layer(hidden, **context)
        assert torch.equal(streamed.norm(hidden), model.model(tokens()).last_hidden_state)
        assert torch.equal(streamed.head_VD, model.lm_head.weight)
        whole = layers.StreamedLayers(config, described.weights, placement).whole()
        assert torch.equal(whole(tokens()).logits, model(tokens()).logits)
    assert all(weight.is_meta for weight in whole.model.layers.parameters())


def test_every_supported_family_has_a_row():
    rows = {model_type for model_type, _ in families.ROWS.values()}
    assert rows | {"nemotron-nas"} == set(FAMILIES)  # that one is in test_differing_layers.py


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3", "mixtral"])
def test_an_unsupported_family_is_refused_in_one_line_that_helps(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    message = r"supported: gemma2, .*qwen3 \((docs/families.md|give its text model)"
    with pytest.raises(UserError, match=message):
        parent.describe(str(tmp_path))


def test_the_worked_example_of_the_docs_works(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    module = types.ModuleType("puzzle.model.families.seed_oss")
    exec(code, module.__dict__)
    monkeypatch.setitem(FAMILIES, "seed_oss", module.FAMILY)
    biases = {"attention_bias": True, "attention_out_bias": True, "head_dim": 32}
    monkeypatch.setitem(families.ROWS, "seed-oss", ("seed_oss", biases))
    folder = families.make("seed-oss", tmp_path)
    assert same_logits(folder, torch.float32, "eager")
    assert same_logits(folder, torch.float32, "sdpa")
