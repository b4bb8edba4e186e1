"""Scores: the same as a loop over really swapped models, for how much less work, and what cheaper
ones are worth.

    python benchmarks/score.py [--quick] [--json]

On the embedded parent with its full search space and a library of 65,536 tokens:

1. Exactness, in float32: the stage's scores against swapped models, on a sample of blocks.
2. Speed, in one process: the loop over swapped models (a full forward per block and shard; it may
   keep the parent's final hidden states and uses the same metrics; timed on every seventh block,
   its mean taken for all), exact scores, Fisher, hybrid. `allowed` is the saving that the count of
   block forwards allows: L against L - i.
3. Fisher against exact: Spearman over all blocks and per layer, and what a search loses that uses
   the estimates.
4. How well sums of scores predict: their correlation with the KL of really assembled children.
5. Memory: the peak of scoring a parent with a vocabulary of 128,256, above an idle process.
"""

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from puzzle import pipeline
from puzzle.library import LIBRARY
from puzzle.library.weights import read_block
from puzzle.model import variants
from puzzle.model.architecture import Block
from puzzle.run import Run
from puzzle.score import SCORE, results
from puzzle.score.results import Losses
from puzzle.score.stage import all_shards
from puzzle.search import mip, validate
from puzzle.search.program import Program, starts_of
from puzzle.stage import Job
from puzzle.training.losses import METRICS, token_metrics

POCKET = {
    "parent": "pocket",
    "deploy": ["transformers"],
    "library": {"tokens": 65_536},
    "score": {"sequences": 32},
    "corpus": {"train_tokens": 1_000_000},
}
WIDE_LIBRARY = {
    "kv_heads": [1],
    "ffn_percent": [50],
    "attention_replacements": ["no_op"],
    "ffn_replacements": ["no_op"],
    "tokens": 4096,
}
LIMITS = np.linspace(0.95, 0.3, 10)  # shares of the layers' parameters that a search may keep


def wide_sizes(width: int, vocabulary: int) -> common.LlamaSizes:
    """Four layers below a large vocabulary."""
    return common.LlamaSizes(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        vocab_size=vocabulary,
    )


@dataclass(frozen=True)
class Scale:
    """How large the benchmark is."""

    recipe: common.Settings
    children: int  # that are assembled
    wide: common.LlamaSizes  # the parent whose memory is measured


def spearman(a: list[float], b: list[float]) -> float:
    """The correlation of ranks."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(ranks)[0, 1])


# ----------------------------------------------------------------------------- exactness and speed


class SwappedModels:
    """The obvious way: put the block into the model, run all of it."""

    def __init__(self, run: Run) -> None:
        self.run, self.parent = run, run.parent_model
        self.shards = all_shards(run)
        with torch.no_grad(), run.device.autocast():
            self.finals = [self.hidden(shard.tokens_BS) for shard in self.shards]

    def hidden(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Final hidden states [B, S, D] of the model as it is now."""
        tokens_BS = tokens_BS.to(self.run.device.torch_device)
        return self.parent.model(tokens_BS, use_cache=False).last_hidden_state

    @torch.no_grad()
    def kl(self, layer: int, block: Block) -> float:
        """KL(parent || parent with this block replaced), nats per token."""
        run, layers = self.run, self.parent.model.layers
        parent_layer, attention = layers[layer], run.placement.attention
        state = read_block(run, layer, block, parent_layer.state_dict())
        module = variants.frozen_module(run.parent, layer, block, attention, state)
        layers[layer] = module.to(run.device.torch_device)
        total, tokens, head = 0.0, 0, self.parent.lm_head.weight
        with run.device.autocast():
            for shard, final_BSD in zip(self.shards, self.finals, strict=True):
                parent_TD = final_BSD[:, :-1].flatten(0, 1)
                child_TD = self.hidden(shard.tokens_BS)[:, :-1].flatten(0, 1)
                targets_T = shard.tokens_BS[:, 1:].flatten().to(child_TD.device)
                metrics_MT = token_metrics(parent_TD, head, child_TD[None], head, targets_T)[0]
                total += metrics_MT[METRICS.index("kl")].double().sum().item()
                tokens += len(targets_T)
        layers[layer] = parent_layer
        return total / tokens


def sampled_blocks(run: Run, every: int) -> list[tuple[int, Block]]:
    """Every n-th block that is not the parent's, with its layer; n is `every`."""
    blocks = [(i, block) for i, layer in enumerate(run.space.layers) for block in layer.blocks[1:]]
    return blocks[::every]


def exactness(run: Run) -> float:
    """The largest relative difference of the KL, on every fifth block; prints it."""
    pipeline.execute_stage(LIBRARY, Job(run))
    pipeline.execute_stage(SCORE, Job(run))
    scores, loop = results.read(run), SwappedModels(run)
    differences = [
        abs(scores[layer, block.name].kl / loop.kl(layer, block) - 1)
        for layer, block in sampled_blocks(run, every=5)
    ]
    worst = max(differences)
    print(
        f"exact scores against swapped models, float32: largest relative difference {worst:.1e}",
        flush=True,
    )
    return worst


def loop_seconds(run: Run) -> float:
    """Of the loop over swapped models for all blocks, from a sample."""
    sample, loop = sampled_blocks(run, every=7), SwappedModels(run)
    loop.kl(*sample[0])  # warms up
    began = time.perf_counter()
    for layer, block in sample:
        loop.kl(layer, block)
    blocks = sum(len(layer.blocks) for layer in run.space.layers)
    return (time.perf_counter() - began) / len(sample) * blocks


def print_speed(run: Run, seconds: dict[str, float]) -> float:
    """The table of methods; the saving that the count of block forwards allows."""
    counts, loop_s = [len(layer.blocks) for layer in run.space.layers], seconds["swapped models"]
    L = len(counts)
    forwards = sum(count * (L - index) for index, count in enumerate(counts))
    allowed = L * sum(counts) / forwards
    common.print_header("method", "seconds", "saving")
    for method, value in seconds.items():
        common.print_row(method, f"{value:.1f}", f"{loop_s / value:.1f}x")
    share = loop_s / seconds["exact"] / allowed
    print(
        f"the count of block forwards allows {allowed:.2f}x; exact reaches {share:.0%} of that\n"
        f"fisher: {loop_s / seconds['fisher']:.1f}x (goal L/2 = {L / 2:.0f}x)"
    )
    return allowed


# ------------------------------------------------------------------------------ Fisher and hybrid


def print_fisher(fisher: Losses, exact: Losses) -> float:
    """How well Fisher's estimates rank and size the exact scores; Spearman over all blocks."""
    keys = sorted((key for key in exact if exact[key] > 0), key=lambda key: exact[key])

    def rank(part: list[tuple[int, str]]) -> float:
        return spearman([fisher[key] for key in part], [exact[key] for key in part])

    overall = rank(keys)
    layers = sorted({layer for layer, _ in keys})
    by_layer = [rank([key for key in keys if key[0] == layer]) for layer in layers]
    ratios = [fisher[key] / exact[key] for key in keys]
    low, middle, high = np.percentile(ratios, [5, 50, 95])
    print(
        f"fisher against exact: Spearman {overall:.3f}; "
        f"per layer {min(by_layer):.3f} to {max(by_layer):.3f}"
    )
    print(
        f"fisher over exact: 5 % below {low:.2f}, median {middle:.2f}, 5 % above {high:.2f}",
        flush=True,
    )
    common.print_header("exact KL", "blocks", "median fisher / exact", "Spearman")
    for indices in np.array_split(np.arange(len(keys)), 5):
        part = [keys[index] for index in indices]
        ratio = statistics.median(fisher[key] / exact[key] for key in part)
        span = f"{exact[part[0]]:.4f} to {exact[part[-1]]:.4f}"
        common.print_row(span, len(part), f"{ratio:.2f}", f"{rank(part):.3f}")
    return overall


def searched(run: Run, losses: Losses) -> list[list[tuple[int, str]]]:
    """What a search takes by these losses at each of `LIMITS`: layers and block names."""
    shape, layers = run.parent.shape, results.scored_layers(run, losses)
    columns = [(index, block) for index, layer in enumerate(layers) for block in layer]
    starts = starts_of([len(layer) for layer in layers])
    costs = np.array([losses[index, block.name] for index, block in columns])
    sizes = np.array([float(shape.parameters(block)) for _, block in columns])
    parent = float(sizes[starts[:-1]].sum())  # the parent's block comes first in every layer
    answers = []
    for share in LIMITS:
        program = Program(starts, costs, sizes[None], np.array([share * parent]))
        optimum = mip.solve(program, gap=1e-3)
        if optimum is not None:
            taken = [columns[column] for column in optimum.columns]
            answers.append([(index, block.name) for index, block in taken])
    return answers


def lost_by_search(run: Run, estimates: Losses, exact: Losses) -> float:
    """By how much the exact sum of what a search takes by estimates exceeds the best: the median
    over `LIMITS`.
    """
    best, other = (
        [sum(exact[key] for key in answer) for answer in searched(run, losses)]
        for losses in (exact, estimates)
    )
    return statistics.median(b / a - 1 for a, b in zip(best, other, strict=True))


def measure_methods(root: Path, scale: Scale) -> dict[str, Any]:
    """Speed of all methods, and what the cheaper ones and sums of scores are worth."""
    folder, recipe = root / "run", scale.recipe
    run = common.open_run(folder, recipe)
    pipeline.execute_stage(LIBRARY, Job(run))
    seconds = {"swapped models": loop_seconds(run)}
    losses: dict[str, Losses] = {}
    validation = validate.Correlation(count=0, spearman=None, pearson=None)
    for method in ("exact", "fisher", "hybrid"):  # each replaces the scores before it
        scored = common.open_run(folder, recipe, score={"method": method})
        seconds[method] = pipeline.execute_stage(SCORE, Job(scored)).seconds
        losses[method] = results.losses(scored)
        if method == "exact":
            validation = validate.validate(scored, scale.children).overall
    exact = losses["exact"]
    allowed = print_speed(run, seconds)
    overall = print_fisher(losses["fisher"], exact)
    lost = {name: lost_by_search(run, losses[name], exact) for name in ("fisher", "hybrid")}
    print(f"objective lost by a search: fisher {lost['fisher']:.2%}, hybrid {lost['hybrid']:.2%}")
    print(f"hybrid scores {len(losses['hybrid']) / len(exact):.0%} of the blocks exactly")
    print(
        f"sums of scores against the KL of {validation.count} assembled children: "
        f"Spearman {validation.spearman or np.nan:.3f}, Pearson {validation.pearson or np.nan:.3f}",
        flush=True,
    )
    figures = {"seconds": seconds, "allowed": allowed, "lost": lost, "spearman": overall}
    return figures | {"validation": validation.as_json()}


# ----------------------------------------------------------------------------------------- memory


def score_alone(recipe: str, folder: str, method: str) -> None:
    """In a process of its own: print its peak after scoring, or after imports only (`idle`)."""
    if method != "idle":
        settings = {"method": method, "sequences": 8, "shard_sequences": 4}
        run = common.open_run(Path(folder), json.loads(recipe), score=settings)
        pipeline.execute_stage(SCORE, Job(run))
    print(common.peak_bytes())


def memory(root: Path, scale: Scale) -> dict[str, float]:
    """Peaks above an idle process, beside the model's size and what `puzzle plan` says."""
    model_bytes = common.make_parent(root / "wide", scale.wide)
    recipe = scale.recipe | {"parent": str(root / "wide")}
    recipe["library"] = recipe["library"] | WIDE_LIBRARY
    run = common.open_run(root / "wide-run", recipe)
    pipeline.execute_stage(LIBRARY, Job(run))
    words = (json.dumps(recipe), run.folder)
    peaks = {
        method: common.in_own_process(__file__, *words, method)
        for method in ("idle", "exact", "fisher")
    }
    need = SCORE.work().need(Job(run))
    figures = {"model_bytes": model_bytes, "plan_bytes": need.memory_bytes}
    vocabulary = scale.wide.vocab_size
    print(f"vocabulary {vocabulary:,}: model {model_bytes / 1e6:.0f} MB, above an idle process:")
    for method in ("exact", "fisher"):
        above = peaks[method] - peaks["idle"]
        figures[method] = above
        print(f"  {method} {above / 1e6:.0f} MB = {above / model_bytes:.2f}x the model")
    print(f"  `puzzle plan` says {need.memory_bytes / 1e6:.0f} MB")
    return figures


def main() -> None:
    """All five parts, or the work of one of the processes of the last."""
    arguments = common.worker_arguments()
    if arguments is not None:
        score_alone(*arguments)
        return
    quick = "a tiny parent, four sequences, eight children, a small vocabulary"
    args = common.start(common.parser(__doc__, quick))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        scale = Scale(POCKET, 40, wide_sizes(768, 128_256))
        if args.quick:
            scale = Scale(common.tiny_recipe(root), 8, wide_sizes(256, 4096))
        run = common.open_run(root / "run", scale.recipe)
        blocks = sum(len(layer.blocks) for layer in run.space.layers)
        print(
            f"{len(run.space.layers)} layers, {blocks} blocks, {run.recipe.score.sequences} "
            f"sequences of {run.recipe.corpus.sequence_length} tokens"
        )
        float32 = scale.recipe | {"precision": "float32"}
        small = {"library": {"tokens": 4096}, "score": {"sequences": 8}}
        difference = exactness(common.open_run(root / "float32", float32, **small))
        figures = measure_methods(root, scale)
        figures["memory"] = memory(root, scale)
    common.print_json(args, {"largest_relative_difference": difference} | figures)


if __name__ == "__main__":
    main()
