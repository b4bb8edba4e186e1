"""Stage `uptrain`: global knowledge distillation of the assembled child (paper: section 4.3).

The loop is in trainer.py, what happens to one micro-batch in gkd.py. This is the stage: what its
result depends on, what cannot work, loading and saving.

Reads: `child/`, the parent, the corpus. Writes: `uptrained/` (the same format) and `curve.jsonl`.
"""

import contextlib
from importlib.util import find_spec
from pathlib import Path

import torch

from puzzle.artifacts import Inputs
from puzzle.assemble import ASSEMBLE
from puzzle.device import Placement
from puzzle.errors import UserError
from puzzle.model import card, child
from puzzle.model.architecture import Architecture
from puzzle.model.modeling_puzzle import PuzzleForCausalLM
from puzzle.model.weights import Weights
from puzzle.stage import Job, Work
from puzzle.training import checkpoint, offload, sharding
from puzzle.uptrain import compiled, memory, trained_weights
from puzzle.uptrain.gkd import Pair
from puzzle.uptrain.memory import Choice
from puzzle.uptrain.phases import phases
from puzzle.uptrain.trainer import BEST, Trainer


def _facts(job: Job) -> Inputs:
    return job.run.data_facts


def check(job: Job) -> None:
    """Raise `UserError` for lengths, processes and packages that cannot work."""
    settings, run = job.child.uptrain, job.run
    number = memory.processes(job)
    if not memory.is_shared(job) and sharding.size() > 1:
        raise UserError(
            "uptrain.lora_rank: is for one process; use `puzzle uptrain RUN`, or lora_rank: 0"
        )
    if settings.optimizer_memory == "host" and memory.refuses_host(settings, number):
        raise UserError(
            "uptrain.optimizer_memory: host is for one process whose own weights learn; use auto, "
            "or processes=1 and lora_rank: 0"
        )
    packages = {"peft": ("lora_rank", settings.lora_rank), "wandb": ("wandb", settings.wandb)}
    for package, (key, is_used) in packages.items():
        if is_used and find_spec(package) is None:
            raise UserError(
                f"uptrain.{key}: needs {package}; install it with `pip install {package}`"
            )
    compiled.check(job)
    if settings.freeze:
        trained_weights.check_patterns(run.parent, settings.freeze)
    _check_lengths(job)
    for phase in phases(job):
        if phase.batch % number:
            raise UserError(
                f"uptrain.batch_sequences: a batch of {phase.batch} sequences cannot be shared by "
                f"{number} processes equally; choose a multiple, or other `processes`"
            )


def _check_lengths(job: Job) -> None:
    settings, length = job.child.uptrain, job.run.recipe.corpus.sequence_length
    positions = job.run.parent.hf_config.max_position_embeddings
    for stage in settings.stages:
        longer = stage.sequence_length
        if longer % length or settings.batch_sequences * length % longer:
            raise UserError(
                f"uptrain.stages: got sequence_length {longer}; expected a multiple of "
                f"corpus.sequence_length ({length}) that divides a batch of "
                f"{settings.batch_sequences} x {length} tokens; change uptrain.batch_sequences"
            )
        if longer > positions:
            raise UserError(
                f"uptrain.stages: got sequence_length {longer}, but the parent takes at most "
                f"{positions}"
            )


def _execute(job: Job, folder: Path) -> None:
    check(job)
    # config.json comes last: a folder with a config is complete
    if not sharding.shared((folder / "config.json").exists()):
        distil(job, folder)


def distil(job: Job, folder: Path) -> None:
    """Everything between `child/` and `uptrained/`, by one process or by a group together."""
    run, settings, source = job.run, job.child.uptrain, job.folder(ASSEMBLE)
    architecture = child.read_architecture(source)
    config = run.parent.child_config(architecture)
    choice = memory.choose(job, folder if sharding.rank() == 0 else None)
    choice = sharding.shared(choice)
    run.progress.say(f"  {choice}")
    masters = None
    if choice.optimizer_memory == "host":
        masters = child.load(source, torch.float32, torch.device("cpu"))
        trained_weights.select(masters, settings, architecture, run.parent.shape.parent_blocks)
    trainer = Trainer(job, folder, load(job, source, architecture, choice), choice, masters)
    with contextlib.ExitStack() as stack:
        if compiled.is_wanted(job, memory.need(job).flops, sharding.size()):
            run.progress.say("  layers are compiled while they first run, which takes a while")
            stack.enter_context(compiled.layers(trainer.pair))
        trainer.train()
    if settings.keep == "best":
        sharding.barrier()  # process 0 has written the index
        trainer.snapshots.restore(BEST, {"child": trainer.stored}, {})
    state = trainer.stored.state_dict()
    if settings.lora_rank:
        state = trained_weights.merge_adapters(trainer.stored)
    tensors = {}
    for name, tensor in state.items():
        full = checkpoint.gathered(tensor)
        if sharding.rank() == 0:
            tensors[name] = full.to(device="cpu", dtype=run.parent.dtype)
    if sharding.rank() == 0:
        model_card = card.text(run.recipe.parent, run.parent, architecture)
        child.save(folder, config, architecture, tensors, run.parent.folder, model_card)
    sharding.barrier()


def load(job: Job, source: Path, architecture: Architecture, choice: Choice) -> Pair:
    """Child and parent, in full in a single process, sharded in one of several.

    The child is float32 where the optimiser steps it, and has the dtype of products where the
    float32 weights are on the host. What does not learn has the dtype of frozen models.
    """
    run, settings, shape = job.run, job.child.uptrain, job.run.parent.shape
    longest = max(phase.join for phase in phases(job)) * run.recipe.corpus.sequence_length
    frozen = run.device.frozen(run.parent.dtype, longest)
    device, attention = run.device.torch_device, frozen.attention
    again = choice.activation_checkpointing

    def select(model: PuzzleForCausalLM) -> None:
        trained_weights.select(model, settings, architecture, shape.parent_blocks)

    if sharding.size() == 1:
        dtype = torch.float32
        if choice.optimizer_memory == "host" and run.device.bfloat16:
            dtype = torch.bfloat16
        model = child.load(source, frozen.dtype if settings.lora_rank else dtype, device, attention)
        select(model)
        if settings.lora_rank:
            trained_weights.add_adapters(model, settings)
        if choice.parent == "host":
            parent = run.parent.load(frozen.dtype, torch.device("cpu"), attention)
            return Pair(model, offload.fetch_layers(parent, device), settings, again)
        if frozen == run.placement:
            return Pair(model, run.parent_model, settings, again)
        parent = run.parent.load(frozen.dtype, device, attention)
        return Pair(model, parent, settings, again)
    over, products = sharding.mesh(device), torch.bfloat16 if run.device.bfloat16 else None
    placement = Placement(torch.float32, device, attention)
    child_config = run.parent.child_config(architecture)
    parent_config = run.parent.child_config(Architecture.of_parent(shape))
    shards = sharding.Shards(over, products)
    model = shards.load(child_config, Weights(source), placement, select)
    parent = shards.load(parent_config, run.parent.weights(), frozen, sharding.freeze)
    pair = Pair(model, parent, settings, again)
    shards.add_rest(pair)
    return pair


WORK = Work(
    facts=_facts, execute=_execute, need=memory.need, check=check, is_shared=memory.is_shared
)
