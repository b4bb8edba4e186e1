"""A child's tokenizer as GGUF keys: tokens, special ids, and how text is split.

Reads the tokenizer as transformers runs it (its backend, not the files); `add` writes
`tokenizer.ggml.*`. How text is split is `gguf_splitting.py`'s.

Two known differences are told in `notes`: llama.cpp does not compose characters (NFC, which Qwen's
tokenizer does), and it always puts a space before a SentencePiece text, as SentencePiece does;
transformers does not where there is a space already.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from puzzle.errors import UserError
from puzzle.export.gguf_splitting import Splitting, recognise, unknown_tokenizer
from puzzle.export.tokenizer_json import TokenizerJSON
from puzzle.model.modeling_puzzle import PuzzleConfig

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What `tokenizer.ggml.*` holds.

    `tokens` and `types` (gguf.TokenType) go by token id, `special_ids` by bos, eos, unk and pad,
    those the tokenizer has; `notes` tell where llama.cpp splits text otherwise than transformers.
    """

    splitting: Splitting
    tokens: list[str]
    types: list[int]
    special_ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: str | list[dict[str, str]] | None
    notes: list[str]


def load(source: Path, config: PuzzleConfig) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers runs it. Raises `UserError` where it cannot be loaded."""
    try:
        # with our config, or transformers asks whether to run the modelling code in the folder
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, config=config)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"export gguf: {source}: cannot load its tokenizer: {reason}") from None
    return tokenizer


def read(source: Path, config: PuzzleConfig) -> Vocabulary:
    """The tokenizer in folder `source`, with as many tokens as the embedding has rows.

    Raises `UserError` for a tokenizer that llama.cpp does not know, or with more tokens than that.
    """
    vocab_size, tokenizer = config.vocab_size, load(source, config)
    if not hasattr(tokenizer, "backend_tokenizer"):
        kind = type(tokenizer).__name__
        raise unknown_tokenizer(f"a {kind}, which has no tokenizer.json")
    state: TokenizerJSON = json.loads(tokenizer.backend_tokenizer.to_str())
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"export gguf: {source}: its tokenizer has {len(tokenizer)} tokens, "
            f"its embedding {vocab_size}"
        )
    splitting = recognise(tokenizer, state, vocab_size)
    tokens, types = _tokens(state, vocab_size)
    add_bos, add_eos = _tokens_around_text(tokenizer)
    return Vocabulary(
        splitting=splitting,
        tokens=tokens,
        types=types,
        special_ids=_special_ids(tokenizer),
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=_chat_template(tokenizer),
        notes=_notes(state),
    )


def add(writer: "GGUFWriter", vocabulary: Vocabulary) -> None:
    """Write the keys."""
    splitting = vocabulary.splitting
    writer.add_tokenizer_model(splitting.model)
    writer.add_tokenizer_pre(splitting.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if splitting.model == "gpt2":
        writer.add_token_merges(splitting.merges)
    else:
        writer.add_token_scores(splitting.scores)
        writer.add_add_space_prefix(splitting.space_prefix)
    setters = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for kind, token_id in vocabulary.special_ids.items():
        setters[kind](token_id)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _tokens(state: TokenizerJSON, vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types by token id.

    Every row of the embedding has a token: rows that the tokenizer lacks are padding that nothing
    produces.
    """
    model = state["model"]
    tokens = [f"[PAD{token_id}]" for token_id in range(vocab_size)]
    types = [UNUSED] * vocab_size
    unknown, byte_fallback = model.get("unk_token"), model.get("byte_fallback")
    for token, token_id in model["vocab"].items():
        tokens[token_id] = token
        if byte_fallback and len(token) == 6 and token.startswith("<0x"):
            types[token_id] = BYTE
        else:
            types[token_id] = UNKNOWN if token == unknown else NORMAL
    for added in state["added_tokens"]:
        tokens[added["id"]] = added["content"]
        if types[added["id"]] != UNKNOWN:
            types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tokens, types


def _tokens_around_text(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts its bos before a text and its eos after it.

    llama.cpp can do no more than that, so anything else raises `UserError`.
    """
    text_ids: list[int] = tokenizer("a", add_special_tokens=False).input_ids
    all_ids: list[int] = tokenizer("a", add_special_tokens=True).input_ids
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for add_bos, add_eos in ((False, False), (True, False), (False, True), (True, True)):
        if all_ids == bos * add_bos + text_ids + eos * add_eos:
            return add_bos, add_eos
    raise unknown_tokenizer(
        f"one that wraps every text in the tokens {all_ids} (around {text_ids})"
    )


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    return {kind: token_id for kind, token_id in ids.items() if token_id is not None}


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str | list[dict[str, str]] | None:
    template: str | dict[str, str] | None = tokenizer.chat_template
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template


def _notes(state: TokenizerJSON) -> list[str]:
    notes = []
    if (state["normalizer"] or {}).get("type") == "NFC":
        notes.append("text that is not in Unicode's form NFC splits otherwise in llama.cpp")
    if (state["pre_tokenizer"] or {}).get("type") == "Metaspace":
        notes.append(
            "text that begins with a space or follows a special token gets one more space "
            "in llama.cpp"
        )
    return notes
