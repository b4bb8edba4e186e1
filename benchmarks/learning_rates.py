"""Which learning rates are best at two widths: what the defaults' dependence on width stands on.

    python benchmarks/learning_rates.py [--stages library uptrain] [--json] [--quick]

Two parents of random weights that differ in width only. For each: the library is trained at several
rates (the mean over variants of the log of the loss after over that before), and a child of
70 % of the parameters is uptrained at several rates (KL on validation text at the end). The best
rate is the vertex of the parabola through the best of the sweep and its neighbours, in log rate;
the slope between the widths says how the best rate falls.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common

from puzzle import pipeline
from puzzle.assemble import ASSEMBLE
from puzzle.cost import COST
from puzzle.library import LIBRARY
from puzzle.library.records import read_index
from puzzle.run import Run
from puzzle.score import SCORE
from puzzle.search import SEARCH
from puzzle.stage import Job
from puzzle.uptrain import UPTRAIN
from puzzle.uptrain.trainer import read_curve

WIDTHS = (128, 512)
LIBRARY_RATES = [2.5e-4 * 2**n for n in range(6)]
UPTRAIN_RATES = [1e-3 * 2**n for n in range(6)]  # of Muon
STAGES = ("library", "uptrain")
RECIPE: common.Settings = {
    "deploy": ["transformers"],
    "corpus": {"sequence_length": 64, "train_tokens": 400_000, "held_out_tokens": 65_536},
    "library": {
        "kv_heads": [1],
        "ffn_percent": [50, 25],
        "attention_replacements": ["linear"],
        "ffn_replacements": [],
        "tokens": 65_536,
        "batch_sequences": 16,
    },
    "score": {"sequences": 8, "assembled": 0, "method": "fisher", "fisher_samples": 4},
    "cost": {
        "engine": "roofline",
        "scenario": {"batch_size": 4, "input_length": 16, "output_length": 8},
    },
    "search": {"parameters": "70%", "points": 3, "refinements": 0},
    "uptrain": {"tokens": 65_536, "batch_sequences": 16, "cosine_weight": 0.0},
    "evaluate": {"sequences": 8},
}


def sizes(width: int, quick: bool) -> common.LlamaSizes:
    """Heads of one size, an FFN three times as wide: only the width differs."""
    return common.LlamaSizes(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2 if quick else 4,
        num_attention_heads=width // 32,
        num_key_value_heads=2,
        head_dim=32,
    )


def library_loss(folder: Path, recipe: common.Settings, rate: float) -> float:
    """The mean over variants of log(loss after / loss before)."""
    run = common.open_run(folder, recipe, library={"learning_rate": rate})
    pipeline.execute_stage(LIBRARY, Job(run))
    records = [record for record in read_index(Job(run)) if record.file]
    gains = [math.log(record.nmse_after / record.nmse_before) for record in records]
    return math.fsum(gains) / len(gains)


def uptrained_kl(job: Job, rate: float) -> float:
    """On validation text after the last step; whatever was best on the way."""
    uptrain = job.child.uptrain.model_copy(update={"learning_rate": rate})
    changed = replace(job, wish=replace(job.child, uptrain=uptrain))
    pipeline.execute_stage(UPTRAIN, changed)
    validation = read_curve(changed)[-1].validation
    assert validation is not None
    return validation["kl"]


def assembled(folder: Path, recipe: common.Settings) -> Job:
    """A child before its uptraining."""
    run: Run = common.open_run(folder, recipe)
    run.write()
    job = run.child_job("main")
    for stage in (LIBRARY, SCORE, COST, SEARCH, ASSEMBLE):
        pipeline.execute_stage(stage, job)
    return job


def best(rates: list[float], losses: list[float]) -> float:
    """The rate at the lowest loss, between the rates of the sweep."""
    index = min(range(len(rates)), key=losses.__getitem__)
    if index in (0, len(rates) - 1):
        return rates[index]
    before, here, after = losses[index - 1 : index + 2]
    shift = 0.5 * (before - after) / (before - 2 * here + after)
    return rates[index] * (rates[1] / rates[0]) ** shift


def sweep(root: Path, width: int, stages: Sequence[str], quick: bool) -> dict[str, Any]:
    """The stages at all rates."""
    folder = root / str(width)
    common.make_parent(folder / "parent", sizes(width, quick))
    recipe = RECIPE | {"parent": str(folder / "parent")}
    count = 2 if quick else len(LIBRARY_RATES)
    library_rates, uptrain_rates = LIBRARY_RATES[:count], UPTRAIN_RATES[:count]
    if quick:
        recipe |= {"corpus": common.TINY_CORPUS}
        recipe["library"] = recipe["library"] | {"tokens": 2048}
        recipe["uptrain"] = recipe["uptrain"] | {"tokens": 2048}
    figures: dict[str, Any] = {"width": width}
    if "library" in stages:
        libraries = [library_loss(folder / f"{r:g}", recipe, r) for r in library_rates]
        figures["library"] = dict(zip(library_rates, libraries, strict=True))
    if "uptrain" in stages:
        job = assembled(folder / "run", recipe)
        children = [uptrained_kl(job, rate) for rate in uptrain_rates]
        figures["uptrain"] = dict(zip(uptrain_rates, children, strict=True))
    for stage in stages:
        losses = figures[stage]
        cells = [f"{rate:.2e}: {loss:.4f}" for rate, loss in losses.items()]
        figures[f"best_{stage}"] = best(list(losses), list(losses.values()))
        common.print_row(width, stage, f"{figures[f'best_{stage}']:.2e}", ", ".join(cells))
    return figures


def main() -> None:
    """Sweep both widths and print the slopes."""
    options = common.parser(__doc__, quick="two rates, two layers, few tokens")
    options.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    args = common.start(options)
    common.print_header("width", "stage", "best rate", "loss by rate")
    with tempfile.TemporaryDirectory() as root:
        rows = [sweep(Path(root), width, args.stages, args.quick) for width in WIDTHS]
    narrow, wide = rows
    ratio = math.log(WIDTHS[1] / WIDTHS[0])
    slopes = {
        stage: math.log(wide[f"best_{stage}"] / narrow[f"best_{stage}"]) / ratio
        for stage in args.stages
    }
    for stage, slope in slopes.items():
        print(f"{stage}: the best rate goes with width to the power of {slope:.2f}")
    common.print_json(args, {"widths": rows, "slopes": slopes})


if __name__ == "__main__":
    main()
