"""Stage `library`: train every variant by blockwise local distillation (paper: section 3; one
lesson: `bld.py`).

    for chunk of batches:                    # the unit of loss when interrupted
        for layer:                           # activations of the chunk pass from layer to layer
            for batch in chunk:  one parent block forward; every variant of the layer takes one step
            every variant: validation loss, checkpoint

No gradient crosses blocks, so one parent forward serves all variants, and the training of m + n
subblocks covers m * n blocks (decoupled). With `library.coupled` pairs are trained instead, in the
space that a first, decoupled search has narrowed, starting from its library (appendix F.1.1).
Parent and no-op subblocks need no training.

Resident, the parent and all trainees stay in memory. Streamed, one layer of the parent is read from
its files at a time and trainees come from disk and go back to it: the same arithmetic in the same
order, so the same library.

Reads: the parent, the corpus. Writes: `library/<layer>.<slot>.<variant>.safetensors` (float32,
names relative to the layer), `index.jsonl` (normalised MSE before and after), `curve.jsonl`; a
checkpoint per variant while it runs.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from puzzle import artifacts, plan
from puzzle.library import initialization
from puzzle.library.bld import Lesson, Trainee, mean
from puzzle.model import variants as subblocks
from puzzle.model.architecture import FFN, Attention, Block, Subblock
from puzzle.model.layers import ParentLayers, StreamedLayers
from puzzle.model.modeling_puzzle import PuzzleDecoderLayer
from puzzle.run import Run, return_freed_memory
from puzzle.training import checkpoint

Batches = list[torch.Tensor]


def inputs(run: Run) -> dict[str, Any]:
    settings = run.recipe.library.model_dump(
        mode="json", exclude={"memory"}
    )  # the same library either way
    first = {"first": run.first.fingerprint_of("search")} if run.first else {}
    return run.data_inputs | {"library": settings, "deploy": run.recipe.deploy} | first


def run(run: Run, folder: Path) -> dict[str, Any]:
    run.progress.say(f"search space: {run.space.summary()}")
    if "vllm" in run.recipe.deploy and not run.parent.shape.stock:
        run.progress.say(
            "  vllm serves children of this family through our plugin: install puzzle-nas where you serve"
        )
    for line in run.space.left_out:
        run.progress.say(f"  left out: {line}")
    trainees = enrol(run)
    if trainees:
        streamed = plan.is_streamed(run)
        parent = (
            StreamedLayers(run.parent, *run.placement)
            if streamed
            else ParentLayers(run.parent_model)
        )
        initialise(run, folder, parent, trainees, keep=not streamed)
        train(run, folder, parent, trainees, keep=not streamed)
    for trainee in trainees:
        _write(run, folder, trainee)
    records = [_record(run, folder, trainee) for trainee in trainees] + artifacts.read_jsonl(
        _no_ops(folder)
    )
    artifacts.write_jsonl(folder / "index.jsonl", sorted(records, key=lambda r: r["layer"]))
    names = [{"layer": t.layer, "slot": t.slot, "variant": t.variant} for t in trainees]
    curve = (name | record for name, t in zip(names, trainees, strict=True) for record in t.history)
    artifacts.write_jsonl(folder / "curve.jsonl", curve)
    return {"index": artifacts.file_fingerprint(folder / "index.jsonl"), "variants": len(trainees)}


def enrol(run: Run) -> list[Trainee]:
    """What is to be trained, in a fixed order: subblocks (decoupled) or pairs (coupled)."""
    settings, shape = run.recipe.library, run.parent.shape
    batch_tokens = settings.batch_sequences * run.recipe.corpus.sequence_length
    trainees = []
    for layer, options in enumerate(run.space.layers):
        halves: list[tuple[Attention | None, FFN | None]]
        if settings.coupled:
            halves = [
                (b.attention, b.ffn)
                for b in options.blocks
                if is_trained_pair(b, shape.parent_block)
            ]
        else:
            wanted = [v for v in options.subblocks if subblocks.is_trained(v, shape)]
            halves = [(v, None) if isinstance(v, Attention) else (None, v) for v in wanted]
        for attention, ffn in halves:
            trainee = Trainee(layer, attention, ffn, 0)
            own = settings.budgets.get(
                f"{trainee.slot}.{trainee.variant}", settings.budgets.get(trainee.variant)
            )
            trainee.steps = -(-(own or settings.tokens) // batch_tokens)
            trainees.append(trainee)
    return trainees


def is_trained_pair(block: Block, parent: Block) -> bool:
    return block != parent and not (block.attention.kind == block.ffn.kind == "no_op")


# ----------------------------------------------------------------------------------- initialisation


def initialise(
    run: Run, folder: Path, parent: ParentLayers, trainees: list[Trainee], keep: bool
) -> None:
    """Give every trainee its first weights and its first validation loss, layer by layer; what is
    on disk stays.
    """
    missing = [t for t in trainees if not _checkpoint(folder, t).exists()]
    no_ops = {(r["layer"], r["slot"]) for r in artifacts.read_jsonl(_no_ops(folder))}
    wanted = [
        (i, v) for i, o in enumerate(run.space.layers) for v in o.subblocks if v.kind == "no_op"
    ]
    if missing or any((i, v.slot) not in no_ops for i, v in wanted):
        settings = run.recipe.library
        tokens_NS = run.corpus["train"].batch(0, settings.calibration_sequences)
        calibration, context = _embed(run, parent, list(tokens_NS.split(settings.batch_sequences)))
        validation, _ = _embed(run, parent, _validation(run))
        with run.progress.task("initialising the library", len(run.space.layers), "layers") as task:
            for layer in range(len(run.space.layers)):
                own = [t for t in missing if t.layer == layer]
                slots = [v.slot for i, v in wanted if i == layer and (i, v.slot) not in no_ops]
                with parent.layer(layer) as module:
                    _initialise_layer(
                        run,
                        folder,
                        layer,
                        own,
                        slots,
                        module,
                        calibration,
                        validation,
                        context,
                        keep,
                    )
                    _advance(run, module, calibration, context)
                    _advance(run, module, validation, context)
                task.advance()
    for trainee in trainees:
        if not trainee.history:
            trainee.recall(_checkpoint(folder, trainee))


def _initialise_layer(
    run: Run,
    folder: Path,
    layer: int,
    trainees: list[Trainee],
    no_ops: list[str],
    module: PuzzleDecoderLayer,
    calibration: Batches,
    validation: Batches,
    context: dict[str, Any],
    keep: bool,
) -> None:
    with run.autocast():
        least_squares = run.recipe.library.initialization == "least_squares"
        found = initialization.calibrate(module, _moved(run, calibration), context, least_squares)
    for trainee in trainees:
        first = _first_state(run, trainee, module.state_dict(), found)
        _initialise_one(run, folder, trainee, first, module, validation, context, keep)
    for slot in no_ops:
        _note_no_op(run, folder, layer, slot, module, validation, context)


def _initialise_one(
    run: Run,
    folder: Path,
    trainee: Trainee,
    state: Mapping[str, torch.Tensor],
    parent_layer: PuzzleDecoderLayer,
    validation: Batches,
    context: dict[str, Any],
    keep: bool,
) -> None:
    module = _module(run, trainee)
    module.load_state_dict(state)
    trainee.begin(module)
    errors = _errors(run, [trainee], parent_layer, validation, context)
    trainee.history = [{"tokens": 0, "validation": errors[trainee.key]}]
    trainee.save(_checkpoint(folder, trainee))
    if not keep:
        _release([trainee])


def _release(group: list[Trainee]) -> None:
    for trainee in group:
        trainee.release()
    return_freed_memory()


def _first_state(
    run: Run,
    trainee: Trainee,
    layer_state: Mapping[str, torch.Tensor],
    found: initialization.Calibration,
) -> Mapping[str, torch.Tensor]:
    """Training-free weights of a subblock; a pair starts from the first run's library."""
    if trainee.attention and trainee.ffn:
        assert run.first is not None
        block = Block(trainee.attention, trainee.ffn)
        return {
            name: t.float()
            for name, t in read_block(run.first, trainee.layer, block, layer_state).items()
        }
    variant = trainee.attention or trainee.ffn
    assert variant is not None
    return initialization.initial_state(layer_state, variant, run.parent.shape, found)


def _note_no_op(
    run: Run,
    folder: Path,
    layer: int,
    slot: str,
    module: PuzzleDecoderLayer,
    validation: Batches,
    context: dict[str, Any],
) -> None:
    with torch.no_grad(), run.autocast():
        loss = mean(
            [Lesson.of(module, x, context).no_op_error(slot) for x in _moved(run, validation)]
        )
    record = {
        "layer": layer,
        "slot": slot,
        "variant": "no_op",
        "file": None,
        "nmse_before": loss,
        "nmse_after": loss,
    }
    artifacts.append_jsonl(_no_ops(folder), record | {"tokens": 0})


# ----------------------------------------------------------------------------------------- training


def train(
    run: Run, folder: Path, parent: ParentLayers, trainees: list[Trainee], keep: bool
) -> None:
    """BLD, chunk by chunk and layer by layer; goes on from the checkpoints in `folder`."""
    settings = run.recipe.library
    steps = max(trainee.steps for trainee in trainees)
    batch_tokens = settings.batch_sequences * run.recipe.corpus.sequence_length
    with run.progress.task(
        f"BLD of {len(trainees)} variants", steps * batch_tokens, "tokens"
    ) as task:
        for first in range(0, steps, settings.chunk_steps):
            last = min(first + settings.chunk_steps, steps)
            pending = [t for t in trainees if not t.done and t.step < last]
            if not pending:
                task.skip((last - first) * batch_tokens)
                continue
            depth = max(trainee.layer for trainee in pending) + 1
            training, context = _embed(
                run, parent, [_batch(run, step) for step in range(first, last)]
            )
            validation, _ = _embed(run, parent, _validation(run))
            for layer in range(depth):
                own = [t for t in pending if t.layer == layer]
                groups = [own] if keep else ([[t] for t in own] or [[]])
                with parent.layer(layer) as module:
                    for group in groups:
                        _learn(
                            run,
                            folder,
                            group,
                            module,
                            training,
                            validation,
                            context,
                            group is groups[-1],
                        )
                        if not keep:
                            _release(group)
                losses = [t.history[-1]["validation"] for t in own]
                note = f"layer {layer}" + (f", mean nMSE {mean(losses):.4f}" if losses else "")
                task.advance((last - first) * batch_tokens / depth, note)


def _learn(
    run: Run,
    folder: Path,
    group: list[Trainee],
    module: PuzzleDecoderLayer,
    training: Batches,
    validation: Batches,
    context: dict[str, Any],
    final: bool,
) -> None:
    """One layer, one chunk: every trainee of the group learns from every batch. `final`: hand the
    outputs on.
    """
    settings = run.recipe.library
    losses: dict[str, list[torch.Tensor]] = {trainee.key: [] for trainee in group}
    for trainee in group:
        if trainee.module is None:
            trainee.restore(_checkpoint(folder, trainee), _module(run, trainee))
    for index, x_BSD in enumerate(_moved(run, training)):
        with run.autocast():
            lesson = Lesson.of(module, x_BSD, context)
            for trainee in group:
                if not trainee.done:
                    losses[trainee.key].append(trainee.learn(lesson, settings))
        if final:
            training[index] = lesson.o_BSD.to(training[index].device)
    errors = _errors(run, group, module, validation, context)
    if final:
        _advance(run, module, validation, context)
    for trainee in group:
        train_loss = torch.stack(losses[trainee.key]).mean().item()
        tokens = trainee.step * settings.batch_sequences * run.recipe.corpus.sequence_length
        trainee.take_stock(train_loss, errors[trainee.key], tokens, settings)
        if trainee.stopped:
            run.progress.say(f"  {trainee.key}: stopped, {trainee.stopped}")
        trainee.save(_checkpoint(folder, trainee))
        run.curve("library", trainee.step, {trainee.key: trainee.history[-1]})


def _errors(
    run: Run,
    group: list[Trainee],
    module: PuzzleDecoderLayer,
    validation: Batches,
    context: dict[str, Any],
) -> dict[str, float]:
    """Validation loss of every trainee of a layer: the mean over batches."""
    losses: dict[str, list[float]] = {trainee.key: [] for trainee in group}
    if group:
        with torch.no_grad(), run.autocast():
            for x_BSD in _moved(run, validation):
                lesson = Lesson.of(module, x_BSD, context)
                for trainee in group:
                    losses[trainee.key].append(trainee.error(lesson).item())
    return {key: mean(values) for key, values in losses.items()}


def _embed(
    run: Run, parent: ParentLayers, batches: list[torch.Tensor]
) -> tuple[Batches, dict[str, Any]]:
    """Layer 0's input of every batch, [B, S, D] each, and the context of a batch of one, which fits
    any other.
    """
    with torch.no_grad(), run.autocast():
        embedded = [parent.embed(tokens_BS.to(run.device))[0] for tokens_BS in batches]
        _, context = parent.embed(batches[0][:1].to(run.device))
    return [x.cpu() for x in embedded] if parent.on_host else embedded, context


def _moved(run: Run, batches: Batches) -> Iterator[torch.Tensor]:
    return (x_BSD.to(run.device, non_blocking=True) for x_BSD in batches)


@torch.no_grad()
def _advance(
    run: Run, module: PuzzleDecoderLayer, batches: Batches, context: dict[str, Any]
) -> None:
    """Replace a layer's inputs by its outputs."""
    with run.autocast():
        for index, x_BSD in enumerate(_moved(run, batches)):
            batches[index] = module(x_BSD, **context).to(batches[index].device)


def _batch(run: Run, step: int) -> torch.Tensor:
    return run.corpus["train"].batch(step, run.recipe.library.batch_sequences)


def _validation(run: Run) -> list[torch.Tensor]:
    settings = run.recipe.library
    return list(
        run.corpus["validation"].head(settings.validation_sequences).split(settings.batch_sequences)
    )


# ------------------------------------------------------------------------------------------ machine


def _module(run: Run, trainee: Trainee) -> PuzzleDecoderLayer:
    no_attention, no_ffn = Attention("no_op"), FFN("no_op")
    block = Block(trainee.attention or no_attention, trainee.ffn or no_ffn)
    return subblocks.block_module(run.parent, trainee.layer, block, run.attention).to(run.device)


def _checkpoint(folder: Path, trainee: Trainee) -> Path:
    return folder / checkpoint.FOLDER / f"{trainee.key}.safetensors"


def _no_ops(folder: Path) -> Path:
    return folder / checkpoint.FOLDER / "no_ops.jsonl"


def _write(run: Run, folder: Path, trainee: Trainee) -> None:
    """Write a variant's weights, from memory or from its checkpoint."""
    if trainee.module is not None:
        state = trainee.module.state_dict()
    else:
        state = checkpoint.weights(_checkpoint(folder, trainee), "variant")
    with artifacts.atomic_path(folder / f"{trainee.key}.safetensors") as path:
        save_file({name: t.detach().float().cpu().contiguous() for name, t in state.items()}, path)


def _record(run: Run, folder: Path, trainee: Trainee) -> dict[str, Any]:
    file = f"{trainee.key}.safetensors"
    return {
        "layer": trainee.layer,
        "slot": trainee.slot,
        "variant": trainee.variant,
        "file": file,
        "sha256": artifacts.file_fingerprint(folder / file),
        "nmse_before": trainee.history[0]["validation"],
        "nmse_after": trainee.history[-1]["validation"],
        "tokens": trainee.history[-1]["tokens"],
        "stopped": trainee.stopped,
        "seed": run.recipe.corpus.seed,
    }


# ------------------------------------------------------------------------------------------ reading


def read_index(run: Run) -> list[dict[str, Any]]:
    """One record per trained variant and per no-op, with its validation normalised MSE before and
    after training.
    """
    return artifacts.read_jsonl(run.stage_folder("library") / "index.jsonl")


def read_curve(run: Run) -> list[dict[str, Any]]:
    return artifacts.read_jsonl(run.stage_folder("library") / "curve.jsonl")


def read_state(
    run: Run, layer: int, variant: Subblock, parent_layer_state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights of a subblock: trained ones from the library, the parent's from the parent, none
    for a no-op.
    """
    if variant.kind == "no_op":
        return {}
    if not subblocks.is_trained(variant, run.parent.shape):
        return subblocks.subblock_state(parent_layer_state, type(variant))
    half = (
        Trainee(layer, variant, None, 0)
        if isinstance(variant, Attention)
        else Trainee(layer, None, variant, 0)
    )
    return load_file(run.stage_folder("library") / f"{half.key}.safetensors")


def read_block(
    run: Run, layer: int, block: Block, parent_layer_state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights of a whole block: a pair trained together, or two subblocks composed."""
    if run.recipe.library.coupled and is_trained_pair(block, run.parent.shape.parent_block):
        key = Trainee(layer, block.attention, block.ffn, 0).key
        return load_file(run.stage_folder("library") / f"{key}.safetensors")
    halves = (
        read_state(run, layer, half, parent_layer_state) for half in (block.attention, block.ffn)
    )
    return {name: tensor for state in halves for name, tensor in state.items()}
