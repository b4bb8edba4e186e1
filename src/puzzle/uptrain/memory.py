"""What uptraining takes: memory of one process, FLOPs, disk, time."""

from puzzle.model.architecture import Architecture
from puzzle.stage import Job, Need
from puzzle.training.losses import LOSS_ELEMENTS
from puzzle.uptrain.launch import processes

PROJECTIONS = 7  # of a layer: q, k, v, o, gate, up, down


def memory_bytes(job: Job) -> float:
    """Peak memory of one process: its share of models and optimiser, and one micro-batch.

    Sharded: the parent, and per parameter of the child 4 bytes, or 16 where it learns (all of it,
    as children are not known yet). Not sharded: chunks of logits, and per layer and token what the
    backward pass needs (norms and the residual in float32, projections, attention probabilities
    where they are made; what the cosine keeps), or only the layer's input where the rest is
    computed again; and once more what one layer needs, for its gradients.
    """
    run, settings, number = job.run, job.child.uptrain, processes(job)
    shape, length = run.parent.shape, run.recipe.corpus.sequence_length
    parameters = Architecture.of_parent(shape).parameters(shape)
    longest = max([s.sequence_length for s in settings.stages], default=length)
    rows = settings.batch_sequences // number
    tokens = max(min(settings.micro_batch_sequences or rows, rows) * length, longest)
    size = 2 if run.device.bfloat16 else 4
    eager = run.device.type == "cpu" and run.device.attention_for(longest) == "eager"
    D, layers = shape.hidden_size, shape.num_hidden_layers
    probabilities = 10 * shape.num_attention_heads * longest if eager else 0
    layer = tokens * ((24 + 6 * size) * D + 4 * size * shape.intermediate_size + probabilities)
    between = tokens * D * (16 if settings.cosine_weight else 4)
    activations = layer + layers * between
    if not settings.activation_checkpointing:
        activations += layers * layer
    trained = 16.0 * parameters
    if settings.lora_rank:
        widths = shape.hidden_size + shape.intermediate_size
        adapters = settings.lora_rank * 2 * widths * PROJECTIONS * layers / 2
        trained = 4.0 * parameters + 16 * adapters
    logits = 4 * 4 * min(tokens * shape.vocab_size, LOSS_ELEMENTS)
    models = (parameters * run.placement.dtype.itemsize + trained) / number
    return models + activations + logits


def need(job: Job) -> Need:
    """What the stage will take, for a child of the parent's size."""
    run, settings, shape = job.run, job.child.uptrain, job.run.parent.shape
    parameters = Architecture.of_parent(shape).parameters(shape)
    tokens = sum(stage.tokens for stage in settings.stages) or settings.tokens
    backward = 4.0 if settings.lora_rank else 6.0
    per_token = 2.0 + backward + 2.0 * settings.activation_checkpointing
    flops = tokens * per_token * parameters
    if run.device.type == "cuda":
        flops /= processes(job)  # side by side; processes on a CPU share its cores
    checkpoints = (12.0 + 4.0 * (settings.keep == "best")) * parameters
    if settings.lora_rank:
        checkpoints *= 0.02
    return Need(
        tokens=tokens,
        flops=flops,
        memory_bytes=memory_bytes(job),
        disk_bytes=parameters * run.parent.dtype.itemsize + checkpoints,
        seconds=flops / run.device.training_flops_per_s,
    )
