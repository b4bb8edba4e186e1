"""Peak memory of BLD on a parent that is large for what may be held: streamed against resident.

    python benchmarks/memory.py [--json] [--quick] [--bfloat16]

Makes a parent of random weights (24 layers, float32; with --bfloat16 half the bytes on disk, the
same in memory, for layers are computed in float32 on a CPU), then runs the library stage in new
processes: an idle one that imports the same modules, one streamed, and one resident. Peak resident
set size is the kernel's (`VmHWM`), above the idle process's; the formula is what `puzzle plan`
prints. At the end the files of the two libraries are compared.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
from safetensors.torch import load_file

from puzzle import pipeline
from puzzle.library import LIBRARY, memory
from puzzle.library.records import read_index
from puzzle.library.stage import WORK  # noqa: F401 (the idle process imports what the others do)
from puzzle.run import Run
from puzzle.stage import Job

LARGE = common.LlamaSizes(
    hidden_size=1280,
    intermediate_size=3840,
    num_hidden_layers=24,
    num_attention_heads=20,
    num_key_value_heads=5,
)
SMALL = common.LlamaSizes(
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=1,
)
LIBRARY_SETTINGS = {
    "kv_heads": [1],
    "ffn_percent": [50],
    "ffn_replacements": ["linear", "no_op"],
    "tokens": 1024,
    "batch_sequences": 4,
    "chunk_steps": 2,
    "calibration_sequences": 4,
    "validation_sequences": 4,
}


CORPUS = {"train_tokens": 40_000, "held_out_tokens": 32_768, "sequence_length": 128}


def work(recipe: str, folder: str, mode: str) -> None:
    """In a process of its own: print its peak after the library stage, or without it (`idle`)."""
    if mode == "idle":
        torch.ones(64, 64) @ torch.ones(64, 64)
    else:
        run = common.open_run(Path(folder), json.loads(recipe), library={"memory": mode})
        pipeline.execute_stage(LIBRARY, Job(run))
    print(common.peak_bytes())


def difference(a: Path, b: Path) -> float:
    """The largest relative difference of any tensor of two libraries."""
    worst = 0.0
    for path in sorted(a.glob("*.safetensors")):
        ours, theirs = load_file(path), load_file(b / path.name)
        differences = [((ours[n] - t).norm() / t.norm()).item() for n, t in theirs.items()]
        worst = max(worst, *differences)
    return worst


@dataclass(frozen=True)
class Benchmark:
    """The parent in `root / "parent"`, and where the two libraries are made."""

    root: Path
    corpus: common.Settings

    @property
    def recipe(self) -> common.Settings:
        """Of both libraries."""
        return {
            "parent": str(self.root / "parent"),
            "deploy": ["transformers"],
            "library": LIBRARY_SETTINGS,
            "corpus": self.corpus,
        }

    def open_run(self, mode: str) -> Run:
        """The run whose library is trained `streamed` or `resident`."""
        return common.open_run(self.root / mode, self.recipe, library={"memory": mode})

    def peak_bytes(self, mode: str) -> int:
        """Of a process that trains the library, or of an `idle` one."""
        words = (json.dumps(self.recipe), self.root / mode, mode)
        peak: int = common.in_own_process(__file__, *words)
        return peak

    def measure(self, parent_bytes: int) -> dict[str, Any]:
        """Peaks of both modes above an idle process, and how their libraries differ."""
        idle = self.peak_bytes("idle")
        common.print_header("mode", "formula", "peak above idle", "of the parent's size")
        rows = []
        for mode in ("streamed", "resident"):
            peak = self.peak_bytes(mode) - idle
            formula = memory.memory_bytes(self.open_run(mode), streamed=mode == "streamed")
            share = peak / parent_bytes
            row = {"mode": mode, "peak_bytes": peak, "formula_bytes": formula, "share": share}
            rows.append(row)
            figures = (f"{formula / 1e9:.2f} GB", f"{peak / 1e9:.2f} GB", f"{share:.0%}")
            common.print_row(mode, *figures)
        streamed, resident = (Job(self.open_run(mode)) for mode in ("streamed", "resident"))
        worst = compare(streamed.folder(LIBRARY), resident.folder(LIBRARY))
        files = {record.file for record in read_index(streamed) if record.file is not None}
        assert files == {path.name for path in resident.folder(LIBRARY).glob("*.safetensors")}
        return {"idle_bytes": idle, "modes": rows, "largest_difference": worst}


def compare(streamed: Path, resident: Path) -> float:
    """Print how many files are equal; the largest relative difference of any tensor."""
    files = sorted(path.name for path in resident.glob("*.safetensors"))
    equal = [(streamed / name).read_bytes() == (resident / name).read_bytes() for name in files]
    worst = difference(streamed, resident)
    print(
        f"{sum(equal)} of {len(files)} files identical to the byte; "
        f"largest relative difference {worst:.1e}"
    )
    return worst


def main() -> None:
    """Make the parent and measure, or do the work of one of the processes."""
    arguments = common.worker_arguments()
    if arguments is not None:
        work(*arguments)
        return
    parser = common.parser(__doc__, quick="a parent of 4 layers of width 256")
    parser.add_argument("--bfloat16", action="store_true", help="the dtype of the parent's weights")
    args = common.start(parser)
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    sizes, corpus = (SMALL, common.TINY_CORPUS) if args.quick else (LARGE, CORPUS)
    with tempfile.TemporaryDirectory() as root:
        parent_bytes = common.make_parent(Path(root) / "parent", sizes, dtype)
        print(
            f"parent: {sizes.num_hidden_layers} layers of width {sizes.hidden_size}, "
            f"{parent_bytes / 1e9:.2f} GB in {str(dtype).removeprefix('torch.')}"
        )
        figures = Benchmark(Path(root), corpus).measure(parent_bytes)
    common.print_json(args, {"parent_bytes": parent_bytes} | figures)


if __name__ == "__main__":
    main()
