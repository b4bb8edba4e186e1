"""Documents -> token ids -> sequences of one length: the split, the mixture and the packing.

A document belongs to train or to validation by a hash of its name (files) or of its text (rows).
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from puzzle.config import CorpusConfig, SourceConfig
from puzzle.data.sequences import Split
from puzzle.data.sources import Document, documents

TOKENIZE_BATCH = 64  # documents per tokeniser call: the fast tokenisers run one call on all cores
Tokens = list[int]  # of one document


def split_of(document: Document, validation_fraction: float) -> Split:
    """The side a document belongs to, fixed by a hash of its name (files) or of its text (rows)."""
    key = document.name or document.text
    digest = hashlib.sha256(key.encode("utf-8", "replace")).digest()
    is_validation = int.from_bytes(digest[:8], "big") < validation_fraction * 2**64
    return "validation" if is_validation else "train"


def tokenised_documents(
    source: SourceConfig,
    split: Split,
    config: CorpusConfig,
    tokenizer: PreTrainedTokenizerBase,
    seen: set[bytes],
) -> Iterator[Tokens]:
    """Token ids of one source's documents on one side, each closed by the end-of-text token.

    Args:
        source: where the documents come from.
        split: the side to take.
        config: the seed and the share of validation.
        tokenizer: the parent's.
        seen: digests of the texts that are taken, to which this adds its own. All sources of a
            side share it, and train's begins with validation's.
    """
    texts = _new_texts(documents(source, tokenizer, config.seed), split, config, seen)
    while batch := list(itertools.islice(texts, TOKENIZE_BATCH)):
        encoded = tokenizer(
            batch, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        for ids in encoded["input_ids"]:
            yield [*ids, tokenizer.eos_token_id]


def _new_texts(
    stream: Iterable[Document], split: Split, config: CorpusConfig, seen: set[bytes]
) -> Iterator[str]:
    """The texts of one side that are not in `seen`, which grows by them."""
    for document in stream:
        key = hashlib.sha256(document.text.encode("utf-8", "replace")).digest()[:12]
        if key not in seen and split_of(document, config.validation_fraction) == split:
            seen.add(key)
            yield document.text


def mixture(streams: list[Iterator[Tokens]], weights: list[float]) -> Iterator[Tokens]:
    """Interleave streams so that their token counts stay proportional to `weights`.

    The next document comes from the stream that is furthest behind its share. A stream that ends
    leaves the rest to the others.
    """
    token_counts = dict.fromkeys(range(len(streams)), 0)
    while token_counts:
        index = min(token_counts, key=lambda i: token_counts[i] / weights[i])
        ids = next(streams[index], None)
        if ids is None:
            del token_counts[index]
        else:
            token_counts[index] += len(ids)
            yield ids


def pack(stream: Iterable[Tokens], sequence_length: int) -> Iterator[npt.NDArray[np.int32]]:
    """Cut a stream of documents into int32 sequences of exactly `sequence_length` tokens.

    What does not fill the last sequence is dropped.
    """
    pending: list[int] = []
    for ids in stream:
        pending += ids
        ready = len(pending) // sequence_length * sequence_length
        if ready:
            yield from np.asarray(pending[:ready], dtype=np.int32).reshape(-1, sequence_length)
            pending = pending[ready:]
