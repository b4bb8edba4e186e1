"""What the benchmarks share: options, tables, parents of random weights, runs, processes.

Not a benchmark itself. Every benchmark takes `--quick` (a run of seconds on a tiny parent or few
tokens, which shows that the script works) and `--json` (a machine-readable last line).
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

from puzzle import config, settings
from puzzle.cost.scenarios import served_scenarios
from puzzle.device import EFFICIENCY, Device, keep_freed_memory
from puzzle.engines import machine
from puzzle.engines.intervals import Start
from puzzle.engines.turns import serve_in_turn
from puzzle.model.parent import locate
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.stage import Job

Settings = dict[str, Any]  # a recipe, or one of its sections
WORKER = "--worker"  # first argument of a script that is started by `in_own_process`

# ---------------------------------------------------------------------------- options and results


def parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """The options of every benchmark. `quick`: what its quick run does."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--quick", action="store_true", help=quick)
    options.add_argument("--json", action="store_true", help="a machine-readable last line")
    return options


def start(options: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the options and print what is measured on, and whether it is a quick run.

    Freed memory is kept, as the command line does. A quick run computes on one thread, in the
    processes that it starts as well: more of them make tiny products slower, many times so on a
    busy machine.
    """
    args = options.parse_args()
    keep_freed_memory()
    if args.quick:
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
    device, count = machine()
    unit = "GPUs" if torch.cuda.is_available() else "cores"
    threads = torch.get_num_threads()
    print(f"{device}, {count} {unit}, torch {torch.__version__}, {threads} threads")
    if args.quick:
        print("quick run: it shows that the script works; its figures mean nothing")
    sys.stdout.flush()
    return args


def print_row(*cells: object) -> None:
    """One line of a Markdown table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_header(*names: str) -> None:
    """The first two lines of a Markdown table."""
    print_row(*names)
    print_row(*("---" for _ in names))


def print_json(args: argparse.Namespace, figures: object) -> None:
    """The last line of `--json`."""
    if args.json:
        print(json.dumps(figures))


# ------------------------------------------------------------------------------ parents and runs


@dataclass(frozen=True, kw_only=True)
class LlamaSizes:
    """The sizes of a Llama with tied embeddings; a vocabulary of 2048 is the pocket tokenizer's."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 64
    vocab_size: int = 2048


TINY = LlamaSizes(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,  # the least that vLLM serves on a CPU
)
TINY_CORPUS = {
    "sources": [argparse.__file__],  # one file: reading all of the standard library takes seconds
    "sequence_length": 64,
    "train_tokens": 16_384,
    "held_out_fraction": 0.4,
    "held_out_tokens": 16_384,
}


def make_parent(folder: Path, sizes: LlamaSizes, dtype: torch.dtype = torch.float32) -> int:
    """Write a Llama of random weights into a new folder; returns the bytes of its weights.

    It is made in shards of one layer, so it is never in memory as a whole.
    """
    name = str(dtype).removeprefix("torch.")
    llama = LlamaConfig(
        tie_word_embeddings=True, dtype=name, bos_token_id=0, eos_token_id=0, **vars(sizes)
    )
    llama.save_pretrained(folder)
    AutoTokenizer.from_pretrained(locate("pocket")).save_pretrained(folder)
    torch.manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, dtype=dtype) * columns**-0.5

    D, inner = sizes.hidden_size, sizes.intermediate_size
    query = sizes.num_attention_heads * sizes.head_dim
    key = sizes.num_key_value_heads * sizes.head_dim
    state = {
        "model.embed_tokens.weight": matrix(sizes.vocab_size, D),
        "model.norm.weight": torch.ones(D, dtype=dtype),
    }
    files = dict.fromkeys(state, "model-00000.safetensors")
    save_file(state, folder / "model-00000.safetensors", metadata={"format": "pt"})
    for layer in range(sizes.num_hidden_layers):
        tensors = {
            "self_attn.q_proj": matrix(query, D),
            "self_attn.k_proj": matrix(key, D),
            "self_attn.v_proj": matrix(key, D),
            "self_attn.o_proj": matrix(D, query),
            "mlp.gate_proj": matrix(inner, D),
            "mlp.up_proj": matrix(inner, D),
            "mlp.down_proj": matrix(D, inner),
            "input_layernorm": torch.ones(D, dtype=dtype),
            "post_attention_layernorm": torch.ones(D, dtype=dtype),
        }
        state = {f"model.layers.{layer}.{name}.weight": t for name, t in tensors.items()}
        file = f"model-{layer + 1:05d}.safetensors"
        save_file(state, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(state, file)
    index = json.dumps({"weight_map": files})
    (folder / "model.safetensors.index.json").write_text(index)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def tiny_recipe(root: Path) -> Settings:
    """A recipe for quick runs: seconds from a tiny parent, made in `root`, to a finished child."""
    make_parent(root / "tiny-parent", TINY)
    return {
        "parent": str(root / "tiny-parent"),
        "deploy": ["transformers"],
        "corpus": TINY_CORPUS,
        "library": {
            "kv_heads": [1],
            "ffn_percent": [50],
            "tokens": 2048,
            "batch_sequences": 8,
            "calibration_sequences": 8,
            "validation_sequences": 8,
            "chunk_steps": 2,
        },
        "score": {"sequences": 4, "shard_sequences": 2, "assembled": 0},
        "cost": {
            "engine": "roofline",
            "scenario": {"batch_size": 4, "input_length": 16, "output_length": 8},
        },
        "search": {"parameters": "75%", "points": 3},
        "uptrain": {"tokens": 2048, "batch_sequences": 8, "checkpoint_steps": 2},
        "evaluate": {
            "sequences": 4,
            "context": 64,
            "questions": 1,
            "samples": 1,
            "sample_tokens": 4,
        },
    }


def embedded_recipe(root: Path, quick: bool) -> Settings:
    """The demo's recipe, or the quick one with a tiny parent in `root`."""
    return tiny_recipe(root) if quick else settings.read_yaml(settings.recipe_path("pocket"))


def open_run(folder: Path, recipe: Settings, **sections: Settings) -> Run:
    """A run that prints nothing. `sections` change some settings each: `library={"tokens": 1}`."""
    changed = {name: recipe.get(name, {}) | values for name, values in sections.items()}
    return Run(config.parse(recipe | changed), folder, Progress(quiet=True))


# ------------------------------------------------------------------------------------ measurement


def serve_together(job: Job, folders: Sequence[Path], count: int) -> list[Start]:
    """The turns of `count` starts of the engine on every folder, all side by side."""
    scenario, starts = served_scenarios(job)["main"], []
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(job.engine.serve(f, scenario)) for f in folders]
        for number in range(count):
            if number:
                for session in sessions:
                    session.restart()
            starts.append(serve_in_turn(sessions, [scenario] * len(sessions)))
    return starts


def in_own_process(script: str, *arguments: object) -> Any:
    """The value of the last line, which is JSON, that `script --worker ARGUMENTS` prints.

    Ends this process with its errors where it fails.
    """
    command = [sys.executable, script, WORKER, *map(str, arguments)]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        sys.exit(out.stderr or f"{' '.join(command)}: ended with {out.returncode}")
    return json.loads(out.stdout.splitlines()[-1])


def worker_arguments() -> list[str] | None:
    """The arguments of a process that `in_own_process` has started, None in any other."""
    return sys.argv[2:] if sys.argv[1:2] == [WORKER] else None


def peak_bytes() -> int:
    """The largest resident set that this process has had, as the kernel counts it (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024


def matmul_flops_per_s(device: Device) -> float:
    """The rate of a square matrix product, measured now: a device measures it once and keeps it."""
    return replace(device).training_flops_per_s / EFFICIENCY
