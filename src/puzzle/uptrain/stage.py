"""Stage `uptrain`: global knowledge distillation of the assembled child (paper: section 4.3).

The loop is in trainer.py, what happens to one micro-batch in gkd.py, how several processes share
the work in distributed.py. This is the stage: what its result depends on, what cannot work, loading
and saving, processes.

Reads: `child/`, the parent, the corpus. Writes: `uptrained/` (same format), and what trainer.py
writes. `python -m puzzle.uptrain RUN` is one process of several.
"""

import argparse
import os
import sys
import traceback
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from puzzle import artifacts
from puzzle.assemble import stage as assemble
from puzzle.errors import UserError
from puzzle.model import child
from puzzle.model.architecture import Architecture
from puzzle.model.modeling_puzzle import PuzzleConfig
from puzzle.model.weights import Weights
from puzzle.progress import Progress
from puzzle.report import card
from puzzle.run import Run
from puzzle.training import checkpoint, distributed
from puzzle.uptrain import gkd, trainer

SAME_RESULT = {
    "processes",
    "wandb",
    "micro_batch_sequences",
    "activation_checkpointing",
    "checkpoint_steps",
}


def inputs(run: Run) -> dict[str, Any]:
    settings = run.recipe.uptrain.model_dump(mode="json", exclude=SAME_RESULT)
    return run.data_inputs | {"assemble": run.fingerprint_of("assemble"), "uptrain": settings}


def check(run: Run, number: int | None = None) -> None:
    """Everything about lengths, processes and packages that can be known to be wrong before
    anything is spent.
    """
    settings, length, number = (
        run.recipe.uptrain,
        run.recipe.corpus.sequence_length,
        number or distributed.processes(run),
    )
    for package, key in (
        ("peft", settings.lora_rank and "lora_rank"),
        ("wandb", settings.wandb and "wandb"),
    ):
        if key and find_spec(package) is None:
            raise UserError(
                f"uptrain.{key}: needs {package}; install it with `pip install {package}`"
            )
    if settings.freeze:
        _check_patterns(run)
    positions = run.parent.hf_config.max_position_embeddings
    for stage in settings.stages:
        own = stage.sequence_length
        if own % length or settings.batch_sequences * length % own:
            raise UserError(
                f"uptrain.stages: got sequence_length {own}; expected a multiple of corpus.sequence_length ({length}) "
                f"that divides a batch of {settings.batch_sequences} x {length} tokens; change uptrain.batch_sequences"
            )
        if own > positions:
            raise UserError(
                f"uptrain.stages: got sequence_length {own}, but the parent takes at most {positions}"
            )
    for phase in trainer.phases(run):
        if phase.batch % number:
            raise UserError(
                f"uptrain.batch_sequences: a batch of {phase.batch} sequences cannot be shared by {number} processes "
                "equally; choose a multiple, or another uptrain.processes"
            )


def _check_patterns(run: Run) -> None:
    """A child may lack what the parent has, so the parent's names count, and those of linear
    replacements.
    """
    more = (
        "lm_head.weight",
        "model.layers.0.self_attn.linear_attn.weight",
        "model.layers.0.mlp.linear_mlp.weight",
    )
    with run.parent.weights() as weights:
        names = [*weights, *more]
    for pattern in run.recipe.uptrain.freeze:
        if not any(fnmatch(name, pattern) for name in names):
            raise UserError(
                f"uptrain.freeze: {pattern!r} matches no weight; expected a pattern such as 'model.layers.0.*' or "
                "'*embed_tokens*'"
            )


def run(run: Run, folder: Path) -> dict[str, Any]:
    number = distributed.processes(run)
    check(run, number)
    if not (folder / "config.json").exists():  # it comes last: a folder with a config is complete
        if number == 1:
            distil(run, folder)
        else:
            _launch(run, folder, number)
    return {"weights": assemble.weights_fingerprint(folder)}


def _launch(run: Run, folder: Path, number: int) -> None:
    run.write_recipe()
    _ = run.corpus  # built once, here
    run.release_models()
    run.progress.say(f"  {number} processes; logs in {run.folder / 'logs' / 'uptrain'}")
    words = [str(run.folder)] + (["--quiet"] if run.progress.quiet else [])
    failure = distributed.launch(
        "puzzle.uptrain.stage", words, number, run.folder / "logs" / "uptrain"
    )
    if failure:
        path = folder / checkpoint.FOLDER / "uptrain.safetensors"
        step = checkpoint.peek(path)[0] if path.exists() else 0
        logs = run.folder / "logs" / "uptrain"
        raise UserError(
            f"uptrain: {failure}; the same command goes on from step {step} (logs: {logs})"
        )


def distil(run: Run, folder: Path) -> None:
    """Everything between `child/` and `uptrained/`, by one process or by all of a group together."""
    source, settings = run.stage_folder("assemble"), run.recipe.uptrain
    architecture = child.read_architecture(source)
    config = run.parent.child_config(architecture)
    pair = load(run, source, architecture, config)
    trainer.train(run, folder, pair)
    best = folder / checkpoint.FOLDER / "best.safetensors"
    if settings.keep == "best" and best.exists():
        checkpoint.restore(best, {"student": pair.student}, {})
    state = gkd.merge_adapters(pair.student) if settings.lora_rank else pair.student.state_dict()
    tensors = {}
    for name, tensor in state.items():
        full = checkpoint.whole(tensor)
        if distributed.rank() == 0:
            tensors[name] = full.to(device="cpu", dtype=run.parent.dtype)
    if distributed.rank() == 0:
        child.save(
            folder, config, architecture, tensors, run.parent.folder, card.text(run, architecture)
        )
    distributed.barrier()


def load(run: Run, source: Path, architecture: Architecture, config: PuzzleConfig) -> gkd.Pair:
    """Child (float32) and parent, whole in a single process, sharded in one of several."""
    settings, shape = run.recipe.uptrain, run.parent.shape
    longest = max(phase.join for phase in trainer.phases(run)) * run.recipe.corpus.sequence_length
    attention = run.attention_for(longest)

    def prepare(student: Any) -> None:
        gkd.choose(student, settings, architecture, shape.parent_block)

    if distributed.size() == 1:
        student = child.load(source, torch.float32, run.device, attention)
        prepare(student)
        if settings.lora_rank:
            gkd.add_adapters(student, settings)
        dtype, device, usual = run.placement
        teacher = (
            run.parent_model if attention == usual else run.parent.load(dtype, device, attention)
        )
        return gkd.Pair(student, teacher, settings)
    over = distributed.mesh(run.device)
    student = distributed.load_sharded(
        config, Weights(source), torch.float32, run.device, attention, prepare, over
    )
    whole = run.parent.child_config(Architecture.of_parent(shape))
    teacher = distributed.load_sharded(
        whole,
        run.parent.weights(),
        run.placement[0],
        run.device,
        attention,
        distributed.freeze,
        over,
    )
    pair = gkd.Pair(student, teacher, settings)
    distributed.shard_rest(pair, over)
    return pair


# ----------------------------------------------------------------------------------- one of several


def main() -> None:
    """One process of several: `torchrun ... -m puzzle.uptrain RUN`. Exit codes as in cli.py."""
    parser = argparse.ArgumentParser(prog="puzzle.uptrain", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args()
    launched = distributed.LAUNCHED in os.environ
    if launched and os.environ.get("RANK") == "0":
        sys.stderr = sys.stdout  # torchrun's own log goes to a file; people see what process 0 says
    try:
        with distributed.group():
            work(args.run, Progress(args.quiet or distributed.rank() > 0), launched)
    except UserError as error:
        print(f"puzzle: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)
    except Exception:
        traceback.print_exc(file=sys.__stderr__)
        os._exit(1)  # at once: the others wait in a collective operation


def work(folder: Path, progress: Progress, launched: bool) -> None:
    run = Run.open(folder, progress)
    check(run, distributed.size())
    if run.recipe.uptrain.lora_rank:
        raise UserError(
            "uptrain.lora_rank: is for one process; use `puzzle uptrain RUN`, or lora_rank: 0"
        )
    if distributed.rank() == 0:
        artifacts.begin(run.stage_folder("uptrain"), run.inputs_of("uptrain"))
        _ = run.corpus
    distributed.barrier()
    distil(run, run.stage_folder("uptrain"))
    if distributed.rank() == 0 and not launched:
        from puzzle import pipeline

        pipeline.execute_stage(run, "uptrain")  # finds the weights there and closes the stage


if __name__ == "__main__":
    main()
