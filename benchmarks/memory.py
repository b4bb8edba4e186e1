"""Peak memory of BLD on a parent that is large for what may be held: streamed against resident.

    python benchmarks/memory.py [--json] [--quick]

Makes a parent of random weights (float32, 24 layers; --quick: a small one; --bfloat16: half the
bytes on disk, the same in memory, for layers are computed in float32 on a CPU), then runs the
library stage in processes of its own: an idle one that imports the same modules, one streamed, and
one resident. Peak resident set size is the kernel's (`VmHWM`), above the idle process's; the
formula is what `puzzle plan` prints. At the end the files of the two libraries are compared.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig

from puzzle import config, pipeline, plan
from puzzle.engines import machine
from puzzle.library import stage as library
from puzzle.model.child import skeleton  # noqa: F401 (the idle process imports what the others do)
from puzzle.model.parent import locate
from puzzle.progress import Progress
from puzzle.run import Run

VARIANTS = {"kv_heads": [1], "ffn_percent": [50], "ffn_replacements": ["linear", "no_op"]}


def make_parent(
    folder: Path, hidden: int, layers: int, dtype: torch.dtype, vocabulary: int = 2048, **more: int
) -> int:
    """A random Llama in shards of one layer, never whole in memory; its size in bytes."""
    shape = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256,
        "head_dim": 64,
    } | more
    settings = LlamaConfig(
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        dtype=str(dtype).removeprefix("torch."),
        bos_token_id=0,
        eos_token_id=0,
        **shape,
    )
    settings.save_pretrained(folder)
    AutoTokenizer.from_pretrained(locate("pocket")).save_pretrained(folder)
    torch.manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, dtype=dtype) * columns**-0.5

    D, I, kv = hidden, shape["intermediate_size"], shape["num_key_value_heads"] * shape["head_dim"]  # noqa: E741
    table = {
        "model.embed_tokens.weight": matrix(vocabulary, D),
        "model.norm.weight": torch.ones(D, dtype=dtype),
    }
    save_file(table, folder / "model-00000.safetensors", metadata={"format": "pt"})
    for layer in range(layers):
        state = {
            "self_attn.q_proj": matrix(D, D),
            "self_attn.k_proj": matrix(kv, D),
            "self_attn.v_proj": matrix(kv, D),
            "self_attn.o_proj": matrix(D, D),
            "mlp.gate_proj": matrix(I, D),
            "mlp.up_proj": matrix(I, D),
            "mlp.down_proj": matrix(D, I),
            "input_layernorm": torch.ones(D, dtype=dtype),
            "post_attention_layernorm": torch.ones(D, dtype=dtype),
        }
        named = {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in state.items()}
        save_file(named, folder / f"model-{layer + 1:05d}.safetensors", metadata={"format": "pt"})
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def open_run(parent: Path, folder: Path, memory: str, tokens: int) -> Run:
    settings = VARIANTS | {
        "memory": memory,
        "tokens": tokens,
        "batch_sequences": 4,
        "chunk_steps": 2,
        "calibration_sequences": 4,
        "validation_sequences": 4,
    }
    recipe = {
        "parent": str(parent),
        "deploy": ["transformers"],
        "library": settings,
        "corpus": {"train_tokens": 40_000, "validation_tokens": 8192, "sequence_length": 128},
    }
    return Run(config.parse(recipe), folder, Progress(quiet=True))


def child_process(script: str, *arguments: object) -> int:
    """Peak resident set size in bytes that `script --child ARGUMENTS` prints last, in a process of
    its own.
    """
    out = subprocess.run(
        [sys.executable, script, "--child", *map(str, arguments)], capture_output=True, text=True
    )
    if out.returncode:
        sys.exit(out.stderr)
    return int(out.stdout.splitlines()[-1])


def work(parent: str, folder: str, memory: str, tokens: str) -> None:
    if memory == "idle":
        torch.ones(64, 64) @ torch.ones(64, 64)
    else:
        run = open_run(Path(parent), Path(folder), memory, int(tokens))
        pipeline.execute_stage(run, "library")
    print(peak_bytes())


def peak_bytes() -> int:
    """The largest resident set this process has had (Linux)."""
    peak = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(peak.split()[1]) * 1024


def difference(a: Path, b: Path) -> float:
    """The largest relative difference of any tensor of two libraries."""
    worst = 0.0
    for path in sorted(a.glob("*.safetensors")):
        ours, theirs = load_file(path), load_file(b / path.name)
        worst = max(worst, *(((ours[n] - t).norm() / t.norm()).item() for n, t in theirs.items()))
    return worst


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        work(*sys.argv[2:6])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--bfloat16", action="store_true")
    args = parser.parse_args()
    hidden, layers, tokens = (512, 8, 1024) if args.quick else (1280, 24, 1024)
    print(f"{machine()['device']}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "parent").mkdir()
        dtype = torch.bfloat16 if args.bfloat16 else torch.float32
        size = make_parent(root / "parent", hidden, layers, dtype)
        print(f"parent: {layers} layers of width {hidden}, {size / 1e9:.2f} GB in {str(dtype)[6:]}")
        idle = child_process(__file__, root / "parent", root / "none", "idle", tokens)
        rows: list[dict[str, Any]] = []
        print(
            "| mode | formula | peak above idle | of the parent's size |\n| --- | --- | --- | --- |"
        )
        for memory in ("streamed", "resident"):
            folder = root / memory
            peak = child_process(__file__, root / "parent", folder, memory, tokens) - idle
            formula = plan.library_memory_bytes(
                open_run(root / "parent", folder, memory, tokens), memory == "streamed"
            )
            rows.append(
                {"mode": memory, "peak_bytes": peak, "formula_bytes": formula, "share": peak / size}
            )
            print(
                f"| {memory} | {formula / 1e9:.2f} GB | {peak / 1e9:.2f} GB | {peak / size:.0%} |",
                flush=True,
            )
        files = sorted(p.name for p in (root / "resident" / "library").glob("*.safetensors"))
        same = [
            (root / "streamed" / "library" / n).read_bytes()
            == (root / "resident" / "library" / n).read_bytes()
            for n in files
        ]
        worst = difference(root / "streamed" / "library", root / "resident" / "library")
        print(
            f"{sum(same)} of {len(files)} files identical to the byte; largest relative difference {worst:.1e}"
        )
        assert len(
            library.read_index(open_run(root / "parent", root / "streamed", "streamed", tokens))
        ) >= len(files)
    if args.json:
        print(
            json.dumps(
                {
                    "parent_bytes": size,
                    "idle_bytes": idle,
                    "modes": rows,
                    "largest_difference": worst,
                }
            )
        )


if __name__ == "__main__":
    main()
