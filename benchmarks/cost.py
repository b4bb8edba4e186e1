"""Do predicted speeds hold? Random heterogeneous children of the embedded parent, predicted and
then really served.

    python benchmarks/cost.py [--quick] [--json] [--architectures 20] [--pairs 11]
    # On a GPU, in one go
    python benchmarks/cost.py --llama-8b --engine torch --architectures 2 --seconds 300

1. The cost stage for the full search space, timed.
2. Random architectures, each saved as a checkpoint, served by the engine, and timed in turn with
   the parent (A B A B), because this machine's absolute speed drifts. Measured throughput is the
   parent's median times the median ratio; predicted throughput is the table's. The error of the
   ratio is what the product promises.
3. One architecture served several times over, each in an engine of its own: the noise of the
   yardstick.
4. The architectures a search would take for 1.5x and 2x: do they meet it, in how many attempts?
   Scores are stood in for by the parameters that are removed, since speed does not depend on
   quality: a search that is as lopsided as can be, it drops attentions and keeps FFNs.

With `--llama-8b` the parent has the shapes of Llama-3.1-8B and random weights; 128 tokens in, 1024
out, batch 128.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import make_parent

from puzzle import config, engines, pipeline
from puzzle.cost import stage as cost
from puzzle.model.architecture import Architecture
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.search import mip
from puzzle.search import stage as search

LLAMA_8B = {
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def random_architecture(run: Run, rng: random.Random) -> Architecture:
    """A random share of the layers takes a random block, the others stay the parent's."""
    share, parent = rng.uniform(0.2, 0.9), run.parent.shape.parent_block
    return Architecture(
        tuple(rng.choice(o.blocks) if rng.random() < share else parent for o in run.space.layers)
    )


def searched(run: Run, table: cost.CostTable, speedup: float, factor: float) -> Architecture:
    """What a search takes for this speed-up, aimed `factor` further, as the product does after a
    miss.
    """
    layers, shape = [list(options.blocks) for options in run.space.layers], run.parent.shape
    parameters = [
        shape.parameters(b.attention) + shape.parameters(b.ffn)
        for options in layers
        for b in options
    ]
    scores = max(parameters) - np.array(parameters, dtype=float)
    margin = run.recipe.search.margin
    limit = table.predict(Architecture.of_parent(shape)).total_s / speedup * (1 - margin) / factor
    found = mip.solve(search.build(layers, scores, [(search.KINDS["throughput"], table, limit)]))
    assert found is not None
    return Architecture.from_names(search.names(found.chosen, layers))


def keep_promise(run: Run, table: cost.CostTable, asked: float) -> list[dict[str, Any]]:
    """Search, serve, and on a miss search again with corrected costs, as `puzzle run` does."""
    attempts: list[dict[str, Any]] = []
    factor = 1.0
    for _ in range(run.recipe.search.attempts):
        attempts.append(
            serve(run, table, searched(run, table, asked, factor), 5) | {"asked": asked}
        )
        show(f"searched {asked}x", attempts[-1])
        if attempts[-1]["measured"] >= asked:
            break
        factor = max(factor, attempts[-1]["predicted"] / attempts[-1]["measured"])
    return attempts


def serve(
    run: Run, table: cost.CostTable, architecture: Architecture, pairs: int
) -> dict[str, Any]:
    """An architecture with random weights, paired with the parent."""
    with tempfile.TemporaryDirectory() as folder:
        cost.write_checkpoint(run, Path(folder), architecture)
        paired = cost.measure_pair(
            run, Path(folder), (table.scenario, table.scenario), pairs, "benchmark"
        )
    parent, own = (
        table.predict(a).total_s for a in (Architecture.of_parent(run.parent.shape), architecture)
    )
    spread = statistics.pstdev(paired.speedups) / paired.speedup
    return {
        "measured": paired.speedup,
        "predicted": parent / own,
        "error": parent / own / paired.speedup - 1,
        "measured_tok_per_s": paired.child["throughput_tok_per_s"],
        "predicted_tok_per_s": table.tokens / own,
        "pair_spread": spread,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--architectures", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--engine", default="auto")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of measuring in the cost stage"
    )
    parser.add_argument("--llama-8b", action="store_true")
    parser.add_argument(
        "--quick", action="store_true", help="two architectures, few pairs, 15 s of measuring"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.architectures, args.pairs, args.seconds = 2, 3, 15.0
    with tempfile.TemporaryDirectory() as out:
        settings: dict[str, Any] = {"engine": args.engine, "seconds": args.seconds}
        recipe: dict[str, Any] = {"out": out, "cost": settings}
        if args.llama_8b:
            (Path(out) / "parent").mkdir()
            recipe |= {"parent": str(Path(out) / "parent"), "library": {"ffn_multiple": 256}}
            settings["scenario"] = {"batch_size": 128, "input_length": 128, "output_length": 1024}
            make_parent(Path(out) / "parent", 4096, 32, torch.bfloat16, 128_256, **LLAMA_8B)
        run = Run(config.parse(recipe), Path(out), Progress(quiet=True))
        about = {**run.engine.describe(""), "cores": engines.machine()["count"]}
        print(f"{about['engine']} {about['version']} on {about['device']}, {about['cores']} cores")
        name = "shapes of Llama-3.1-8B" if args.llama_8b else "embedded parent"
        print(f"{name}, {run.space.summary()}; {run.recipe.cost.scenario}")
        began = time.monotonic()
        pipeline.execute_stage(run, "cost")
        stage_s, table = time.monotonic() - began, cost.read(run)
        print(f"cost stage: {stage_s:.0f} s for {len(table.variants)} variants")
        rng, rows = random.Random(0), []
        print(f"{'':>14} {'speed-up':>9} {'predicted':>9} {'error':>7} {'sd of pairs':>11}")
        for index in range(args.architectures):
            rows.append(serve(run, table, random_architecture(run, rng), args.pairs))
            show(f"random {index}", rows[-1])
        same = random_architecture(run, random.Random(0))
        again = [
            serve(run, table, same, args.pairs)["measured"] for _ in range(2 if args.quick else 4)
        ]
        again.append(rows[0]["measured"])
        promises = [keep_promise(run, table, asked) for asked in (1.5, 2.0)]
    errors = np.abs([row["error"] for row in rows])
    absolute = np.abs([row["predicted_tok_per_s"] / row["measured_tok_per_s"] - 1 for row in rows])
    noise = statistics.pstdev(again) / statistics.fmean(again)
    met = [attempts[-1]["measured"] >= attempts[-1]["asked"] for attempts in promises]
    print(
        f"error of the predicted speed-up: median {np.median(errors):.1%}, worst {errors.max():.1%}"
    )
    print(
        f"error of absolute tokens/s: median {np.median(absolute):.1%}, worst {absolute.max():.1%}"
    )
    print(
        f"the same architecture in {len(again)} engines: {', '.join(f'{x:.3f}x' for x in again)} (sd {noise:.1%})"
    )
    for attempts, one in zip(promises, met, strict=True):
        word = "met" if one else "missed"
        print(
            f"asked {attempts[0]['asked']}x: {word} in attempt {len(attempts)} (median of 5 pairs)"
        )
    if args.json:
        figures = {
            "stage_s": stage_s,
            "median_error": float(np.median(errors)),
            "worst_error": float(errors.max()),
            "median_absolute_error": float(np.median(absolute)),
            "noise": noise,
            "met": met,
            "rows": rows,
        }
        print(json.dumps(figures))


def show(name: str, row: dict[str, Any]) -> None:
    figures = f"{row['measured']:>8.3f}x {row['predicted']:>8.3f}x {row['error']:>+7.1%} {row['pair_spread']:>11.1%}"
    print(f"{name:>14} {figures}", flush=True)


if __name__ == "__main__":
    main()
