"""How llama.cpp splits text as a child's tokenizer does.

llama.cpp has the pre-tokenizers compiled in and finds them by name, so a tokenizer is accepted only
where that name is certain:

- byte-level BPE by what its pre-tokenizer does (`SPLITS`), else by what it makes of a test text,
  the way llama.cpp's own converter recognises published tokenizers (`PUBLISHED`);
- SentencePiece BPE (Llama 2's kind) where its merges are those that scores express: llama.cpp
  merges by score.
"""

import hashlib
import json
from dataclasses import dataclass, field

from pydantic import JsonValue
from transformers import PreTrainedTokenizerBase

from puzzle.errors import UserError
from puzzle.export.tokenizer_json import TokenizerJSON

BYTE_LEVEL = "byte-level"  # GPT-2's expression, built into the ByteLevel pre-tokenizer
SPACE = "▁"  # U+2581, as which SentencePiece writes a space
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_END}"
)
QWEN_2 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_END}"
)
QWEN_35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_END}"
)
# (how text is split, whether a word in the vocabulary skips the merges) -> llama.cpp's name
SPLITS = {
    ((BYTE_LEVEL,), False): "gpt-2",
    (("digits", BYTE_LEVEL), False): "smollm",
    ((LLAMA_3,), True): "llama-bpe",
    ((LLAMA_3,), False): "dbrx",
    ((QWEN_2,), False): "qwen2",
    ((QWEN_35,), False): "qwen35",
}
# SHA-256 of what a published tokenizer makes of `TEST_TEXT` -> llama.cpp's name; from its
# convert_hf_to_gguf.py (MIT)
PUBLISHED = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",  # Llama 3
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
    "877081d19cf6996e2c4ff0e1236341e9b7bde288f5311a56a937f0afbbb3aeb5": "deepseek-v3",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",  # Qwen 1.5 to 3
    # With a closing token
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "7fc505bd3104ca1083b150b17d088b59534ede9bde81f0dd2090967d7fe52cee": "viking",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",  # Mistral Nemo
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "d4c8f286ea6b520b3d495c4455483cfa2302c0cfcd4be05d781b6a8a0a7cdaf1": "megrez",
    "d5f1dd6f980fec569fb218a81a7658ac45fc56b38c5a0adeb1c232fbe04ef5ec": "seed-coder",
    "1431a23e583c97432bc230bff598d103ddb5a1f89960c8f1d1051aaa944d0b35": "minerva-7b",
}
TEST_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n"
    "🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天\uff5e "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? "
    "I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, "
    "'D you like some tea? We'Ve a'lL"
)


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """The keys of `tokenizer.ggml.*` that decide how text is split.

    `model` is gpt2 (byte-level BPE, with `merges`) or llama (SentencePiece, with `scores` and
    `space_prefix`: whether a space is put before a text); `pre` names the pre-tokenizer.
    """

    model: str
    pre: str
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool = False


def recognise(
    tokenizer: PreTrainedTokenizerBase, state: TokenizerJSON, vocab_size: int
) -> Splitting:
    """How llama.cpp splits text as `tokenizer` does, whose tokenizer.json is `state`.

    Raises `UserError` where llama.cpp cannot, or where its name for it is not certain.
    """
    model = state["model"]
    altered = (
        model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
        or model.get("dropout")
    )
    if model["type"] != "BPE" or altered:
        raise unknown_tokenizer(f"a {model['type']} model that is not plain BPE")
    merges = []
    for pair in model["merges"]:
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        merges.append((left, right))
    if model.get("byte_fallback"):
        return Splitting(
            model="llama",
            pre="default",
            scores=_scores(model["vocab"], merges, vocab_size),
            space_prefix=_space_prefix(state),
        )
    return Splitting(
        model="gpt2",
        pre=_pre_tokenizer(tokenizer, state),
        merges=[f"{left} {right}" for left, right in merges],
    )


def unknown_tokenizer(got: str) -> UserError:
    """The error for a tokenizer that llama.cpp does not have; `got` describes it."""
    return UserError(
        f"export gguf: tokenizer: got {got}, expected a byte-level BPE or SentencePiece tokenizer "
        "that llama.cpp knows (src/puzzle/export/gguf_splitting.py lists them); "
        "serve this child with another engine"
    )


def _pre_tokenizer(tokenizer: PreTrainedTokenizerBase, state: TokenizerJSON) -> str:
    """llama.cpp's name for the way a byte-level BPE tokenizer splits text into words."""
    steps = _split_steps(state["pre_tokenizer"])
    normalizer = (state["normalizer"] or {}).get("type")
    name = SPLITS.get((steps, bool(state["model"].get("ignore_merges"))))
    if name and normalizer in (None, "NFC"):
        return name
    digest = hashlib.sha256(str(tokenizer.encode(TEST_TEXT)).encode()).hexdigest()
    if digest in PUBLISHED:
        return PUBLISHED[digest]
    raise unknown_tokenizer(f"the pre-tokenizer {list(steps)} (normalizer: {normalizer})")


def _split_steps(part: JsonValue) -> tuple[str, ...]:
    """What a pre-tokenizer does, step by step.

    A step is an expression that isolates its matches, `digits`, `byte-level`, or the JSON of a part
    that is none of these.
    """
    match part:
        case {"type": "Sequence", "pretokenizers": [*parts]}:
            return tuple(step for inner in parts for step in _split_steps(inner))
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return (BYTE_LEVEL,) if use_regex else ()
        case {
            "type": "Split",
            "pattern": {"Regex": str(expression)},
            "behavior": "Isolated",
            "invert": False,
        }:
            return (expression,)
        case {"type": "Digits", "individual_digits": True}:
            return ("digits",)
    return (json.dumps(part),)


def _scores(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], vocab_size: int
) -> list[float]:
    """Scores by token id that make llama.cpp merge in the tokenizer's order.

    A piece's score is minus the rank of the first merge that yields it. llama.cpp joins any two
    neighbours that make a piece, highest score first; the merges say the same only if they hold
    every such pair, in the order of the scores.
    """
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    order = [ranks[left + right] for left, right in merges]
    pairs = set()
    for piece in vocabulary:
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs |= {(left, right) for left, right in halves if {left, right} <= vocabulary.keys()}
    if order != sorted(order) or pairs != set(merges):
        raise unknown_tokenizer(
            "a BPE with byte fallback whose merges are not those of SentencePiece scores"
        )
    scores = [-float(len(merges))] * vocab_size
    for piece, rank in ranks.items():
        scores[vocabulary[piece]] = -float(rank)
    return scores


def _space_prefix(state: TokenizerJSON) -> bool:
    """Whether a space is put before a text.

    Anything done to text besides writing spaces as U+2581 is refused.
    """
    normalizer, pre_tokenizer = state["normalizer"], state["pre_tokenizer"]
    steps = _normalizer_steps(normalizer)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    only_spaces = all(step in (replace, prepend) for step in steps)
    if pre_tokenizer is None and replace in steps and only_spaces:
        return prepend in steps
    match pre_tokenizer:
        case {
            "type": "Metaspace",
            "replacement": "▁",
            "split": False,
            "prepend_scheme": scheme,
        } if not steps:
            return scheme != "never"
    raise unknown_tokenizer(
        f"a BPE with byte fallback, normalizer {json.dumps(normalizer)} "
        f"and splitter {json.dumps(pre_tokenizer)}"
    )


def _normalizer_steps(normalizer: dict[str, JsonValue] | None) -> list[JsonValue]:
    match normalizer:
        case None:
            return []
        case {"normalizers": [*steps]}:
            return steps
    return [normalizer]
