"""Children for the GGUF tests, and what an exported file holds."""

import json

import gguf
from safetensors.torch import load_file

from puzzle.export import gguf as gguf_exporter
from puzzle.export.exporter import Options

MIXED = ["gqa_1+gated_96", "no_op+gated_32", "linear+gated_64", "gqa_2+gated_32"]
SERVED = {
    "the parent": ["gqa_2+gated_96"] * 4,
    "reduced": ["gqa_1+gated_96", "no_op+gated_32", "gqa_2+gated_64", "no_op+gated_64"],
    "no-ops first and last": ["no_op+gated_32", "gqa_2+gated_96", "gqa_1+gated_64", "no_op+no_op"],
    "empty layers": ["no_op+no_op", "gqa_1+gated_96", "no_op+no_op", "gqa_2+gated_32"],
    "linear": ["linear+gated_96", "gqa_2+gated_64", "linear+gated_32", "gqa_1+gated_96"],
}
ROPE = {
    "default": {"rope_theta": 5e5},
    "linear": {"rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
}


def exported(folder, target, **options):
    """What was written, the file's tensors dequantised, the names of their types, and its keys."""
    written = gguf_exporter.export(folder, target, Options(**options))
    reader = gguf.GGUFReader(target / written.file)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    keys = {name: value.contents() for name, value in reader.fields.items()}
    return written, tensors, types, keys


def checkpoint(folder):
    """The tensors of a child, by name."""
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def change_config(folder, **changes):
    """Overwrite keys of a child's config.json."""
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))
