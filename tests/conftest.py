"""Tiny parents made with transformers, a local corpus, and runs on them: everything a test needs,
offline.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from interrupted_runs import Command, Tally, Uninterrupted, results
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from puzzle import config
from puzzle.model import parent
from puzzle.progress import Progress
from puzzle.run import Run

DEVICE_SHEET = Path(__file__).parent / "device.yaml"
TEXT = (
    "def add(left, right):\n    return left + right\n\n"
    "for number in range(10):\n    print(add(number, number))\n"
)
NEEDS_VLLM = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return fast


def make_parent(folder: Path, **overrides) -> Path:
    """A random Llama of 4 layers; weights large enough that every layer matters."""
    settings = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    dtype = overrides.pop("dtype", torch.float32)
    model = LlamaForCausalLM(LlamaConfig(**(settings | overrides))).to(dtype)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    return make_parent(tmp_path_factory.mktemp("parent"))


@pytest.fixture(scope="session")
def tiny(tiny_folder) -> parent.Parent:
    return parent.describe(str(tiny_folder))


def make_text(folder: Path) -> Path:
    for i in range(80):
        body = "\n".join(TEXT.replace("add", f"add_{i}_{j}") for j in range(4))
        (folder / f"module_{i}.py").write_text(body)
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"))


def tiny_recipe(tiny_folder: Path, text_folder: Path, out: Path) -> dict:
    """Settings of a run that takes seconds: modelled costs, a few training steps."""
    return {
        "parent": str(tiny_folder),
        "out": str(out),
        "precision": "float32",
        "deploy": ["transformers"],
        "corpus": {
            "sources": [str(text_folder)],
            "sequence_length": 32,
            "train_tokens": 16384,
            "held_out_fraction": 0.4,
            "held_out_tokens": 4096,
        },
        "library": {
            "ffn_percent": [50],
            "tokens": 2048,
            "batch_sequences": 8,
            "calibration_sequences": 8,
            "validation_sequences": 8,
            "chunk_steps": 3,
            # Eight steps show no gain over a least-squares start
            "initialization": "training_free",
            "learning_rate": 1.5e-3,
        },
        "score": {"assembled": 0, "sequences": 8, "shard_sequences": 4, "tokens_per_pass": 512},
        "cost": {
            "engine": "roofline",
            "device_sheet": str(DEVICE_SHEET),
            "scenario": {"batch_size": 8, "input_length": 16, "output_length": 16},
        },
        "search": {"throughput": "1.3x", "refinements": 0},
        "uptrain": {
            "tokens": 2048,
            "batch_sequences": 8,
            "checkpoint_steps": 2,
            "validate_steps": 4,
        },
        "evaluate": {"sequences": 16, "questions": 4, "samples": 1, "sample_tokens": 4},
    }


@pytest.fixture
def tiny_run(tiny_folder, text_folder, tmp_path) -> Run:
    recipe = config.parse(tiny_recipe(tiny_folder, text_folder, tmp_path / "run"))
    return Run(recipe, tmp_path / "run", Progress(quiet=True))


@pytest.fixture(scope="session")
def finished_run(tiny_folder, text_folder, tmp_path_factory) -> Run:
    """One whole run shared by the tests that only look at it."""
    from puzzle import pipeline

    out = tmp_path_factory.mktemp("runs") / "run"
    run = Run(config.parse(tiny_recipe(tiny_folder, text_folder, out)), out, Progress(quiet=True))
    pipeline.execute(run)
    return run


@pytest.fixture(scope="session")
def command(tiny_folder, text_folder, tmp_path_factory):
    """`puzzle run` of the tiny recipe in processes that can fail."""
    folder = tmp_path_factory.mktemp("faults")
    with Command(tiny_recipe(tiny_folder, text_folder, folder / "run"), folder) as started:
        yield started


@pytest.fixture(scope="session")
def uninterrupted(command) -> Uninterrupted:
    """The same run without faults."""
    folder = command.folder / "uninterrupted"
    outcome = command.run(folder)
    assert outcome.status == 0, outcome.lines
    return Uninterrupted(folder, outcome.writes, results(folder))


@pytest.fixture(scope="session")
def tally():
    """Faults that were injected and survived, by kind; see `make test-faults`."""
    counted = Tally()
    yield counted
    counted.write()


def write_recipe(path: Path, recipe: dict) -> Path:
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path
