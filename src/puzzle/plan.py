"""`puzzle plan`: what each stage will need, from config and shapes alone, without loading weights.

Time is FLOPs over the rate of a matrix product measured now on this machine, at the efficiency that
the pocket run reached (docs/log.md); treat it as an order of magnitude on other machines.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from puzzle.model import variants as subblocks
from puzzle.model.architecture import Architecture, Attention, ModelShape
from puzzle.run import Run
from puzzle.training import distributed
from puzzle.training.losses import CHUNK_ELEMENTS, LOSS_ELEMENTS

RESIDENT_SHARE = 0.125  # of the memory: a library up to this size is held while it is scored
EFFICIENCY = 0.4  # share of the matrix-product rate that whole training steps reach
ENGINE_START_S, BATCH_OVERHEAD = 30.0, 3.0


@dataclass(frozen=True)
class Need:
    stage: str
    tokens: int = 0
    flops: float = 0.0
    memory_bytes: float = 0.0
    disk_bytes: float = 0.0
    seconds: float = 0.0


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """The rate of a square matrix product on this device, the best of three."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _library_flops_per_token(run: Run, shape: ModelShape) -> float:
    """Forward 2, forward and backward 6, backward through frozen weights 4 FLOPs per parameter and
    token.
    """
    frozen_ffn = shape.parameters(shape.parent_block.ffn)
    total = 2.0 * Architecture.of_parent(shape).parameters(shape)
    for options in run.space.layers:
        for variant in options.subblocks:
            if subblocks.is_trained(variant, shape):
                total += 6 * shape.parameters(variant) + (
                    4 * frozen_ffn if isinstance(variant, Attention) else 0
                )
    return total


def trained_parameters(run: Run, shape: ModelShape) -> list[int]:
    """Parameters of everything the library trains: subblocks, or pairs with `library.coupled`."""
    if run.recipe.library.coupled:
        pairs = (
            b for options in run.space.layers for b in options.blocks if b != shape.parent_block
        )
        return [shape.parameters(b.attention) + shape.parameters(b.ffn) for b in pairs]
    return [
        shape.parameters(v)
        for o in run.space.layers
        for v in o.subblocks
        if subblocks.is_trained(v, shape)
    ]


def library_memory_bytes(run: Run, streamed: bool) -> float:
    """Peak memory of BLD beside the process itself.

    Resident: the parent, 16 bytes (weight, gradient, two moments) per trained parameter of all
    variants. Streamed: one layer of the parent (and its pages on disk while it is read), 16 bytes
    per parameter of the largest variant; the embedding's pages only while a chunk is embedded.
    Both: the chunk's activations, and what one variant keeps for one batch: its inputs and outputs,
    three intermediates forward and two backward, and its folded weights.
    """
    recipe, shape = run.recipe, run.parent.shape
    settings, sequence = recipe.library, recipe.corpus.sequence_length
    size = run.placement[0].itemsize
    batch, D = settings.batch_sequences * sequence, shape.hidden_size
    block = shape.parent_block
    layer = shape.parameters(block.attention) + shape.parameters(block.ffn)
    trained = trained_parameters(run, shape)
    kept = (settings.chunk_steps * batch + settings.validation_sequences * sequence) * D * 4
    product = 2 if run.bfloat16 else 4
    scores = (
        settings.batch_sequences * shape.num_attention_heads * sequence**2 * 10
        if run.attention == "eager"
        else 0
    )
    step = (
        batch * (10 * D * 4 + 5 * shape.intermediate_size * product)
        + scores
        + 12 * max(trained, default=0)
    )
    gram = (
        (shape.intermediate_size**2 + 4 * D**2) * 8
        if settings.initialization == "least_squares"
        else 0
    )
    if not streamed:
        parameters = Architecture.of_parent(shape).parameters(shape)
        return parameters * size + 16 * sum(trained) + kept + step + gram
    embedding = shape.vocab_size * D * run.parent.dtype.itemsize
    return (
        max(layer * (size + run.parent.dtype.itemsize), embedding)
        + 16 * max(trained, default=0)
        + kept
        + step
        + gram
    )


def is_streamed(run: Run) -> bool:
    """Whether BLD holds one layer at a time: as the recipe says, or where all of it would not fit
    comfortably.
    """
    if run.recipe.library.memory != "auto":
        return run.recipe.library.memory == "streamed"
    return library_memory_bytes(run, streamed=False) > 0.7 * run.memory_bytes


def _score_memory_bytes(run: Run, weights: float, trained: int) -> float:
    """The parent, a shard's activations, a pass, four copies of a chunk of logits, the library
    where it is small.
    """
    settings, shape = run.recipe.score, run.parent.shape
    tokens = min(settings.sequences, settings.shard_sequences) * run.recipe.corpus.sequence_length
    activations = (
        (shape.num_hidden_layers + 1) * tokens + 4 * settings.tokens_per_pass
    ) * shape.hidden_size
    library = (
        trained * 4
        if trained * 4 < RESIDENT_SHARE * run.memory_bytes
        else trained * 4 / shape.num_hidden_layers
    )
    return weights + 4 * activations + library + 4 * 4 * CHUNK_ELEMENTS


def uptrain_memory_bytes(run: Run) -> float:
    """Peak memory of one process of uptraining: its share of both models, gradients and moments,
    and one micro-batch.

    Sharded: the parent, and per parameter of the child 4 bytes, or 16 where it learns (all of it,
    as children are not known yet). Not sharded: chunks of logits, and per layer and token what the
    backward pass needs (norms and the residual in float32, projections, attention probabilities
    where they are made; what the cosine keeps), or only the layer's input where the rest is
    computed again; and once more what one layer needs, for its gradients.
    """
    settings, shape, number = run.recipe.uptrain, run.parent.shape, distributed.processes(run)
    parameters = Architecture.of_parent(shape).parameters(shape)
    length = max(
        [s.sequence_length for s in settings.stages], default=run.recipe.corpus.sequence_length
    )
    rows = settings.batch_sequences // number
    tokens = max(
        min(settings.micro_batch_sequences or rows, rows) * run.recipe.corpus.sequence_length,
        length,
    )
    size = 2 if run.bfloat16 else 4
    eager = run.device.type == "cpu" and run.attention_for(length) == "eager"
    D, layers = shape.hidden_size, shape.num_hidden_layers
    scores = 10 * shape.num_attention_heads * length if eager else 0
    layer = tokens * ((24 + 6 * size) * D + 4 * size * shape.intermediate_size + scores)
    between = tokens * D * (16 if settings.cosine_weight else 4)
    kept = layer + layers * (between + (0 if settings.activation_checkpointing else layer))
    adapters = (
        settings.lora_rank * 2 * (shape.hidden_size + shape.intermediate_size) * 7 * layers / 2
    )
    trained = 4.0 * parameters + 16 * adapters if settings.lora_rank else 16.0 * parameters
    logits = 4 * 4 * min(tokens * shape.vocab_size, LOSS_ELEMENTS)
    return (parameters * run.placement[0].itemsize + trained) / number + kept + logits


def estimate(run: Run) -> list[Need]:
    recipe, shape = run.recipe, run.parent.shape
    parent = Architecture.of_parent(shape).parameters(shape)
    per_layer = (parent - shape.constant_parameters) / shape.num_hidden_layers
    trained = sum(trained_parameters(run, shape))
    sequence = recipe.corpus.sequence_length
    weights = parent * (4 if run.device.type == "cpu" else run.parent.dtype.itemsize)
    rate = EFFICIENCY * matmul_flops_per_s(
        run.device, torch.bfloat16 if run.bfloat16 else torch.float32
    )
    blocks = [len(options.blocks) for options in run.space.layers]
    suffix = sum(n * (len(blocks) - i) for i, n in enumerate(blocks)) * per_layer
    scored = recipe.score.sequences * sequence
    streamed = is_streamed(run)
    score_flops = 2.0 * scored * (suffix + sum(blocks) * shape.vocab_size * shape.hidden_size)
    scenario = recipe.cost.scenario
    served = scenario.batch_size * (scenario.input_length + scenario.output_length)
    batch_s = BATCH_OVERHEAD * 2 * parent * served / rate
    child_bytes = parent * run.parent.dtype.itemsize
    gkd = recipe.uptrain
    gkd_tokens, gkd_bytes = (
        sum(s.tokens for s in gkd.stages) or gkd.tokens,
        uptrain_memory_bytes(run),
    )
    gkd_flops = (
        gkd_tokens
        * (2.0 + (4.0 if gkd.lora_rank else 6.0) + 2.0 * gkd.activation_checkpointing)
        * parent
    )
    if run.device.type == "cuda":
        gkd_flops /= distributed.processes(run)  # side by side; processes on a CPU share its cores
    checked = recipe.evaluate.sequences * sequence
    engine_memory = 2 * (child_bytes + (1 << 30))

    def stage(
        name: str, tokens: int, flops: float, memory: float, disk: float, extra_s: float = 0.0
    ) -> Need:
        return Need(name, tokens, flops, memory, disk, flops / rate + extra_s)

    served_s = ENGINE_START_S + 2 * batch_s
    return [
        stage(
            "library",
            recipe.library.tokens,
            recipe.library.tokens * _library_flops_per_token(run, shape),
            library_memory_bytes(run, streamed),
            4.0 * trained * 4,
        ),
        stage("score", scored, score_flops, _score_memory_bytes(run, weights, trained), 1e6),
        stage(
            "cost",
            0,
            0.0,
            engine_memory,
            child_bytes,
            len(recipe.cost.measured) * recipe.cost.seconds,
        ),
        stage("search", 0, 0.0, 2e8, 1e6, 5.0),
        stage("assemble", 0, 0.0, engine_memory, child_bytes, served_s),
        stage(
            "uptrain",
            gkd_tokens,
            gkd_flops,
            gkd_bytes,
            child_bytes
            + (12.0 + 4.0 * (gkd.keep == "best")) * (1.0 if gkd.lora_rank == 0 else 0.02) * parent,
        ),
        stage(
            "evaluate",
            checked,
            3 * 2.0 * checked * parent,
            max(2 * weights, engine_memory),
            1e6,
            served_s,
        ),
    ]


def library_memory(run: Run) -> str:
    """One line: what BLD takes either way, and which way the recipe and this machine give."""
    streamed, resident = (library_memory_bytes(run, streamed=way) / 2**30 for way in (True, False))
    word = "streamed" if is_streamed(run) else "resident"
    return (
        f"library: {word} (library.memory: {run.recipe.library.memory}); resident {resident:.2f} GiB, "
        f"streamed layer by layer {streamed:.2f} GiB, of {run.memory_bytes / 2**30:.1f} GiB"
    )


def as_dict(needs: list[Need]) -> dict[str, Any]:
    return {
        "stages": [asdict(need) for need in needs],
        "seconds": sum(need.seconds for need in needs),
    }


def print_plan(needs: list[Need]) -> None:
    from puzzle.progress import duration

    table = Table(title="what each stage will need (estimates)", title_justify="left")
    for name in ("stage", "tokens", "FLOPs", "memory", "disk", "time"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for need in needs:
        table.add_row(
            need.stage,
            f"{need.tokens:,}" if need.tokens else "",
            f"{need.flops:.1e}" if need.flops else "",
            f"{need.memory_bytes / 2**30:.2f} GiB",
            f"{need.disk_bytes / 2**20:,.0f} MiB",
            duration(need.seconds),
        )
    table.add_row("all", "", "", "", "", duration(sum(need.seconds for need in needs)))
    Console(highlight=False).print(table)
