"""Peak memory of stages on a parent that is large for what may be held: streamed against resident.

    python benchmarks/memory.py [--json] [--quick] [--bfloat16] [--streamed]

Makes a parent of random weights (2 GB: 27 layers, float32; with --bfloat16 half the bytes on disk,
the same in memory, for layers are computed in float32 on a CPU), then trains a library, scores it,
and evaluates a child of it (quality, without serving), each in new processes: an idle one that
imports the same modules, one streamed, and one resident. Peak resident set size is the kernel's
(`VmHWM`), above the idle process's; the formula is what `puzzle plan` prints. At the end what both
ways have made is compared.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
from safetensors.torch import load_file

from puzzle import pipeline
from puzzle.artifacts import read_records
from puzzle.assemble import ASSEMBLE
from puzzle.assemble.stage import ChildState
from puzzle.evaluate import EVALUATE
from puzzle.evaluate import memory as evaluate_memory
from puzzle.evaluate import stage as evaluate_stage
from puzzle.evaluate.results import MODELS, ModelQuality, quality_path
from puzzle.library import LIBRARY
from puzzle.library import memory as library_memory
from puzzle.library.records import read_index
from puzzle.model import child
from puzzle.model.architecture import Architecture, Block
from puzzle.run import Run
from puzzle.score import SCORE
from puzzle.score import memory as score_memory
from puzzle.score.results import SCORES, BlockScore
from puzzle.stage import Job
from puzzle.uptrain import UPTRAIN

LARGE = common.LlamaSizes(
    hidden_size=1280,
    intermediate_size=3840,
    num_hidden_layers=27,
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
    "initialization": "training_free",  # least squares takes a minute a layer
}


CORPUS = {"train_tokens": 40_000, "held_out_tokens": 32_768, "sequence_length": 128}
SCORE_SETTINGS = {
    "granularity": "subblock",
    "sequences": 2,
    "shard_sequences": 2,
    "tokens_per_pass": 2048,
    "assembled": 0,
}
EVALUATE_SETTINGS = {
    "sequences": 4,
    "context": 256,
    "questions": 1,
    "samples": 1,
    "sample_tokens": 8,
}
STAGES = ("library", "score", "evaluate")


def work(recipe: str, folder: str, stage: str, way: str) -> None:
    """In a process of its own: print its peak after a stage, or without it (`idle`)."""
    if way == "idle":
        torch.ones(64, 64) @ torch.ones(64, 64)
        print(common.peak_bytes())
        return
    run = common.open_run(Path(folder), json.loads(recipe), **{stage: {"memory": way}})
    if stage == "evaluate":
        job = run.child_job("main")
        evaluate_stage.WORK.execute(job, job.folder(EVALUATE))
    else:
        pipeline.execute_stage({"library": LIBRARY, "score": SCORE}[stage], Job(run))
    print(common.peak_bytes())


def formula(run: Run, stage: str, way: str) -> float:
    """What `puzzle plan` says a stage takes."""
    if stage == "library":
        return library_memory.memory_bytes(run, streamed=way == "streamed")
    if stage == "score":
        peak = score_memory.taken(run, streamed=way == "streamed")
        return peak.device + peak.host
    place: evaluate_memory.Way = "streamed" if way == "streamed" else "resident"
    peak = evaluate_memory.taken(run.child_job("main"), place)
    return peak.device + peak.host


def save_child(run: Run) -> None:
    """The smallest block of the library that is no no-op in every other layer, saved twice."""
    job, blocks = run.child_job("main"), []
    for index, layer in enumerate(run.space.layers):
        halves = [
            [v for v in layer.subblocks if v.slot == slot and v.kind != "no_op"]
            for slot in ("attention", "ffn")
        ]
        small = Block(*(min(half, key=run.parent.shape.parameters) for half in halves))
        blocks.append(small if index % 2 else run.parent.shape.parent_blocks[index])
    architecture = Architecture(tuple(blocks))
    config, state = run.parent.child_config(architecture), ChildState(run, architecture)
    for stage in (ASSEMBLE, UPTRAIN):
        child.save(job.folder(stage), config, architecture, state, run.parent.folder, "")


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
    """The parent in `root / "parent"`, and where everything is made in each way."""

    root: Path
    corpus: common.Settings
    ways: Sequence[str]

    @property
    def recipe(self) -> common.Settings:
        """Of all runs."""
        return {
            "parent": str(self.root / "parent"),
            "deploy": ["transformers"],
            "library": LIBRARY_SETTINGS,
            "score": SCORE_SETTINGS,
            "cost": {"engine": "roofline"},
            "search": {"parameters": "90%"},
            "evaluate": EVALUATE_SETTINGS,
            "corpus": self.corpus,
        }

    def open_run(self, way: str, stage: str = "library") -> Run:
        """The run of one way, `streamed` or `resident`."""
        return common.open_run(self.root / way, self.recipe, **{stage: {"memory": way}})

    def peak_bytes(self, stage: str, way: str) -> int:
        """Of a process that does a stage, or of an `idle` one."""
        words = (json.dumps(self.recipe), self.root / way, stage, way)
        peak: int = common.in_own_process(__file__, *words)
        return peak

    def measure(self, parent_bytes: int) -> dict[str, Any]:
        """Peaks of both ways above an idle process, and how what they make differs."""
        idle = self.peak_bytes("library", "idle")
        common.print_header("stage", "way", "formula", "peak above idle", "of the parent's size")
        rows = []
        for stage in STAGES:
            for way in self.ways:
                run = self.open_run(way, stage)
                if stage == "evaluate":
                    save_child(run)
                peak = self.peak_bytes(stage, way) - idle
                planned = formula(run, stage, way)
                share = peak / parent_bytes
                row = {"stage": stage, "way": way, "peak_bytes": peak, "formula_bytes": planned}
                rows.append(row | {"share": share})
                cells = (f"{planned / 1e9:.2f} GB", f"{peak / 1e9:.2f} GB", f"{share:.0%}")
                common.print_row(stage, way, *cells)
        figures = {"idle_bytes": idle, "stages": rows}
        return figures | (self.compared() if len(self.ways) == 2 else {})

    def compared(self) -> dict[str, Any]:
        """How what both ways have made differs."""
        streamed, resident = (Job(self.open_run(way)) for way in self.ways)
        worst = compare(streamed.folder(LIBRARY), resident.folder(LIBRARY))
        files = {record.file for record in read_index(streamed) if record.file is not None}
        assert files == {path.name for path in resident.folder(LIBRARY).glob("*.safetensors")}
        one, other = (
            read_records(job.folder(SCORE) / SCORES, BlockScore) for job in (streamed, resident)
        )
        shown = [
            [ModelQuality.read(quality_path(self._evaluated(way), model)) for model in MODELS]
            for way in self.ways
        ]
        print(f"scores equal: {one == other}; evaluations equal: {shown[0] == shown[1]}")
        return {
            "largest_difference": worst,
            "scores_equal": one == other,
            "evaluations_equal": shown[0] == shown[1],
        }

    def _evaluated(self, way: str) -> Path:
        return self.open_run(way).child_job("main").folder(EVALUATE)


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
    parser.add_argument("--streamed", action="store_true", help="not the resident way")
    args = common.start(parser)
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    sizes, corpus = (SMALL, common.TINY_CORPUS) if args.quick else (LARGE, CORPUS)
    with tempfile.TemporaryDirectory() as root:
        parent_bytes = common.make_parent(Path(root) / "parent", sizes, dtype)
        print(
            f"parent: {sizes.num_hidden_layers} layers of width {sizes.hidden_size}, "
            f"{parent_bytes / 1e9:.2f} GB in {str(dtype).removeprefix('torch.')}"
        )
        ways = ("streamed",) if args.streamed else ("streamed", "resident")
        figures = Benchmark(Path(root), corpus, ways).measure(parent_bytes)
    common.print_json(args, {"parent_bytes": parent_bytes} | figures)


if __name__ == "__main__":
    main()
