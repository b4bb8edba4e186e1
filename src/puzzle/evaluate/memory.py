"""What evaluating takes, and where the models are: chosen so that it fits.

Resident, parent and child are on the device. Then the parent's layers are in the host's memory, and
each on the device in its turn. At last the layers of both are read from their files whenever they
compute (`model/layers.py`).
"""

from dataclasses import replace
from typing import Literal

from puzzle.assemble.stage import serving_need
from puzzle.evaluate import context, skills
from puzzle.evaluate.results import MODELS
from puzzle.model.architecture import Architecture
from puzzle.stage import Bytes, Effort, Job, Need
from puzzle.training import launch
from puzzle.training.losses import CHUNK_ELEMENTS
from puzzle.uptrain.memory import most_parameters

WRITTEN_LAYER_S = 1e-3  # a layer for one token of one sequence, about (samples)
Way = Literal["resident", "host", "streamed"]
CHOSEN = {
    "resident": "parent and child in memory",
    "host": "the parent's layers in the host's memory",
    "streamed": "parent and child layer by layer from disk (streamed)",
}


def way(job: Job) -> Way:
    """Where the models are: as the recipe says, or the fastest way that fits."""
    asked, memory = job.child.evaluate.memory, job.run.device.memory
    if asked != "auto":
        return asked
    ways: list[Way] = ["resident", "streamed"] if memory.is_shared else ["resident", "host"]
    return next((way for way in ways if not taken(job, way).lacking(memory)), "streamed")


def taken(job: Job, way: Way) -> Bytes:
    """Peak memory of judging a child.

    Both models, or what is there of them (with `host` the parent's layers count once more on the
    host; streamed, embeddings and heads, and a layer with its pages on disk), and a batch. Every
    process takes as much; where they share one memory it is that of all.
    """
    run, shape = job.run, job.run.parent.shape
    element, beside = run.placement.dtype.itemsize, launch.processes_beside(job.run)
    parent = float(Architecture.of_parent(shape).parameters(shape) * element)
    child, host = float(most_parameters(job) * element), 0.0
    layer, ends = float(shape.parameters(shape.widest_block)), shape.constant_parameters
    if way == "host":
        parent, host = (ends + 2 * layer) * element, parent
    if way == "streamed":
        stored = run.parent.dtype.itemsize
        parent = ends * element
        child = ends * element + max(layer * (element + stored), float(ends * stored))
    peak = Bytes(weights=parent + child, activations=_batch_bytes(job))
    return replace(peak.times(beside if run.device.memory.is_shared else 1), host=host * beside)


def batch_tokens(job: Job, length: int) -> int:
    """The most that pass a model at once: a batch of text, or one sequence of the context."""
    return max(job.child.evaluate.batch_sequences * job.run.recipe.corpus.sequence_length, length)


def _batch_bytes(job: Job) -> float:
    """Of a batch that goes through a layer; then of four copies of a chunk of logits, and both
    sides of the cosine in float32.
    """
    run, shape = job.run, job.run.parent.shape
    tokens = batch_tokens(job, context.planned(run, job.child.evaluate.context))
    passing = shape.passing_elements * run.placement.dtype.itemsize
    judged = 5 * 4 * shape.hidden_size
    logits = 4.0 * 4 * min(tokens * shape.vocab_size, CHUNK_ELEMENTS[run.device.type])
    return max(tokens * passing, tokens * judged + logits)


def need(job: Job) -> Need:
    """What the stage will take; serving the child once more is part of it."""
    run, settings, shape = job.run, job.child.evaluate, job.run.parent.shape
    serving, row, chosen = serving_need(job), run.recipe.corpus.sequence_length, way(job)
    parameters = Architecture.of_parent(shape).parameters(shape)
    length = context.planned(run, settings.context)
    text = 2 * settings.sequences * row  # and once more by position
    tokens = text + settings.questions * skills.tokens_per_question(row, length)
    read = len(MODELS) * tokens + (len(MODELS) - 1) * text  # the parent beside each child
    written = len(MODELS) * settings.samples * settings.sample_tokens * shape.num_hidden_layers
    judging = taken(job, chosen)
    # what is not on the device comes with every batch, from the host or from disk
    passes = read / batch_tokens(job, length)
    moved = 0.0 if chosen == "resident" else passes * parameters * run.parent.dtype.itemsize
    # side by side on GPUs; processes on a CPU share its cores
    share = 1 / launch.processes(run) if run.device.type == "cuda" else 1.0
    effort = Effort(
        forward=share * read * (parameters - shape.constant_parameters),
        judged=share * len(MODELS) * tokens,
        link=share * moved,
        files=share * moved if chosen == "streamed" else 0.0,
        beside_s=serving.effort.beside_s + written * WRITTEN_LAYER_S,
    )
    return Need(
        tokens=tokens,
        flops=2.0 * read * parameters,
        memory=max(judging, serving.memory, key=lambda peak: peak.device),
        disk_bytes=1e6,
        effort=effort,
        chosen=CHOSEN[chosen],
        instead=serving.instead,
    )
