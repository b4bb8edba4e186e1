"""Uptraining: memory and time of the loss, and the paper's table of losses at pocket scale.

    python benchmarks/uptrain.py [--json] [--quick] [--bfloat16]
    python benchmarks/uptrain.py --mixes RUN [--tokens N] [--seeds 3] [--out DIR] [--json]

The loss: KL and LM loss of 4096 tokens of width 2048 over a vocabulary of 128,256 (--quick: 512 tokens), value and
gradients of hidden states and head, against the plain implementation (all logits at once, torch's own functions).
Memory: each in a process of its own, the peak resident set above the one with its inputs made; so everything that is
allocated counts, the head's gradient included. Time: the same two processes, the median of three.

The table (`--mixes`): the child of a finished run is uptrained with the eight mixes of LM loss, KL and cosine, the
same tokens for all, once for every seed (which decides the order of the data). Held-out KL, LM loss and accuracy.
What is done is kept in --out: the same command goes on.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from memory import peak_bytes
from puzzle import artifacts, config, evaluate, losses, uptrain
from puzzle.engines import machine
from puzzle.progress import Progress
from puzzle.run import Run, keep_freed_memory

VOCABULARY, HIDDEN, TOKENS = 128_256, 2048, 4096
SETTINGS = losses.LogitLoss(kl_weight=1.0, lm_weight=1.0)  # both terms: the case with the most work

# ------------------------------------------------------------------------------------------------ the loss


def plain(
    child_TD: torch.Tensor, head_VD: torch.Tensor, parent_TD: torch.Tensor, parent_head_VD: torch.Tensor,
    targets_T: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    logits_TV = child_TD @ head_VD.T
    with torch.no_grad():
        target_TV = parent_TD @ parent_head_VD.T
    log_q_TV, log_p_TV = F.log_softmax(logits_TV.float(), -1), F.log_softmax(target_TV.float(), -1)
    kl = F.kl_div(log_q_TV, log_p_TV, log_target=True, reduction="batchmean")
    return SETTINGS.kl_weight * kl + SETTINGS.lm_weight * F.nll_loss(log_q_TV, targets_T)


def chunked(*sides: torch.Tensor) -> torch.Tensor:
    return losses.distillation_losses(*sides, SETTINGS)[0]


def measure_loss(name: str, tokens: int, bfloat16: bool, rounds: int) -> None:
    """In a process of its own: prints bytes above the inputs, seconds of each round, value and size of the gradient."""
    keep_freed_memory()
    torch.manual_seed(0)
    child_TD = torch.randn(tokens, HIDDEN).requires_grad_()
    head_VD = (torch.randn(VOCABULARY, HIDDEN) / HIDDEN**0.5).requires_grad_()
    parent_TD = child_TD.detach() + 0.3 * torch.randn(tokens, HIDDEN)
    parent_head_VD = head_VD.detach().clone()
    targets_T = torch.randint(VOCABULARY, (tokens,))
    before, seconds = peak_bytes(), []
    for _ in range(rounds):
        child_TD.grad = head_VD.grad = None
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = {"plain": plain, "chunked": chunked}[name](child_TD, head_VD, parent_TD, parent_head_VD, targets_T)
        loss.backward()
        seconds.append(time.perf_counter() - began)
    norms = [child_TD.grad.norm().item(), head_VD.grad.norm().item()]
    print(json.dumps({"bytes": peak_bytes() - before, "seconds": seconds, "loss": loss.item(), "gradients": norms}))


def compare_losses(tokens: int, bfloat16: bool, rounds: int) -> dict[str, Any]:
    found = {}
    for name in ("plain", "chunked"):
        words = [sys.executable, __file__, "--child", name, str(tokens), str(int(bfloat16)), str(rounds)]
        out = subprocess.run(words, capture_output=True, text=True)
        if out.returncode:
            sys.exit(out.stderr or f"{name}: ended with {out.returncode}")
        found[name] = json.loads(out.stdout.splitlines()[-1])
        found[name]["median_s"] = statistics.median(found[name]["seconds"])
    ours, theirs = found["chunked"], found["plain"]
    ratios = {"memory": ours["bytes"] / theirs["bytes"], "time": ours["median_s"] / theirs["median_s"]}
    dtype = "bfloat16 products" if bfloat16 else "float32"
    print(f"{tokens} tokens, width {HIDDEN}, vocabulary {VOCABULARY:,}, {dtype}, {torch.get_num_threads()} threads")
    print("| | peak above the inputs | median seconds | loss | gradient norms |\n| --- | ---: | ---: | ---: | --- |")
    for name, row in found.items():
        norms = ", ".join(f"{norm:.6g}" for norm in row["gradients"])
        print(f"| {name} | {row['bytes'] / 1e9:.2f} GB | {row['median_s']:.2f} | {row['loss']:.6f} | {norms} |")
    print(f"memory 1/{1 / ratios['memory']:.1f}, time {ratios['time']:.2f}x of plain torch", flush=True)
    return {"tokens": tokens, "dtype": dtype, **found, "ratios": ratios}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        measure_loss(sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1", int(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--bfloat16", action="store_true")
    args = parser.parse_args()
    print(f"{machine()['device']}, torch {torch.__version__}", flush=True)
    result = compare_losses(512 if args.quick else TOKENS, args.bfloat16, 1 if args.quick else 3)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
