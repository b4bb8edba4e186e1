"""Make the embedded parent: tokenizer, training, evaluation, model card. `python -m
puzzle.pocket.make --help`.

The pocket parent is a 12-layer Llama (GQA) trained on the source of the Python standard library of
the interpreter that runs this script. Everything about it is decided here; why its size is what it
is stands in docs/log.md. Training is resumable: run the same command again after an interruption.

Optimiser: Muon for the matrices, AdamW for embedding and norms, warm-up, constant rate, linear
decay to zero (WSD, so that the length can still be changed until the decay starts). bf16 autocast
over float32 weights.
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
from puzzle.config import CorpusConfig
from puzzle.data import corpus
from puzzle.progress import Progress, duration
from puzzle.training import checkpoint

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
STAGES = ((0.85, 256), (0.15, 512))  # share of the tokens, sequence length
BATCH_TOKENS = 6144
MATRIX_LR, OTHER_LR, WEIGHT_DECAY, WARMUP_STEPS, DECAY_SHARE = 3e-3, 3e-3, 0.1, 60, 0.4
VALIDATE_EVERY, CHECKPOINT_EVERY = 125, 125
VALIDATION_ROWS = 192


def make_tokenizer(out: Path, config: CorpusConfig) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the training side of the split only."""
    if not (out / "tokenizer.json").exists():
        documents = corpus.documents(config.sources[0], None, config.seed)
        texts = [
            d.text for d in documents if corpus.split_of(d, config.validation_fraction) == "train"
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
    return PreTrainedTokenizerFast.from_pretrained(out)


def next_token_loss(model: LlamaForCausalLM, tokens_BS: torch.Tensor) -> torch.Tensor:
    with torch.autocast(tokens_BS.device.type, torch.bfloat16):
        hidden_BSD = model.model(input_ids=tokens_BS, use_cache=False).last_hidden_state
        logits = hidden_BSD[:, :-1] @ model.lm_head.weight.T
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens_BS[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, data: corpus.Sequences, device: str) -> float:
    model.eval()
    losses = [
        next_token_loss(model, part.to(device)).item()
        for part in data.head(VALIDATION_ROWS).split(24)
    ]
    model.train()
    return sum(losses) / len(losses)


def learning_rate_factor(step: int, steps: int) -> float:
    decay_steps = int(steps * DECAY_SHARE)
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / max(1, decay_steps))


def optimizers(model: LlamaForCausalLM) -> dict[str, torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return {
        "muon": torch.optim.Muon(
            matrices, lr=MATRIX_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        "adamw": torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.0),
    }


def read_corpora(out: Path, progress: Progress) -> dict[int, dict[corpus.Split, corpus.Sequences]]:
    """The packed standard library at every sequence length of the schedule."""
    data = {}
    for _, length in STAGES:
        config = CorpusConfig(sequence_length=length, train_tokens=10**9, validation_tokens=10**9)
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
    torch.manual_seed(0)
    progress = Progress()
    steps = tokens // BATCH_TOKENS
    first_long = int(steps * STAGES[0][0])
    data = read_corpora(out, progress)
    config = LlamaConfig(**SHAPE)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).to(device)  # type: ignore[arg-type]
    optims = optimizers(model)
    path = out / "checkpoint.safetensors"
    step, _ = checkpoint.restore(path, {"model": model}, optims)
    if compile_layers:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    progress.say(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, step {step} of {steps}"
    )
    began, began_step, running = time.perf_counter(), step, 0.0
    while step < steps:
        length = STAGES[0][1] if step < first_long else STAGES[1][1]
        tokens_BS = data[length]["train"].batch(step, BATCH_TOKENS // length).to(device)
        factor = learning_rate_factor(step, steps)
        checkpoint.set_learning_rate(optims["muon"], MATRIX_LR * factor)
        checkpoint.set_learning_rate(optims["adamw"], OTHER_LR * factor)
        loss = next_token_loss(model, tokens_BS)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims.values():
            optim.step()
            optim.zero_grad(set_to_none=True)
        step += 1
        running = loss.item() if not running else 0.98 * running + 0.02 * loss.item()
        if step % 25 == 0:
            rate = (step - began_step) / (time.perf_counter() - began)
            line = f"step {step}/{steps} loss {running:.4f} {rate * BATCH_TOKENS:,.0f} tok/s"
            progress.say(f"{line} {duration((steps - step) / rate)} left")
        if step % VALIDATE_EVERY == 0 or step == steps:
            value = validation_loss(model, data[STAGES[0][1]]["validation"], device)
            progress.say(f"step {step} validation loss {value:.4f}")
            record = {
                "step": step,
                "tokens": step * BATCH_TOKENS,
                "train_loss": running,
                "validation_loss": value,
            }
            artifacts.append_jsonl(out / "curve.jsonl", record)
            if not math.isfinite(value):
                raise RuntimeError("training diverged")
        if step % CHECKPOINT_EVERY == 0 or step == steps:
            checkpoint.save(path, step, {"model": model}, optims)
    return model


def finish(model: LlamaForCausalLM, out: Path, tokens: int) -> None:
    """Write the parent as it is shipped: bf16 safetensors, tokenizer, model card with the figures
    of this run.
    """
    folder = out / "model"
    data = read_corpora(out, Progress())[STAGES[0][1]]
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer = make_tokenizer(out, CorpusConfig())
    tokenizer.save_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    unique = len(data["train"]) * STAGES[0][1]
    curve = artifacts.read_jsonl(out / "curve.jsonl")
    rows = "\n".join(
        f"| {r['step']} | {r['tokens']:,} | {r['train_loss']:.3f} | {r['validation_loss']:.3f} |"
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

A Llama (`LlamaForCausalLM`) of {sum(p.numel() for p in model.parameters()):,} parameters for demonstrations and
tests: {SHAPE["num_hidden_layers"]} layers, hidden size {SHAPE["hidden_size"]}, FFN {SHAPE["intermediate_size"]},
{SHAPE["num_attention_heads"]} query and {SHAPE["num_key_value_heads"]} KV heads of {SHAPE["head_dim"]}, tied
embeddings, a byte-level BPE vocabulary of {VOCAB_SIZE}. {size / 1e6:.1f} MB in bf16. It completes Python badly, but
not at random.

## How it was made
`python -m puzzle.pocket.make --tokens {tokens}` (torch {torch.__version__}).

- Text: the source of the standard library of Python {artifacts.versions()["python"]}, without `encodings` and
  `pydoc_data`. A file belongs to validation by a hash of its name ({CorpusConfig().validation_fraction:.0%} of the
  files); neither training nor the tokenizer saw those. {unique:,} training tokens,
  {len(data["validation"]) * STAGES[0][1]:,} validation tokens.
- Training: {tokens:,} tokens ({tokens / unique:.1f} epochs), batches of {BATCH_TOKENS} tokens, sequences of 256 and,
  for the last {STAGES[1][0]:.0%}, 512. Muon (matrices) and AdamW (the rest) at {MATRIX_LR}, weight decay
  {WEIGHT_DECAY}, {WARMUP_STEPS} steps of warm-up, linear decay to zero over the last {DECAY_SHARE:.0%}. bf16 autocast
  over float32 weights.

| step | tokens | training loss | validation loss |
| --- | --- | --- | --- |
{rows}

The standard library is licensed under the PSF licence; the weights are ours, under Apache-2.0.
""",
    )


def main() -> None:
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
    finish(model, args.out, args.tokens)
    print(args.out / "model")


if __name__ == "__main__":
    main()
