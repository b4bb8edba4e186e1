"""The parts of a tokenizer.json, as the tokenizers library writes it, that a GGUF file needs."""

from typing import Required, TypedDict

from pydantic import JsonValue


class BPEModel(TypedDict, total=False):
    """`model` of a tokenizer.json that is BPE; `merges` in rank order, "left right" or a pair."""

    type: Required[str]
    vocab: Required[dict[str, int]]
    merges: Required[list[str | list[str]]]
    unk_token: str | None
    byte_fallback: bool
    ignore_merges: bool
    continuing_subword_prefix: str | None
    end_of_word_suffix: str | None
    dropout: float | None


class AddedToken(TypedDict):
    """One of `added_tokens` of a tokenizer.json."""

    id: int
    content: str
    special: bool


class TokenizerJSON(TypedDict):
    """What a tokenizer.json holds, as far as llama.cpp needs it."""

    model: BPEModel
    normalizer: dict[str, JsonValue] | None
    pre_tokenizer: dict[str, JsonValue] | None
    added_tokens: list[AddedToken]
