"""Make the embedded parent: tokenizer, training, evaluation, model card.

`python -m puzzle.pocket.make --help` shows the options. The pocket parent is a 12-layer Llama (GQA)
trained on the source of the Python standard library of the interpreter that runs this script.
Everything about it is decided here; docs/log.md says why it has this size. Training is resumable:
run the same command again after an interruption.

Optimiser: Muon for the matrices, AdamW for embedding and norms, warm-up, constant rate, linear
decay to zero (WSD, so that the length can still be changed until the decay starts). bf16 autocast
over float32 weights.

Reads: the standard library. Writes, in `--out`: the tokenizer, the packed corpora, a checkpoint,
`curve.jsonl` and the finished parent in `model/`.

Shape legend: B batch, S sequence, D hidden size, V vocabulary.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from puzzle import artifacts
from puzzle.artifacts import Record
from puzzle.config import CorpusConfig
from puzzle.data import corpus
from puzzle.data.packing import split_of
from puzzle.data.sequences import HELD_OUT, Sequences, Split
from puzzle.data.sources import documents
from puzzle.progress import Progress, duration
from puzzle.training import checkpoint, schedules

VOCAB_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.02,
}
SCHEDULE = ((0.85, 256), (0.15, 512))  # share of the tokens, sequence length
BATCH_TOKENS = 6144
MATRIX_LR, OTHER_LR, WEIGHT_DECAY, WARMUP_STEPS, DECAY_SHARE = 3e-3, 3e-3, 0.1, 60, 0.4
VALIDATE_EVERY, CHECKPOINT_EVERY = 125, 125
VALIDATION_ROWS = 192


class CurvePoint(Record):
    """One line of the training curve."""

    step: int
    tokens: int
    train_loss: float
    validation_loss: float


def make_tokenizer(out: Path, config: CorpusConfig) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the training side of the split only; an existing one is read."""
    if not (out / "tokenizer.json").exists():
        texts = [
            document.text
            for document in documents(config.sources[0], None, config.seed)
            if split_of(document, config.held_out_fraction) == "train"
        ]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token=END_OF_TEXT,
            bos_token=END_OF_TEXT,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(out)
    fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(out)
    return fast


def next_token_loss(model: LlamaForCausalLM, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next token, in nats, under bf16 autocast."""
    with torch.autocast(tokens_BS.device.type, torch.bfloat16):
        hidden_BSD = model.model(input_ids=tokens_BS, use_cache=False).last_hidden_state
        logits_BSV = hidden_BSD[:, :-1] @ model.lm_head.weight.T
    return F.cross_entropy(logits_BSV.flatten(0, 1).float(), tokens_BS[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, data: Sequences, device: str) -> float:
    """Mean over the batches of `VALIDATION_ROWS` sequences."""
    model.eval()
    losses = [
        next_token_loss(model, tokens_BS.to(device)).item()
        for tokens_BS in data.head(VALIDATION_ROWS).split(24)
    ]
    model.train()
    return sum(losses) / len(losses)


def learning_rate_factor(step: int, steps: int) -> float:
    """The share of the full rate at a step: warm-up, constant, linear to zero."""
    decay_steps = int(steps * DECAY_SHARE)
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / max(1, decay_steps))


def optimizers(model: LlamaForCausalLM) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return {
        "muon": torch.optim.Muon(
            matrices, lr=MATRIX_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        "adamw": torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.0),
    }


def read_corpora(out: Path, progress: Progress) -> dict[int, dict[Split, Sequences]]:
    """The packed standard library at every sequence length of the schedule."""
    data = {}
    for _, length in SCHEDULE:
        config = CorpusConfig(sequence_length=length, train_tokens=10**9, held_out_tokens=10**9)
        tokenizer = make_tokenizer(out, config)
        data[length] = corpus.build(
            config,
            tokenizer,
            out / f"corpus-{length}",
            tokenizer_fingerprint=artifacts.file_fingerprint(out / "tokenizer.json"),
            progress=progress,
        )
    return data


def train(out: Path, tokens: int, device: str, compile_layers: bool) -> LlamaForCausalLM:
    """Train on `tokens` tokens, from the checkpoint in `out` if there is one.

    Raises `RuntimeError` where the validation loss is not finite.
    """
    torch.manual_seed(0)
    progress = Progress()
    steps = tokens // BATCH_TOKENS
    first_long = int(steps * SCHEDULE[0][0])
    data = read_corpora(out, progress)
    config = LlamaConfig(**SHAPE)
    config._attn_implementation = "eager"
    model: LlamaForCausalLM = LlamaForCausalLM(config)
    model.to(device)  # type: ignore[arg-type]
    optimizer_by_name = optimizers(model)
    path = out / "checkpoint.safetensors"
    step, _ = checkpoint.restore(path, {"model": model}, optimizer_by_name)
    if compile_layers:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    progress.say(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, step {step} of {steps}"
    )
    started, first_step, smoothed_loss = time.perf_counter(), step, 0.0
    while step < steps:
        length = SCHEDULE[0][1] if step < first_long else SCHEDULE[1][1]
        tokens_BS = data[length]["train"].batch(step, BATCH_TOKENS // length).to(device)
        factor = learning_rate_factor(step, steps)
        schedules.set_learning_rate(optimizer_by_name["muon"], MATRIX_LR * factor)
        schedules.set_learning_rate(optimizer_by_name["adamw"], OTHER_LR * factor)
        loss = next_token_loss(model, tokens_BS)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizer_by_name.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        smoothed_loss = (
            loss.item() if not smoothed_loss else 0.98 * smoothed_loss + 0.02 * loss.item()
        )
        if step % 25 == 0:
            rate = (step - first_step) / (time.perf_counter() - started)
            line = f"step {step}/{steps} loss {smoothed_loss:.4f} {rate * BATCH_TOKENS:,.0f} tok/s"
            progress.say(f"{line} {duration((steps - step) / rate)} left")
        if step % VALIDATE_EVERY == 0 or step == steps:
            held_out_loss = validation_loss(model, data[SCHEDULE[0][1]]["validation"], device)
            progress.say(f"step {step} validation loss {held_out_loss:.4f}")
            record = CurvePoint(
                step=step,
                tokens=step * BATCH_TOKENS,
                train_loss=smoothed_loss,
                validation_loss=held_out_loss,
            )
            artifacts.append_record(out / "curve.jsonl", record)
            if not math.isfinite(held_out_loss):
                raise RuntimeError("training diverged")
        if step % CHECKPOINT_EVERY == 0 or step == steps:
            checkpoint.save(path, step, {"model": model}, optimizer_by_name)
    return model


def write_parent(model: LlamaForCausalLM, out: Path, tokens: int) -> None:
    """Write the parent as it is shipped, in `out/model`.

    bf16 safetensors, tokenizer, and a model card with the figures of this run.
    """
    folder = out / "model"
    data = read_corpora(out, Progress())[SCHEDULE[0][1]]
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer = make_tokenizer(out, CorpusConfig())
    tokenizer.save_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    unique = len(data["train"]) * SCHEDULE[0][1]
    held_out = sum(len(data[split]) for split in HELD_OUT) * SCHEDULE[0][1]
    curve = artifacts.read_records(out / "curve.jsonl", CurvePoint)
    rows = "\n".join(
        f"| {r.step} | {r.tokens:,} | {r.train_loss:.3f} | {r.validation_loss:.3f} |"
        for i, r in enumerate(curve)
        if i % max(1, len(curve) // 12) == 0 or i == len(curve) - 1
    )
    artifacts.write_text(
        folder / "README.md",
        f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# The pocket parent of puzzle

A Llama (`LlamaForCausalLM`) of {sum(p.numel() for p in model.parameters()):,} parameters for
demonstrations and tests: {SHAPE["num_hidden_layers"]} layers, hidden size {SHAPE["hidden_size"]},
FFN {SHAPE["intermediate_size"]}, {SHAPE["num_attention_heads"]} query and
{SHAPE["num_key_value_heads"]} KV heads of {SHAPE["head_dim"]}, tied embeddings, a byte-level BPE
vocabulary of {VOCAB_SIZE}. {size / 1e6:.1f} MB in bf16. It completes Python badly, but not at
random.

## How it was made
`python -m puzzle.pocket.make --tokens {tokens}` (torch {torch.__version__}).

- Text: the source of the standard library of Python {artifacts.versions()["python"]}, without
  `encodings` and `pydoc_data`. A file is held out by a hash of its name
  ({CorpusConfig().held_out_fraction:.0%} of the files); neither training nor the tokenizer saw
  those. {unique:,} training tokens, {held_out:,} held out, of which a quarter are for validation.
- Training: {tokens:,} tokens ({tokens / unique:.1f} epochs), batches of {BATCH_TOKENS} tokens,
  sequences of 256 and, for the last {SCHEDULE[1][0]:.0%}, 512. Muon (matrices) and AdamW (the rest)
  at {MATRIX_LR}, weight decay {WEIGHT_DECAY}, {WARMUP_STEPS} steps of warm-up, linear decay to zero
  over the last {DECAY_SHARE:.0%}. bf16 autocast over float32 weights.

| step | tokens | training loss | validation loss |
| --- | --- | --- | --- |
{rows}

The standard library is licensed under the PSF licence; the weights are ours, under Apache-2.0.
""",
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/pocket-parent"))
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = train(args.out, args.tokens, args.device, not args.no_compile)
    write_parent(model, args.out, args.tokens)
    print(args.out / "model")


if __name__ == "__main__":
    main()
