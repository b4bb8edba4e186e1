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
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import make_parent, make_text, tiny_recipe
from safetensors.torch import load_file

from puzzle import artifacts, config, pipeline
from puzzle.cost import stage as cost
from puzzle.engines import machine
from puzzle.progress import Progress
from puzzle.run import Run

GOLDEN = Path(__file__).parent / "golden.json"
pytestmark = pytest.mark.training


def this_machine() -> str:
    return f"{machine()['device']}, {machine()['count']} cores, torch {torch.__version__}, {platform.python_version()}"


def write_costs(run: Run, path: Path) -> None:
    """A table in which seconds and bytes follow the parameters, and attention costs half as much
    again.
    """
    records = [cost.header(run)]
    for variant in cost.distinct_variants(run):
        parameters = run.parent.shape.parameters(variant)
        slot = variant.slot
        seconds = parameters * (1.5e-9 if slot == "attention" else 1e-9)
        figures = cost.Cost(
            seconds,
            4 * seconds,
            parameters,
            4 * parameters,
            64 * (slot == "attention") * parameters,
        )
        records.append(
            {"scenario": "main", "slot": slot, "variant": variant.name, **asdict(figures)}
        )
    constant = cost.Cost(
        1e-5, 2e-5, run.parent.shape.constant_parameters, 4 * run.parent.shape.constant_parameters
    )
    records.append(
        {"scenario": "main", "slot": cost.CONSTANT, "variant": cost.CONSTANT, **asdict(constant)}
    )
    artifacts.write_jsonl(path, records)


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
    write_costs(run, root / "costs.jsonl")
    pipeline.execute(run)
    scores = [
        [r["layer"], r["block"], r["shard"], {k: v for k, v in r.items() if isinstance(v, float)}]
        for r in artifacts.read_jsonl(run.stage_folder("score") / "scores.jsonl")
    ]
    solved = artifacts.read_json(run.stage_folder("search") / "solutions.json")
    curve = artifacts.read_jsonl(run.stage_folder("uptrain") / "curve.jsonl")
    return {
        "library": weights(run.stage_folder("library")),
        "scores": digest(scores),
        "solutions": digest([[s["blocks"], s["objective"]] for s in solved["solutions"]]),
        "child": weights(run.stage_folder("assemble")),
        "uptrained": weights(run.stage_folder("uptrain")),
        "curve": digest([[r["step"], r["kl"], r["cosine"]] for r in curve]),
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
