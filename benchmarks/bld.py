"""BLD of every variant of the embedded parent: how fast, and what is learnt.

    python benchmarks/bld.py [--json] [--quick] [--tokens N]

Speed: one chunk of the library's training loop against (a) the obvious implementation, which trains
each variant in a loop of its own, with a forward of the full parent for each and plain modules, and
(b) the matrix-product limit: the FLOPs that must be done (counted below) over the rate of a
1024-cubed product measured in between. Both are timed in turn, in this process, round by round;
medians. The obvious loop is timed on the variants of the first, the middle and the last layer, and
their mean is taken for all: all of it would take an hour.

Quality: the library is trained twice (initialised as in the paper, then by least squares) and the
loss of every kind of variant before and after is printed, the mean over layers, with the worst
layer and the no-op beside it.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch

from puzzle import pipeline
from puzzle.library import LIBRARY, memory
from puzzle.library.bld import ParentBatch, VariantTrainer
from puzzle.library.records import VariantRecord, read_index
from puzzle.library.relay import Relay
from puzzle.library.stage import make_trainers
from puzzle.library.training import LibraryTraining
from puzzle.model import variants
from puzzle.model.architecture import Attention, ModelShape, Subblock
from puzzle.model.layers import ParentLayers
from puzzle.run import Run
from puzzle.stage import Job
from puzzle.training.losses import normalized_mse

ENDLESS = 1 << 30  # tokens: no variant's budget ends while speed is measured
POCKET = {
    "parent": "pocket",
    "deploy": ["transformers"],
    "corpus": {"train_tokens": 1_000_000},
}

# ------------------------------------------------------------------------------------------ speed


def flops_per_token(run: Run) -> float:
    """What must be computed for one token, all variants together.

    Products only, the causal half of the attention scores, nothing through a frozen input. A weight
    costs 2 FLOPs forward, 2 for its gradient and 2 for its input's gradient where that is needed.
    """
    shape, length = run.parent.shape, run.recipe.corpus.sequence_length
    D, query = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    projections = 2 * D * query + 2 * D * shape.num_key_value_heads * shape.head_dim
    parent = 2 * (projections + _ffn_weights(shape)) + _score_flops(shape, length)
    total = 0.0
    for layer in run.space.layers:
        trained = [v for v in layer.subblocks if variants.is_trained(v, shape.widest_block)]
        total += parent + sum(_variant_flops(shape, length, variant) for variant in trained)
    return total


def _variant_flops(shape: ModelShape, length: int, variant: Subblock) -> float:
    D, query = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    if not isinstance(variant, Attention):
        return 4 * D * D if variant.kind == "linear" else 14 * D * variant.intermediate_size
    through_frozen_ffn = 4 * _ffn_weights(shape)
    if variant.kind == "linear":
        return through_frozen_ffn + 4 * D * D
    inputs = D * query + 2 * D * variant.kv_heads * shape.head_dim
    return through_frozen_ffn + 4 * inputs + 6 * D * query + 3 * _score_flops(shape, length)


def _ffn_weights(shape: ModelShape) -> int:
    return 3 * shape.hidden_size * shape.intermediate_size


def _score_flops(shape: ModelShape, length: int) -> int:
    """Two products, each 2 * query * length / 2 a token."""
    return 2 * shape.num_attention_heads * shape.head_dim * length


def chunk_step(training: LibraryTraining, batches: list[torch.Tensor]) -> None:
    """Every variant of every layer learns from every batch [B, S]."""
    run, parent = training.run, training.parent
    device, settings = run.device.torch_device, run.recipe.library
    with torch.no_grad(), run.device.autocast():
        inputs = [parent.embed(tokens_BS.to(device))[0] for tokens_BS in batches]
        _, context = parent.embed(batches[0][:1].to(device))
    for layer in range(len(run.space.layers)):
        trainers = [t for t in training.trainers if t.layer == layer]
        with parent.layer(layer) as module, run.device.autocast():
            for index, x_BSD in enumerate(inputs):
                batch = ParentBatch.from_layer(module, x_BSD, context)
                for trainer in trainers:
                    trainer.train_step(batch, settings)
                inputs[index] = batch.o_BSD


def obvious_step(run: Run, trainer: VariantTrainer, tokens_BS: torch.Tensor) -> None:
    """One step of one variant with its own forward of the parent, as one would write it first."""
    model, activations = run.parent_model, {}
    layer = model.model.layers[trainer.layer]

    def keep(_: Any, inputs: tuple[Any, ...], context: dict[str, Any], output: Any) -> None:
        activations.update(x=inputs[0], context=context, o=output)

    hook = layer.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad(), run.device.autocast():
        model.model(tokens_BS.to(run.device.torch_device), use_cache=False)
    hook.remove()
    is_attention = isinstance(trainer.variant, Attention)
    attention, ffn = (trainer.module, layer) if is_attention else (layer, trainer.module)
    with run.device.autocast():
        h_BSD = attention.attention(activations["x"], **activations["context"])
        loss = normalized_mse(ffn.feed_forward(h_BSD), activations["o"])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainer.module.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Round:
    """Rates of one round of measurements."""

    tokens_per_s: float  # of the library's loop, all variants together
    obvious_tokens_per_s: float
    matmul_flops_per_s: float


def measure_round(training: LibraryTraining, number: int) -> Round:
    """Time a chunk of the library's loop, then the obvious one on a sample of the variants."""
    run, trainers = training.run, training.trainers
    settings, layers = run.recipe.library, len(run.space.layers)
    chunk = memory.chunk_steps(run, streamed=False)
    batch_tokens = settings.batch_sequences * run.recipe.corpus.sequence_length
    rate = common.matmul_flops_per_s(run.device)
    steps = range(number * chunk, (number + 1) * chunk)
    batches = [run.corpus["train"].batch(step, settings.batch_sequences) for step in steps]
    began = time.perf_counter()
    chunk_step(training, batches)
    tokens_per_s = len(batches) * batch_tokens / (time.perf_counter() - began)
    sampled = [t for t in trainers if t.layer in (0, layers // 2, layers - 1)]
    began = time.perf_counter()
    for trainer in sampled:
        obvious_step(run, trainer, batches[0])
    variant_s = (time.perf_counter() - began) / len(sampled)
    return Round(tokens_per_s, batch_tokens / (variant_s * len(trainers)), rate)


def speed(run: Run, rounds: int) -> dict[str, float]:
    """Medians over the rounds; a first round warms up and does not count."""
    parent = ParentLayers(run.parent_model)
    folder = Job(run).folder(LIBRARY)
    training = LibraryTraining(run, folder, parent, make_trainers(run), None, Relay.of(run))
    training.initialise()
    measured = [measure_round(training, number) for number in range(rounds + 1)][1:]
    needed = flops_per_token(run)
    rate = statistics.median(r.matmul_flops_per_s for r in measured)
    shares = [r.tokens_per_s * needed / r.matmul_flops_per_s for r in measured]
    figures = {
        "variants": len(training.trainers),
        "tokens_per_s": statistics.median(r.tokens_per_s for r in measured),
        "obvious_tokens_per_s": statistics.median(r.obvious_tokens_per_s for r in measured),
        "ratio_to_obvious": statistics.median(
            r.tokens_per_s / r.obvious_tokens_per_s for r in measured
        ),
        "flops_per_token": needed,
        "matmul_flops_per_s": rate,
        "limit_tokens_per_s": rate / needed,
        "share_of_limit": statistics.median(shares),
    }
    print(f"\nvariants trained                  {figures['variants']}")
    print(f"ours, all variants                {figures['tokens_per_s']:8,.0f} tokens/s")
    print(
        f"(a) the obvious implementation    {figures['obvious_tokens_per_s']:8,.0f} tokens/s   "
        f"ours is {figures['ratio_to_obvious']:.1f}x"
    )
    print(
        f"(b) the matrix-product limit      {figures['limit_tokens_per_s']:8,.0f} tokens/s   "
        f"ours is {figures['share_of_limit']:.0%}  ({needed / 1e6:.0f} MFLOP a token, "
        f"{rate / 1e9:.0f} GFLOP/s)",
        flush=True,
    )
    return figures


# ---------------------------------------------------------------------------------------- quality


def quality(run: Run) -> list[dict[str, Any]]:
    """Train the library; a row for every kind of variant."""
    seconds = pipeline.execute_stage(LIBRARY, Job(run)).seconds
    settings = run.recipe.library
    records = read_index(Job(run))
    no_ops = {(r.layer, r.slot): r.nmse_after for r in records if r.file is None}
    trained = [r for r in records if r.file is not None]
    print(
        f"\n{settings.initialization}, {settings.tokens:,} tokens, {seconds:.0f} s: "
        "normalised MSE of the block output, mean over layers"
    )
    common.print_header(
        "variant",
        "before",
        "after",
        "after / before",
        "worst layer: after / before",
        "after / no-op, worst layer",
    )
    rows = []
    for slot, variant in dict.fromkeys((r.slot, r.variant) for r in trained):
        layers = [r for r in trained if (r.slot, r.variant) == (slot, variant)]
        row = _quality_row(layers, no_ops)
        rows.append({"initialization": settings.initialization, **row})
        ratios = (row["after"] / row["before"], row["worst_gain"], row["worst_to_no_op"])
        losses = (f"{row['before']:.4f}", f"{row['after']:.4f}")
        common.print_row(f"{slot} {variant}", *losses, *(f"{ratio:.3f}" for ratio in ratios))
    better = sum(r.nmse_after < r.nmse_before for r in trained)
    beat_no_op = sum(r.nmse_after < no_ops[r.layer, r.slot] for r in trained)
    print(
        f"better than before training: {better} of {len(trained)}; "
        f"better than a no-op: {beat_no_op} of {len(trained)}",
        flush=True,
    )
    return rows


def _quality_row(
    layers: list[VariantRecord], no_ops: dict[tuple[int, str], float]
) -> dict[str, Any]:
    """One kind of variant, from its record in every layer."""
    return {
        "slot": layers[0].slot,
        "variant": layers[0].variant,
        "before": statistics.mean(r.nmse_before for r in layers),
        "after": statistics.mean(r.nmse_after for r in layers),
        "worst_gain": max(r.nmse_after / r.nmse_before for r in layers),
        "worst_to_no_op": max(r.nmse_after / no_ops[r.layer, r.slot] for r in layers),
    }


def main() -> None:
    """Measure the speed, then the quality of both initialisations."""
    parser = common.parser(__doc__, quick="a tiny parent, one round, 2048 tokens")
    parser.add_argument("--tokens", type=int, default=250_000, help="of each library")
    args = common.start(parser)
    tokens, chunk = (2048, 2) if args.quick else (args.tokens, 4)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        recipe = common.tiny_recipe(root) if args.quick else POCKET
        endless = {"tokens": ENDLESS, "chunk_steps": chunk}
        measured = speed(
            common.open_run(root / "speed", recipe, library=endless), rounds=1 if args.quick else 7
        )
        rows = []
        for initialization in ("training_free", "least_squares"):
            settings = {"tokens": tokens, "initialization": initialization}
            rows += quality(common.open_run(root / initialization, recipe, library=settings))
    common.print_json(args, {"speed": measured, "quality": rows})


if __name__ == "__main__":
    main()
