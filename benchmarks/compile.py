"""Uptraining with compiled layers against uptraining without: tokens per second, time to begin.

    python benchmarks/compile.py [--json] [--quick]

The parent is the embedded one, the child has random weights and blocks of six shapes, as a searched
child has. Both ways take turns of several steps. Decides `PAYS_FROM_FLOPS` in
puzzle/uptrain/compiled.py: the tokens from which the time that compiling takes is won back.
"""

import os
import statistics
import tempfile
import time

import common
import torch

from puzzle.config import UptrainConfig
from puzzle.device import Device
from puzzle.model.architecture import Architecture
from puzzle.model.modeling_puzzle import PuzzleForCausalLM
from puzzle.model.parent import describe
from puzzle.uptrain import compiled
from puzzle.uptrain.gkd import Pair

BLOCKS = [
    "gqa_2+gated_768",
    "gqa_2+gated_384",
    "gqa_1+gated_576",
    "no_op+gated_384",
    "gqa_2+no_op",
    "no_op+no_op",
]
SEQUENCES, LENGTH = 16, 256
STEPS, TURNS = 4, 3


def make_pair(layers: int) -> tuple[Pair, Device]:
    """The embedded parent, or its first layers, and a child of random weights."""
    device = Device.choose("auto", "auto")
    parent = describe("pocket")
    blocks = Architecture.from_names([BLOCKS[i % len(BLOCKS)] for i in range(layers)])
    attention = device.attention_for(LENGTH)
    models = []
    for architecture in (blocks, Architecture(parent.shape.parent_blocks[:layers])):
        config = parent.child_config(architecture, parent.shape.windows[:layers])
        config._attn_implementation = attention
        models.append(PuzzleForCausalLM(config).to(device.torch_device))
    child, frozen = models
    return Pair(child.train(), frozen.requires_grad_(False), UptrainConfig()), device


def steps_s(pair: Pair, device: Device, count: int) -> list[float]:
    """Seconds of each of so many steps."""
    optimizer = torch.optim.AdamW(pair.child.parameters(), lr=1e-5, fused=True)
    tokens_BS = torch.randint(0, 2048, (SEQUENCES, LENGTH), device=device.torch_device)
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        with device.autocast():
            loss, _ = pair(tokens_BS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        taken.append(time.perf_counter() - began)
    return taken


def main() -> None:
    """Print both speeds, their ratio, and what compiling takes."""
    args = common.start(common.parser(__doc__, quick="two layers, a turn of two steps"))
    if not compiled.has_compiler():
        print("| --- |\nno C++ compiler is here: nothing to compare")
        common.print_json(args, {"compiler": None})
        return
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # as where nothing was compiled yet
    layers, steps, turns = (2, 2, 1) if args.quick else (12, STEPS, TURNS)
    pair, device = make_pair(layers)
    first = {}
    seconds: dict[str, list[float]] = {"as they are": [], "compiled": []}
    with compiled.layers(pair):
        began = time.perf_counter()
        steps_s(pair, device, 2)
        first["compiled"] = time.perf_counter() - began
        programs = [layer._compiled_call_impl for layer in _layers(pair)]
        for _ in range(turns):
            for name, taken in seconds.items():
                for layer, program in zip(_layers(pair), programs, strict=True):
                    layer._compiled_call_impl = program if name == "compiled" else None
                taken += steps_s(pair, device, steps)
    tokens = SEQUENCES * LENGTH
    speeds = {name: tokens / statistics.median(taken) for name, taken in seconds.items()}
    ratio = speeds["compiled"] / speeds["as they are"]
    common.print_header("layers", "tokens/s", "fastest to slowest step")
    for name, taken in seconds.items():
        spread = f"{tokens / min(taken):,.0f} to {tokens / max(taken):,.0f}"
        common.print_row(name, f"{speeds[name]:,.0f}", spread)
    compiling_s = first["compiled"] - 2 * statistics.median(seconds["compiled"])
    saved = 1 / speeds["as they are"] - 1 / speeds["compiled"]
    pays = compiling_s / saved if saved > 0 else float("inf")
    print(f"{ratio:.2f}x; compiling takes {compiling_s:.0f} s, won back after {pays:,.0f} tokens")
    common.print_json(
        args, {"ratio": ratio, "compiling_s": compiling_s, "tokens_per_s": speeds, "pays": pays}
    )


def _layers(pair: Pair) -> list[torch.nn.Module]:
    return [*pair.child.model.layers, *pair.parent.model.layers]


if __name__ == "__main__":
    main()
