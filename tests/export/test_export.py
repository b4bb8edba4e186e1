"""The stage and its command, and what a child's folder says to transformers by itself."""

import json
import sys

import pytest
from children import MIXED, job_with_child, write_child
from transformers import LlamaConfig

from puzzle import artifacts, cli
from puzzle.errors import UserError
from puzzle.export import stage as export
from puzzle.model import block_configs
from puzzle.model.architecture import Architecture
from puzzle.uptrain import UPTRAIN


def test_an_export_is_done_once_and_again_when_the_child_changes(tmp_path):
    job = job_with_child(tmp_path, MIXED["reduced"])
    folder, first = export.export(job, "nemotron-nas")
    assert folder == job.child.folder / "export" / "nemotron-nas"
    written = (folder / "config.json").stat().st_mtime_ns
    assert export.export(job, "nemotron-nas") == (folder, first)
    assert (folder / "config.json").stat().st_mtime_ns == written
    uptrained, inputs = job.folder(UPTRAIN), {"settings": "of uptraining"}
    artifacts.begin(uptrained, inputs)
    write_child(job.run.parent, uptrained, MIXED["reduced"])
    artifacts.write_manifest(uptrained, inputs, seconds=0.0)
    assert export.export(job, "nemotron-nas")[0] == folder
    assert (folder / "config.json").stat().st_mtime_ns != written


def test_an_unknown_format_or_type_is_one_clear_line(tmp_path):
    job = job_with_child(tmp_path, MIXED["reduced"])
    with pytest.raises(UserError, match=r"export: got 'onnx', expected one of: gguf, nemotron-nas"):
        export.export(job, "onnx")
    with pytest.raises(UserError, match=r"dtype: got 'int4', expected one of: bf16, f16, f32"):
        export.export(job, "nemotron-nas", "int4")


def test_the_command_exports_and_says_what_it_wrote(tmp_path, capsys, monkeypatch):
    job = job_with_child(tmp_path, MIXED["reduced"])
    arguments = ["puzzle", "export", str(job.run.folder), "--to", "nemotron-nas", "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and "nemotron-nas" in lines[0]
    assert "read back and compared" in lines[0]
    assert json.loads(lines[-1])["verified"]["largest_logit_difference"] == 0


def test_transformers_own_per_layer_config_carries_plain_architectures(tiny, tmp_path):
    plain = ["gqa_1+gated_96", "gqa_2+gated_32", "gqa_2+gated_96", "gqa_1+gated_64"]
    folder = write_child(tiny, tmp_path / "plain", plain)
    settings = json.loads((folder / "config.json").read_text())
    native = LlamaConfig(
        **{key: value for key, value in settings.items() if key != "block_configs"}
    )
    read = [
        f"gqa_{layer.num_key_value_heads}+gated_{layer.intermediate_size}"
        for layer in native.per_layer_config
    ]
    assert read == plain
    folder = write_child(tiny, tmp_path / "mixed", MIXED["reduced"])
    assert "per_layer_config" not in json.loads((folder / "config.json").read_text())
    written = block_configs.per_layer_config(Architecture.from_names(plain), 2, 96)
    assert written == settings["per_layer_config"]
