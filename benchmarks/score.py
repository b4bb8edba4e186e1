"""Scores: the same as a loop over really swapped models, for how much less work, and what cheaper
ones are worth.

    python benchmarks/score.py [--quick] [--json]

On the embedded parent with its full search space and a library of 65,536 tokens; fewer sequences
with --quick:

1. Exactness, in float32: the stage's scores against swapped models run whole, on a sample of
   blocks.
2. Speed, in one run: the loop over swapped models (a whole forward per block and shard; it may keep
   the parent's final hidden states and uses the same metrics; timed on every seventh block, its
   mean taken for all), exact scores, Fisher, hybrid. `allowed` is the saving that the count of
   block forwards allows: L against L - i.
3. Fisher against exact: Spearman over all blocks and per layer, and what a search loses that uses
   the estimates.
4. Do sums of scores mean anything? Their correlation with the KL of really assembled children.
5. Memory: the peak of scoring a parent with a vocabulary of 128,256, above an idle process.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import child_process, make_parent, peak_bytes

from puzzle import config, pipeline, plan
from puzzle.engines import machine
from puzzle.library.stage import read_block
from puzzle.model import variants as subblocks
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.score import stage as score
from puzzle.search import validate
from puzzle.training.losses import METRICS, token_metrics

VOCABULARY = 128_256


WIDE = {
    "kv_heads": [1],
    "ffn_percent": [50],
    "attention_replacements": ["no_op"],
    "ffn_replacements": ["no_op"],
}


def open_run(
    folder: Path,
    precision: str = "auto",
    parent: str = "pocket",
    tokens: int = 65_536,
    **settings: Any,
) -> Run:
    recipe = {
        "parent": parent,
        "deploy": ["transformers"],
        "precision": precision,
        "score": settings,
        "library": {"tokens": tokens} | (WIDE if parent != "pocket" else {}),
        "corpus": {"train_tokens": 1_000_000},
    }
    return Run(config.parse(recipe), folder, Progress(quiet=True))


class SwappedModels:
    """The obvious way: put the block into the model, run all of it."""

    def __init__(self, run: Run) -> None:
        self.run, self.parent = run, run.parent_model
        self.shards = score.all_shards(run)
        with torch.no_grad(), run.autocast():
            self.finals = [self.hidden(shard.tokens_BS) for shard in self.shards]

    def hidden(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        return self.parent.model(tokens_BS, use_cache=False).last_hidden_state

    @torch.no_grad()
    def kl(self, layer: int, block: Any) -> float:
        own = self.parent.model.layers[layer]
        state = read_block(self.run, layer, block, own.state_dict())
        self.parent.model.layers[layer] = subblocks.frozen_module(
            self.run.parent, layer, block, self.run.attention, state
        )
        total, tokens, head = 0.0, 0, self.parent.lm_head.weight
        with self.run.autocast():
            for shard, final_BSD in zip(self.shards, self.finals, strict=True):
                child_TD = self.hidden(shard.tokens_BS)[:, :-1].flatten(0, 1)
                targets = shard.tokens_BS[:, 1:].flatten()
                found = token_metrics(
                    final_BSD[:, :-1].flatten(0, 1), head, child_TD[None], head, targets
                )[0]
                total, tokens = (
                    total + found[METRICS.index("kl")].double().sum().item(),
                    tokens + len(targets),
                )
        self.parent.model.layers[layer] = own
        return total / tokens


def exactness(run: Run) -> float:
    """The largest relative difference of the KL, on every fifth block."""
    pipeline.execute_stage(run, "score")
    found, loop = score.read(run), SwappedModels(run)
    names = [(i, b) for i, o in enumerate(run.space.layers) for b in o.blocks[1:]][::5]
    return max(abs(found[i, b.name].kl / loop.kl(i, b) - 1) for i, b in names)


def timed(run: Run) -> float:
    shutil.rmtree(run.stage_folder("score"), ignore_errors=True)
    began = time.perf_counter()
    pipeline.execute_stage(run, "score")
    return time.perf_counter() - began


def lost_by_search(
    run: Run, estimates: dict[tuple[int, str], float], exact: dict[tuple[int, str], float]
) -> float:
    """By how much the exact sum of what a search takes by estimates exceeds the best, over ten
    limits: the median.
    """
    best, other = (
        validate.searched_architectures(run, losses, 10) for losses in (exact, estimates)
    )
    sums = [
        [sum(exact[i, b.name] for i, b in enumerate(architecture)) for _, architecture in found]
        for found in (best, other)
    ]
    return statistics.median(b / a - 1 for a, b in zip(*sums, strict=True))


def spearman(a: list[float], b: list[float]) -> float:
    points = [{"sum": x, "kl": y} for x, y in zip(a, b, strict=True)]
    return float(validate.correlations(points)["spearman"] or 0.0)


def memory_child(parent: str, folder: str, method: str) -> None:
    """A process of its own: score the parent in `folder`, or (idle) only import."""
    if method != "idle":
        run = open_run(
            Path(folder), parent=parent, tokens=4096, method=method, sequences=8, shard_sequences=4
        )
        pipeline.execute_stage(run, "score")
    print(peak_bytes())


def memory(root: Path, quick: bool) -> dict[str, Any]:
    (root / "wide").mkdir()
    size = make_parent(root / "wide", 256 if quick else 768, 4, torch.float32, VOCABULARY)
    run = open_run(root / "wide-run", parent=str(root / "wide"), tokens=4096)
    pipeline.execute_stage(run, "library")
    peaks = {}
    for method in ("idle", "exact", "fisher"):
        shutil.rmtree(root / "wide-run" / "score", ignore_errors=True)
        peaks[method] = child_process(__file__, root / "wide", root / "wide-run", method)
    need = next(need for need in plan.estimate(run) if need.stage == "score").memory_bytes
    return {
        "model_bytes": size,
        "plan_bytes": need,
        **{m: peaks[m] - peaks["idle"] for m in ("exact", "fisher")},
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        memory_child(*sys.argv[2:5])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    sequences = 8 if args.quick else 32
    print(f"{machine()['device']}, {machine()['count']} cores, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        run = open_run(root / "run", sequences=sequences)
        pipeline.execute_stage(run, "library")
        L, blocks = len(run.space.layers), [len(o.blocks) for o in run.space.layers]
        print(
            f"{L} layers, {sum(blocks)} blocks, {sequences} sequences of {run.recipe.corpus.sequence_length} tokens"
        )
        precise = open_run(root / "precise", "float32", tokens=4096, sequences=8)
        pipeline.execute_stage(precise, "library")
        difference = exactness(precise)
        print(
            f"exact scores against swapped models, float32: largest relative difference {difference:.1e}",
            flush=True,
        )
        names = [(i, b) for i, o in enumerate(run.space.layers) for b in o.blocks[1:]][::7]
        loop = SwappedModels(run)
        loop.kl(*names[0])
        began = time.perf_counter()
        for layer, block in names:
            loop.kl(layer, block)
        seconds = {"swapped models": (time.perf_counter() - began) / len(names) * sum(blocks)}
        exact_s = timed(run)
        exact = score.losses(run)
        meaning = validate.run(run, 8 if args.quick else 40)
        estimated = open_run(root / "run", sequences=sequences, method="fisher")
        fisher_s = timed(estimated)
        fisher = score.losses(estimated)
        mixed = open_run(root / "run", sequences=sequences, method="hybrid")
        seconds |= {"exact": exact_s, "fisher": fisher_s, "hybrid": timed(mixed)}
        hybrid = score.losses(mixed)
        allowed = L * sum(blocks) / sum(n * (L - i) for i, n in enumerate(blocks))
        print("| method | seconds | saving |\n| --- | --- | --- |")
        for method, value in seconds.items():
            print(f"| {method} | {value:.1f} | {seconds['swapped models'] / value:.1f}x |")
        saving = seconds["swapped models"] / seconds["exact"]
        print(
            f"the count of block forwards allows {allowed:.2f}x; exact reaches {saving / allowed:.0%} of that"
        )
        print(
            f"fisher: {seconds['swapped models'] / seconds['fisher']:.1f}x (goal L/2 = {L / 2:.0f}x)"
        )

        keys = [key for key in exact if exact[key] > 0]
        overall = spearman([fisher[k] for k in keys], [exact[k] for k in keys])
        layers = [
            spearman([fisher[k] for k in keys if k[0] == i], [exact[k] for k in keys if k[0] == i])
            for i in range(L)
        ]
        ratios = [fisher[k] / exact[k] for k in keys]
        tenths = np.percentile(ratios, [5, 50, 95])
        print(
            f"fisher against exact: Spearman {overall:.3f}; per layer {min(layers):.3f} to {max(layers):.3f}"
        )
        print(
            f"fisher over exact: 5 % below {tenths[0]:.2f}, median {tenths[1]:.2f}, 5 % above {tenths[2]:.2f}"
        )
        print("| exact KL | blocks | median fisher / exact | Spearman |\n| --- | --- | --- | --- |")
        order = sorted(keys, key=lambda k: exact[k])
        for part in np.array_split(np.arange(len(order)), 5):
            own = [order[i] for i in part]
            ratio = statistics.median(fisher[k] / exact[k] for k in own)
            rank = spearman([fisher[k] for k in own], [exact[k] for k in own])
            print(
                f"| {exact[own[0]]:.4f} to {exact[own[-1]]:.4f} | {len(own)} | {ratio:.2f} | {rank:.3f} |"
            )
        lost = {
            "fisher": lost_by_search(run, fisher, exact),
            "hybrid": lost_by_search(run, hybrid, exact),
        }
        kept = len(hybrid) / len(exact)
        print(
            f"objective lost by a search: fisher {lost['fisher']:.2%}, hybrid {lost['hybrid']:.2%}"
        )
        print(f"hybrid scores {kept:.0%} of the blocks exactly")
        print(
            f"sums of scores against the KL of {meaning['count']} assembled children: "
            f"Spearman {meaning['spearman']:.3f}, Pearson {meaning['pearson']:.3f}"
        )
        found = memory(root, args.quick)
        print(
            f"vocabulary {VOCABULARY:,}: model {found['model_bytes'] / 1e6:.0f} MB, above an idle process:"
        )
        for method in ("exact", "fisher"):
            share = found[method] / found["model_bytes"]
            print(f"  {method} {found[method] / 1e6:.0f} MB = {share:.2f}x the model")
        print(f"  `puzzle plan` says {found['plan_bytes'] / 1e6:.0f} MB")
    if args.json:
        figures = {
            "largest_relative_difference": difference,
            "seconds": seconds,
            "allowed": allowed,
            "lost": lost,
        }
        print(json.dumps(figures | {"spearman": overall, "validation": meaning, "memory": found}))


if __name__ == "__main__":
    main()
