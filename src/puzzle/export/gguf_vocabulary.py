"""A child's tokenizer as GGUF keys: tokens, merges or scores, special ids, and llama.cpp's name for
the pre-tokenizer.

Reads the tokenizer as transformers runs it (its backend, not the files); `add` writes
`tokenizer.ggml.*`. llama.cpp has the pre-tokenizers compiled in and finds them by name, so a
tokenizer is accepted only where that name is certain:

- byte-level BPE by what its pre-tokenizer does (`SPLITS`), else by what it makes of a test text,
  the way llama.cpp's own converter recognises published tokenizers (`PUBLISHED`);
- SentencePiece BPE (Llama 2's kind) where its merges are those that scores express: llama.cpp
  merges by score.

Two known differences are told in `notes`: llama.cpp does not compose characters (NFC, which Qwen's
tokenizer does), and it always puts a space before a SentencePiece text, as SentencePiece does;
transformers does not where one is there.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from puzzle.errors import UserError
from puzzle.model.modeling_puzzle import PuzzleConfig

BYTE_LEVEL = "byte-level"  # GPT-2's expression, built into the ByteLevel pre-tokenizer
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_END}"
QWEN_2 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_END}"
)
QWEN_35 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_END}"
# (how text is split, whether whole words in the vocabulary skip the merges) -> llama.cpp's name
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
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天\uff5e "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? "
    "I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What `tokenizer.ggml.*` holds; `merges` for BPE, `scores` and `space_prefix` for
    SentencePiece.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool = False
    special_ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: str | list[dict[str, str]] | None
    notes: list[str]


def load(source: Path, config: PuzzleConfig) -> Any:
    """The tokenizer as transformers runs it."""
    try:
        # with our config, or transformers asks whether to run the modelling code in the folder
        return AutoTokenizer.from_pretrained(source, config=config)
    except Exception as error:
        raise UserError(
            f"export gguf: {source}: cannot load its tokenizer: {str(error).splitlines()[0]}"
        ) from None


def read(source: Path, config: PuzzleConfig) -> Vocabulary:
    """The tokenizer in folder `source`, with as many tokens as the embedding has rows."""
    vocab_size, tokenizer = config.vocab_size, load(source, config)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise _unknown(f"a {type(tokenizer).__name__}, which has no tokenizer.json")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"export gguf: {source}: its tokenizer has {len(tokenizer)} tokens, its embedding {vocab_size}"
        )
    model = state["model"]
    plain = model["type"] == "BPE" and not any(
        model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
    )
    if not plain:
        raise _unknown(f"a {model['type']} model that is not plain BPE")
    merges = [
        tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair)
        for pair in model["merges"]
    ]
    parts = (
        _sentencepiece(state, merges, vocab_size)
        if model.get("byte_fallback")
        else {
            "model": "gpt2",
            "pre": _pre_tokenizer(tokenizer, state),
            "merges": [" ".join(pair) for pair in merges],
        }
    )
    tokens, types = _tokens(state, vocab_size)
    add_bos, add_eos = _added(tokenizer)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "unk", "pad")}
    return Vocabulary(
        tokens=tokens,
        types=types,
        special_ids={kind: id for kind, id in ids.items() if id is not None},
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=template,
        notes=_notes(state),
        **parts,
    )


def add(writer: Any, vocabulary: Vocabulary) -> None:
    """Write the keys with a `gguf.GGUFWriter`."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    for kind, id in vocabulary.special_ids.items():
        getattr(writer, f"add_{kind}_token_id")(id)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _unknown(what: str) -> UserError:
    return UserError(
        f"export gguf: tokenizer: got {what}, expected a byte-level BPE or SentencePiece tokenizer that llama.cpp "
        "knows (src/puzzle/exporters/gguf_vocabulary.py lists them); serve this child with another engine"
    )


def _notes(state: dict[str, Any]) -> list[str]:
    notes = []
    if (state["normalizer"] or {}).get("type") == "NFC":
        notes.append("text that is not in Unicode's form NFC splits otherwise in llama.cpp")
    if (state["pre_tokenizer"] or {}).get("type") == "Metaspace":
        notes.append(
            "text that begins with a space or follows a special token gets one more space in llama.cpp"
        )
    return notes


def _tokens(state: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Every row of the embedding has a token: rows that the tokenizer lacks are padding that
    nothing produces.
    """
    tokens = [f"[PAD{id}]" for id in range(vocab_size)]
    types = [UNUSED] * vocab_size
    unknown = state["model"].get("unk_token")
    for token, id in state["model"]["vocab"].items():
        tokens[id] = token
        byte = state["model"].get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
        types[id] = BYTE if byte else UNKNOWN if token == unknown else NORMAL
    for added in state["added_tokens"]:
        tokens[added["id"]] = added["content"]
        if types[added["id"]] != UNKNOWN:
            types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tokens, types


def _added(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts its bos before a text and its eos after it: llama.cpp can do no
    more than that.
    """
    bare, whole = (
        tokenizer("a", add_special_tokens=special).input_ids for special in (False, True)
    )
    for before, after in ((False, False), (True, False), (False, True), (True, True)):
        if whole == [tokenizer.bos_token_id] * before + bare + [tokenizer.eos_token_id] * after:
            return before, after
    raise _unknown(f"one that wraps every text in the tokens {whole} (around {bare})")


def _pre_tokenizer(tokenizer: Any, state: dict[str, Any]) -> str:
    """llama.cpp's name for the way a byte-level BPE tokenizer splits text into words."""
    splits, model = _splits(state["pre_tokenizer"]), state["model"]
    normalizer = (state["normalizer"] or {}).get("type")
    known = SPLITS.get((splits, bool(model.get("ignore_merges"))))
    if known and normalizer in (None, "NFC"):
        return known
    digest = hashlib.sha256(str(tokenizer.encode(TEST_TEXT)).encode()).hexdigest()
    if digest in PUBLISHED:
        return PUBLISHED[digest]
    raise _unknown(f"the pre-tokenizer {list(splits)} (normalizer: {normalizer})")


def _splits(part: dict[str, Any] | None) -> tuple[str, ...]:
    """What a pre-tokenizer does, step by step: expressions that isolate their matches, `digits`,
    `byte-level`.
    """
    match part:
        case {"type": "Sequence", "pretokenizers": parts}:
            return tuple(step for inner in parts for step in _splits(inner))
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return (BYTE_LEVEL,) if use_regex else ()
        case {
            "type": "Split",
            "pattern": {"Regex": expression},
            "behavior": "Isolated",
            "invert": False,
        }:
            return (expression,)
        case {"type": "Digits", "individual_digits": True}:
            return ("digits",)
    return (json.dumps(part),)


def _sentencepiece(
    state: dict[str, Any], merges: list[tuple[str, ...]], vocab_size: int
) -> dict[str, Any]:
    """Scores that make llama.cpp merge in the tokenizer's order.

    A piece's score is minus the rank of the first merge that yields it. llama.cpp joins any two
    neighbours that make a piece, highest score first; the merges say the same only if they hold
    every such pair, in the order of the scores.
    """
    vocabulary = state["model"]["vocab"]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    order = [ranks[left + right] for left, right in merges]
    pairs = {
        (piece[:cut], piece[cut:])
        for piece in vocabulary
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    }
    if order != sorted(order) or pairs != set(merges):
        raise _unknown(
            "a BPE with byte fallback whose merges are not those of SentencePiece scores"
        )
    scores = [-float(len(merges))] * vocab_size
    for piece, rank in ranks.items():
        scores[vocabulary[piece]] = -float(rank)
    prefix = _space_prefix(state)
    return {"model": "llama", "pre": "default", "scores": scores, "space_prefix": prefix}


def _space_prefix(state: dict[str, Any]) -> bool:
    """Whether a space is put before a text; anything done to text besides writing spaces as U+2581
    is refused.
    """
    space, normalizer, splitter = "▁", state["normalizer"], state["pre_tokenizer"]
    parts = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": space}
    prepend = {"type": "Prepend", "prepend": space}
    if splitter is None and replace in parts and all(part in (replace, prepend) for part in parts):
        return prepend in parts
    match splitter:
        case {
            "type": "Metaspace",
            "replacement": "▁",
            "split": False,
            "prepend_scheme": scheme,
        } if not parts:
            return bool(scheme != "never")
    raise _unknown(
        f"a BPE with byte fallback, normalizer {json.dumps(normalizer)} and splitter {json.dumps(splitter)}"
    )
