"""Stage `library`: train every variant by blockwise local distillation (paper: section 3).

No gradient crosses blocks, so one parent forward serves all variants, and the training of m + n
subblocks covers m * n blocks (decoupled). With `library.coupled` pairs are trained instead, in the
space that a first, decoupled search has narrowed, starting from its library (appendix F.1.1).
Parent and no-op subblocks need no training. The loop is in `training.py`, one batch in `bld.py`.

Reads: the parent, the corpus. Writes: `library/<layer>.<slot>.<variant>.safetensors` (in the
parent's dtype, names relative to the layer), `index.jsonl`, `curve.jsonl` (`records.py`); a
checkpoint per variant while it runs.
"""

from pathlib import Path

from safetensors.torch import save_file

from puzzle import artifacts
from puzzle.artifacts import Inputs
from puzzle.data import sources
from puzzle.errors import UserError
from puzzle.library import LIBRARY, memory
from puzzle.library.bld import VariantTrainer
from puzzle.library.records import CURVE, INDEX, CurvePoint, VariantRecord
from puzzle.library.relay import Relay
from puzzle.library.training import LibraryTraining
from puzzle.run import NARROWED, Run
from puzzle.stage import Job, Work, always
from puzzle.training import checkpoint, sharding

Made = tuple[VariantRecord, list[CurvePoint]]


def _facts(job: Job) -> Inputs:
    facts = dict(job.run.data_facts)
    if job.run.first is not None:
        if not (job.run.folder / NARROWED).exists():
            raise UserError(
                f"run {job.run.folder}: library.coupled needs a first search; run `puzzle run` "
                "with the recipe"
            )
        facts["first"] = Job(job.run.first).manifest(LIBRARY).fingerprint
        facts["space"] = artifacts.file_fingerprint(job.run.folder / NARROWED)
    return facts


def _check(job: Job) -> None:
    run = job.run
    parent, length = run.parent, run.recipe.corpus.sequence_length
    positions = parent.hf_config.max_position_embeddings
    if length > positions:
        raise UserError(
            f"corpus.sequence_length: got {length}, but the parent takes at most {positions} "
            "positions"
        )
    if len(parent.tokenizer) > parent.shape.vocab_size:
        raise UserError(
            f"parent {parent.name}: its tokenizer has {len(parent.tokenizer)} tokens, its "
            f"embedding only {parent.shape.vocab_size}; give it the tokenizer it was trained with"
        )
    parent.check_weights()
    sources.check(run.recipe.corpus, parent.tokenizer)
    _ = run.full_space


def _execute(job: Job, folder: Path) -> None:
    run = job.run
    run.progress.say(f"search space: {run.space.summary()}")
    if "vllm" in run.recipe.deploy and not run.parent.shape.stock:
        run.progress.say(
            "  vllm serves children of this family through our plugin: install puzzle-nas where "
            "you serve"
        )
    for line in run.space.left_out:
        run.progress.say(f"  left out: {line}")
    trainers, made, relay = make_trainers(run), sharding.shared(_made(folder)), Relay.of(run)
    missing = [t for t in trainers if t.key not in made and t.layer in relay.layers]
    streamed = sharding.shared(memory.is_streamed(run))
    parent = run.parent_layers(streamed=streamed, some=True)
    together = memory.together(run) if streamed else None
    training = LibraryTraining(run, folder, parent, missing, together, relay)
    training.initialise()
    training.train()
    written = sharding.gathered((_write_weights(training), training.no_ops()))
    if sharding.rank() == 0:
        no_ops = []
        for ours, of_layers in written:
            made |= ours
            no_ops += of_layers
        _write(folder, [made[trainer.key] for trainer in trainers], no_ops)
    sharding.barrier()


def make_trainers(run: Run) -> list[VariantTrainer]:
    """What is to be trained, in a fixed order: subblocks (decoupled) or pairs (coupled)."""
    settings = run.recipe.library
    batch_tokens = settings.batch_sequences * run.recipe.corpus.sequence_length
    trainers = []
    for layer, variant in memory.trained_variants(run):
        steps = -(-memory.budget(run, variant) // batch_tokens)
        trainers.append(VariantTrainer(layer, variant, steps=steps))
    return trainers


def _made(folder: Path) -> dict[str, Made]:
    """By key, what a library that is repaired has: variants whose files are all undamaged."""
    points: dict[str, list[CurvePoint]] = {}
    for point in artifacts.read_records(folder / CURVE, CurvePoint):
        points.setdefault(f"{point.layer} {point.slot} {point.variant}", []).append(point)
    made = {}
    for record in artifacts.read_records(folder / INDEX, VariantRecord):
        name = f"{record.layer} {record.slot} {record.variant}"
        if record.file is not None and (folder / record.file).exists() and name in points:
            made[record.file.removesuffix(".safetensors")] = record, points[name]
    return made


def _write_weights(training: LibraryTraining) -> dict[str, Made]:
    """Write the weights of what was trained; its records by key."""
    folder, seed = training.folder, training.run.recipe.corpus.seed
    made = {}
    for trainer in training.trainers:
        file = f"{trainer.key}.safetensors"
        state = checkpoint.weights(training.checkpoint(trainer), "variant")
        with artifacts.atomic_path(folder / file) as path:
            dtype = training.run.parent.dtype
            save_file({name: t.to(dtype).cpu().contiguous() for name, t in state.items()}, path)
        slot, name, history = trainer.variant.slot, trainer.variant.name, trainer.history
        record = VariantRecord(
            layer=trainer.layer,
            slot=slot,
            variant=name,
            file=file,
            nmse_before=history[0].validation,
            nmse_after=history[-1].validation,
            tokens=history[-1].tokens,
            stopped=trainer.stopped,
            seed=seed,
        )
        points = [
            CurvePoint(layer=trainer.layer, slot=slot, variant=name, **point.model_dump())
            for point in history
        ]
        made[trainer.key] = record, points
    return made


def _write(folder: Path, made: list[Made], no_ops: list[VariantRecord]) -> None:
    """Index and curves of all variants."""
    records = [record for record, _ in made] + no_ops
    records.sort(key=lambda record: record.layer)
    artifacts.write_records(folder / INDEX, records)
    curve = [point for _, points in made for point in points]
    artifacts.write_records(folder / CURVE, curve)


WORK = Work(facts=_facts, execute=_execute, need=memory.need, check=_check, is_shared=always)
