"""What the library takes: trained parameters, memory resident and streamed, FLOPs, disk, time."""

from dataclasses import replace

from puzzle.model import variants
from puzzle.model.architecture import FFN, Architecture, Attention, Block, Subblock
from puzzle.run import Run
from puzzle.stage import Bytes, Effort, Job, Need
from puzzle.training import launch

OPTIMIZER_BYTES = 12  # per trained parameter, between its steps: weight, two moments
CHUNK_STEPS = 32
PASSED_ON = 3  # copies of a chunk where it goes from process to process
CHUNK_SHARE = 0.25  # of the host's memory that the activations of a chunk may take


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


def budget(run: Run, variant: Subblock | Block) -> int:
    """Tokens that a variant learns from."""
    settings = run.recipe.library
    names = (f"{variant.slot}.{variant.name}", variant.name, variant.slot)
    return next((settings.budgets[n] for n in names if n in settings.budgets), settings.tokens)


def longest_budget(run: Run) -> int:
    """Tokens that pass the parent's layers: those of the variant that learns from most."""
    return max((budget(run, variant) for _, variant in trained_variants(run)), default=0)


def memory_bytes(run: Run, *, streamed: bool) -> float:
    """Peak memory of BLD beside the process itself, where device and host share theirs."""
    peak = taken(run, _largest(run) if streamed else None)
    return peak.device + peak.host


def taken(run: Run, together: int | None) -> Bytes:
    """Peak memory of BLD, where layers are shared out, of the process that has most of them.

    Resident (`together` None): the parent, and `OPTIMIZER_BYTES` per trained parameter of all
    variants, and the chunk's activations. Streamed: one layer of the parent (and its pages on disk
    while it is read), and the same per parameter of the variants that are trained `together`; the
    embedding's pages only while a chunk is embedded, and the chunk on the host. Both: a batch
    forward and backward through the parent's layer, or through a variant that has a gradient and
    folded weights beside that; at the beginning, when there are no moments yet, least squares. Of
    several processes each has its share of the layers, and a chunk that has come, one that went
    through its layers ahead, and one that is being sent; where they share one memory it is that of
    all.
    """
    recipe, shape, others = run.recipe, run.parent.shape, launch.processes(run)
    settings, sequence = recipe.library, recipe.corpus.sequence_length
    element, stored = run.placement.dtype.itemsize, run.parent.dtype.itemsize
    batch, D = settings.batch_sequences * sequence, shape.hidden_size
    trained = trained_parameters(run)
    steps = chunk_steps(run, streamed=together is not None)
    chunk = (steps * batch + settings.validation_sequences * sequence) * D * element
    chunk *= 1 if others == 1 else PASSED_ON
    product = 2 if run.device.bfloat16 else 4
    probabilities = 0.0
    if run.placement.attention == "eager":
        probabilities = 10.0 * settings.batch_sequences * shape.num_attention_heads * sequence**2
    passing = batch * shape.passing_elements * product
    step = probabilities + passing + max(passing, 16 * max(trained, default=0))
    first = _least_squares(run) if settings.initialization == "least_squares" else 0.0
    beside, shared = launch.processes_beside(run), run.device.memory.is_shared
    if together is None:
        weights = Architecture.of_parent(shape).parameters(shape) * element / others
        learning = begun = sum(trained) / others
        waiting, host = chunk, 0
    else:
        layer = shape.parameters(shape.widest_block) * (element + stored)
        weights = float(max(layer, shape.vocab_size * D * stored))
        learning, begun = float(together), float(max(trained, default=0))
        waiting, host = 0, beside * chunk
    optimizer, working = max((OPTIMIZER_BYTES * learning, step), (4 * begun, first), key=sum)
    peak = Bytes(weights=weights, optimizer=optimizer, activations=working + waiting)
    # where processes share one memory it is that of all
    return replace(peak.times(beside if shared else 1), host=float(host))


def _least_squares(run: Run) -> float:
    """Bytes of the first weights of a layer's variants (`initialization.solve`).

    Of two folds the products of the FFN's activations and of both subblocks' inputs and outputs,
    and the layer in float32; for the widest variant its share of them, in float64 too, and what is
    solved.
    """
    shape = run.parent.shape
    D, width = shape.hidden_size, shape.intermediate_size
    trained = [variant for _, variant in trained_variants(run)]
    kept = max([D, *(v.intermediate_size for v in trained if isinstance(v, FFN))])
    of_parent = 8 * width**2 + 32 * D**2 + 12 * D * width
    return float(of_parent + 8 * kept * width + 48 * kept**2)


def _largest(run: Run) -> int:
    return max(trained_parameters(run), default=0)


def is_streamed(run: Run) -> bool:
    """Whether BLD holds one layer at a time: as the recipe says, or where all would not fit."""
    if run.recipe.library.memory != "auto":
        return run.recipe.library.memory == "streamed"
    return bool(taken(run, None).lacking(run.device.memory))


def together(run: Run) -> int:
    """How many parameters of a layer's variants are trained at a time, streamed, at the most.

    With all of a layer's the parent's block runs once a batch; it comes out the same either way.
    """
    most, memory = _largest(run), run.device.memory
    by_layer: dict[int, int] = {}
    for layer, variant in trained_variants(run):
        by_layer[layer] = by_layer.get(layer, 0) + run.parent.shape.parameters(variant)
    whole = max(by_layer.values(), default=0)
    sizes = [whole * share // 8 for share in range(8, 0, -1)]
    return next((n for n in sizes if n > most and not taken(run, n).lacking(memory)), most)


def chunk_steps(run: Run, *, streamed: bool) -> int:
    """Batches that pass one layer before the next one starts.

    Streamed, every layer's variants are read and written once a chunk, so a chunk is as long as the
    host's memory allows.
    """
    settings, sequence = run.recipe.library, run.recipe.corpus.sequence_length
    if settings.chunk_steps != "auto":
        return settings.chunk_steps
    if not streamed:
        return CHUNK_STEPS
    batch = settings.batch_sequences * sequence
    batch_bytes = batch * run.parent.shape.hidden_size * run.placement.dtype.itemsize
    if launch.processes(run) > 1:
        batch_bytes *= PASSED_ON * launch.processes_beside(run)
    fitting = int(CHUNK_SHARE * run.device.memory.host_bytes / batch_bytes)
    return min(max(CHUNK_STEPS, fitting), max(1, -(-longest_budget(run) // batch)))


def trained_parameter_tokens(run: Run) -> float:
    """Parameters that go forward and backward for a token, times tokens.

    Where they are frozen, under an attention that learns, they count for two thirds.
    """
    shape, total = run.parent.shape, 0.0
    for index, variant in trained_variants(run):
        passed = float(shape.parameters(variant))
        if isinstance(variant, Attention):
            passed += 2 / 3 * shape.parameters(shape.parent_blocks[index].ffn)
        total += budget(run, variant) * passed
    return total


def need(job: Job) -> Need:
    """What the stage will take."""
    run = job.run
    streamed = is_streamed(run)
    at_a_time = together(run) if streamed else None
    peak = taken(run, at_a_time)
    shape, tokens = run.parent.shape, longest_budget(run)
    parent = Architecture.of_parent(shape).parameters(shape) - shape.constant_parameters
    forward, training = float(tokens * parent), trained_parameter_tokens(run)
    steps = chunk_steps(run, streamed=streamed)
    chosen = f"parent and variants in memory (resident), {steps} batches a layer (chunk_steps)"
    if at_a_time is not None:
        chosen = (
            f"layer by layer from disk (streamed), {steps} batches a layer (chunk_steps), variants "
            f"of up to {at_a_time / 1e6:,.0f}M parameters together"
        )
    return Need(
        tokens=tokens,
        flops=2 * forward + 6 * training,
        memory=peak,
        disk_bytes=OPTIMIZER_BYTES * sum(trained_parameters(run)),
        effort=_effort(run, forward, training, streamed=streamed),
        chosen=chosen,
        instead=_smallest_change(run, peak),
    )


def _effort(run: Run, forward: float, training: float, *, streamed: bool) -> Effort:
    """Of the process with most layers, and what it moves; `forward` and `training` are of all.

    With every layer of every chunk what was learnt goes to disk, and streamed it comes from there,
    through the host, as the parent's layer does; the chunk crosses to the device and back. Several
    processes run the parent's layers once more, ahead, and send their outputs on.
    """
    settings, shape, processes = run.recipe.library, run.parent.shape, launch.processes(run)
    tokens = longest_budget(run)
    layers = -(-shape.num_hidden_layers // processes)
    share = layers / shape.num_hidden_layers
    batch = settings.batch_sequences * run.recipe.corpus.sequence_length
    chunks = -(-tokens // (batch * chunk_steps(run, streamed=streamed)))
    states = float(tokens * shape.hidden_size * run.placement.dtype.itemsize)
    written = OPTIMIZER_BYTES * share * sum(trained_parameters(run))
    read = written + layers * shape.parameters(shape.widest_block) * run.parent.dtype.itemsize
    at_once = share if run.device.type == "cuda" else 1.0  # processes on a CPU share its cores
    return Effort(
        forward=at_once * forward * (2 if processes > 1 else 1),
        training=at_once * training,
        network=states if processes > 1 else 0.0,
        link=chunks * (written + read) + 2 * layers * states if streamed else chunks * written,
        files=chunks * (written + read if streamed else written),
    )


def _smallest_change(run: Run, peak: Bytes) -> str:
    """What would make the library fit where it does not."""
    memory, settings = run.device.memory, run.recipe.library
    if not peak.lacking(memory):
        return ""
    if not is_streamed(run) and not taken(run, _largest(run)).lacking(memory):
        return "leave out library.memory"
    fewer = settings.model_copy(update={"chunk_steps": 1, "batch_sequences": 1, "memory": "auto"})
    recipe = run.recipe.model_copy(update={"library": fewer})
    least = Run(recipe, run.folder, run.progress, device=run.device)
    if not taken(least, _largest(run)).lacking(memory):
        return "lower library.batch_sequences or library.chunk_steps"
    return ""
