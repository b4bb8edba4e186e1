"""Do predicted speeds hold? Random heterogeneous children of the embedded parent, predicted and
then really served.

    python benchmarks/cost.py [--quick] [--json] [--architectures 20] [--pairs 11] [--seconds 60]
    # On a GPU, in one go
    python benchmarks/cost.py --llama-8b --engine torch --architectures 2 --seconds 300

1. The cost stage for the full search space, timed.
2. Random architectures, each saved as a checkpoint, served by the engine, and timed in turn with
   the parent (A B A B), because this machine's absolute speed drifts. Measured throughput is the
   parent's median times the median ratio; predicted throughput is the table's. The error of the
   ratio is what the product promises.
3. One architecture served several times over, each in a new engine: the noise of the yardstick.
4. The architectures a search would take for 1.5x and 2x: do they meet it, in how many attempts?
   Parameters that are removed stand in for scores, since speed does not depend on quality: a search
   that is as lopsided as can be, it drops attentions and keeps FFNs.

With `--llama-8b` the parent has the shapes of Llama-3.1-8B and random weights; 128 tokens in, 1024
out, batch 128.
"""

import argparse
import random
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from puzzle import pipeline
from puzzle.cost import COST
from puzzle.cost.probe import write_checkpoint
from puzzle.cost.table import CostTable, read
from puzzle.engines.turns import Served, measure_pair
from puzzle.model.architecture import Architecture
from puzzle.run import Run
from puzzle.search import mip
from puzzle.search.constraints import KINDS
from puzzle.search.space_program import Choices, Limit, build
from puzzle.stage import Job

LLAMA_8B = common.LlamaSizes(
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128_256,
)
PROMISE_PAIRS = 5


@dataclass(frozen=True)
class ServedChild:
    """A child that was served beside its parent; speeds are relative to the parent's."""

    measured: float
    predicted: float
    error: float  # of the prediction
    measured_tok_per_s: float
    predicted_tok_per_s: float
    pair_spread: float  # standard deviation of the pairs over their median

    def print_line(self, name: str) -> None:
        """A line of the table."""
        figures = (f"{self.measured:.3f}x", f"{self.predicted:.3f}x")
        common.print_row(name, *figures, f"{self.error:+.1%}", f"{self.pair_spread:.1%}")


@dataclass(frozen=True)
class Benchmark:
    """A place whose costs are measured, and the table of them."""

    job: Job
    table: CostTable

    def random_architecture(self, rng: random.Random) -> Architecture:
        """A random share of the layers takes a random block, the others stay the parent's."""
        run, share = self.job.run, rng.uniform(0.2, 0.9)
        parent = run.parent.shape.widest_block
        blocks = [
            rng.choice(layer.blocks) if rng.random() < share else parent
            for layer in run.space.layers
        ]
        return Architecture(tuple(blocks))

    def predicted_s(self, architecture: Architecture) -> float:
        """Seconds of a batch."""
        return self.table.predict(architecture).total_s

    @property
    def parent_s(self) -> float:
        """Predicted seconds of the parent's batch."""
        return self.predicted_s(Architecture.of_parent(self.job.run.parent.shape))

    def serve(self, architecture: Architecture, pairs: int) -> ServedChild:
        """Serve an architecture with random weights in turn with the parent."""
        parent, scenario = self.job.run.parent, self.table.scenario
        with tempfile.TemporaryDirectory() as name:
            write_checkpoint(parent, Path(name), architecture)
            sides = (Served(parent.folder, scenario), Served(Path(name), scenario))
            measurement = measure_pair(self.job.engine, *sides, pairs, on_batch=lambda: None)
        child_s = self.predicted_s(architecture)
        predicted, measured = self.parent_s / child_s, measurement.speedup
        return ServedChild(
            measured=measured,
            predicted=predicted,
            error=predicted / measured - 1,
            measured_tok_per_s=measurement.child.throughput_tok_per_s,
            predicted_tok_per_s=self.table.tokens / child_s,
            pair_spread=statistics.pstdev(measurement.speedups) / measured,
        )

    def search(self, speedup: float, factor: float) -> Architecture | None:
        """What a search takes for this speed-up, or None where no architecture is predicted to
        reach it.

        It is aimed `factor` further than asked, as the product does after a miss.
        """
        shape, settings = self.job.run.parent.shape, self.job.child.search
        layers = [list(layer.blocks) for layer in self.job.run.space.layers]
        parameters = [shape.parameters(block) for layer in layers for block in layer]
        scores = max(parameters) - np.array(parameters, dtype=float)
        limit_s = self.parent_s / speedup * (1 - settings.margin) / factor
        choices = Choices(layers, scores)
        program = build(choices, [Limit(KINDS["throughput"], self.table, limit_s)])
        optimum = mip.solve(program)
        if optimum is None:
            return None
        return Architecture.from_names(choices.names(optimum.columns))

    def keep_promise(self, asked: float) -> list[ServedChild]:
        """Every attempt: search, serve, and after a miss again with corrected costs."""
        attempts: list[ServedChild] = []
        factor = 1.0
        for _ in range(self.job.child.search.attempts):
            architecture = self.search(asked, factor)
            if architecture is None:
                break
            attempts.append(self.serve(architecture, PROMISE_PAIRS))
            attempts[-1].print_line(f"searched {asked}x")
            if attempts[-1].measured >= asked:
                break
            factor = max(factor, attempts[-1].predicted / attempts[-1].measured)
        return attempts


def open_run(root: Path, args: argparse.Namespace) -> Run:
    """A run of the parent that is asked for."""
    cost: common.Settings = {"engine": args.engine, "seconds": args.seconds}
    recipe: common.Settings = {"parent": "pocket"}
    if args.quick:
        recipe = common.tiny_recipe(root)
    elif args.llama_8b:
        common.make_parent(root / "parent", LLAMA_8B, torch.bfloat16)
        recipe = {"parent": str(root / "parent"), "library": {"ffn_multiple": 256}}
        cost["scenario"] = {"batch_size": 128, "input_length": 128, "output_length": 1024}
    return common.open_run(root / "run", recipe, cost=cost)


def measure(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Steps 1 to 4; prints as it goes."""
    job = run.child_job("main")
    stage_s = pipeline.execute_stage(COST, job).seconds
    benchmark = Benchmark(job, read(job))
    print(f"cost stage: {stage_s:.0f} s for {len(benchmark.table.variants)} variants")
    common.print_header("architecture", "speed-up", "predicted", "error", "sd of pairs")
    rng, children = random.Random(0), []
    for index in range(args.architectures):
        children.append(benchmark.serve(benchmark.random_architecture(rng), args.pairs))
        children[-1].print_line(f"random {index}")
    same = benchmark.random_architecture(random.Random(0))
    repeats = range(1 if args.quick else 4)
    again = [benchmark.serve(same, args.pairs).measured for _ in repeats]
    again.append(children[0].measured)
    asked_for = (1.2,) if args.quick else (1.5, 2.0)
    promises = {asked: benchmark.keep_promise(asked) for asked in asked_for}
    errors = np.abs([child.error for child in children])
    absolute = np.abs([c.predicted_tok_per_s / c.measured_tok_per_s - 1 for c in children])
    return {
        "stage_s": stage_s,
        "median_error": float(np.median(errors)),
        "worst_error": float(errors.max()),
        "median_absolute_error": float(np.median(absolute)),
        "worst_absolute_error": float(absolute.max()),
        "again": again,
        "noise": statistics.pstdev(again) / statistics.fmean(again),
        "promises": {str(a): [asdict(child) for child in made] for a, made in promises.items()},
        "met": [bool(made) and made[-1].measured >= a for a, made in promises.items()],
        "rows": [asdict(child) for child in children],
    }


def print_summary(figures: dict[str, Any]) -> None:
    """Errors, noise and promises, a line each."""
    median, worst = figures["median_error"], figures["worst_error"]
    print(f"error of the predicted speed-up: median {median:.1%}, worst {worst:.1%}")
    median, worst = figures["median_absolute_error"], figures["worst_absolute_error"]
    print(f"error of absolute tokens/s: median {median:.1%}, worst {worst:.1%}")
    speedups = ", ".join(f"{speedup:.3f}x" for speedup in figures["again"])
    print(
        f"the same architecture in {len(figures['again'])} engines: {speedups} "
        f"(sd {figures['noise']:.1%})"
    )
    for (asked, attempts), met in zip(figures["promises"].items(), figures["met"], strict=True):
        if not attempts:
            print(f"asked {asked}x: no architecture is predicted to reach it")
            continue
        word = "met" if met else "missed"
        print(
            f"asked {asked}x: {word} in attempt {len(attempts)} (median of {PROMISE_PAIRS} pairs)"
        )


def main() -> None:
    """Measure costs, predict and serve."""
    parser = common.parser(
        __doc__, quick="a tiny parent on the torch engine, two architectures, 2 s of measuring"
    )
    parser.add_argument("--architectures", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring, in the stage")
    parser.add_argument("--llama-8b", action="store_true", help="the shapes of Llama-3.1-8B")
    args = common.start(parser)
    if args.quick:
        args.architectures, args.pairs, args.seconds, args.engine = 2, 1, 2.0, "torch"
    with tempfile.TemporaryDirectory() as root:
        run = open_run(Path(root), args)
        facts = run.child_job("main").engine.facts
        print(f"{facts.engine} {facts.version}")
        print(f"{run.recipe.parent}, {run.space.summary()}; {run.recipe.cost.scenario}")
        figures = measure(run, args)
    print_summary(figures)
    common.print_json(args, figures)


if __name__ == "__main__":
    main()
