"""Uptraining: memory and time of the loss, and the paper's table of losses at pocket scale.

    python benchmarks/uptrain.py [--json] [--quick] [--bfloat16]
    python benchmarks/uptrain.py --mixes RUN [--tokens N] [--seeds 3] [--out DIR] [--json]

The loss: KL and LM loss of 4096 tokens of width 2048 over a vocabulary of 128,256 (--quick: 512
tokens), value and gradients of hidden states and head, against the plain implementation (all logits
at once, torch's own functions). Memory: each in a process of its own, the peak resident set above
the one with its inputs made; so everything that is allocated counts, the head's gradient included.
Time: those processes, in turn, three of each; medians.

The table (`--mixes`): the child of a finished run is uptrained with the eight mixes of LM loss, KL
and cosine, the same tokens for all, once for every seed (which decides the order of the data).
Held-out KL, LM loss and accuracy. What is done is kept in --out: the same command goes on.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from memory import peak_bytes

from puzzle import artifacts, config
from puzzle.engines import machine
from puzzle.evaluate import stage as evaluate
from puzzle.model import child
from puzzle.progress import Progress
from puzzle.run import Run, keep_freed_memory
from puzzle.training import checkpoint, losses
from puzzle.uptrain import stage as uptrain

VOCABULARY, HIDDEN, TOKENS = 128_256, 2048, 4096
SETTINGS = losses.LogitLoss(kl_weight=1.0, lm_weight=1.0)  # both terms: the case with the most work

# ----------------------------------------------------------------------------------------- the loss


def plain(
    child_TD: torch.Tensor,
    head_VD: torch.Tensor,
    parent_TD: torch.Tensor,
    parent_head_VD: torch.Tensor,
    targets_T: torch.Tensor,
) -> torch.Tensor:
    logits_TV = child_TD @ head_VD.T
    with torch.no_grad():
        target_TV = parent_TD @ parent_head_VD.T
    log_q_TV, log_p_TV = F.log_softmax(logits_TV.float(), -1), F.log_softmax(target_TV.float(), -1)
    kl = F.kl_div(log_q_TV, log_p_TV, log_target=True, reduction="batchmean")
    return SETTINGS.kl_weight * kl + SETTINGS.lm_weight * F.nll_loss(log_q_TV, targets_T)


def chunked(*sides: torch.Tensor) -> torch.Tensor:
    return losses.distillation_losses(*sides, SETTINGS)[0]


def measure_loss(name: str, tokens: int, bfloat16: bool) -> None:
    """In a process of its own: prints bytes above the inputs, seconds, value and size of the
    gradients.
    """
    keep_freed_memory()
    torch.manual_seed(0)
    child_TD = torch.randn(tokens, HIDDEN).requires_grad_()
    head_VD = (torch.randn(VOCABULARY, HIDDEN) / HIDDEN**0.5).requires_grad_()
    parent_TD = child_TD.detach() + 0.3 * torch.randn(tokens, HIDDEN)
    parent_head_VD = head_VD.detach().clone()
    targets_T = torch.randint(VOCABULARY, (tokens,))
    before, began = peak_bytes(), time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss = {"plain": plain, "chunked": chunked}[name](
            child_TD, head_VD, parent_TD, parent_head_VD, targets_T
        )
    loss.backward()
    seconds = time.perf_counter() - began
    norms = [child_TD.grad.norm().item(), head_VD.grad.norm().item()]
    print(
        json.dumps(
            {
                "bytes": peak_bytes() - before,
                "seconds": seconds,
                "loss": loss.item(),
                "gradients": norms,
            }
        )
    )


def compare_losses(tokens: int, bfloat16: bool, rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"plain": [], "chunked": []}
    found: dict[str, Any] = {}
    for _ in range(rounds):
        for name, times in seconds.items():
            words = [sys.executable, __file__, "--child", name, str(tokens), str(int(bfloat16))]
            out = subprocess.run(words, capture_output=True, text=True)
            if out.returncode:
                sys.exit(out.stderr or f"{name}: ended with {out.returncode}")
            one = json.loads(out.stdout.splitlines()[-1])
            times.append(one["seconds"])
            found[name] = one | {"seconds": times, "median_s": statistics.median(times)}
    ours, theirs = found["chunked"], found["plain"]
    ratios = {
        "memory": ours["bytes"] / theirs["bytes"],
        "time": ours["median_s"] / theirs["median_s"],
    }
    dtype = "bfloat16 products" if bfloat16 else "float32"
    print(
        f"{tokens} tokens, width {HIDDEN}, vocabulary {VOCABULARY:,}, {dtype}, {torch.get_num_threads()} threads"
    )
    print(
        "| | peak above the inputs | median seconds | loss | gradient norms |\n| --- | ---: | ---: | ---: | --- |"
    )
    for name, row in found.items():
        norms = ", ".join(f"{norm:.6g}" for norm in row["gradients"])
        print(
            f"| {name} | {row['bytes'] / 1e9:.2f} GB | {row['median_s']:.2f} | {row['loss']:.6f} | {norms} |"
        )
    print(
        f"memory 1/{1 / ratios['memory']:.1f}, time {ratios['time']:.2f}x of plain torch",
        flush=True,
    )
    return {"tokens": tokens, "dtype": dtype, **found, "ratios": ratios}


# ---------------------------------------------------------------------------------------- the mixes

MIXES = {  # the paper's table: its validation KL at about 5B tokens
    "none": 0.19,
    "LM": 0.31,
    "LM+KLD": 0.14,
    "KLD": 0.10,
    "LM+cos": 0.30,
    "cos": 0.16,
    "LM+cos+KLD": 0.14,
    "cos+KLD": 0.11,
}
FINDINGS = [  # (what the paper found, figure, the better mix, the worse mix)
    ("LM alone is worse than no uptraining", "kl", "none", "LM"),
    ("KLD alone improves", "kl", "KLD", "none"),
    ("cosine alone improves", "kl", "cos", "none"),
    ("LM hurts KLD", "kl", "KLD", "LM+KLD"),
    ("LM hurts cosine", "kl", "cos", "LM+cos"),
    ("LM hurts cosine + KLD", "kl", "cos+KLD", "LM+cos+KLD"),
    ("KLD alone has the lowest KL", "kl", "KLD", "cos+KLD"),
    ("cosine + KLD is the most accurate: more than KLD", "top1", "cos+KLD", "KLD"),
    ("cosine + KLD is the most accurate: more than all three", "top1", "cos+KLD", "LM+cos+KLD"),
]


def mixes(folder: Path, out: Path, tokens: int, seeds: int, as_json: bool) -> None:
    path = out / "results.jsonl"
    for seed in range(1, seeds + 1):
        for mix in MIXES:
            done = {(row["mix"], row["seed"], row["tokens"]) for row in artifacts.read_jsonl(path)}
            key = (mix, seed if mix != "none" else 1, tokens if mix != "none" else 0)
            if key not in done:
                began = time.perf_counter()
                figures = one_mix(folder, out, *key)
                row = dict(zip(("mix", "seed", "tokens"), key, strict=True)) | figures
                artifacts.append_jsonl(path, row | {"seconds": time.perf_counter() - began})
                print(
                    f"{mix}, seed {key[1]}: KL {figures['kl']:.4f}, {time.perf_counter() - began:.0f} s",
                    flush=True,
                )
    rows = [
        row
        for row in artifacts.read_jsonl(path)
        if row["tokens"] in (0, tokens) and row["seed"] <= seeds
    ]
    print_mixes(rows, tokens, seeds)
    if as_json:
        print(json.dumps({"tokens": tokens, "seeds": seeds, "rows": rows}))


def one_mix(folder: Path, out: Path, mix: str, seed: int, tokens: int) -> dict[str, float]:
    """Uptrain the run's child with one mix and measure it; the last weights, so that nothing is
    chosen by its KL.
    """
    recipe = Run.open(folder, Progress(quiet=True)).recipe.model_dump(mode="json")
    recipe["uptrain"] |= {
        "lm_weight": float("LM" in mix),
        "kl_weight": float("KLD" in mix),
        "cosine_weight": float("cos" in mix),
        "tokens": tokens,
        "seed": seed,
        "keep": "last",
        "stages": [],
        "patience": 0,
        "processes": 1,
    }
    own, source = out / f"{mix}-{seed}-{tokens}", folder / "child"
    if mix == "none":
        recipe["uptrain"] |= {"kl_weight": 1.0, "tokens": 1}
    run = Run(config.parse(recipe), folder, Progress())
    if mix != "none":
        run.curve = lambda *_: None  # type: ignore[method-assign]  # the finished run's own logs stay as they are
        if not (own / "config.json").exists():
            uptrain.distil(run, own)
        shutil.rmtree(own / checkpoint.FOLDER, ignore_errors=True)
        source = own
    model = child.load(source, torch.float32, run.device, run.attention)
    return evaluate.quality(
        run, model, run.corpus["validation"].head(run.recipe.evaluate.sequences)
    )


def print_mixes(rows: list[dict[str, Any]], tokens: int, seeds: int) -> None:
    by_mix = {mix: {row["seed"]: row for row in rows if row["mix"] == mix} for mix in MIXES}
    print(f"\n{tokens:,} tokens, {seeds} seeds; mean and standard deviation over seeds")
    print(
        "| mix | KL(parent, child) | the paper's | LM loss | top-1 accuracy |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for mix, found in by_mix.items():
        cells = []
        for key, form in (("kl", ".4f"), ("lm_loss", ".4f"), ("top1", ".2%")):
            values = [row[key] for row in found.values()]
            spread = f" ± {format(statistics.stdev(values), form)}" if len(values) > 1 else ""
            cells.append(format(statistics.mean(values), form) + spread)
        print(f"| {mix} | {cells[0]} | {MIXES[mix]:.2f} | {cells[1]} | {cells[2]} |")
    print(
        "\n| the paper's finding | difference here, mean (± standard error) | reproduces |\n| --- | ---: | --- |"
    )
    for what, key, better, worse in FINDINGS:
        sign = 1 if key == "kl" else -1
        pairs = [
            (_of(by_mix[worse], seed), _of(by_mix[better], seed)) for seed in range(1, seeds + 1)
        ]
        gaps = [sign * (bad[key] - good[key]) for bad, good in pairs]
        mean = statistics.mean(gaps)
        error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
        word = (
            "too close to call"
            if not abs(mean) > 2 * error
            else "yes"
            if mean > 0
            else "NO, the reverse"
        )
        print(f"| {what} ({key}) | {mean:+.4f} ± {error:.4f} | {word} |")


def _of(found: dict[int, dict[str, Any]], seed: int) -> dict[str, Any]:
    return found.get(seed) or found[1]  # the child before uptraining has no seed


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        measure_loss(sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1")
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--mixes", type=Path, metavar="RUN")
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/mixes"))
    args = parser.parse_args()
    print(f"{machine()['device']}, torch {torch.__version__}", flush=True)
    if args.mixes:
        mixes(args.mixes, args.out, args.tokens, args.seeds, args.json)
        return
    result = compare_losses(512 if args.quick else TOKENS, args.bfloat16, 1 if args.quick else 3)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
