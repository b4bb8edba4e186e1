import json
import shutil

import pytest
import torch
from conftest import make_parent
from transformers import AutoModelForCausalLM

from puzzle.errors import UserError
from puzzle.model import parent

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_all_parent_child_is_bitwise_the_parent(tmp_path, dtype, attention, tied):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = make_parent(tmp_path, dtype=dtype, tie_word_embeddings=tied, rope_parameters=rope)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention
    ).eval()
    ours = parent.describe(str(folder)).load(dtype, CPU, attention)
    tokens = torch.randint(0, 320, (3, 50))
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_a_sharded_parent_loads_the_same(tmp_path, tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny.folder)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    whole, sharded = (
        tiny.load(torch.float32, CPU),
        parent.describe(str(tmp_path)).load(torch.float32, CPU),
    )
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), sharded.parameters(), strict=True)
    )


def test_the_fingerprint_follows_the_weights(tmp_path, tiny):
    make_parent(tmp_path, initializer_range=0.1)
    assert parent.describe(str(tmp_path)).fingerprint != tiny.fingerprint
    assert parent.describe(str(tiny.folder)).fingerprint == tiny.fingerprint


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported; supported: "),
        ({}, "config.json: no model_type; expected that of a Hugging Face model"),
    ],
)
def test_a_parent_we_cannot_take_is_one_clear_line(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        parent.describe(str(tmp_path))


def test_code_that_a_supported_parent_brings_is_not_run(tmp_path, tiny):
    """As checkpoints on the hub have it: `auto_map` names a file, which would leave a trace."""
    folder = tmp_path / "parent"
    shutil.copytree(tiny.folder, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps(settings))
    trace = tmp_path / "trace"
    (folder / "own.py").write_text(f"open({str(trace)!r}, 'w')\nclass Config: ...\n")
    described = parent.describe(str(folder))
    assert described.shape == tiny.shape and len(described.tokenizer) == len(tiny.tokenizer)
    tokens = torch.randint(0, 320, (2, 20))
    with torch.no_grad():
        expected = tiny.load(torch.float32, CPU)(tokens).logits
        assert torch.equal(described.load(torch.float32, CPU)(tokens).logits, expected)
    assert not trace.exists()


def test_a_missing_parent_and_missing_weights_are_user_errors(tmp_path, tiny):
    with pytest.raises(UserError, match="no such folder"):
        parent.describe("./nothing-here")
    with pytest.raises(UserError, match="no config.json"):
        parent.describe(str(tmp_path))
    (tmp_path / "config.json").write_text((tiny.folder / "config.json").read_text())
    with pytest.raises(UserError, match="no model.safetensors and no"):
        parent.describe(str(tmp_path)).load(torch.float32, CPU)


def test_pickled_weights_are_never_read(tmp_path, tiny):
    (tmp_path / "config.json").write_text((tiny.folder / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="convert the weights to safetensors"):
        parent.describe(str(tmp_path)).weights()


def test_the_pocket_parent_is_a_deep_small_llama():
    pocket = parent.describe("pocket")
    assert pocket.hf_config.architectures == ["LlamaForCausalLM"]
    assert pocket.shape.num_hidden_layers >= 12
    assert pocket.shape.num_key_value_heads < pocket.shape.num_attention_heads
    assert sum(path.stat().st_size for path in pocket.folder.iterdir()) <= 24 * 10**6
