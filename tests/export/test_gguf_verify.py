"""`verify` of a GGUF file, without llama.cpp."""

import pytest
from children import write_child
from gguf_exports import MIXED, checkpoint
from safetensors.torch import save_file

from puzzle.errors import UserError
from puzzle.export import gguf as gguf_exporter
from puzzle.export.exporter import Options


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_verify_accepts_an_export_and_finds_one_changed_value(tiny, tmp_path, dtype):
    folder = write_child(tiny, tmp_path / "child", MIXED)
    written = gguf_exporter.export(folder, tmp_path / "out", Options(dtype=dtype))
    comparison = gguf_exporter.verify(folder, tmp_path / "out", tokens=0)
    expected = {"file": written.file, "dtype": dtype, "tensors": written.tensors}
    assert comparison.as_json() == expected
    state = checkpoint(folder)
    state["model.layers.3.self_attn.k_proj.weight"][17, 3] += 0.1
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"blk\.3\.attn_k\.weight"):
        gguf_exporter.verify(folder, tmp_path / "out", tokens=0)
