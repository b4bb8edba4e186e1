"""Stage `uptrain`: global knowledge distillation of the assembled child (paper: section 4.3; on one micro-batch: gkd.py).

AdamW on float32 weights, bf16 autocast, warm-up, then cosine or warm-up-stable-decay; the gradients of micro-batches
add up to those of the batch; a step whose gradient is not finite is skipped and counted. With several processes
(distributed.py) each takes every n-th sequence of every batch, so the loss curve does not depend on how many there are.

Reads: `child/`, the parent, the corpus. Writes: `uptrained/` (same format), `curve.jsonl`; while it runs, a checkpoint
of the last state and the weights with the best validation KL. `python -m puzzle.uptrain RUN` is one process of several.
"""

import argparse
import math
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from puzzle import artifacts, assemble, checkpoint, child, distributed, gkd
from puzzle.config import UptrainConfig
from puzzle.errors import UserError
from puzzle.losses import METRICS
from puzzle.modeling_puzzle import PuzzleConfig
from puzzle.parent import Weights
from puzzle.progress import Progress
from puzzle.run import Run

VALIDATION_SEQUENCES = 32
CURVE_EVERY = 5
SAME_RESULT = {"processes", "wandb", "micro_batch_sequences", "activation_checkpointing", "checkpoint_steps"}


@dataclass(frozen=True)
class Phase:
    """Steps [first, last) at one sequence length: `batch` sequences of `join` rows of the corpus each."""

    first: int
    last: int
    join: int
    batch: int


@dataclass
class State:
    """What a checkpoint keeps beside weights and moments."""

    skipped: int = 0
    best_kl: float = math.inf
    stale: int = 0  # validations since the best one


def inputs(run: Run) -> dict[str, Any]:
    settings = run.recipe.uptrain.model_dump(mode="json", exclude=SAME_RESULT)
    return run.data_inputs | {"assemble": run.fingerprint_of("assemble"), "uptrain": settings}


def phases(run: Run) -> list[Phase]:
    """The sequence-length stages in steps. Every batch has the same number of tokens."""
    settings, length = run.recipe.uptrain, run.recipe.corpus.sequence_length
    batch_tokens = settings.batch_sequences * length
    asked = [(s.sequence_length, s.tokens) for s in settings.stages] or [(length, settings.tokens)]
    found, first = [], 0
    for own_length, tokens in asked:
        steps = -(-tokens // batch_tokens)
        found.append(Phase(first, first + steps, own_length // length, batch_tokens // own_length))
        first += steps
    return found


def processes(run: Run) -> int:
    asked = run.recipe.uptrain.processes
    if asked == "auto":
        alone = run.device.type != "cuda" or run.recipe.uptrain.lora_rank > 0
        return 1 if alone else torch.cuda.device_count()
    if run.device.type == "cuda" and asked > torch.cuda.device_count():
        raise UserError(f"uptrain.processes: got {asked}, but this machine has {torch.cuda.device_count()} GPUs")
    return asked


def check(run: Run, number: int | None = None) -> None:
    """Everything about lengths, processes and packages that can be known to be wrong before anything is spent."""
    settings, length, number = run.recipe.uptrain, run.recipe.corpus.sequence_length, number or processes(run)
    for package, key in (("peft", settings.lora_rank and "lora_rank"), ("wandb", settings.wandb and "wandb")):
        if key and find_spec(package) is None:
            raise UserError(f"uptrain.{key}: needs {package}; install it with `pip install {package}`")
    positions = run.parent.hf_config.max_position_embeddings
    for stage in settings.stages:
        own = stage.sequence_length
        if own % length or settings.batch_sequences * length % own:
            raise UserError(
                f"uptrain.stages: got sequence_length {own}; expected a multiple of corpus.sequence_length ({length}) "
                f"that divides a batch of {settings.batch_sequences} x {length} tokens; change uptrain.batch_sequences"
            )
        if own > positions:
            raise UserError(f"uptrain.stages: got sequence_length {own}, but the parent takes at most {positions}")
    for phase in phases(run):
        if phase.batch % number:
            raise UserError(
                f"uptrain.batch_sequences: a batch of {phase.batch} sequences cannot be shared by {number} processes "
                "equally; choose a multiple, or another uptrain.processes"
            )


def run(run: Run, folder: Path) -> dict[str, Any]:
    number = processes(run)
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
    failure = distributed.launch("puzzle.uptrain", words, number, run.folder / "logs" / "uptrain")
    if failure:
        path = folder / checkpoint.FOLDER / "uptrain.safetensors"
        step = checkpoint.peek(path)[0] if path.exists() else 0
        logs = run.folder / "logs" / "uptrain"
        raise UserError(f"uptrain: {failure}; the same command goes on from step {step} (logs: {logs})")


def distil(run: Run, folder: Path) -> None:
    """Everything between `child/` and `uptrained/`, by one process or by all of a group together."""
    source, settings = run.stage_folder("assemble"), run.recipe.uptrain
    architecture = child.read_architecture(source)
    config = run.parent.child_config(architecture)
    pair = load(run, source, config)
    train(run, folder, pair)
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
        child.save(folder, config, architecture, tensors, run.parent.folder, assemble.card(run, architecture))
    distributed.barrier()


def load(run: Run, source: Path, config: PuzzleConfig) -> gkd.Pair:
    """Child (float32) and parent, whole in a single process, sharded in one of several."""
    settings, shape = run.recipe.uptrain, run.parent.shape
    architecture = child.read_architecture(source)
    longest = max(phase.join for phase in phases(run)) * run.recipe.corpus.sequence_length
    attention = run.attention_for(longest)

    def prepare(student: Any) -> None:
        gkd.choose(student, settings, architecture, shape.parent_block)

    if distributed.size() == 1:
        student = child.load(source, torch.float32, run.device, attention)
        prepare(student)
        if settings.lora_rank:
            gkd.add_adapters(student, settings)
        dtype, device, usual = run.placement
        teacher = run.parent_model if attention == usual else run.parent.load(dtype, device, attention)
        return gkd.Pair(student, teacher, settings)
    over = distributed.mesh(run.device)
    student = distributed.load_sharded(config, Weights(source), torch.float32, run.device, attention, prepare, over)
    whole = run.parent.child_config(type(architecture).of_parent(shape))
    teacher = distributed.load_sharded(
        whole, run.parent.weights(), run.placement[0], run.device, attention, distributed.freeze, over
    )
    pair = gkd.Pair(student, teacher, settings)
    distributed.shard_rest(pair, over)
    return pair


# ------------------------------------------------------------------------------------------------ training


def train(run: Run, folder: Path, pair: gkd.Pair) -> None:
    """The loop; goes on from the last checkpoint in `folder`, whatever number of processes wrote it."""
    settings, student, schedule = run.recipe.uptrain, pair.student, phases(run)
    learning = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    path = folder / checkpoint.FOLDER / "uptrain.safetensors"
    start, notes = checkpoint.restore(path, {"student": student}, {"adamw": optimizer})
    state, steps, batches = State(**notes), schedule[-1].last, Batches(run, schedule)
    if distributed.rank() == 0:
        artifacts.keep_jsonl(folder / "curve.jsonl", lambda record: record["step"] <= start)
    with run.progress.task("uptraining", steps * batches.tokens, "tokens") as task:
        task.skip(start * batches.tokens)
        for step in range(start, steps):
            torch.manual_seed(_seed(settings.seed, step))  # for a parent with dropout
            checkpoint.set_learning_rate(optimizer, settings.learning_rate * rate_factor(settings, step, steps))
            terms = torch.zeros(len(gkd.TERMS), device=run.device)
            for tokens_BS, share in batches.micro(step):
                with run.autocast():
                    loss, found = pair(tokens_BS.to(run.device))
                (loss * share).backward()
                terms += found * share
            norm = checkpoint.whole(torch.nn.utils.clip_grad_norm_(learning, settings.gradient_clip))
            if torch.isfinite(norm):
                optimizer.step()
            else:
                state.skipped += 1
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            validated = done % settings.validate_steps == 0 or done == steps
            figures = take_stock(run, folder, pair, state, done) if validated else {}
            if validated or done % CURVE_EVERY == 0:
                note(run, folder, done, done * batches.tokens, state, terms, figures)
            if 0 < settings.patience <= state.stale:
                run.progress.say(f"  stopped at step {done}: {state.stale} validations without a better KL")
                break
            if done % settings.checkpoint_steps == 0 and done < steps:
                checkpoint.save(path, done, {"student": student}, {"adamw": optimizer}, asdict(state))
            task.advance(batches.tokens, f"loss {loss.item():.4f}")
    if state.skipped == done:
        raise RuntimeError("uptraining diverged: every step was non-finite")


class Batches:
    """This process's share of every batch, in micro-batches: a pure function of (seed, step)."""

    def __init__(self, run: Run, schedule: list[Phase]) -> None:
        settings, self.schedule = run.recipe.uptrain, schedule
        self.tokens = settings.batch_sequences * run.recipe.corpus.sequence_length  # of a whole batch
        self.views = {phase.join: run.corpus["train"].view(phase.join, settings.seed) for phase in schedule}
        # BLD used the first batches of the stream; go on where it stopped, so that fresh text comes first
        self.offset = 0 if settings.seed else -(-run.recipe.library.tokens // self.tokens)
        self.micro_rows = settings.micro_batch_sequences or settings.batch_sequences

    def micro(self, step: int) -> Iterator[tuple[torch.Tensor, float]]:
        """(tokens [B, S], their share of what this process does in the step)."""
        phase = next(phase for phase in self.schedule if step < phase.last)
        whole_NS = self.views[phase.join].batch(self.offset + step, phase.batch)
        own_NS = whole_NS[distributed.rank() :: distributed.size()]
        for tokens_BS in own_NS.split(max(1, self.micro_rows // phase.join)):
            yield tokens_BS, len(tokens_BS) / len(own_NS)


def rate_factor(settings: UptrainConfig, step: int, steps: int) -> float:
    if settings.schedule == "wsd":
        return checkpoint.wsd_schedule(step, steps, settings.warmup_share, settings.decay_share)
    return checkpoint.cosine_schedule(step, steps, settings.warmup_share)


def _seed(seed: int, step: int) -> int:
    return ((seed << 32) + step) * distributed.size() + distributed.rank()


def take_stock(run: Run, folder: Path, pair: gkd.Pair, state: State, done: int) -> dict[str, float]:
    """Validate; keep the weights where they are the best so far."""
    figures = validate(run, pair)
    if figures["kl"] < state.best_kl:
        state.best_kl, state.stale = figures["kl"], 0
        if run.recipe.uptrain.keep == "best":
            checkpoint.save(folder / checkpoint.FOLDER / "best.safetensors", done, {"student": pair.student}, {})
    else:
        state.stale += 1
    return figures


def validate(run: Run, pair: gkd.Pair) -> dict[str, float]:
    """Means per token of the child's `METRICS` on held-out text, and its retention of the parent's top-1 accuracy."""
    pair.student.eval()
    tokens_NS, size = run.corpus["validation"].head(VALIDATION_SEQUENCES), distributed.size()
    sums = torch.zeros(2, len(METRICS), dtype=torch.float64)
    round_rows = run.recipe.evaluate.batch_sequences * size
    for first in range(0, len(tokens_NS), round_rows):
        own_BS = tokens_NS[first : first + round_rows][distributed.rank() :: size]
        with torch.no_grad(), run.autocast():  # sharded layers need all processes, also one that has nothing to count
            found = torch.stack(pair((own_BS if len(own_BS) else tokens_NS[:1]).to(run.device), metrics=True)).cpu()
        sums += found if len(own_BS) else 0
    distributed.reshard(pair)
    pair.student.train()
    means, parent = (distributed.summed(sums.to(run.device)) / tokens_NS[:, 1:].numel()).tolist()
    figures = dict(zip(METRICS, means, strict=True))
    best = parent[METRICS.index("top1")]
    figures |= {"kl": max(0.0, figures["kl"])} | ({"retention": figures["top1"] / best} if best else {})
    return figures


def note(
    run: Run, folder: Path, step: int, tokens: int, state: State, terms: torch.Tensor, figures: dict[str, float]
) -> None:
    """Write a point of the training curve: the terms of this step's loss, means over all processes."""
    settings = run.recipe.uptrain
    logits = settings.kl_weight + settings.lm_weight
    weights = dict(zip(gkd.TERMS, (settings.cosine_weight, settings.kl_weight, logits), strict=True))
    means = zip(gkd.TERMS, (distributed.summed(terms) / distributed.size()).tolist(), strict=True)
    losses = {name: value for name, value in means if weights[name]}
    if distributed.rank() == 0:
        record = {"step": step, "tokens": tokens, "skipped_steps": state.skipped} | losses
        record |= {f"validation_{name}": value for name, value in figures.items()}
        artifacts.append_jsonl(folder / "curve.jsonl", record)
        run.curve("uptrain", step, {"training": losses} | ({"validation": figures} if figures else {}))


# ------------------------------------------------------------------------------------------------ one of several


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
        raise UserError("uptrain.lora_rank: is for one process; use `puzzle uptrain RUN`, or lora_rank: 0")
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
