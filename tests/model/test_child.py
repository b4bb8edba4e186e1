import json
import subprocess
import sys

import pytest
import torch
from children import MIXED, generate, write_child
from torch.nn.functional import log_softmax

from puzzle.model import child
from puzzle.model.architecture import Architecture

CPU = torch.device("cpu")


@pytest.fixture(params=MIXED.values(), ids=MIXED.keys())
def mixed(request, tiny, tmp_path):
    return write_child(tiny, tmp_path / "child", request.param)


def write_children(tiny, folder):
    """A child of every row of `MIXED`."""
    return [write_child(tiny, folder / f"{i}", names) for i, names in enumerate(MIXED.values())]


def test_generation_with_a_cache_equals_generation_without(mixed):
    model = child.load(mixed, torch.float32, CPU)
    prompt = torch.tensor([[5, 17, 200, 31]])
    assert generate(model, prompt, True).tolist() == generate(model, prompt, False).tolist()


def test_left_padding_does_not_change_what_is_generated(mixed):
    model = child.load(mixed, torch.float32, CPU)
    prompt = torch.tensor([[5, 17, 200, 31]])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    out = model.generate(
        padded, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=-1
    )
    assert out[0, 7:].tolist() == generate(model, prompt, True)[0, 4:12].tolist()


def test_saved_and_loaded_logits_are_equal(mixed, tmp_path):
    first = child.load(mixed, torch.float32, CPU)
    architecture = child.read_architecture(mixed)
    child.save(tmp_path / "again", first.config, architecture, first.state_dict(), mixed, "card\n")
    second = child.load(tmp_path / "again", torch.float32, CPU)
    tokens = torch.randint(0, 320, (2, 9))
    assert torch.equal(first(tokens).logits, second(tokens).logits)


@pytest.mark.training
def test_transformers_alone_generates_the_same_tokens(tiny, tmp_path):
    """`trust_remote_code=True` in a process that cannot import puzzle, with and without a cache."""
    folders = write_children(tiny, tmp_path)
    script = f"""
import importlib.abc, json, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "puzzle":
            raise ImportError("puzzle is not importable here")
sys.meta_path.insert(0, Block())
import torch
from transformers import AutoModelForCausalLM
for folder in {[str(folder) for folder in folders]!r}:
    loading = dict(trust_remote_code=True, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, **loading)
    for use_cache in (True, False):
        settings = dict(max_new_tokens=24, do_sample=False, use_cache=use_cache, eos_token_id=-1)
        out = model.generate(torch.tensor([[5, 17, 200, 31]]), **settings)
        print(json.dumps(out[0].tolist()))
assert not any(name.split(".")[0] == "puzzle" for name in sys.modules)
"""
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr[-2000:]
    theirs = [json.loads(line) for line in out.stdout.strip().splitlines()]
    assert len(theirs) == 2 * len(folders)
    for i, folder in enumerate(folders):
        ours = generate(
            child.load(folder, torch.float32, CPU), torch.tensor([[5, 17, 200, 31]]), True
        )
        assert theirs[2 * i] == theirs[2 * i + 1] == ours[0].tolist()


@pytest.mark.training
def test_with_our_package_imported_a_child_loads_without_trusting_its_code(tiny, tmp_path):
    folders = write_children(tiny, tmp_path)
    script = f"""
import puzzle.model.modeling_puzzle
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in {[str(folder) for folder in folders]!r}:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    print(type(model).__module__, len(tokenizer) > 0)
"""
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.split() == ["puzzle.model.modeling_puzzle", "True"] * len(folders)


def test_a_no_op_subblock_has_neither_weights_nor_norm(tiny, tmp_path):
    folder = write_child(tiny, tmp_path / "child", MIXED["no-op in layer 0"])
    names = list(child.load(folder, torch.float32, CPU).state_dict())
    assert not any(name.startswith("model.layers.2.") for name in names)
    assert not any(
        name.startswith(("model.layers.0.self_attn", "model.layers.0.input_layernorm"))
        for name in names
    )


def test_the_architecture_name_says_who_can_serve(tiny, tmp_path):
    configs = {
        key: tiny.child_config(Architecture.from_names(names)) for key, names in MIXED.items()
    }
    classes = {key: child.architectures_name(config) for key, config in configs.items()}
    assert classes["reduced"] == "DeciLMForCausalLM"
    assert classes["linear"] == classes["no-op in layer 0"] == "PuzzleForCausalLM"


def test_the_tokenizer_and_chat_template_come_along(tiny, tmp_path):
    from transformers import AutoTokenizer

    folder = write_child(tiny, tmp_path / "child", MIXED["reduced"])
    ours = AutoTokenizer.from_pretrained(folder)
    assert ours("def add").input_ids == tiny.tokenizer("def add").input_ids
    assert ours.chat_template == tiny.tokenizer.chat_template


def test_a_replacement_changes_what_the_model_says(tiny, tmp_path):
    """Guards the other tests: a mixed child is not the parent."""
    tokens = torch.randint(0, 320, (1, 12))
    reference = log_softmax(tiny.load(torch.float32, CPU)(tokens).logits, -1)
    for folder in write_children(tiny, tmp_path):
        model = child.load(folder, torch.float32, CPU)
        assert (log_softmax(model(tokens).logits, -1) - reference).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_norm_of_gpus_is_the_norm_up_to_rounding(tiny, dtype):
    norm = tiny.load(dtype, torch.device("cpu")).model.norm
    torch.manual_seed(0)
    norm.weight.copy_(1 + 0.1 * torch.randn(64))
    x = torch.randn(3, 5, 64, dtype=dtype) * 4
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7  # bf16: two roundings against one
    assert norm.fused(x).dtype == dtype
    torch.testing.assert_close(norm.fused(x), norm(x), rtol=tolerance, atol=tolerance)
