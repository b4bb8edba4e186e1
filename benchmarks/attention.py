"""Plain matrix products against the fused attention kernel, forward and backward, on this machine.

    python benchmarks/attention.py [--json] [--quick]

Decides `EAGER_UP_TO_TOKENS` in run.py: on CPUs the fused kernel loses at short sequences and small
heads.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from puzzle.engines import machine

BATCH_TOKENS, HEADS, HEAD_DIM = 4096, 4, 64


def plain(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = (q @ q.transpose(-1, -2)) * HEAD_DIM**-0.5 + mask
    return weights.softmax(-1, dtype=torch.float32).to(q.dtype) @ q


def fused(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def seconds(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], length: int, repeats: int
) -> float:
    q = torch.randn(
        BATCH_TOKENS // length, HEADS, length, HEAD_DIM, dtype=torch.bfloat16, requires_grad=True
    )
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        function(q, mask).sum().backward()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    print(
        f"{machine()}, torch {torch.__version__}, {BATCH_TOKENS} tokens, {HEADS} heads of {HEAD_DIM}, bfloat16"
    )
    print("| sequence | plain ms | fused ms | fused / plain |\n| --- | --- | --- | --- |")
    rows = []
    for length in (256, 512) if args.quick else (128, 256, 512, 1024, 2048):
        times = [seconds(function, length, 5 if args.quick else 15) for function in (plain, fused)]
        rows.append({"sequence": length, "plain_s": times[0], "fused_s": times[1]})
        ratio = times[1] / times[0]
        print(
            f"| {length} | {times[0] * 1e3:.1f} | {times[1] * 1e3:.1f} | {ratio:.2f} |", flush=True
        )
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
