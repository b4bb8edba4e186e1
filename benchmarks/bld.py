"""BLD of every variant of the embedded parent: how fast, and what is learnt.

    python benchmarks/bld.py [--json] [--quick] [--tokens N]

Speed: one chunk of the library's own training loop against (a) the obvious implementation, which
trains each variant in a loop of its own, with a forward of the whole parent for each and plain
modules, and (b) the matrix-product limit: the FLOPs that must be done (counted below) over the rate
of a 1024-cubed product measured in between. Both are timed in turn, in this process, round by
round; medians. The obvious loop is timed on one variant of each kind in layers 0, 6 and 11 and its
mean is taken for all: running it whole would take an hour.

Quality: the whole library is trained (initialised as in the paper, then by least squares) and the
loss of every kind of variant before and after is printed, the mean over layers, with the worst
layer and the no-op beside it.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from puzzle import config, pipeline
from puzzle.engines import machine
from puzzle.library import stage as library
from puzzle.library.bld import Lesson, Trainee
from puzzle.model.architecture import Attention
from puzzle.model.layers import ParentLayers
from puzzle.plan import matmul_flops_per_s
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.training.losses import normalized_mse

LAYERS = (0, 6, 11)


def open_run(folder: Path, **settings: Any) -> Run:
    recipe = {
        "parent": "pocket",
        "deploy": ["transformers"],
        "library": settings,
        "corpus": {"train_tokens": 1_000_000},
    }
    return Run(config.parse(recipe), folder, Progress(quiet=True))


def flops_per_token(run: Run) -> float:
    """What must be computed: products only, causal half of the attention scores, nothing through a
    frozen input.

    A weight costs 2 FLOPs forward, 2 for its gradient and 2 for its input's where that is needed.
    """
    shape, S = run.parent.shape, run.recipe.corpus.sequence_length
    D, query = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    scores = 2 * query * S  # two products, each 2 * query * S / 2 a token
    frozen_ffn = 3 * D * shape.intermediate_size
    projections = 2 * D * query + 2 * D * shape.num_key_value_heads * shape.head_dim
    total = 0.0
    for options in run.space.layers:
        total += 2 * (projections + frozen_ffn) + scores
        for variant in options.subblocks:
            if variant.kind == "no_op" or variant in (
                shape.parent_block.attention,
                shape.parent_block.ffn,
            ):
                continue
            if isinstance(variant, Attention):
                total += 4 * frozen_ffn
                inputs = D * query + 2 * D * variant.kv_heads * shape.head_dim
                total += (
                    4 * D * D
                    if variant.kind == "linear"
                    else 4 * inputs + 6 * D * query + 3 * scores
                )
            else:
                total += (
                    4 * D * D if variant.kind == "linear" else 14 * D * variant.intermediate_size
                )
    return total


def obvious_step(run: Run, trainee: Trainee, tokens_BS: torch.Tensor) -> None:
    """One step of one variant with a parent forward of its own, as one would write it first."""
    model, seen = run.parent_model, {}

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        seen.update(x=args[0], context=kwargs, o=output)

    hook = model.model.layers[trainee.layer].register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad(), run.autocast():
        model.model(tokens_BS, use_cache=False)
    hook.remove()
    layer = model.model.layers[trainee.layer]
    with run.autocast():
        first = trainee.module if trainee.attention else layer
        second = trainee.module if trainee.ffn else layer
        loss = normalized_mse(
            second.feed_forward(first.attention(seen["x"], **seen["context"])), seen["o"]
        )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainee.module.parameters(), 1.0)
    trainee.optimizer.step()
    trainee.optimizer.zero_grad(set_to_none=True)


def speed(folder: Path, rounds: int, chunk: int) -> dict[str, float]:
    run = open_run(folder, tokens=1 << 30, chunk_steps=chunk)
    settings = run.recipe.library
    trainees, layers = library.enrol(run), ParentLayers(run.parent_model)
    library.initialise(run, folder / "library", layers, trainees, keep=True)
    batch_tokens = settings.batch_sequences * run.recipe.corpus.sequence_length
    sampled = [t for t in trainees if t.layer in LAYERS]
    ours, obvious, rates = [], [], []
    for part in range(rounds + 1):  # the first round warms up
        rates.append(
            matmul_flops_per_s(run.device, torch.bfloat16 if run.bfloat16 else torch.float32)
        )
        batches = [library._batch(run, part * chunk + step) for step in range(chunk)]
        began = time.perf_counter()
        training, context = library._embed(run, layers, batches)
        for layer in range(len(run.space.layers)):
            group = [t for t in trainees if t.layer == layer]
            with layers.layer(layer) as module, run.autocast():
                for index, x_BSD in enumerate(training):
                    lesson = Lesson.of(module, x_BSD, context)
                    for trainee in group:
                        trainee.learn(lesson, settings)
                    training[index] = lesson.o_BSD
        ours.append(chunk * batch_tokens / (time.perf_counter() - began))
        began = time.perf_counter()
        for trainee in sampled:
            obvious_step(run, trainee, batches[0])
        seconds = (
            (time.perf_counter() - began) / len(sampled) * len(trainees)
        )  # for one batch, all variants
        obvious.append(batch_tokens / seconds)
    need, rate = flops_per_token(run), statistics.median(rates)
    found = {
        "variants": len(trainees),
        "tokens_per_s": statistics.median(ours[1:]),
        "obvious_tokens_per_s": statistics.median(obvious[1:]),
        "ratio_to_obvious": statistics.median(
            a / b for a, b in zip(ours[1:], obvious[1:], strict=True)
        ),
        "flops_per_token": need,
        "matmul_flops_per_s": rate,
        "limit_tokens_per_s": rate / need,
        "share_of_limit": statistics.median(
            o * need / r for o, r in zip(ours[1:], rates[1:], strict=True)
        ),
    }
    print(f"variants trained                  {found['variants']}")
    print(f"ours, all variants                {found['tokens_per_s']:8,.0f} tokens/s")
    print(
        f"(a) the obvious implementation    {found['obvious_tokens_per_s']:8,.0f} tokens/s   ours is "
        f"{found['ratio_to_obvious']:.1f}x"
    )
    print(
        f"(b) the matrix-product limit      {found['limit_tokens_per_s']:8,.0f} tokens/s   ours is "
        f"{found['share_of_limit']:.0%}  ({need / 1e6:.0f} MFLOP a token, {rate / 1e9:.0f} GFLOP/s)"
    )
    return found


def quality(folder: Path, tokens: int, initialization: str) -> list[dict[str, Any]]:
    run = open_run(folder, tokens=tokens, initialization=initialization)
    began = time.perf_counter()
    pipeline.execute_stage(run, "library")
    seconds = time.perf_counter() - began
    index = library.read_index(run)
    no_op = {(r["layer"], r["slot"]): r["nmse_after"] for r in index if not r["file"]}
    rows = []
    print(
        f"\n{initialization}, {tokens:,} tokens, {seconds:.0f} s: normalised MSE of the block output, mean over layers"
    )
    print(
        "| variant | before | after | after / before | worst layer: after / before | after / no-op, worst layer |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for slot, variant in dict.fromkeys((r["slot"], r["variant"]) for r in index if r["file"]):
        own = [r for r in index if (r["slot"], r["variant"]) == (slot, variant)]
        row = {
            "initialization": initialization,
            "slot": slot,
            "variant": variant,
            "before": statistics.mean(r["nmse_before"] for r in own),
            "after": statistics.mean(r["nmse_after"] for r in own),
            "worst_gain": max(r["nmse_after"] / r["nmse_before"] for r in own),
            "worst_to_no_op": max(r["nmse_after"] / no_op[r["layer"], slot] for r in own),
        }
        rows.append(row)
        print(
            f"| {slot} {variant} | {row['before']:.4f} | {row['after']:.4f} | {row['after'] / row['before']:.3f} | "
            f"{row['worst_gain']:.3f} | {row['worst_to_no_op']:.3f} |",
            flush=True,
        )
    trained = [r for r in index if r["file"]]
    better = sum(r["nmse_after"] < r["nmse_before"] for r in trained)
    beaten = sum(r["nmse_after"] < no_op[r["layer"], r["slot"]] for r in trained)
    print(
        f"better than before training: {better} of {len(trained)}; better than a no-op: {beaten} of {len(trained)}"
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--quick", action="store_true", help="under a minute: speed only, two rounds"
    )
    parser.add_argument("--tokens", type=int, default=250_000, help="of each whole library")
    args = parser.parse_args()
    print(f"{machine()['device']}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {
            "speed": speed(Path(folder) / "speed", 2 if args.quick else 7, 2 if args.quick else 4)
        }
        if not args.quick:
            found["quality"] = [
                row
                for initialization in ("training_free", "least_squares")
                for row in quality(Path(folder) / initialization, args.tokens, initialization)
            ]
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
