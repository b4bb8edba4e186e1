"""GGUF exports in llama.cpp itself against transformers: `make test-engines`."""

import importlib.util
import itertools

import gguf
import pytest
import torch
from children import write_child
from conftest import make_parent
from gguf_exports import MIXED, ROPE, SERVED, exported
from made_tokenizers import CORPUS, PRE_TOKENIZERS, sentencepiece, train, vocabulary

from puzzle.errors import UserError
from puzzle.export import gguf as gguf_exporter
from puzzle.export import gguf_vocabulary
from puzzle.export.exporter import Options
from puzzle.export.gguf_types import FILE_TYPES
from puzzle.model import child, parent
from puzzle.model.architecture import Architecture
from puzzle.model.modeling_puzzle import PuzzleForCausalLM

PROMPT = [5, 17, 200, 31, 4, 99, 150, 7]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llama_cpp") is None, reason="llama_cpp is not installed"
    ),
]


def ask_llama_cpp(path, prompt, count):
    """Greedy tokens with a float32 KV cache, as ours."""
    import llama_cpp

    f32 = llama_cpp.GGML_TYPE_F32
    engine = llama_cpp.Llama(
        str(path), n_ctx=256, verbose=False, type_k=f32, type_v=f32, n_threads=1
    )
    tokens = engine.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
    first_tokens = list(itertools.islice(tokens, count))
    engine.close()
    return first_tokens


def ask_ours(folder, prompt, count, dtype):
    """Greedy tokens of our loader in float32, matrices rounded as the file's."""
    model = child.load(folder, torch.float32, torch.device("cpu"))
    if dtype == "f16":
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data = parameter.data.half().float()
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=-1
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("names", SERVED.values(), ids=SERVED.keys())
def test_llama_cpp_generates_the_same_64_tokens(tiny, tmp_path, names):
    """In f32: with f16 matrices llama.cpp rounds activations to f16 too, and random models have
    near-ties.
    """
    folder = write_child(tiny, tmp_path / "child", names)
    written = gguf_exporter.export(folder, tmp_path / "out", Options(dtype="f32"))
    ours = ask_ours(folder, PROMPT, 64, "f32")
    assert ask_llama_cpp(tmp_path / "out" / written.file, PROMPT, 64) == ours
    assert len(set(ours)) > 10


def test_llama_cpp_generates_the_same_64_tokens_in_f16(tiny, tmp_path):
    folder = write_child(tiny, tmp_path / "child", SERVED["reduced"])
    written = gguf_exporter.export(folder, tmp_path / "out", Options(dtype="f16"))
    ours = ask_ours(folder, PROMPT, 64, "f16")
    assert ask_llama_cpp(tmp_path / "out" / written.file, PROMPT, 64) == ours


@pytest.mark.parametrize(
    "settings",
    [
        *({"rope_parameters": {"rope_type": kind, **ROPE[kind]}} for kind in ROPE),
        {"tie_word_embeddings": False, "head_dim": 32},
        {
            "hidden_size": 96,
            "num_attention_heads": 6,
            "rms_norm_eps": 1e-2,
            "dtype": torch.bfloat16,
        },
    ],
    ids=[*ROPE, "untied, wide heads", "odd width, bfloat16"],
)
def test_llama_cpp_computes_every_config_as_transformers_does(tmp_path, settings):
    make_parent(tmp_path / "parent", **settings)
    folder = write_child(parent.describe(str(tmp_path / "parent")), tmp_path / "child", MIXED)
    written = gguf_exporter.export(folder, tmp_path / "out", Options(dtype="f32"))
    prompt = [*range(3, 203, 2)]  # long enough for slow RoPE dimensions to count
    ours = ask_ours(folder, prompt, 64, "f32")
    assert ask_llama_cpp(tmp_path / "out" / written.file, prompt, 64) == ours


@pytest.mark.parametrize("biases", ["qkv_bias", "attention_bias", "mlp_bias"])
def test_llama_cpp_computes_biases_as_transformers_does(tiny, tmp_path, biases):
    architecture = Architecture.from_names(MIXED)
    config = tiny.child_config(architecture)
    setattr(config, biases, True)
    torch.manual_seed(1)
    model = PuzzleForCausalLM(config).float()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 or name.endswith("bias"):
            parameter.data.normal_(0, 0.5 if name.endswith("bias") else 0.15)
    child.save(tmp_path / "child", config, architecture, model.state_dict(), tiny.folder, "card\n")
    written, tensors, _, _ = exported(tmp_path / "child", tmp_path / "out", dtype="f32")
    assert any(name.endswith(".bias") for name in tensors)
    ours = ask_ours(tmp_path / "child", PROMPT, 64, "f32")
    assert ask_llama_cpp(tmp_path / "out" / written.file, PROMPT, 64) == ours


@pytest.mark.parametrize("dtype", FILE_TYPES)
def test_verify_compares_what_llama_cpp_generates(tiny, tmp_path, dtype):
    folder = write_child(tiny, tmp_path / "child", SERVED["linear"])
    gguf_exporter.export(folder, tmp_path / "out", Options(dtype=dtype))
    comparison = gguf_exporter.verify(folder, tmp_path / "out", tokens=48)
    assert comparison.generated_tokens == 48 and comparison.same_tokens >= 40
    assert dtype != "f32" or comparison.same_tokens == 48


def test_verify_finds_the_attention_output_that_llama_cpp_loses(tiny, tmp_path, monkeypatch):
    """Why an FFN no-op after attention is refused."""
    names = ["gqa_2+gated_96", "gqa_2+no_op", "gqa_2+gated_96", "gqa_2+gated_96"]
    folder = write_child(tiny, tmp_path / "child", names)
    monkeypatch.setattr(gguf_exporter, "refuse", lambda *_: None)
    gguf_exporter.export(folder, tmp_path / "out", Options(dtype="f32"))
    with pytest.raises(UserError, match="computes another model"):
        gguf_exporter.verify(folder, tmp_path / "out")


def split_by_llama_cpp(folder, path, texts):
    """Token ids of texts, from a GGUF file that holds only the tokenizer of `folder`."""
    import llama_cpp

    writer = gguf.GGUFWriter(path, "deci")
    gguf_vocabulary.add(writer, vocabulary(folder))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    engine = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    ids = [engine.tokenize(text.encode(), add_bos=True, special=True) for text in texts]
    engine.close()
    return ids


@pytest.mark.parametrize("name", [*PRE_TOKENIZERS, "sentencepiece"])
def test_llama_cpp_splits_text_as_transformers_does(tmp_path, name):
    if name == "sentencepiece":
        tokenizer = sentencepiece(tmp_path, True)
        texts = [*CORPUS, " led", "  two", "returned the adder", "</s>after"]
    else:
        tokenizer = train(tmp_path, *PRE_TOKENIZERS[name])
        texts = [*CORPUS, " led", "a<tool>b <|end|>", "x = 3.14159 # WE'Ve", "\r\n\r\n \t"]
    ids = [tokenizer(text).input_ids for text in texts]
    assert split_by_llama_cpp(tmp_path, tmp_path / "tokenizer.gguf", texts) == ids
