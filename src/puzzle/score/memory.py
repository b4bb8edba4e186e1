"""What scoring takes, whether the parent is streamed, how many blocks pass its layers together.

Resident, the parent is in memory as a whole, and the blocks of one layer go on to the head
together. Streamed, one layer of it is read from its files at a time (`model/layers.py`); then the
blocks of as many layers go on together as `passing_blocks` says, so that reading a layer is little
beside what it computes.
"""

from puzzle.library.memory import trained_parameters
from puzzle.model.architecture import Architecture
from puzzle.run import Run
from puzzle.score.candidates import scored_blocks
from puzzle.stage import Bytes, Effort, Job, Need
from puzzle.training import launch
from puzzle.training.losses import CHUNK_ELEMENTS

RESIDENT_SHARE = 0.125  # of the memory: a library up to this size is held while it is scored
HELD_SHARE = 0.05  # of the memory: outputs of blocks on their way to the head
# Tokens of blocks on their way, streamed: with so many a layer computes for longer than it is read.
STREAMED_TOKENS = {"cpu": 1 << 13, "cuda": 1 << 19}
# Of `Speed.judged_s`, for a block: the parent's side is computed once for all blocks that wait.
JUDGED = 0.5


def is_streamed(run: Run) -> bool:
    """Whether one layer of the parent is in memory: as the recipe says, or where all do not fit."""
    if run.recipe.score.memory != "auto":
        return run.recipe.score.memory == "streamed"
    return bool(taken(run, streamed=False).lacking(run.device.memory))


def keeps_library(run: Run) -> bool:
    """Whether all layers' variants are kept in memory while scoring."""
    library_bytes = run.placement.dtype.itemsize * sum(trained_parameters(run))
    return not is_streamed(run) and library_bytes < RESIDENT_SHARE * run.device.memory_bytes


def passing_blocks(run: Run, shard_tokens: int, *, streamed: bool) -> int:
    """How many blocks' outputs for a shard of so many tokens are on their way to the head at most.

    At least one pass (`score.tokens_per_pass`).
    """
    state = shard_tokens * run.parent.shape.hidden_size * run.placement.dtype.itemsize
    most = int(HELD_SHARE * run.device.memory_bytes / state)
    if streamed:
        most = min(most, STREAMED_TOKENS[run.device.type] // shard_tokens)
    return max(1, run.recipe.score.tokens_per_pass // shard_tokens, most)


def _shard_tokens(run: Run) -> int:
    """Of the largest shard."""
    settings = run.recipe.score
    sequences = min(settings.sequences, settings.shard_sequences)
    return sequences * run.recipe.corpus.sequence_length


def taken(run: Run, *, streamed: bool) -> Bytes:
    """Peak memory of scoring.

    On the device the parent and the library (streamed a layer of each, the parent's pages on disk
    while they are read, and the head), and the larger of two. Exact: outputs of blocks on their
    way, and once more before the head; a shard's input and final states; a pass of
    `tokens_per_pass` or four copies of a chunk of logits. Fisher: a gradient of every sample, and
    the logits with the head in float32 or a layer forward and backward. On the host the activations
    of a shard at every layer. Every process takes as much; where they share one memory it is that
    of all.
    """
    settings, shape = run.recipe.score, run.parent.shape
    element, stored = run.placement.dtype.itemsize, run.parent.dtype.itemsize
    tokens = _shard_tokens(run)
    parent = float(Architecture.of_parent(shape).parameters(shape) * element)
    library = float(element * sum(trained_parameters(run)))
    head = shape.vocab_size * shape.hidden_size
    if streamed or library >= RESIDENT_SHARE * run.device.memory_bytes:
        library /= shape.num_hidden_layers
    if streamed:
        layer = shape.parameters(shape.widest_block) * (element + stored)
        parent = max(layer, float(head * stored)) + head * element
    state, of_token = tokens * shape.hidden_size, shape.passing_elements * element
    logits = 4.0 * 4 * min(tokens * shape.vocab_size, CHUNK_ELEMENTS[run.device.type])
    exact = fisher = 0.0
    if settings.method != "fisher":
        of_layers = [len(layer.blocks) for layer in run.space.layers]
        most = sum(of_layers) if streamed else max(of_layers)
        waiting = 2.0 * state * element
        waiting *= min(most, passing_blocks(run, tokens, streamed=streamed))
        passing = min(max(tokens, settings.tokens_per_pass), most * tokens) * of_token
        exact = waiting + 4.0 * 3 * state + max(passing, logits)
    if settings.method != "exact":
        both_ways = 2.0 * tokens * of_token
        fisher = 4.0 * settings.fisher_samples * state + max(logits + 4.0 * head, both_ways)
    beside = launch.processes_beside(run)
    sharing = beside if run.device.memory.is_shared else 1
    return Bytes(
        weights=sharing * (parent + library),
        activations=sharing * max(exact, fisher),
        host=float(beside * (shape.num_hidden_layers + 1) * state * element),
    )


def need(job: Job) -> Need:
    """FLOPs of exact scoring: every block's run through the layers after it, and the head."""
    run = job.run
    settings, shape, streamed = run.recipe.score, run.parent.shape, is_streamed(job.run)
    tokens = settings.sequences * run.recipe.corpus.sequence_length
    parameters = Architecture.of_parent(shape).parameters(shape)
    per_layer = (parameters - shape.constant_parameters) / shape.num_hidden_layers
    layers = [scored_blocks(layer.blocks, settings.granularity) for layer in run.space.layers]
    counts = [len(blocks) for blocks in layers]
    suffix = sum(n * (len(counts) - i) for i, n in enumerate(counts)) * per_layer
    head = shape.vocab_size * shape.hidden_size
    chosen = f"the parent in memory, the library {'too' if keeps_library(run) else 'by layer'}"
    if streamed:
        together = passing_blocks(run, _shard_tokens(run), streamed=True)
        chosen = f"parent and library layer by layer from disk (streamed), {together} blocks a pass"
    effort = Effort(
        forward=tokens * suffix,
        judged=JUDGED * tokens * sum(counts),
        files=_read(run, sum(counts)) if streamed else 0.0,
    )
    if run.device.type == "cuda":  # side by side; processes on a CPU share its cores
        effort = effort.times(1 / launch.processes(run))
    return Need(
        tokens=tokens,
        flops=2.0 * tokens * (suffix + sum(counts) * head),
        memory=taken(run, streamed=streamed),
        disk_bytes=1e6,
        effort=effort,
        chosen=chosen,
        instead=_smallest_change(run),
    )


def _read(run: Run, blocks: int) -> float:
    """Bytes of a streamed parent that are read: for a shard's activations the whole of it.

    Then for each group of blocks what comes after them: half of it, on average.
    """
    settings, shape = run.recipe.score, run.parent.shape
    parent = Architecture.of_parent(shape).parameters(shape) * run.parent.dtype.itemsize
    groups = -(-blocks // passing_blocks(run, _shard_tokens(run), streamed=True))
    return -(-settings.sequences // settings.shard_sequences) * parent * (1 + groups / 2)


def _smallest_change(run: Run) -> str:
    """What would make scoring fit where it does not."""
    memory = run.device.memory
    if not taken(run, streamed=is_streamed(run)).lacking(memory):
        return ""
    if not taken(run, streamed=True).lacking(memory):
        return "leave out score.memory"
    least = {"shard_sequences": 1, "tokens_per_pass": 1, "fisher_samples": 4, "memory": "streamed"}
    score = run.recipe.score.model_copy(update=least)
    recipe = run.recipe.model_copy(update={"score": score})
    smaller = Run(recipe, run.folder, run.progress, device=run.device)
    if not taken(smaller, streamed=True).lacking(memory):
        return "lower score.shard_sequences and score.tokens_per_pass"
    return ""
