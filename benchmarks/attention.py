"""Plain matrix products against the fused attention kernel, forward and backward, on this machine.

    python benchmarks/attention.py [--json] [--quick]

Decides `EAGER_UP_TO_TOKENS` in puzzle/device.py: on CPUs the fused kernel loses at short sequences
and small heads.
"""

import statistics
import time
from collections.abc import Callable

import common
import torch
import torch.nn.functional as F

BATCH_TOKENS, HEADS, HEAD_DIM = 4096, 4, 64
WARM_UPS = 2


def plain(q_BHSD: torch.Tensor, mask_SS: torch.Tensor) -> torch.Tensor:
    """Attention in separate products, as `eager` computes it."""
    weights = (q_BHSD @ q_BHSD.transpose(-1, -2)) * HEAD_DIM**-0.5 + mask_SS
    return weights.softmax(-1, dtype=torch.float32).to(q_BHSD.dtype) @ q_BHSD


def fused(q_BHSD: torch.Tensor, mask_SS: torch.Tensor) -> torch.Tensor:
    """The fused kernel, which needs no mask."""
    return F.scaled_dot_product_attention(q_BHSD, q_BHSD, q_BHSD, is_causal=True)


def seconds(
    attention: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], length: int, repeats: int
) -> float:
    """The median of a forward and backward pass over `BATCH_TOKENS`, in sequences of `length`."""
    sizes = (BATCH_TOKENS // length, HEADS, length, HEAD_DIM)
    q_BHSD = torch.randn(sizes, dtype=torch.bfloat16, requires_grad=True)
    mask_SS = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
    times = []
    for _ in range(repeats + WARM_UPS):
        began = time.perf_counter()
        attention(q_BHSD, mask_SS).sum().backward()
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARM_UPS:])


def main() -> None:
    """Print a line for every sequence length."""
    args = common.start(common.parser(__doc__, quick="two lengths, two repeats"))
    print(f"{BATCH_TOKENS} tokens, {HEADS} heads of {HEAD_DIM}, bfloat16")
    common.print_header("sequence", "plain ms", "fused ms", "fused / plain")
    rows = []
    for length in (128, 256) if args.quick else (128, 256, 512, 1024, 2048):
        repeats = 2 if args.quick else 15
        plain_s, fused_s = (seconds(function, length, repeats) for function in (plain, fused))
        rows.append({"sequence": length, "plain_s": plain_s, "fused_s": fused_s})
        ratio = f"{fused_s / plain_s:.2f}"
        common.print_row(length, f"{plain_s * 1e3:.1f}", f"{fused_s * 1e3:.1f}", ratio)
    common.print_json(args, rows)


if __name__ == "__main__":
    main()
