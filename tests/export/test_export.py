import json
import subprocess
import sys

import pytest
import torch
from children import MIXED, run_with_child, write_child
from transformers import LlamaConfig

from puzzle import artifacts, cli
from puzzle.errors import UserError
from puzzle.export import nemotron_nas
from puzzle.export import stage as export
from puzzle.model import block_configs, child
from puzzle.model.architecture import Architecture

TOKENS = torch.randint(0, 320, (2, 20), generator=torch.Generator().manual_seed(3))


def test_an_export_is_done_once_and_again_when_the_child_changes(tmp_path):
    run = run_with_child(tmp_path, MIXED["reduced"])
    first = export.run(run, "nemotron-nas")
    config = run.folder / "export" / "nemotron-nas" / "config.json"
    written = config.stat().st_mtime_ns
    assert export.run(run, "nemotron-nas") == first and config.stat().st_mtime_ns == written
    other = run.folder / "uptrained"
    artifacts.begin(other, {})
    write_child(run.parent, other, MIXED["reduced"])
    artifacts.write_manifest(other, {}, {"weights": "other"})
    export.run(run, "nemotron-nas")
    assert config.stat().st_mtime_ns != written


@pytest.mark.parametrize("kind", [None, "bf16", "f16", "f32"])
def test_a_nemotron_nas_export_loads_in_transformers_with_the_childs_logits(tmp_path, kind):
    run = run_with_child(tmp_path, MIXED["reduced"])
    found = export.run(run, "nemotron-nas", kind)
    script = f"""
import sys, torch
sys.modules["puzzle"] = None  # not importable
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({found["folder"]!r}, trust_remote_code=True, dtype="auto")
print(model.dtype, type(model).__name__)
torch.save(model(torch.tensor({TOKENS.tolist()!r})).logits, {str(tmp_path / "logits.pt")!r})
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    dtype = nemotron_nas.DTYPES[kind or "f32"]
    assert out.stdout.split() == [str(dtype), "DeciLMForCausalLM"]
    ours = child.load(run.folder / "child", dtype, torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(ours(TOKENS).logits, torch.load(tmp_path / "logits.pt"))


def test_a_nemotron_nas_config_has_every_key_of_the_format_and_none_of_ours(tmp_path):
    run = run_with_child(tmp_path, MIXED["reduced"])
    config = json.loads((tmp_path / "run" / "child" / "config.json").read_text())
    assert "norm_style" in config
    exported = json.loads((nemotron(run) / "config.json").read_text())
    assert not set(nemotron_nas.OURS) & set(exported)
    for block in exported["block_configs"]:
        assert {"no_op", "replace_with_linear", "n_heads_in_group", "window_length"} <= set(
            block["attention"]
        )
        assert {"no_op", "replace_with_linear", "intermediate_size"} <= set(block["ffn"])


def nemotron(run):
    return export.source(run).parent / "export" / export.run(run, "nemotron-nas")["format"]


def test_ffn_mult_gives_back_the_width_by_the_engines_rule():
    def width(multiple, hidden):  # as vLLM and llama.cpp's converter compute it
        size = int(2 * multiple * hidden / 3)
        return size if size % 256 == 0 else size + 256 - size % 256

    attention = {"no_op": False, "replace_with_linear": False, "n_heads_in_group": 1}
    for hidden in (2048, 4096, 5120, 8192):
        for size in range(256, 4 * hidden, 256):
            block = {
                "attention": attention,
                "ffn": {"no_op": False, "replace_with_linear": False, "intermediate_size": size},
            }
            assert (
                width(nemotron_nas._spelled_out(block, hidden, True)["ffn"]["ffn_mult"], hidden)
                == size
            )


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
    run = run_with_child(tmp_path, blocks)
    with pytest.raises(UserError, match=message):
        export.run(run, "nemotron-nas")


def test_an_unknown_format_or_type_is_one_clear_line(tmp_path):
    run = run_with_child(tmp_path, MIXED["reduced"])
    with pytest.raises(UserError, match=r"export: got 'onnx', expected one of: gguf, nemotron-nas"):
        export.run(run, "onnx")
    with pytest.raises(UserError, match=r"dtype: got 'int4', expected one of: bf16, f16, f32"):
        export.run(run, "nemotron-nas", "int4")


def test_the_command_exports_and_says_what_it_wrote(tmp_path, capsys, monkeypatch):
    run = run_with_child(tmp_path, MIXED["reduced"])
    monkeypatch.setattr(
        sys, "argv", ["puzzle", "export", str(run.folder), "--to", "nemotron-nas", "--json"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and "nemotron-nas" in lines[0] and "checked" in lines[0]
    assert json.loads(lines[-1])["verified"]["largest_logit_difference"] == 0


def test_transformers_own_per_layer_config_carries_plain_architectures(tiny, tmp_path):
    plain = ["gqa_1+gated_96", "gqa_2+gated_32", "gqa_2+gated_96", "gqa_1+gated_64"]
    settings = json.loads(
        (write_child(tiny, tmp_path / "plain", plain) / "config.json").read_text()
    )
    native = LlamaConfig(
        **{key: value for key, value in settings.items() if key != "block_configs"}
    )
    read = [
        f"gqa_{one.num_key_value_heads}+gated_{one.intermediate_size}"
        for one in native.per_layer_config
    ]
    assert read == plain
    mixed = json.loads(
        (write_child(tiny, tmp_path / "mixed", MIXED["reduced"]) / "config.json").read_text()
    )
    assert "per_layer_config" not in mixed
    assert (
        block_configs.per_layer_config(Architecture.from_names(plain), 2, 96)
        == settings["per_layer_config"]
    )
