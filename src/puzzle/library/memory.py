"""What the library takes: trained parameters, memory resident and streamed, FLOPs, disk, time."""

from puzzle.model import variants
from puzzle.model.architecture import Architecture, Attention, Block, Subblock
from puzzle.run import Run
from puzzle.stage import Job, Need

STREAM_ABOVE = 0.7  # of the device's memory
OPTIMIZER_BYTES = 12  # per trained parameter, between its steps: weight, two moments


def trained_parameters(run: Run) -> list[int]:
    """Parameters of everything the library trains: subblocks, or pairs with `library.coupled`."""
    return [run.parent.shape.parameters(variant) for _, variant in trained_variants(run)]


def trained_variants(run: Run) -> list[tuple[int, Subblock | Block]]:
    """(layer, variant) of everything the library trains, in a fixed order."""
    trained: list[tuple[int, Subblock | Block]] = []
    for index, layer in enumerate(run.space.layers):
        parent = run.parent.shape.parent_blocks[index]
        if run.recipe.library.coupled:
            pairs = [b for b in layer.blocks if variants.is_trained_pair(b, parent)]
            trained += [(index, pair) for pair in pairs]
        else:
            subblocks = [v for v in layer.subblocks if variants.is_trained(v, parent)]
            trained += [(index, variant) for variant in subblocks]
    return trained


def memory_bytes(run: Run, *, streamed: bool) -> float:
    """Peak memory of BLD beside the process itself.

    Resident: the parent, and `OPTIMIZER_BYTES` per trained parameter of all variants. Streamed: one
    layer of the parent (and its pages on disk while it is read), the same per parameter of the
    largest variant; the embedding's pages only while a chunk is embedded. Both: the chunk's
    activations, and what one variant keeps for one batch: its inputs and outputs, three
    intermediates forward and two backward, its gradients, and its folded weights.
    """
    recipe, shape = run.recipe, run.parent.shape
    settings, sequence = recipe.library, recipe.corpus.sequence_length
    element, stored = run.placement.dtype.itemsize, run.parent.dtype.itemsize
    batch, D = settings.batch_sequences * sequence, shape.hidden_size
    trained = trained_parameters(run)
    chunk = (settings.chunk_steps * batch + settings.validation_sequences * sequence) * D * element
    product = 2 if run.device.bfloat16 else 4
    probabilities = 0.0
    if run.placement.attention == "eager":
        probabilities = 10.0 * settings.batch_sequences * shape.num_attention_heads * sequence**2
    activations = batch * (10 * D * 4 + 5 * shape.intermediate_size * product)
    step = activations + probabilities + 16 * max(trained, default=0)
    gram = 0
    if settings.initialization == "least_squares":
        gram = (shape.intermediate_size**2 + 4 * D**2) * 8
    if not streamed:
        parent = Architecture.of_parent(shape).parameters(shape) * element
        return parent + OPTIMIZER_BYTES * sum(trained) + chunk + step + gram
    layer = shape.parameters(shape.widest_block) * (element + stored)
    parent = max(layer, shape.vocab_size * D * stored)
    return parent + OPTIMIZER_BYTES * max(trained, default=0) + chunk + step + gram


def is_streamed(run: Run) -> bool:
    """Whether BLD holds one layer at a time: as the recipe says, or where all would not fit."""
    if run.recipe.library.memory != "auto":
        return run.recipe.library.memory == "streamed"
    return memory_bytes(run, streamed=False) > STREAM_ABOVE * run.device.memory_bytes


def flops_per_token(run: Run) -> float:
    """Forward 2, forward and backward 6, backward through frozen weights 4, per parameter."""
    shape = run.parent.shape
    total = 2.0 * Architecture.of_parent(shape).parameters(shape)
    for index, variant in trained_variants(run):
        total += 6 * shape.parameters(variant)
        if isinstance(variant, Attention):
            total += 4 * shape.parameters(shape.parent_blocks[index].ffn)
    return total


def need(job: Job) -> Need:
    """What the stage will take."""
    run = job.run
    tokens = run.recipe.library.tokens
    flops = tokens * flops_per_token(run)
    return Need(
        tokens=tokens,
        flops=flops,
        memory_bytes=memory_bytes(run, streamed=is_streamed(run)),
        disk_bytes=OPTIMIZER_BYTES * sum(trained_parameters(run)),
        seconds=flops / run.device.training_flops_per_s,
    )


def summary(run: Run) -> str:
    """One line: what BLD takes either way, and which way the recipe and this machine give."""
    gib = {way: memory_bytes(run, streamed=way) / 2**30 for way in (False, True)}
    word = "streamed" if is_streamed(run) else "resident"
    return (
        f"library: {word} (library.memory: {run.recipe.library.memory}); resident "
        f"{gib[False]:.2f} GiB, streamed layer by layer {gib[True]:.2f} GiB, of "
        f"{run.device.memory_bytes / 2**30:.1f} GiB"
    )
