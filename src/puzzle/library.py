"""Stage `library`: train every subblock variant by decoupled blockwise local distillation (paper: section 3).

Each variant sees the parent's activations and learns to give the parent's block output:

    attention a_j:  o' = f_parent(a_j(x))      FFN f_k:  o' = f_k(a_parent(x))      loss = |o' - o|^2 / |o|^2

No gradient crosses blocks, so one parent forward serves all variants of all layers, and the training of
m + n subblocks covers m * n blocks. Parent and no-op subblocks need no training.

Reads: the parent, the corpus. Writes: `library/<layer>.<slot>.<variant>.safetensors` (float32, names relative to
the layer), `index.jsonl` (normalised MSE before and after), `curve.jsonl`; a checkpoint while it runs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from puzzle import artifacts, checkpoint, subblocks
from puzzle.architecture import Attention, Subblock
from puzzle.losses import normalized_mse
from puzzle.modeling_puzzle import PuzzleDecoderLayer, PuzzleForCausalLM
from puzzle.run import Run

CURVE_EVERY = 10


@dataclass
class Trainee:
    """One variant of one layer in training."""

    layer: int
    variant: Subblock
    module: PuzzleDecoderLayer
    nmse_before: float = float("nan")
    nmse_after: float = float("nan")
    skipped_steps: int = 0

    @property
    def key(self) -> str:
        return f"{self.layer:03d}.{subblocks.slot(self.variant)}.{self.variant.name}"

    def block_output(
        self, parent_layer: PuzzleDecoderLayer, x_BSD: torch.Tensor, h_BSD: torch.Tensor, context: dict[str, Any]
    ) -> torch.Tensor:
        """The parent's block with this subblock in place, from the block's input x or its attention output h."""
        if isinstance(self.variant, Attention):
            return parent_layer.feed_forward(self.module.attention(x_BSD, **context))
        return self.module.feed_forward(h_BSD)


def inputs(run: Run) -> dict[str, Any]:
    return run.data_inputs | {"library": run.recipe.library.model_dump(mode="json"), "deploy": run.recipe.deploy}


def run(run: Run, folder: Path) -> dict[str, Any]:
    settings, data = run.recipe.library, run.corpus
    run.progress.say(f"search space: {run.space.summary()}")
    for line in run.space.left_out:
        run.progress.say(f"  left out: {line}")
    parent = run.parent_model
    trainees = initialise(run, parent)
    by_layer = [[t for t in trainees if t.layer == layer] for layer in range(len(parent.model.layers))]
    steps = -(-settings.tokens // (settings.batch_sequences * run.recipe.corpus.sequence_length))
    if trainees:
        validation = data["validation"].head(settings.validation_sequences).split(settings.batch_sequences)
        _validate(run, parent, by_layer, validation, "nmse_before")
        train(run, folder, parent, by_layer, steps)
        _validate(run, parent, by_layer, validation, "nmse_after")
    index = [_write(folder, trainee, steps, settings, run) for trainee in trainees]
    artifacts.write_jsonl(folder / "index.jsonl", index)
    return {"index": artifacts.file_fingerprint(folder / "index.jsonl"), "variants": len(index)}


def initialise(run: Run, parent: PuzzleForCausalLM) -> list[Trainee]:
    """Training-free initialisation of every variant that will be trained, in a fixed order."""
    contributions = channel_contributions(run, parent)
    trainees = []
    for layer, options in enumerate(run.space.layers):
        state = parent.model.layers[layer].state_dict()
        for variant in options.subblocks:
            if subblocks.is_trained(variant, run.parent.shape):
                module = subblocks.module(run.parent, variant, run.attention).to(run.device)
                module.load_state_dict(subblocks.initial_state(state, variant, run.parent.shape, contributions[layer]))
                trainees.append(Trainee(layer, variant, module))
    return trainees


@torch.no_grad()
def channel_contributions(run: Run, parent: PuzzleForCausalLM) -> list[torch.Tensor]:
    """The paper's channel contribution of every FFN channel of every layer, on calibration sequences, [L][I]."""
    settings = run.recipe.library
    sums = [torch.zeros(run.parent.shape.intermediate_size, device=run.device) for _ in parent.model.layers]

    def collect(layer: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            sums[layer] += args[0].float().abs().sum(dim=(0, 1))

        return hook

    hooks = [layer.mlp.down_proj.register_forward_pre_hook(collect(i)) for i, layer in enumerate(parent.model.layers)]
    tokens_NS = run.corpus["train"].batch(0, settings.calibration_sequences)
    with run.autocast():
        for tokens_BS in tokens_NS.split(settings.batch_sequences):
            parent.model(tokens_BS.to(run.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [
        subblocks.channel_contribution(total, tokens_NS.numel(), layer.mlp.down_proj.weight)
        for total, layer in zip(sums, parent.model.layers, strict=True)
    ]


def train(run: Run, folder: Path, parent: PuzzleForCausalLM, by_layer: list[list[Trainee]], steps: int) -> None:
    """BLD: one parent forward per batch, every variant of every layer learns from it."""
    settings, data = run.recipe.library, run.corpus["train"]
    modules = {trainee.key: trainee.module for layer in by_layer for trainee in layer}
    parameters = [p for module in modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    path = folder / checkpoint.FOLDER / "library.safetensors"
    start, counters = checkpoint.restore(path, modules, {"adamw": optimizer})
    for trainee in (t for layer in by_layer for t in layer):
        trainee.skipped_steps = counters.get(trainee.key, 0)
    artifacts.keep_jsonl(folder / "curve.jsonl", lambda record: record["step"] <= start)
    batch_tokens = settings.batch_sequences * run.recipe.corpus.sequence_length
    with run.progress.task(f"BLD of {len(modules)} variants", steps * batch_tokens, "tokens") as task:
        task.skip(start * batch_tokens)
        for step in range(start, steps):
            factor = checkpoint.cosine_schedule(step, steps, settings.warmup_share)
            checkpoint.set_learning_rate(optimizer, settings.learning_rate * factor)
            tokens_BS = data.batch(step, settings.batch_sequences).to(run.device)
            losses: dict[str, torch.Tensor] = {}
            for layer, parent_layer, x, h, o, context in parent_activations(run, parent, tokens_BS):
                for trainee in by_layer[layer]:
                    with run.autocast():
                        loss = normalized_mse(trainee.block_output(parent_layer, x, h, context), o)
                    loss.backward()
                    losses[trainee.key] = loss.detach()
            for trainee in (t for layer in by_layer for t in layer):
                norm = torch.nn.utils.clip_grad_norm_(trainee.module.parameters(), settings.gradient_clip)
                if not torch.isfinite(norm):
                    trainee.module.zero_grad(set_to_none=True)
                    trainee.skipped_steps += 1
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            mean = sum(loss.item() for loss in losses.values()) / len(losses)
            if done % CURVE_EVERY == 0 or done == steps:
                curve = {"step": done, "tokens": done * batch_tokens}
                artifacts.append_jsonl(
                    folder / "curve.jsonl", curve | {"nmse": {k: round(v.item(), 6) for k, v in losses.items()}}
                )
            if done % settings.checkpoint_steps == 0:
                skipped = {t.key: t.skipped_steps for layer in by_layer for t in layer if t.skipped_steps}
                checkpoint.save(path, done, modules, {"adamw": optimizer}, skipped)
            task.advance(batch_tokens, f"mean nMSE {mean:.4f}")


def parent_activations(
    run: Run, parent: PuzzleForCausalLM, tokens_BS: torch.Tensor
) -> Iterator[tuple[int, PuzzleDecoderLayer, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]]:
    """(layer, module, block input x, attention output h, block output o, context), layer by layer, without gradients.

    The consumer runs between the layers, so only one layer's activations are alive.
    """
    with torch.no_grad(), run.autocast():
        x_BSD, context = parent.model.embed(tokens_BS)
    for index, layer in enumerate(parent.model.layers):
        with torch.no_grad(), run.autocast():
            h_BSD = layer.attention(x_BSD, **context)
            o_BSD = layer.feed_forward(h_BSD)
        yield index, layer, x_BSD, h_BSD, o_BSD, context
        x_BSD = o_BSD


@torch.no_grad()
def _validate(
    run: Run, parent: PuzzleForCausalLM, by_layer: list[list[Trainee]], batches: tuple[torch.Tensor, ...], field: str
) -> None:
    """Set `field` of every trainee to its normalised MSE, the mean over validation batches."""
    sums = {id(trainee): 0.0 for layer in by_layer for trainee in layer}
    for tokens_BS in batches:
        for layer, parent_layer, x, h, o, context in parent_activations(run, parent, tokens_BS.to(run.device)):
            for trainee in by_layer[layer]:
                with run.autocast():
                    out = trainee.block_output(parent_layer, x, h, context)
                sums[id(trainee)] += normalized_mse(out, o).item() / len(batches)
    for trainee in (t for layer in by_layer for t in layer):
        setattr(trainee, field, sums[id(trainee)])


def _write(folder: Path, trainee: Trainee, steps: int, settings: Any, run: Run) -> dict[str, Any]:
    """Write a variant's weights; its record for the index."""
    file = f"{trainee.key}.safetensors"
    with artifacts.atomic_path(folder / file) as path:
        save_file(
            {name: t.detach().float().cpu().contiguous() for name, t in trainee.module.state_dict().items()}, path
        )
    return {
        "layer": trainee.layer,
        "slot": subblocks.slot(trainee.variant),
        "variant": trainee.variant.name,
        "file": file,
        "sha256": artifacts.file_fingerprint(folder / file),
        "nmse_before": trainee.nmse_before,
        "nmse_after": trainee.nmse_after,
        "tokens": steps * settings.batch_sequences * run.recipe.corpus.sequence_length,
        "skipped_steps": trainee.skipped_steps,
        "seed": run.recipe.corpus.seed,
    }


# ------------------------------------------------------------------------------------------------ reading


def read_index(run: Run) -> list[dict[str, Any]]:
    return artifacts.read_jsonl(run.stage_folder("library") / "index.jsonl")


def read_state(
    run: Run, layer: int, variant: Subblock, parent_layer_state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights of a variant: trained ones from the library, the parent's from the parent, none for a no-op."""
    if variant.kind == "no_op":
        return {}
    if not subblocks.is_trained(variant, run.parent.shape):
        return subblocks.subblock_state(parent_layer_state, type(variant))
    key = Trainee(layer, variant, None).key  # type: ignore[arg-type]
    return load_file(run.stage_folder("library") / f"{key}.safetensors")
