"""How wide must the embedded parent be? Throughput in vLLM of random Llamas, whole and with half of
their layers.

    python benchmarks/parent_size.py [--json] [--quick]

If removing half of the layers gives nearly 2x, one layer's work is visible above the engine's
per-step overhead. The two models of a pair are served side by side and timed in turn; the ratio is
the median over the pairs. The share of a step that is not layers follows: overhead = 2 / ratio - 1.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from puzzle.config import ScenarioConfig
from puzzle.engines import machine, vllm_engine

#         hidden, FFN, layers, vocabulary, heads, KV heads
SHAPES = [
    (192, 512, 12, 2048, 6, 2),
    (256, 768, 12, 2048, 4, 2),
    (256, 768, 12, 4096, 8, 4),
    (320, 640, 12, 2048, 10, 5),
]


def write_llama(folder: Path, shape: tuple[int, ...], layers: int) -> int:
    hidden, ffn, _, vocabulary, heads, kv_heads = shape
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one shape, two pairs")
    args = parser.parse_args()
    scenario, pairs = ScenarioConfig(), 2 if args.quick else 5
    print(
        f"vLLM {vllm_engine.describe('')['version']}, {machine()}, {scenario.name}, bfloat16, {pairs} pairs"
    )
    print(
        "| hidden | FFN | layers | vocabulary | heads/KV | parameters | tok/s | half the layers | ratio | overhead |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for shape in SHAPES[1:2] if args.quick else SHAPES:
        with tempfile.TemporaryDirectory() as temporary:
            folders = [Path(temporary) / name for name in ("whole", "half")]
            parameters = write_llama(folders[0], shape, shape[2])
            write_llama(folders[1], shape, shape[2] // 2)
            sessions = [
                vllm_engine.open_session(f, scenario, f / "log", "", False) for f in folders
            ]
            times: list[list[float]] = [[], []]
            for _ in range(pairs + 1):
                for session, kept in zip(sessions, times, strict=True):
                    kept.append(session.time_batch(scenario).total_s)
            for session in sessions:
                session.__exit__(None, None, None)
        whole, half = (kept[1:] for kept in times)
        tokens = scenario.batch_size * scenario.output_length
        ratio = statistics.median(w / h for w, h in zip(whole, half, strict=True))
        speeds = [tokens / statistics.median(kept) for kept in (whole, half)]
        rows.append({"shape": shape, "parameters": parameters, "tok_per_s": speeds, "ratio": ratio})
        print(
            f"| {shape[0]} | {shape[1]} | {shape[2]} | {shape[3]} | {shape[4]}/{shape[5]} | {parameters:,} "
            f"| {speeds[0]:,.0f} | {speeds[1]:,.0f} | {ratio:.2f} | {2 / ratio - 1:.0%} |",
            flush=True,
        )
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
