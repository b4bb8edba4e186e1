"""Make the embedded parent: tokenizer, training, evaluation, model card. `python -m puzzle.pocket.make --help`.

The pocket parent is a 12-layer Llama (GQA) trained on the source of the Python standard library of the
interpreter that runs this script. Everything about it is decided here; why its size is what it is stands in
docs/log.md. Training is resumable: run the same command again after an interruption.

Optimiser: Muon for the matrices, AdamW for embedding and norms, warm-up, constant rate, linear decay to zero
(WSD, so that the length can still be changed until the decay starts). bf16 autocast over float32 weights.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from puzzle import artifacts, corpus
from puzzle.config import CorpusConfig
from puzzle.progress import Progress, duration

VOCAB_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"
SHAPE = dict(
    vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=768, num_hidden_layers=12, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=512, rope_theta=10000.0, rms_norm_eps=1e-5,
    tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, initializer_range=0.02,
)  # fmt: skip
STAGES = ((0.85, 256), (0.15, 512))  # share of the tokens, sequence length
BATCH_TOKENS = 6144
MATRIX_LR, OTHER_LR, WEIGHT_DECAY, WARMUP_STEPS, DECAY_SHARE = 3e-3, 3e-3, 0.1, 60, 0.4
VALIDATE_EVERY, CHECKPOINT_EVERY = 125, 125


def make_tokenizer(out: Path, config: CorpusConfig) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the training side of the split only."""
    if not (out / "tokenizer.json").exists():
        source = config.sources[0]
        documents = corpus.documents(source, None, config.seed)
        texts = [d.text for d in documents if corpus.split_of(d, config.validation_fraction) == "train"]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
        ).save_pretrained(out)
    return PreTrainedTokenizerFast.from_pretrained(out)


def next_token_loss(model: LlamaForCausalLM, tokens_BS: torch.Tensor) -> torch.Tensor:
    with torch.autocast(tokens_BS.device.type, torch.bfloat16):
        hidden_BSD = model.model(input_ids=tokens_BS, use_cache=False).last_hidden_state
        logits = hidden_BSD[:, :-1] @ model.lm_head.weight.T
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens_BS[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, data: corpus.Sequences, device: str, rows: int = 192) -> float:
    model.eval()
    losses = [next_token_loss(model, part.to(device)).item() for part in data.head(rows).split(24)]
    model.train()
    return sum(losses) / len(losses)


def learning_rate_factor(step: int, steps: int) -> float:
    decay_steps = int(steps * DECAY_SHARE)
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / max(1, decay_steps))


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def save_checkpoint(path: Path, step: int, model: LlamaForCausalLM, optims: list[torch.optim.Optimizer]) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for i, optim in enumerate(optims):
        for index, state in optim.state_dict()["state"].items():
            tensors |= {f"optim.{i}.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
    with artifacts.atomic_path(path) as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"step": str(step)})


def load_checkpoint(path: Path, model: LlamaForCausalLM, optims: list[torch.optim.Optimizer]) -> int:
    from safetensors import safe_open

    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    model.load_state_dict(weights, strict=False)
    for i, optim in enumerate(optims):
        state = optim.state_dict()
        for name, value in tensors.items():
            if name.startswith(f"optim.{i}."):
                _, _, index, key = name.split(".")
                state["state"].setdefault(int(index), {})[key] = value
        optim.load_state_dict(state)
    return step


def train(out: Path, tokens: int, device: str, compile_layers: bool) -> None:
    torch.manual_seed(0)
    progress = Progress()
    steps = tokens // BATCH_TOKENS
    first_long = int(steps * STAGES[0][0])
    data = {}
    for _, length in STAGES:
        config = CorpusConfig(sequence_length=length)
        tokenizer = make_tokenizer(out, config)
        mark = artifacts.file_fingerprint(out / "tokenizer.json")
        data[length] = corpus.build(
            config, tokenizer, out / f"corpus-{length}", train_tokens=10**9, validation_tokens=200_000,
            tokenizer_fingerprint=mark, progress=progress,
        )  # fmt: skip
        progress.say(f"length {length}: {len(data[length]['train']) * length:,} training tokens")
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="eager", use_cache=False)).to(device)
    optims = optimizers(model)
    checkpoint = out / "checkpoint.safetensors"
    step = load_checkpoint(checkpoint, model, optims) if checkpoint.exists() else 0
    if compile_layers:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    progress.say(f"{sum(p.numel() for p in model.parameters()):,} parameters, step {step} of {steps}")
    began, began_step, running = time.perf_counter(), step, 0.0
    while step < steps:
        length = STAGES[0][1] if step < first_long else STAGES[1][1]
        tokens_BS = data[length]["train"].batch(step, BATCH_TOKENS // length).to(device)
        factor = learning_rate_factor(step, steps)
        for optim, rate in zip(optims, (MATRIX_LR, OTHER_LR), strict=True):
            for group in optim.param_groups:
                group["lr"] = rate * factor
        loss = next_token_loss(model, tokens_BS)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        step += 1
        running = loss.item() if not running else 0.98 * running + 0.02 * loss.item()
        if step % 25 == 0:
            rate = (step - began_step) / (time.perf_counter() - began)
            line = f"step {step}/{steps} loss {running:.4f} {rate * BATCH_TOKENS:,.0f} tok/s"
            progress.say(f"{line} {duration((steps - step) / rate)} left")
        if step % VALIDATE_EVERY == 0 or step == steps:
            value = validation_loss(model, data[256]["validation"], device)
            progress.say(f"step {step} validation loss {value:.4f}")
            record = {"step": step, "tokens": step * BATCH_TOKENS, "train_loss": running, "validation_loss": value}
            artifacts.append_jsonl(out / "curve.jsonl", record)
            if not math.isfinite(value):
                raise RuntimeError("training diverged")
        if step % CHECKPOINT_EVERY == 0 or step == steps:
            save_checkpoint(checkpoint, step, model, optims)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pocket-parent"))
    parser.add_argument("--tokens", type=int, default=30_000_000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train(args.out, args.tokens, args.device, not args.no_compile)
    print(json.dumps({"checkpoint": str(args.out / "checkpoint.safetensors")}))


if __name__ == "__main__":
    main()
