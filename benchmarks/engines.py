"""Does a child say the same in every engine? Greedy tokens of one prompt, engine by engine.

    python benchmarks/engines.py RUN [--tokens 64] [--prompt TEXT] [--json]
    python benchmarks/engines.py --quick [--json]

Our loader, transformers in a process that cannot import puzzle, vLLM (stock where the child is made
for it, otherwise with our plugin) and llama.cpp on the f16 GGUF export, where llama_cpp is
installed. float32 but for the last. An engine that is not installed is left out with a message.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import torch

from puzzle.assemble.stage import ChildState
from puzzle.errors import UserError
from puzzle.export import formats
from puzzle.export.exporter import Options
from puzzle.export.stage import source
from puzzle.model import child
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, Block
from puzzle.progress import Progress
from puzzle.run import Run

PROMPT = 'def read(path):\n    """Read a file and return'
QUICK_TOKENS = 8
TRANSFORMERS = """
import json, sys
sys.modules["puzzle"] = None  # not importable
import torch
from transformers import AutoModelForCausalLM
folder, ids, count = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None,
                     pad_token_id=0)
print("TOKENS", json.dumps(out[0, len(ids):].tolist()))
"""
VLLM = """
import json, sys
from vllm import LLM, SamplingParams
folder, ids, count = json.loads(sys.argv[1])
llm = LLM(folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True,
          max_model_len=len(ids) + count + 1, kv_cache_memory_bytes=1 << 28, trust_remote_code=True)
sampling = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False)
out = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
print("TOKENS", json.dumps(list(out[0].outputs[0].token_ids)))
"""
LLAMA_CPP = """
import itertools, json, sys
import llama_cpp
file, ids, count = json.loads(sys.argv[1])
engine = llama_cpp.Llama(file, n_ctx=len(ids) + count, verbose=False)
tokens = engine.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
print("TOKENS", json.dumps(list(itertools.islice(tokens, count))))
"""


def ask(script: str, request: list[Any], plugin: bool = True) -> list[int]:
    """The tokens that a script prints, in a process of its own. `plugin`: ours, for vLLM."""
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
    return [int(token) for token in json.loads(lines[0].removeprefix("TOKENS "))]


def is_installed(package: str) -> bool:
    """Whether a package can be imported; says so where it cannot."""
    if importlib.util.find_spec(package) is None:
        print(f"{package} is not installed: left out", file=sys.stderr)
        return False
    return True


def greedy_tokens(folder: Path, ids: list[int], count: int) -> dict[str, list[int]]:
    """`count` tokens after the prompt `ids` from the child in `folder`, by engine."""
    model = child.load(folder, torch.float32, torch.device("cpu"))
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    output = model.generate(torch.tensor([ids]), max_new_tokens=count, **settings)
    tokens = {"our loader": output[0, len(ids) :].tolist()}
    tokens["transformers"] = ask(TRANSFORMERS, [str(folder), ids, count])
    stock = child.architectures_name(model.config) == "DeciLMForCausalLM"
    if is_installed("vllm"):
        name = "vllm, stock" if stock else "vllm with our plugin"
        tokens[name] = ask(VLLM, [str(folder), ids, count], plugin=not stock)
    if is_installed("llama_cpp") and is_installed("gguf"):
        with tempfile.TemporaryDirectory() as place:
            exporter = formats.exporter("gguf")
            try:
                written = exporter.export(folder, Path(place), Options(dtype="f16"))
            except UserError as error:
                print(error, file=sys.stderr)
            else:
                file = str(Path(place) / written.file)
                tokens["llama.cpp, f16"] = ask(LLAMA_CPP, [file, ids, count])
    return tokens


def make_child(root: Path) -> tuple[Run, Path]:
    """For a quick run: a tiny parent without the last layer's attention and the second's FFN."""
    run = common.open_run(root / "run", common.tiny_recipe(root))
    block = run.parent.shape.widest_block
    attention, ffn = block.subblocks
    architecture = Architecture((block, Block(attention, NO_FFN), Block(NO_ATTENTION, ffn)))
    config, state = run.parent.child_config(architecture), ChildState(run, architecture)
    child.save(root / "child", config, architecture, state, run.parent.folder, "A tiny child.\n")
    return run, root / "child"


def main() -> None:
    """Compare the engines and print what our loader says."""
    parser = common.parser(__doc__, quick=f"a tiny child of random weights, {QUICK_TOKENS} tokens")
    parser.add_argument("run", type=Path, nargs="?", help="the directory of a finished run")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", default=PROMPT)
    args = common.start(parser)
    if args.run is None and not args.quick:
        parser.error("RUN is missing: give the directory of a finished run, or --quick")
    count = QUICK_TOKENS if args.quick else args.tokens
    with tempfile.TemporaryDirectory() as root:
        if args.run is None:
            run, folder = make_child(Path(root))
        else:
            run = Run.open(args.run, Progress(quiet=True))
            folder = source(run.child_job("main"))
        ids = run.parent.tokenizer(args.prompt).input_ids
        tokens = greedy_tokens(folder, ids, count)
    ours = tokens["our loader"]
    common.print_header("engine", "tokens equal to our loader's")
    for name, theirs in tokens.items():
        equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
        common.print_row(name, f"{equal} of {count}")
    print(f"\n{args.prompt}{run.parent.tokenizer.decode(ours)}")
    common.print_json(args, tokens)


if __name__ == "__main__":
    main()
