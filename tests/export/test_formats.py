"""What holds for every exporter."""

import pytest
from children import job_with_child

from puzzle.assemble import ASSEMBLE
from puzzle.errors import UserError
from puzzle.export import formats, gguf, nemotron_nas
from puzzle.export.exporter import Options
from puzzle.model import child
from puzzle.model.modeling_puzzle import PuzzleConfig

LINEAR_FFN = ["gqa_2+gated_96", "gqa_2+linear", "gqa_2+gated_96", "gqa_2+gated_96"]


def test_exporters_go_by_their_names():
    assert formats.exporter("gguf") is gguf.EXPORTER
    assert formats.exporter("nemotron-nas") is nemotron_nas.EXPORTER
    for name, exporter in formats.EXPORTERS.items():
        assert exporter.name == name
        assert exporter.summary and "\n" not in exporter.summary


def test_an_unknown_format_is_one_clear_line():
    with pytest.raises(UserError, match=r"export: got 'onnx', expected one of: gguf, nemotron-nas"):
        formats.exporter("onnx")


@pytest.mark.parametrize("exporter", formats.EXPORTERS.values(), ids=formats.EXPORTERS)
def test_what_a_format_refuses_is_refused_by_layer_before_anything_is_written(tmp_path, exporter):
    folder = job_with_child(tmp_path, LINEAR_FFN).folder(ASSEMBLE)
    config, architecture = PuzzleConfig.from_pretrained(folder), child.read_architecture(folder)
    with pytest.raises(UserError, match=f"export {exporter.name}: layer 1") as refusal:
        exporter.refuse(config, architecture)
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match=f"export {exporter.name}: layer 1"):
        exporter.export(folder, tmp_path / "out", Options())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("exporter", formats.EXPORTERS.values(), ids=formats.EXPORTERS)
def test_an_export_leaves_the_child_as_it_was_and_is_what_verify_accepts(tmp_path, exporter):
    plain = ["gqa_1+gated_96", "no_op+gated_32", "gqa_2+gated_96", "gqa_2+gated_64"]
    folder, target = job_with_child(tmp_path, plain).folder(ASSEMBLE), tmp_path / "out"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    written = exporter.export(folder, target, Options(name="kid", dtype="f32"))
    assert exporter.verify(folder, target).as_json()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert {"file", "bytes", "notes"} <= set(written.as_json())
    assert (target / written.file).exists() and written.bytes > 0


@pytest.mark.parametrize("exporter", formats.EXPORTERS.values(), ids=formats.EXPORTERS)
def test_an_unknown_dtype_is_refused_with_those_the_format_has(tmp_path, exporter):
    folder = job_with_child(tmp_path, ["gqa_1+gated_96"] * 4).folder(ASSEMBLE)
    with pytest.raises(UserError, match=f"export {exporter.name}: dtype: got 'int4', expected one"):
        exporter.export(folder, tmp_path / "out", Options(dtype="int4"))
    assert not (tmp_path / "out").exists()
