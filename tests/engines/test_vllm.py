"""Children of every family in vLLM generate our own greedy tokens.

In stock vLLM where it can serve them, with our plugin where not.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch
from children import MIXED, write_child
from conftest import NEEDS_VLLM

from puzzle.model import child, parent

pytestmark = [pytest.mark.training, pytest.mark.vllm, NEEDS_VLLM]
PROMPTS = [[5, 17, 200, 31], [9, 9, 2, 250, 77, 140], list(range(20, 36))]
# With the longest prompt beyond every window, and within the first 64 positions of long rope
NEW = 46
# Everything that stock vLLM cannot serve
EVERYTHING = ["no_op+gated_32", "linear+gated_96", "gqa_1+linear", "gqa_2+no_op"]
PLAIN = ["gqa_1+gated_96", "gqa_2+gated_32", "gqa_2+gated_96", "gqa_1+gated_64"]
SERVE = """
import gc, json, sys
from vllm import LLM, SamplingParams
folders, prompts, new, trust = json.loads(sys.argv[1])
for folder in folders:
    llm = LLM(folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True,
              max_model_len=64, kv_cache_memory_bytes=1 << 26, trust_remote_code=trust)
    sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, detokenize=False)
    outs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    print("TOKENS", json.dumps([list(out.outputs[0].token_ids) for out in outs]), flush=True)
    del llm, outs
    gc.collect()  # the engine's process group must be gone before the next begins
"""


def served(folders: list[Path], plugin: bool) -> list[list[list[int]]]:
    """The tokens of every prompt for every child, from one process."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment |= {} if plugin else {"VLLM_PLUGINS": ""}
    request = json.dumps([[str(folder) for folder in folders], PROMPTS, NEW, not plugin])
    out = subprocess.run(
        [sys.executable, "-c", SERVE, request], capture_output=True, text=True, env=environment
    )
    lines = [line for line in out.stdout.splitlines() if line.startswith("TOKENS ")]
    assert len(lines) == len(folders), out.stderr[-3000:]
    return [json.loads(line.removeprefix("TOKENS ")) for line in lines]


def ours(folder: Path) -> list[list[int]]:
    model = child.load(folder, torch.float32, torch.device("cpu"))
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([p]), **settings)[0, len(p) :].tolist() for p in PROMPTS]


@pytest.fixture(scope="module")
def with_plugin(tmp_path_factory):
    """{row: (our tokens, vLLM's)}, all from one engine process."""
    root, folders = tmp_path_factory.mktemp("served"), {}
    for row in families.ROWS:
        described = parent.describe(str(families.make(row, root / row / "parent")))
        folders[row] = write_child(described, root / row / "child", EVERYTHING)
    theirs = served(list(folders.values()), plugin=True)
    return {
        row: (ours(folder), tokens)
        for (row, folder), tokens in zip(folders.items(), theirs, strict=True)
    }


@pytest.mark.parametrize("row", families.ROWS)
def test_our_plugin_generates_our_greedy_tokens_without_trusting_code(with_plugin, row):
    mine, theirs = with_plugin[row]
    assert mine == theirs
    assert len({tuple(tokens) for tokens in mine}) == len(PROMPTS)  # the prompts count


def test_stock_vllm_generates_our_greedy_tokens(tmp_path):
    """The child is served as it lies on disk, without our package's model code."""
    folders = []
    for row in ("llama 3", "llama with biases", "qwen2", "mistral"):
        described = parent.describe(str(families.make(row, tmp_path / row / "parent")))
        for name, blocks in {"reduced": MIXED["reduced"], "plain": PLAIN}.items():
            folders.append(write_child(described, tmp_path / row / name, blocks))
            config = json.loads((folders[-1] / "config.json").read_text())
            assert config["architectures"] == ["DeciLMForCausalLM"]
            assert ("per_layer_config" in config) == (blocks == PLAIN)
    for folder, tokens in zip(folders, served(folders, plugin=False), strict=True):
        assert tokens == ours(folder), folder
