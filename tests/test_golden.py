"""The bytes of a tiny run with a fixed cost table: what a change of structure must not change.

Recorded for one processor and one torch version (`golden.json`); elsewhere the test is skipped,
since the arithmetic of another machine may round otherwise. After a change that is meant to change
results:

    python tests/test_golden.py
"""

import hashlib
import json
import platform
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import make_parent, make_text, tiny_recipe
from safetensors.torch import load_file

from puzzle import artifacts, config, pipeline
from puzzle.assemble import ASSEMBLE
from puzzle.cost import stage as cost
from puzzle.cost import table
from puzzle.engines import machine
from puzzle.engines.intervals import Percentiles
from puzzle.library import LIBRARY
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.score import SCORE
from puzzle.score import results as scores
from puzzle.search import answers
from puzzle.stage import Job
from puzzle.uptrain import UPTRAIN, trainer

GOLDEN = Path(__file__).parent / "golden.json"
pytestmark = pytest.mark.training


def this_machine() -> str:
    device, cores = machine()
    threads = torch.get_num_threads()
    versions = f"torch {torch.__version__}, {platform.python_version()}"
    return f"{device}, {cores} cores, {threads} threads, {versions}"


def write_costs(job: Job, path: Path) -> None:
    """Seconds and bytes follow the parameters; attention costs half as much again."""
    shape = job.run.parent.shape
    records = []
    for variant, _ in table.distinct_parts(job):
        parameters, is_attention = shape.parameters(variant), variant.slot == "attention"
        seconds = parameters * (1.5e-9 if is_attention else 1e-9)
        figures = {
            "prefill_s": seconds,
            "decode_s": 4 * seconds,
            "parameters": parameters,
            "parameter_bytes": 4 * parameters,
            "kv_cache_bytes": 64 * is_attention * parameters,
        }
        names = {"scenario": "main", "slot": variant.slot, "variant": variant.name}
        records.append(table.VariantCost(**names, **figures, stderr_s=0.0))
    constant = shape.constant_parameters
    records.append(
        table.VariantCost(
            scenario="main",
            slot=table.CONSTANT,
            variant=table.CONSTANT,
            prefill_s=1e-5,
            decode_s=2e-5,
            parameters=constant,
            parameter_bytes=4 * constant,
            kv_cache_bytes=0,
            stderr_s=0.0,
        )
    )
    cost.header(job).write(path.with_name(table.HEADER))
    artifacts.write_records(path, records)
    fit = table.ScenarioFit(
        scenario="main",
        prefill_scale=1.0,
        decode_scale=1.0,
        prefill_samples=1,
        decode_samples=1,
        noise=0.0,
        first_token=Percentiles(),
        inter_token=Percentiles(),
        unknowns=[],
        prefill_covariance=[],
        decode_covariance=[],
    )
    artifacts.write_records(path.with_name(table.FITS), [fit])


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def weights(folder: Path) -> str:
    """Names, shapes, dtypes and bytes of every tensor of a folder's safetensors files."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            found.update(f"{path.name} {name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def results(root: Path) -> dict[str, str]:
    """Digests of what every stage of the tiny run made."""
    (root / "text").mkdir(parents=True)
    recipe = tiny_recipe(make_parent(root / "parent"), make_text(root / "text"), root / "run")
    recipe["library"] |= {"initialization": "least_squares", "ffn_percent": [50, 25]}
    recipe["cost"] |= {"table": str(root / "costs.jsonl"), "device_sheet": "this-cpu"}
    recipe["search"] = {"parameters": "55%", "solutions": 2, "points": 8}
    run = Run(config.parse(recipe), root / "run", Progress(quiet=True))
    job = run.child_job("main")
    write_costs(job, root / "costs.jsonl")
    pipeline.execute(run)
    records = artifacts.read_records(job.folder(SCORE) / scores.SCORES, scores.BlockScore)
    rows = []
    for record in records:
        squares = {f"{name}_squares": value for name, value in record.result.squares.items()}
        rows.append([record.layer, record.block, int(record.shard), record.result.sums | squares])
    solutions = answers.read(job).solutions
    curve = trainer.read_curve(job)
    return {
        "library": weights(job.folder(LIBRARY)),
        "scores": digest(rows),
        "solutions": digest([[solution.blocks, solution.objective] for solution in solutions]),
        "child": weights(job.folder(ASSEMBLE)),
        "uptrained": weights(job.folder(UPTRAIN)),
        "curve": digest([[p.step, p.losses["kl"], p.losses["cosine"]] for p in curve]),
    }


def test_a_tiny_run_gives_the_recorded_bytes(tmp_path):
    golden = json.loads(GOLDEN.read_text())
    if golden["machine"] != this_machine():
        pytest.skip(f"recorded on {golden['machine']}; this is {this_machine()}")
    assert results(tmp_path) == golden["results"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = results(Path(folder))
    GOLDEN.write_text(json.dumps({"machine": this_machine(), "results": found}, indent=2) + "\n")
    print(GOLDEN.read_text(), file=sys.stdout)
