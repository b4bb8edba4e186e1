"""Tokens, types and special tokens in a GGUF file against transformers."""

import json

import pytest
from children import write_child
from conftest import CHAT_TEMPLATE
from gguf_exports import MIXED, exported
from made_tokenizers import PRE_TOKENIZERS, byte_level, train, vocabulary
from tokenizers import processors
from transformers import AutoTokenizer

from puzzle.errors import UserError
from puzzle.export import gguf as gguf_exporter
from puzzle.export.exporter import Options


def test_the_tokenizer_written_is_the_one_of_transformers(tiny, tmp_path):
    folder = write_child(tiny, tmp_path / "child", MIXED)
    _, _, _, keys = exported(folder, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder)
    size = len(tokenizer)
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 320
    assert tokens[:size] == tokenizer.convert_ids_to_tokens(range(size))
    assert types[0] == 3 and set(types[1:size]) == {1} and set(types[size:]) <= {5}
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == "gpt-2"
    assert keys["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert not keys["tokenizer.ggml.add_bos_token"]
    assert keys["tokenizer.chat_template"] == CHAT_TEMPLATE


def test_tokens_added_around_a_text_are_told_and_others_refused(tmp_path):
    for name, template, expected in (
        ("none", "$A", (False, False)),
        ("bos", "<|begin|> $A", (True, False)),
        ("both", "<|begin|> $A <|end|>", (True, True)),
        ("other", "<|end|> $A", None),
    ):
        tokenizer = train(tmp_path / name, PRE_TOKENIZERS["gpt-2"][0])
        special = [
            (token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|begin|>", "<|end|>")
        ]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special
        )
        tokenizer.save_pretrained(tmp_path / name)
        if expected:
            read = vocabulary(tmp_path / name)
            assert (read.add_bos, read.add_eos) == expected
        else:
            with pytest.raises(UserError, match="wraps every text"):
                vocabulary(tmp_path / name)


def test_a_missing_or_too_large_tokenizer_is_refused(tiny, tmp_path):
    train(tmp_path / "large", byte_level(regex=True))
    with pytest.raises(UserError, match="501 tokens, its embedding 320"):
        vocabulary(tmp_path / "large", 320)
    folder = write_child(tiny, tmp_path / "child", MIXED)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="tokenizer"):
        gguf_exporter.export(folder, tmp_path / "out", Options())
