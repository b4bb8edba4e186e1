"""Tokenizers that llama.cpp knows are recognised, and others refused."""

import hashlib
import json

import pytest
from made_tokenizers import (
    PRE_TOKENIZERS,
    byte_level,
    sentencepiece,
    split,
    train,
    vocabulary,
)
from tokenizers import normalizers, pre_tokenizers

from puzzle.errors import UserError
from puzzle.export import gguf_splitting


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizers_are_recognised_by_what_they_do(tmp_path, name):
    tokenizer = train(tmp_path, *PRE_TOKENIZERS[name])
    read = vocabulary(tmp_path)
    size = len(tokenizer)
    assert read.splitting.pre == name
    assert read.tokens[:size] == tokenizer.convert_ids_to_tokens(range(size))
    ids = tokenizer.convert_tokens_to_ids(["<|begin|>", "<tool>", "a"])
    assert [read.types[token_id] for token_id in ids] == [3, 4, 1]


def test_published_tokenizers_are_recognised_by_what_they_make_of_a_text(tmp_path, monkeypatch):
    tokenizer = train(tmp_path, byte_level(split(r"\d+|[^\d]+")))
    ids = tokenizer.encode(gguf_splitting.TEST_TEXT)
    digest = hashlib.sha256(str(ids).encode()).hexdigest()
    with pytest.raises(UserError, match="pre-tokenizer"):
        vocabulary(tmp_path)
    monkeypatch.setitem(gguf_splitting.PUBLISHED, digest, "deepseek-llm")
    assert vocabulary(tmp_path).splitting.pre == "deepseek-llm"


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


@pytest.mark.parametrize("prepend", [True, False])
def test_sentencepiece_scores_follow_the_merges(tmp_path, prepend):
    tokenizer = sentencepiece(tmp_path, prepend)
    read = vocabulary(tmp_path)
    splitting, size = read.splitting, len(tokenizer)
    assert (splitting.model, splitting.pre) == ("llama", "default")
    assert splitting.space_prefix == prepend
    assert (read.add_bos, read.add_eos) == (True, False)
    assert read.tokens[:size] == tokenizer.convert_ids_to_tokens(range(size))
    assert read.types[:4] == [2, 3, 3, 6] and read.types[size:] == [5] * (512 - size)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    ids = tokenizer.convert_tokens_to_ids(["".join(pair) for pair in merges])
    scores = [splitting.scores[token_id] for token_id in ids]
    assert scores == sorted(scores, reverse=True)


def test_merges_that_scores_cannot_express_are_refused(tmp_path):
    tokenizer = sentencepiece(tmp_path, True)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    del state["model"]["merges"][-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="not those of SentencePiece scores"):
        vocabulary(tmp_path)


def test_a_space_before_a_text_is_the_only_change_that_sentencepiece_may_make(tmp_path):
    tokenizer = sentencepiece(tmp_path, True)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["normalizer"]["normalizers"].append({"type": "Lowercase"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="a BPE with byte fallback, normalizer .*Lowercase"):
        vocabulary(tmp_path)
