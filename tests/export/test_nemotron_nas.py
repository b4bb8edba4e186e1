"""The nemotron-nas export, loaded by transformers without our package."""

import json
import subprocess
import sys

import pytest
import torch
from children import MIXED, job_with_child

from puzzle.assemble import ASSEMBLE
from puzzle.errors import UserError
from puzzle.export import nemotron_nas
from puzzle.export import stage as export
from puzzle.model import child

TOKENS = torch.randint(0, 320, (2, 20), generator=torch.Generator().manual_seed(3))


@pytest.mark.training
@pytest.mark.parametrize("kind", [None, "bf16", "f16", "f32"])
def test_a_nemotron_nas_export_loads_in_transformers_with_the_childs_logits(tmp_path, kind):
    job = job_with_child(tmp_path, MIXED["reduced"])
    folder = str(export.export(job, "nemotron-nas", kind)[0])
    script = f"""
import sys, torch
sys.modules["puzzle"] = None  # not importable
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True, dtype="auto")
print(model.dtype, type(model).__name__)
torch.save(model(torch.tensor({TOKENS.tolist()!r})).logits, {str(tmp_path / "logits.pt")!r})
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    dtype = nemotron_nas.DTYPES[kind or "f32"]
    assert out.stdout.split() == [str(dtype), "DeciLMForCausalLM"]
    model = child.load(job.folder(ASSEMBLE), dtype, torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, torch.load(tmp_path / "logits.pt"))


def test_a_nemotron_nas_config_has_every_key_of_the_format_and_none_of_ours(tmp_path):
    job = job_with_child(tmp_path, MIXED["reduced"])
    config = json.loads((job.folder(ASSEMBLE) / "config.json").read_text())
    assert "norm_style" in config
    folder, record = export.export(job, "nemotron-nas")
    assert record.format == "nemotron-nas"
    assert folder == export.source(job).parent / "export" / record.format
    exported = json.loads((folder / "config.json").read_text())
    assert not set(nemotron_nas.PUZZLE_KEYS) & set(exported)
    common = {"no_op", "replace_with_linear"}
    for block in exported["block_configs"]:
        assert common | {"n_heads_in_group", "window_length"} <= set(block["attention"])
        assert common | {"intermediate_size"} <= set(block["ffn"])


def test_ffn_mult_gives_back_the_width_by_the_engines_rule():
    def width(multiple, hidden):  # as vLLM and llama.cpp's converter compute it
        size = int(2 * multiple * hidden / 3)
        return size if size % 256 == 0 else size + 256 - size % 256

    attention = {"no_op": False, "replace_with_linear": False, "n_heads_in_group": 1}
    for hidden in (2048, 4096, 5120, 8192):
        for size in range(256, 4 * hidden, 256):
            ffn = {"no_op": False, "replace_with_linear": False, "intermediate_size": size}
            block = {"attention": attention, "ffn": ffn}
            exported = nemotron_nas._spelled_out(block, hidden, has_multiples=True)
            assert width(exported["ffn"]["ffn_mult"], hidden) == size


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (MIXED["linear"], "layer 0 has a linear attention"),
        (MIXED["no-op in layer 0"], "layer 0 has no attention"),
        (
            ["gqa_2+gated_96", "gqa_2+linear", "gqa_2+gated_96", "gqa_2+gated_96"],
            "layer 1 has a linear FFN",
        ),
    ],
)
def test_what_the_format_cannot_serve_is_refused_by_layer(tmp_path, blocks, message):
    job = job_with_child(tmp_path, blocks)
    with pytest.raises(UserError, match=message):
        export.export(job, "nemotron-nas")


def test_verify_removes_an_export_whose_logits_are_not_the_childs(tmp_path):
    job = job_with_child(tmp_path / "first", MIXED["reduced"])
    other = job_with_child(tmp_path / "second", ["gqa_1+gated_96"] * 4)
    target, _ = export.export(job, "nemotron-nas")
    with pytest.raises(RuntimeError, match="not those of the child"):
        nemotron_nas.verify(other.folder(ASSEMBLE), target)
    assert not target.exists()
