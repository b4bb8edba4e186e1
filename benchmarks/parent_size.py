"""How wide must the embedded parent be? Throughput of random Llamas, with all and with half of
their layers.

    python benchmarks/parent_size.py [--json] [--quick]

If removing half of the layers gives nearly 2x, one layer's work is visible above the engine's
per-step overhead. The two models of a pair are served side by side by vLLM (--quick: by the
built-in torch engine) and timed in turn. The share of a
step that is not layers follows: overhead = 2 / ratio - 1.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import torch

from puzzle import engines
from puzzle.config import CostConfig, ScenarioConfig
from puzzle.engines import Engine
from puzzle.engines.turns import Served, measure_pair
from puzzle.model.architecture import Architecture
from puzzle.model.parent import describe


def sizes(
    width: int, ffn: int, vocabulary: int, heads: int, kv_heads: int, layers: int = 12
) -> common.LlamaSizes:
    """A candidate for the embedded parent."""
    return common.LlamaSizes(
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width // heads,
        vocab_size=vocabulary,
    )


CANDIDATES = [
    sizes(192, 512, 2048, 6, 2),
    sizes(256, 768, 2048, 4, 2),
    sizes(256, 768, 4096, 8, 4),
    sizes(320, 640, 2048, 10, 5),
]
QUICK_SCENARIO = ScenarioConfig(batch_size=4, input_length=16, output_length=8)


def parameters(folder: Path) -> int:
    """Of the model in a folder."""
    shape = describe(str(folder)).shape
    return Architecture.of_parent(shape).parameters(shape)


def measure(
    engine: Engine, scenario: ScenarioConfig, candidate: common.LlamaSizes, starts: int
) -> dict[str, Any]:
    """Serve a candidate in turn with the same with half of the layers."""
    half = replace(candidate, num_hidden_layers=candidate.num_hidden_layers // 2)
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root) / "full", Path(root) / "half"]
        for folder, llama in zip(folders, (candidate, half), strict=True):
            common.make_parent(folder, llama, torch.bfloat16)
        count = parameters(folders[0])
        sides = [Served(folder, scenario, 0) for folder in folders]
        measured = measure_pair(engine, *sides, starts, lambda m: True, lambda: None)
    speeds = [side.throughput_tok_per_s.value for side in (measured.parent, measured.child)]
    return {
        "sizes": vars(candidate),
        "parameters": count,
        "tok_per_s": speeds,
        "ratio": measured.speedup.value,
    }


def print_candidate(candidate: common.LlamaSizes, figures: dict[str, Any]) -> None:
    """A line of the table."""
    ratio, heads = figures["ratio"], candidate.num_attention_heads
    common.print_row(
        candidate.hidden_size,
        candidate.intermediate_size,
        candidate.num_hidden_layers,
        candidate.vocab_size,
        f"{heads}/{candidate.num_key_value_heads}",
        f"{figures['parameters']:,}",
        *(f"{speed:,.0f}" for speed in figures["tok_per_s"]),
        f"{ratio:.2f}",
        f"{2 / ratio - 1:.0%}",
    )


def main() -> None:
    """Print a line for every candidate."""
    parser = common.parser(__doc__, quick="one small candidate, two starts, on the torch engine")
    args = common.start(parser)
    name, scenario, starts, candidates = "vllm", ScenarioConfig(), 3, CANDIDATES
    if args.quick:
        name, scenario, starts, candidates = "torch", QUICK_SCENARIO, 2, [common.TINY]
    with tempfile.TemporaryDirectory() as logs:
        engine = engines.make(name, CostConfig(), Path(logs))
        print(f"{engine.name} {engine.facts.version}, {scenario}, bfloat16, {starts} starts")
        common.print_header(
            "hidden",
            "FFN",
            "layers",
            "vocabulary",
            "heads/KV",
            "parameters",
            "tok/s",
            "half the layers",
            "ratio",
            "overhead",
        )
        rows = []
        for candidate in candidates:
            rows.append(measure(engine, scenario, candidate, starts))
            print_candidate(candidate, rows[-1])
    common.print_json(args, rows)


if __name__ == "__main__":
    main()
