"""Stage `uptrain`: global knowledge distillation of the assembled child (paper: section 4.3).

The loop is in trainer.py, what happens to one micro-batch in gkd.py, how several processes share
the work in launch.py and worker.py. This is the stage: what its result depends on, what cannot
work, loading and saving.

Reads: `child/`, the parent, the corpus. Writes: `uptrained/` (the same format) and `curve.jsonl`.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

from puzzle import artifacts
from puzzle.artifacts import Inputs
from puzzle.assemble import ASSEMBLE
from puzzle.device import Placement
from puzzle.errors import UserError
from puzzle.model import card, child
from puzzle.model.architecture import Architecture
from puzzle.model.modeling_puzzle import PuzzleConfig, PuzzleForCausalLM
from puzzle.model.weights import Weights
from puzzle.stage import Job, Work
from puzzle.training import checkpoint, sharding
from puzzle.uptrain import launch, memory, trained_weights
from puzzle.uptrain.gkd import Pair
from puzzle.uptrain.phases import phases
from puzzle.uptrain.trainer import BEST, LAST, Trainer


def _facts(job: Job) -> Inputs:
    return job.run.data_facts


def check(job: Job, number: int | None = None) -> None:
    """Raise `UserError` for lengths, processes and packages that cannot work.

    `number` of processes: as the recipe says if None.
    """
    settings, run = job.child.uptrain, job.run
    number = number or launch.processes(job)
    packages = {"peft": ("lora_rank", settings.lora_rank), "wandb": ("wandb", settings.wandb)}
    for package, (key, is_used) in packages.items():
        if is_used and find_spec(package) is None:
            raise UserError(
                f"uptrain.{key}: needs {package}; install it with `pip install {package}`"
            )
    if settings.freeze:
        trained_weights.check_patterns(run.parent, settings.freeze)
    _check_lengths(job)
    for phase in phases(job):
        if phase.batch % number:
            raise UserError(
                f"uptrain.batch_sequences: a batch of {phase.batch} sequences cannot be shared by "
                f"{number} processes equally; choose a multiple, or another uptrain.processes"
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
    number = launch.processes(job)
    check(job, number)
    if (folder / "config.json").exists():  # it comes last: a folder with a config is complete
        return
    if number == 1:
        distil(job, folder)
    else:
        _launch(job, folder, number)


def _launch(job: Job, folder: Path, number: int) -> None:
    run, logs = job.run, job.run.folder / "logs" / f"uptrain-{job.child.name}"
    _ = run.corpus  # built once, here
    run.release_models()
    run.progress.say(f"  {number} processes; logs in {logs}")
    arguments = [str(run.folder), "--child", job.child.name]
    arguments += ["--quiet"] if run.progress.quiet else []
    failure = launch.launch("puzzle.uptrain.worker", arguments, number, logs)
    if failure:
        path = folder / artifacts.UNFINISHED / LAST
        step = checkpoint.peek(path)[0] if path.exists() else 0
        raise UserError(
            f"uptrain: {failure}; the same command goes on from step {step} (logs: {logs})"
        )


def distil(job: Job, folder: Path) -> None:
    """Everything between `child/` and `uptrained/`, by one process or by a group together."""
    run, settings, source = job.run, job.child.uptrain, job.folder(ASSEMBLE)
    architecture = child.read_architecture(source)
    config = run.parent.child_config(architecture)
    pair = load(job, source, architecture, config)
    Trainer(job, folder, pair).train()
    best = folder / artifacts.UNFINISHED / BEST
    if settings.keep == "best" and best.exists():
        checkpoint.restore(best, {"child": pair.child}, {})
    state = pair.child.state_dict()
    if settings.lora_rank:
        state = trained_weights.merge_adapters(pair.child)
    tensors = {}
    for name, tensor in state.items():
        full = checkpoint.gathered(tensor)
        if sharding.rank() == 0:
            tensors[name] = full.to(device="cpu", dtype=run.parent.dtype)
    if sharding.rank() == 0:
        model_card = card.text(run.recipe.parent, run.parent, architecture)
        child.save(folder, config, architecture, tensors, run.parent.folder, model_card)
    sharding.barrier()


def load(job: Job, source: Path, architecture: Architecture, config: PuzzleConfig) -> Pair:
    """Child (float32) and parent, in full in a single process, sharded in one of several."""
    run, settings, shape = job.run, job.child.uptrain, job.run.parent.shape
    longest = max(phase.join for phase in phases(job)) * run.recipe.corpus.sequence_length
    parent_placement = run.device.frozen(run.parent.dtype, longest)
    device, attention = run.device.torch_device, parent_placement.attention

    def select(model: PuzzleForCausalLM) -> None:
        trained_weights.select(model, settings, architecture, shape.parent_blocks)

    if sharding.size() == 1:
        model = child.load(source, torch.float32, device, attention)
        select(model)
        if settings.lora_rank:
            trained_weights.add_adapters(model, settings)
        if parent_placement == run.placement:
            return Pair(model, run.parent_model, settings)
        parent = run.parent.load(parent_placement.dtype, device, attention)
        return Pair(model, parent, settings)
    over = sharding.mesh(device)
    placement = Placement(torch.float32, device, attention)
    model = sharding.load_sharded(config, Weights(source), placement, select, over)
    parent = sharding.load_sharded(
        run.parent.child_config(Architecture.of_parent(shape)),
        run.parent.weights(),
        parent_placement,
        sharding.freeze,
        over,
    )
    pair = Pair(model, parent, settings)
    sharding.shard_rest(pair, over)
    return pair


WORK = Work(facts=_facts, execute=_execute, need=memory.need, check=check)
