"""Does a finished child say the same in every engine? Greedy tokens of one prompt, engine by
engine.

    python benchmarks/engines.py RUN [--tokens 64] [--prompt TEXT] [--json] [--quick]

Our loader, transformers in a process that cannot import puzzle, vLLM (stock where the child is made
for it, otherwise with our plugin) and llama.cpp on the f16 GGUF export, where llama_cpp is
installed. float32 but for the last. An engine that is not installed is left out with a message.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from puzzle.errors import UserError
from puzzle.export import stage as export
from puzzle.model import child
from puzzle.progress import Progress
from puzzle.run import Run

TRANSFORMERS = """
import json, sys
sys.modules["puzzle"] = None  # not importable
import torch
from transformers import AutoModelForCausalLM
folder, ids, count = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
print("TOKENS", json.dumps(out[0, len(ids):].tolist()))
"""
VLLM = """
import json, sys
from vllm import LLM, SamplingParams
folder, ids, count = json.loads(sys.argv[1])
llm = LLM(folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=len(ids) + count + 1,
          kv_cache_memory_bytes=1 << 28, trust_remote_code=True)
sampling = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False)
out = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
print("TOKENS", json.dumps(list(out[0].outputs[0].token_ids)))
"""
LLAMA_CPP = """
import itertools, json, sys
import llama_cpp
file, ids, count = json.loads(sys.argv[1])
engine = llama_cpp.Llama(file, n_ctx=len(ids) + count, verbose=False)
found = engine.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
print("TOKENS", json.dumps(list(itertools.islice(found, count))))
"""


def ask(script: str, request: list[Any], plugin: bool = True) -> list[int]:
    """The tokens that a script prints, in a process of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment |= {} if plugin else {"VLLM_PLUGINS": ""}
    out = subprocess.run(
        [sys.executable, "-c", script, json.dumps(request)],
        capture_output=True,
        text=True,
        env=environment,
    )
    lines = [line for line in out.stdout.splitlines() if line.startswith("TOKENS ")]
    if not lines:
        sys.exit(out.stderr[-3000:])
    return [int(token) for token in json.loads(lines[0][7:])]


def installed(package: str) -> bool:
    if importlib.util.find_spec(package) is None:
        print(f"{package} is not installed: left out", file=sys.stderr)
        return False
    return True


def answers(run: Run, ids: list[int], count: int) -> dict[str, list[int]]:
    folder = export.source(run)
    model = child.load(folder, torch.float32, torch.device("cpu"))
    settings = {
        "max_new_tokens": count,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    found = {"our loader": model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist()}
    found["transformers"] = ask(TRANSFORMERS, [str(folder), ids, count])
    stock = child.architectures_name(model.config) == "DeciLMForCausalLM"
    if installed("vllm"):
        name = "vllm, stock" if stock else "vllm with our plugin"
        found[name] = ask(VLLM, [str(folder), ids, count], plugin=not stock)
    if installed("llama_cpp") and installed("gguf"):
        with tempfile.TemporaryDirectory() as place:
            try:
                written = export.exporters.exporter("gguf").export(folder, Path(place), dtype="f16")
            except UserError as error:
                print(error, file=sys.stderr)
            else:
                found["llama.cpp, f16"] = ask(
                    LLAMA_CPP, [str(Path(place) / written["file"]), ids, count]
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", default='def read(path):\n    """Read a file and return')
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="16 tokens")
    args = parser.parse_args()
    run, count = Run.open(args.run, Progress(quiet=True)), 16 if args.quick else args.tokens
    ids = run.parent.tokenizer(args.prompt).input_ids
    found = answers(run, ids, count)
    ours = found["our loader"]
    print("| engine | tokens equal to our loader's |\n| --- | --- |")
    for name, tokens in found.items():
        print(f"| {name} | {sum(a == b for a, b in zip(ours, tokens, strict=True))} of {count} |")
    print(f"\n{args.prompt}{run.parent.tokenizer.decode(ours)}")
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
