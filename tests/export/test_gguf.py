"""The GGUF export against transformers, hand-made orders of rows, and (marked slow) llama.cpp
itself.
"""

import hashlib
import importlib.util
import itertools
import json
import sys

import gguf
import numpy as np
import pytest
import torch
from children import write_child
from conftest import CHAT_TEMPLATE, TEXT, make_parent
from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from puzzle.errors import UserError
from puzzle.export import formats as exporters
from puzzle.export import gguf as gguf_exporter
from puzzle.export import gguf_vocabulary
from puzzle.model import child, parent
from puzzle.model.architecture import Architecture
from puzzle.model.modeling_puzzle import PuzzleConfig, PuzzleForCausalLM

CPU = torch.device("cpu")
MIXED = ["gqa_1+gated_96", "no_op+gated_32", "linear+gated_64", "gqa_2+gated_32"]
SERVED = {
    "the parent": ["gqa_2+gated_96"] * 4,
    "reduced": ["gqa_1+gated_96", "no_op+gated_32", "gqa_2+gated_64", "no_op+gated_64"],
    "no-ops first and last": ["no_op+gated_32", "gqa_2+gated_96", "gqa_1+gated_64", "no_op+no_op"],
    "empty layers": ["no_op+no_op", "gqa_1+gated_96", "no_op+no_op", "gqa_2+gated_32"],
    "linear": ["linear+gated_96", "gqa_2+gated_64", "linear+gated_32", "gqa_1+gated_96"],
}
ROPE = {
    "default": {"rope_theta": 5e5},
    "linear": {"rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
}


def exported(folder, target, **options):
    """The file written, with its tensors dequantised and its keys."""
    found = gguf_exporter.export(folder, target, **options)
    reader = gguf.GGUFReader(target / found["file"])
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    keys = {name: value.contents() for name, value in reader.fields.items()}
    return found, tensors, types, keys


def checkpoint(folder):
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def change_config(folder, **changes):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))


def pairs_together(rows, heads):
    """Row by row: output row 2j + s of a head is input row j + s * head_dim/2."""
    half = rows.shape[0] // heads // 2
    return np.stack(
        [
            rows[h * 2 * half + s * half + j]
            for h in range(heads)
            for j in range(half)
            for s in (0, 1)
        ]
    )


def test_f32_holds_the_checkpoint_bit_by_bit(tiny, tmp_path):
    folder = write_child(tiny, tmp_path / "child", MIXED)
    _, tensors, types, _ = exported(folder, tmp_path / "out", dtype="f32")
    source = {name: tensor.numpy() for name, tensor in checkpoint(folder).items()}
    wanted = {
        "token_embd.weight": source["model.embed_tokens.weight"],
        "output_norm.weight": source["model.norm.weight"],
    }
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_v": "self_attn.v_proj",
    }
    for layer, ours in itertools.product(range(4), names):
        if (name := f"model.layers.{layer}.{names[ours]}.weight") in source:
            wanted[f"blk.{layer}.{ours}.weight"] = source[name]
    for layer, kv_heads in ((0, 1), (3, 2)):
        attention = f"model.layers.{layer}.self_attn."
        wanted[f"blk.{layer}.attn_q.weight"] = pairs_together(
            source[attention + "q_proj.weight"], 4
        )
        wanted[f"blk.{layer}.attn_k.weight"] = pairs_together(
            source[attention + "k_proj.weight"], kv_heads
        )
        wanted[f"blk.{layer}.attn_output.weight"] = source[attention + "o_proj.weight"]
    wanted["blk.2.attn_output.weight"] = source["model.layers.2.self_attn.linear_attn.weight"]
    assert set(tensors) == set(wanted) and set(types.values()) == {"F32"}
    assert all(np.array_equal(tensors[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_half_precision_is_the_checkpoint_rounded_once(tiny, tmp_path, dtype):
    folder = write_child(tiny, tmp_path / "child", MIXED)
    _, exact, _, _ = exported(folder, tmp_path / "exact", dtype="f32")
    _, tensors, types, _ = exported(folder, tmp_path / "out", dtype=dtype)
    half = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for name, values in exact.items():
        rounded = (
            torch.from_numpy(values.copy()).to(half).float().numpy() if values.ndim == 2 else values
        )
        assert np.array_equal(tensors[name], rounded), name
        assert types[name] == (dtype.upper() if values.ndim == 2 else "F32")


def test_q8_0_is_within_half_a_step_of_the_checkpoint(tiny, tmp_path):
    folder = write_child(tiny, tmp_path / "child", MIXED)
    _, exact, _, _ = exported(folder, tmp_path / "exact", dtype="f32")
    _, tensors, types, _ = exported(folder, tmp_path / "out", dtype="q8_0")
    for name, values in exact.items():
        if values.ndim == 1:
            assert types[name] == "F32" and np.array_equal(tensors[name], values)
            continue
        step = np.abs(values.reshape(-1, 32)).max(1, keepdims=True) / 127
        error = np.abs(tensors[name] - values).reshape(-1, 32)
        assert types[name] == "Q8_0" and (error <= 0.57 * step).all() and error.max() > 0


def test_q8_0_leaves_rows_that_are_no_multiple_of_32_in_f16(tmp_path):
    make_parent(tmp_path / "parent", intermediate_size=80)
    folder = write_child(
        parent.describe(str(tmp_path / "parent")), tmp_path / "child", ["gqa_2+gated_80"] * 4
    )
    found, _, types, _ = exported(folder, tmp_path / "out", dtype="q8_0")
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q8_0"
    assert any("f16" in note for note in found["notes"])


def test_layers_have_their_own_sizes_and_empty_ones_are_left_out(tiny, tmp_path):
    names = ["no_op+no_op", "linear+gated_96", "gqa_1+gated_32", "no_op+gated_64"]
    folder = write_child(tiny, tmp_path / "child", names)
    found, tensors, _, keys = exported(folder, tmp_path / "out")
    assert keys["deci.block_count"] == 3 and found["layers"] == keys["puzzle.layers"] == [1, 2, 3]
    assert keys["deci.attention.head_count"] == [4, 4, 0]
    assert keys["deci.attention.head_count_kv"] == [0, 1, 0]
    assert keys["deci.feed_forward_length"] == [96, 32, 64]
    assert (
        not any(name.startswith("blk.3.") for name in tensors)
        and "blk.2.attn_norm.weight" not in tensors
    )
    assert any("layers 0 are no-ops" in note for note in found["notes"])


def test_a_no_op_attention_in_layer_0_becomes_a_zero_matrix(tiny, tmp_path):
    folder = write_child(tiny, tmp_path / "child", SERVED["no-ops first and last"])
    found, tensors, _, keys = exported(folder, tmp_path / "out")
    assert keys["deci.attention.head_count"] == [4, 4, 4] and keys[
        "deci.attention.head_count_kv"
    ] == [0, 2, 1]
    assert (
        not tensors["blk.0.attn_output.weight"].any()
        and (tensors["blk.0.attn_norm.weight"] == 1).all()
    )
    assert any("zero matrix" in note for note in found["notes"])


def test_the_keys_are_the_config(tiny, tmp_path):
    folder = write_child(tiny, tmp_path / "child", MIXED)
    _, _, _, keys = exported(folder, tmp_path / "out", name="pocket-half", dtype="q8_0")
    config = PuzzleConfig.from_pretrained(folder)
    expected = {
        "general.architecture": "deci",
        "general.name": "pocket-half",
        "general.file_type": 7,
        "deci.context_length": 256,
        "deci.embedding_length": 64,
        "deci.attention.key_length": 16,
        "deci.attention.value_length": 16,
        "deci.rope.dimension_count": 16,
        "deci.rope.freq_base": 10000.0,
        "deci.vocab_size": 320,
        "deci.attention.layer_norm_rms_epsilon": np.float32(config.rms_norm_eps),
    }
    assert {key: keys[key] for key in expected} == expected


def test_an_untied_head_is_written_and_a_tied_one_is_not(tiny, tmp_path):
    _, tied, _, _ = exported(write_child(tiny, tmp_path / "tied", MIXED), tmp_path / "out")
    make_parent(tmp_path / "parent", tie_word_embeddings=False)
    folder = write_child(parent.describe(str(tmp_path / "parent")), tmp_path / "child", MIXED)
    _, untied, _, _ = exported(folder, tmp_path / "out2", dtype="f32")
    assert "output.weight" not in tied
    assert np.array_equal(untied["output.weight"], checkpoint(folder)["lm_head.weight"].numpy())


@pytest.mark.parametrize("kind", ROPE)
def test_rope_factors_give_the_frequencies_of_transformers(tmp_path, kind):
    make_parent(tmp_path / "parent", rope_parameters={"rope_type": kind, **ROPE[kind]})
    folder = write_child(
        parent.describe(str(tmp_path / "parent")), tmp_path / "child", ["gqa_2+gated_96"] * 4
    )
    _, tensors, _, keys = exported(folder, tmp_path / "out")
    rotary = child.load(folder, torch.float32, CPU).model.rotary_emb
    plain = keys["deci.rope.freq_base"] ** (-np.arange(0, 16, 2) / 16)
    got = plain / tensors.get("rope_freqs.weight", 1.0)
    assert np.allclose(got, rotary.inv_freq.numpy(), rtol=1e-5)
    assert keys.get("deci.rope.scaling.attn_factor", 1.0) == pytest.approx(rotary.attention_scaling)
    assert ("rope_freqs.weight" in tensors) == (kind != "default")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["gqa_2+gated_96", "gqa_2+gated_96", "gqa_1+linear", "gqa_2+linear"],
            "layer 2: got a linear FFN",
        ),
        (
            ["gqa_2+gated_96", "gqa_1+no_op", "gqa_2+gated_96", "gqa_2+linear"],
            "layer 1: got an FFN no-op after gqa_1",
        ),
        (
            ["gqa_2+gated_96", "gqa_2+gated_96", "linear+no_op", "gqa_1+no_op"],
            "layer 2: got an FFN no-op after linear",
        ),
        (
            ["no_op+gated_96", "linear+gated_96", "no_op+no_op", "linear+gated_32"],
            "without attention in any layer",
        ),
        (["no_op+no_op"] * 4, "without attention in any layer"),
    ],
)
def test_blocks_that_llama_cpp_gets_wrong_are_refused(tiny, tmp_path, names, message):
    folder = write_child(tiny, tmp_path / "child", names)
    with pytest.raises(UserError, match=message) as refusal:
        gguf_exporter.export(folder, tmp_path / "out")
    assert "expected" in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qk_norm", True),
        ("norm_style", "gemma"),
        ("norm_placement", "post"),
        ("embedding_scale", 8.0),
        ("query_scale", 0.1),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    ],
)
def test_what_other_families_do_is_refused_by_name(tiny, tmp_path, key, value):
    folder = write_child(tiny, tmp_path / "child", MIXED)
    change_config(folder, **{key: value})
    with pytest.raises(UserError, match=key):
        gguf_exporter.export(folder, tmp_path / "out")


def test_a_window_of_attention_is_refused_with_its_layer(tiny, tmp_path):
    folder = write_child(tiny, tmp_path / "child", MIXED)
    blocks = json.loads((folder / "config.json").read_text())["block_configs"]
    blocks[3]["attention"]["window_length"] = 128
    change_config(folder, block_configs=blocks)
    with pytest.raises(UserError, match="layer 3: got attention to a window of 128 tokens"):
        gguf_exporter.export(folder, tmp_path / "out")


def test_a_tensor_without_a_place_is_refused_by_name(tiny, tmp_path):
    folder = write_child(tiny, tmp_path / "child", MIXED)
    state = checkpoint(folder) | {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"self_attn\.q_norm\.weight"):
        gguf_exporter.export(folder, tmp_path / "out")


def test_weights_beyond_f16_are_refused_and_no_file_is_left(tiny, tmp_path):
    folder = write_child(tiny, tmp_path / "child", MIXED)
    state = checkpoint(folder)
    state["model.layers.3.mlp.up_proj.weight"][5, 7] = 1e5
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.3\.mlp\.up_proj.*bf16"):
        gguf_exporter.export(folder, tmp_path / "out", dtype="f16")
    assert list((tmp_path / "out").iterdir()) == []


def test_unknown_names_of_formats_and_types_are_refused(tiny, tmp_path):
    assert exporters.exporter("gguf") is gguf_exporter
    with pytest.raises(UserError, match="expected one of: gguf"):
        exporters.exporter("onnx")
    with pytest.raises(UserError, match="expected one of f32, f16, bf16, q8_0"):
        gguf_exporter.export(tmp_path, tmp_path, dtype="q4_0")
    with pytest.raises(UserError, match=r"no config\.json"):
        gguf_exporter.export(tmp_path, tmp_path)
    with pytest.raises(UserError, match="no block_configs"):
        gguf_exporter.export(tiny.folder, tmp_path)


def test_without_the_gguf_package_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'puzzle-nas\[gguf\]'"):
        gguf_exporter.library()


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_verify_accepts_an_export_and_finds_one_changed_value(tiny, tmp_path, dtype):
    folder = write_child(tiny, tmp_path / "child", MIXED)
    found = gguf_exporter.export(folder, tmp_path / "out", dtype=dtype)
    checked = gguf_exporter.verify(folder, tmp_path / "out", tokens=0)
    assert checked == {"file": found["file"], "dtype": dtype, "tensors": found["tensors"]}
    state = checkpoint(folder)
    state["model.layers.3.self_attn.k_proj.weight"][17, 3] += 0.1
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"blk\.3\.attn_k\.weight"):
        gguf_exporter.verify(folder, tmp_path / "out", tokens=0)


# --- tokenizers


def test_the_tokenizer_written_is_the_one_of_transformers(tiny, tmp_path):
    folder = write_child(tiny, tmp_path / "child", MIXED)
    _, _, _, keys = exported(folder, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tiny.folder)
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 320
    assert tokens[: len(theirs)] == theirs.convert_ids_to_tokens(range(len(theirs)))
    assert types[0] == 3 and set(types[1 : len(theirs)]) == {1} and set(types[len(theirs) :]) <= {5}
    merges = json.loads(theirs.backend_tokenizer.to_str())["model"]["merges"]
    assert keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == "gpt-2"
    assert (
        keys["tokenizer.ggml.eos_token_id"] == theirs.eos_token_id
        and not keys["tokenizer.ggml.add_bos_token"]
    )
    assert keys["tokenizer.chat_template"] == CHAT_TEMPLATE


def byte_level(*steps, regex=False):
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    return pre_tokenizers.Sequence([*steps, last])


def split(expression):
    return pre_tokenizers.Split(Regex(expression), "isolated")


# name -> pre-tokenizer, ignore_merges; the expressions as the published tokenizer.json files have
# them
END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
LLAMA_3 = WORDS + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + END
QWEN_2 = WORDS + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + END
QWEN_35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
    + END
)
PRE_TOKENIZERS = {
    "gpt-2": (byte_level(regex=True), False),
    "smollm": (byte_level(pre_tokenizers.Digits(individual_digits=True), regex=True), False),
    "llama-bpe": (byte_level(split(LLAMA_3)), True),
    "dbrx": (byte_level(split(LLAMA_3)), False),
    "qwen2": (byte_level(split(QWEN_2)), False),
    "qwen35": (byte_level(split(QWEN_35)), False),
}
CORPUS = [
    TEXT,
    gguf_vocabulary.TEST_TEXT,
    "It's 12345 o'clock; WE'LL see 67 naïve cafés.\n\n\n  So    what?\t1,000,000.50",
] * 3


def train(folder, pre_tokenizer, ignore_merges=False, normalizer=None, **settings):
    """A byte-level BPE tokenizer in `folder` that splits with `pre_tokenizer`; 500 tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|begin|>", "<|end|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", **settings
    )
    fast.save_pretrained(folder)
    return fast


def sentencepiece(folder, prepend):
    """A Llama-2-like tokenizer.json: every pair of pieces that makes a piece is a merge, best piece
    first.
    """
    letters = ["▁", *"abcdefghilnorstuvw().,:'"]
    words = [
        "▁a",
        "▁t",
        "he",
        "in",
        "re",
        "er",
        "▁the",
        "on",
        "▁th",
        "add",
        "ad",
        "dd",
        "▁add",
        "return",
        "ret",
        "urn",
        "ur",
    ]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    merges = [
        (word[:cut], word[cut:])
        for word in words
        for cut in range(1, len(word))
        if word[:cut] in vocabulary and word[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    if prepend:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return fast


def vocabulary(folder, size=512):
    return gguf_vocabulary.read(folder, PuzzleConfig(vocab_size=size, block_configs=[]))


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizers_are_recognised_by_what_they_do(tmp_path, name):
    theirs = train(tmp_path, *PRE_TOKENIZERS[name])
    found = vocabulary(tmp_path)
    assert found.pre == name
    assert found.tokens[: len(theirs)] == theirs.convert_ids_to_tokens(range(len(theirs)))
    assert [found.types[theirs.convert_tokens_to_ids(t)] for t in ("<|begin|>", "<tool>", "a")] == [
        3,
        4,
        1,
    ]


def test_published_tokenizers_are_recognised_by_what_they_make_of_a_text(tmp_path, monkeypatch):
    theirs = train(tmp_path, byte_level(split(r"\d+|[^\d]+")))
    digest = hashlib.sha256(str(theirs.encode(gguf_vocabulary.TEST_TEXT)).encode()).hexdigest()
    with pytest.raises(UserError, match="pre-tokenizer"):
        vocabulary(tmp_path)
    monkeypatch.setitem(gguf_vocabulary.PUBLISHED, digest, "deepseek-llm")
    assert vocabulary(tmp_path).pre == "deepseek-llm"


def test_tokens_added_around_a_text_are_told_and_others_refused(tmp_path):
    for name, template, wanted in (
        ("none", "$A", (False, False)),
        ("bos", "<|begin|> $A", (True, False)),
        ("both", "<|begin|> $A <|end|>", (True, True)),
        ("other", "<|end|> $A", None),
    ):
        theirs = train(tmp_path / name, PRE_TOKENIZERS["gpt-2"][0])
        special = [
            (token, theirs.convert_tokens_to_ids(token)) for token in ("<|begin|>", "<|end|>")
        ]
        theirs.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special
        )
        theirs.save_pretrained(tmp_path / name)
        if wanted:
            found = vocabulary(tmp_path / name)
            assert (found.add_bos, found.add_eos) == wanted
        else:
            with pytest.raises(UserError, match="wraps every text"):
                vocabulary(tmp_path / name)


@pytest.mark.parametrize(
    ("pre_tokenizer", "ignore_merges", "normalizer"),
    [
        (byte_level(split(r"\w+|\W+")), False, None),
        (byte_level(regex=True), True, None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), False, None),
        (byte_level(regex=True), False, normalizers.Lowercase()),
        (pre_tokenizers.Whitespace(), False, None),
    ],
)
def test_splits_that_llama_cpp_does_not_know_are_refused(
    tmp_path, pre_tokenizer, ignore_merges, normalizer
):
    train(tmp_path, pre_tokenizer, ignore_merges, normalizer)
    with pytest.raises(
        UserError, match="expected a byte-level BPE or SentencePiece tokenizer that llama.cpp knows"
    ):
        vocabulary(tmp_path)


def test_a_missing_or_too_large_tokenizer_is_refused(tiny, tmp_path):
    train(tmp_path / "large", byte_level(regex=True))
    with pytest.raises(UserError, match="501 tokens, its embedding 320"):
        vocabulary(tmp_path / "large", 320)
    folder = write_child(tiny, tmp_path / "child", MIXED)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="tokenizer"):
        gguf_exporter.export(folder, tmp_path / "out")


@pytest.mark.parametrize("prepend", [True, False])
def test_sentencepiece_scores_follow_the_merges(tmp_path, prepend):
    theirs = sentencepiece(tmp_path, prepend)
    found = vocabulary(tmp_path)
    assert (found.model, found.pre, found.space_prefix) == ("llama", "default", prepend)
    assert (found.add_bos, found.add_eos) == (True, False)
    assert found.tokens[: len(theirs)] == theirs.convert_ids_to_tokens(range(len(theirs)))
    assert found.types[:4] == [2, 3, 3, 6] and found.types[len(theirs) :] == [5] * (
        512 - len(theirs)
    )
    merges = json.loads(theirs.backend_tokenizer.to_str())["model"]["merges"]
    scores = [found.scores[theirs.convert_tokens_to_ids("".join(pair))] for pair in merges]
    assert scores == sorted(scores, reverse=True)


def test_merges_that_scores_cannot_express_are_refused(tmp_path):
    theirs = sentencepiece(tmp_path, True)
    state = json.loads(theirs.backend_tokenizer.to_str())
    del state["model"]["merges"][-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="not those of SentencePiece scores"):
        vocabulary(tmp_path)


# --- llama.cpp itself: `make test-engines`


def in_llama_cpp(test):
    missing = importlib.util.find_spec("llama_cpp") is None
    return pytest.mark.slow(pytest.mark.skipif(missing, reason="llama_cpp is not installed")(test))


def ask_llama_cpp(path, prompt, count):
    """Greedy tokens with a float32 KV cache, as ours."""
    import llama_cpp

    f32 = llama_cpp.GGML_TYPE_F32
    engine = llama_cpp.Llama(
        str(path), n_ctx=256, verbose=False, type_k=f32, type_v=f32, n_threads=1
    )
    tokens = list(
        itertools.islice(engine.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0), count)
    )
    engine.close()
    return tokens


def ask_ours(folder, prompt, count, dtype):
    """Greedy tokens of our loader in float32, matrices rounded as the file's."""
    model = child.load(folder, torch.float32, CPU)
    if dtype == "f16":
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data = parameter.data.half().float()
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=-1
    )
    return out[0, len(prompt) :].tolist()


PROMPT = [5, 17, 200, 31, 4, 99, 150, 7]


@in_llama_cpp
@pytest.mark.parametrize("names", SERVED.values(), ids=SERVED.keys())
def test_llama_cpp_generates_the_same_64_tokens(tiny, tmp_path, names):
    """In f32: with f16 matrices llama.cpp rounds activations to f16 too, and random models have
    near-ties.
    """
    folder = write_child(tiny, tmp_path / "child", names)
    found = gguf_exporter.export(folder, tmp_path / "out", dtype="f32")
    ours = ask_ours(folder, PROMPT, 64, "f32")
    assert ask_llama_cpp(tmp_path / "out" / found["file"], PROMPT, 64) == ours
    assert len(set(ours)) > 10


@in_llama_cpp
def test_llama_cpp_generates_the_same_64_tokens_in_f16(tiny, tmp_path):
    folder = write_child(tiny, tmp_path / "child", SERVED["reduced"])
    found = gguf_exporter.export(folder, tmp_path / "out", dtype="f16")
    assert ask_llama_cpp(tmp_path / "out" / found["file"], PROMPT, 64) == ask_ours(
        folder, PROMPT, 64, "f16"
    )


@in_llama_cpp
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
    found = gguf_exporter.export(folder, tmp_path / "out", dtype="f32")
    prompt = [*range(3, 203, 2)]  # long enough for slow RoPE dimensions to count
    assert ask_llama_cpp(tmp_path / "out" / found["file"], prompt, 64) == ask_ours(
        folder, prompt, 64, "f32"
    )


@in_llama_cpp
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
    found, tensors, _, _ = exported(tmp_path / "child", tmp_path / "out", dtype="f32")
    assert any(name.endswith(".bias") for name in tensors)
    ours = ask_ours(tmp_path / "child", PROMPT, 64, "f32")
    assert ask_llama_cpp(tmp_path / "out" / found["file"], PROMPT, 64) == ours


@in_llama_cpp
@pytest.mark.parametrize("dtype", gguf_exporter.FILE_TYPES)
def test_verify_compares_what_llama_cpp_generates(tiny, tmp_path, dtype):
    folder = write_child(tiny, tmp_path / "child", SERVED["linear"])
    gguf_exporter.export(folder, tmp_path / "out", dtype=dtype)
    found = gguf_exporter.verify(folder, tmp_path / "out", tokens=48)
    assert found["generated_tokens"] == 48 and found["same_tokens"] >= 40
    assert dtype != "f32" or found["same_tokens"] == 48


@in_llama_cpp
def test_verify_finds_the_attention_output_that_llama_cpp_loses(tiny, tmp_path, monkeypatch):
    """Why an FFN no-op after attention is refused."""
    folder = write_child(
        tiny,
        tmp_path / "child",
        ["gqa_2+gated_96", "gqa_2+no_op", "gqa_2+gated_96", "gqa_2+gated_96"],
    )
    monkeypatch.setattr(gguf_exporter, "refuse", lambda *_: None)
    gguf_exporter.export(folder, tmp_path / "out", dtype="f32")
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


@in_llama_cpp
@pytest.mark.parametrize("name", [*PRE_TOKENIZERS, "sentencepiece"])
def test_llama_cpp_splits_text_as_transformers_does(tmp_path, name):
    if name == "sentencepiece":
        theirs = sentencepiece(tmp_path, True)
        texts = [*CORPUS, " led", "  two", "returned the adder", "</s>after"]
    else:
        theirs = train(tmp_path, *PRE_TOKENIZERS[name])
        texts = [*CORPUS, " led", "a<tool>b <|end|>", "x = 3.14159 # WE'Ve", "\r\n\r\n \t"]
    assert split_by_llama_cpp(tmp_path, tmp_path / "tokenizer.gguf", texts) == [
        theirs(text).input_ids for text in texts
    ]
