"""Stage `uptrain`: global knowledge distillation of the assembled child (paper: section 4.3).

    loss = w_cos * sum over layers of (1 - cos(h_child, h_parent)) + w_kl * KL(parent || child) + w_lm * LM loss

Parent and child walk through their layers in step, so the parent's hidden states live for one layer only; logits
exist in chunks (see losses.py). AdamW on float32 weights, bf16 autocast, warm-up and cosine decay.

Reads: `child/`, the parent, the corpus. Writes: `uptrained/` (same format), `curve.jsonl`; a checkpoint while it runs.
"""

import math
from pathlib import Path
from typing import Any

import torch

from puzzle import artifacts, assemble, card, checkpoint, child, evaluate
from puzzle.losses import cosine_distance, distillation_losses
from puzzle.modeling_puzzle import PuzzleForCausalLM
from puzzle.run import Run

VALIDATION_SEQUENCES = 32
CURVE_EVERY = 5


def inputs(run: Run) -> dict[str, Any]:
    return run.data_inputs | {
        "assemble": run.fingerprint_of("assemble"), "uptrain": run.recipe.uptrain.model_dump(mode="json"),
    }  # fmt: skip


def run(run: Run, folder: Path) -> dict[str, Any]:
    source = run.stage_folder("assemble")
    student = child.load(source, torch.float32, run.device, run.attention).train()
    student.requires_grad_(True)
    train(run, folder, student)
    architecture = child.read_architecture(source)
    config = run.parent.child_config(architecture)
    child.save(folder, config, architecture, student.state_dict(), run.parent.folder, card.text(run, architecture))
    return {"weights": assemble.weights_fingerprint(folder)}


def train(run: Run, folder: Path, student: PuzzleForCausalLM) -> None:
    settings, data, parent = run.recipe.uptrain, run.corpus["train"], run.parent_model
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    path = folder / checkpoint.FOLDER / "uptrain.safetensors"
    start, counters = checkpoint.restore(path, {"student": student}, {"adamw": optimizer})
    artifacts.keep_jsonl(folder / "curve.jsonl", lambda record: record["step"] <= start)
    batch_tokens = settings.batch_sequences * run.recipe.corpus.sequence_length
    steps = -(-settings.tokens // batch_tokens)
    # BLD used the first batches of the stream; go on where it stopped, so that fresh text comes first
    offset = -(-run.recipe.library.tokens // batch_tokens)
    skipped = counters.get("skipped", 0)
    with run.progress.task("uptraining", steps * batch_tokens, "tokens") as task:
        task.skip(start * batch_tokens)
        for step in range(start, steps):
            factor = checkpoint.cosine_schedule(step, steps, settings.warmup_share)
            checkpoint.set_learning_rate(optimizer, settings.learning_rate * factor)
            tokens_BS = data.batch(offset + step, settings.batch_sequences).to(run.device)
            cosine, kl, lm = losses(run, parent, student, tokens_BS)
            loss = settings.cosine_weight * cosine + settings.kl_weight * kl + settings.lm_weight * lm
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), settings.gradient_clip)
            if torch.isfinite(norm):
                optimizer.step()
            else:
                skipped += 1
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            record: dict[str, Any] = {"step": done, "tokens": done * batch_tokens, "skipped_steps": skipped}
            record |= {"cosine": cosine.item(), "kl": kl.item(), "lm_loss": lm.item()}
            if done % settings.validate_steps == 0 or done == steps:
                record |= {f"validation_{k}": v for k, v in validate(run, student).items()}
            if done % CURVE_EVERY == 0 or done == steps or "validation_kl" in record:
                artifacts.append_jsonl(folder / "curve.jsonl", record)
            if done % settings.checkpoint_steps == 0 and done < steps:
                checkpoint.save(path, done, {"student": student}, {"adamw": optimizer}, {"skipped": skipped})
            task.advance(batch_tokens, f"KL {kl.item():.4f}")
    if not math.isfinite(kl.item()) or skipped == steps:
        raise RuntimeError("uptraining diverged: every step was non-finite")


def losses(
    run: Run, parent: PuzzleForCausalLM, student: PuzzleForCausalLM, tokens_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum over layers of the cosine distance, KL, LM loss) of one batch, float32 scalars."""
    settings = run.recipe.uptrain
    with run.autocast():
        hidden, context = student.model.embed(tokens_BS)
        with torch.no_grad():
            target, parent_context = parent.model.embed(tokens_BS)
        cosine = torch.zeros((), device=run.device)
        for layer, parent_layer in zip(student.model.layers, parent.model.layers, strict=True):
            hidden = layer(hidden, **context)
            with torch.no_grad():
                target = parent_layer(target, **parent_context)
            if settings.cosine_weight:
                cosine = cosine + cosine_distance(hidden, target)
        with torch.no_grad():
            target = parent.model.norm(target)
        kl, lm = distillation_losses(
            student.model.norm(hidden)[:, :-1].flatten(0, 1), student.lm_head.weight,
            target[:, :-1].flatten(0, 1), parent.lm_head.weight, tokens_BS[:, 1:].flatten(),
            temperature=settings.temperature, chunk_tokens=settings.chunk_tokens,
        )  # fmt: skip
    return cosine, kl, lm


def validate(run: Run, student: PuzzleForCausalLM) -> dict[str, float]:
    student.eval()
    tokens = run.corpus["validation"].head(VALIDATION_SEQUENCES)
    metrics = evaluate.quality(run, student, tokens)
    student.train()
    return metrics
