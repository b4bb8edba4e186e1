"""Documents -> token ids -> sequences of one length: the split, the mixture and the packing.

A document belongs to one side of the split by a hash of its name (files) or of its text (rows). It
begins and ends as the parent's tokenizer makes it by default, with a beginning-of-text token where
that adds one, and so does every sequence; without an end of its own it ends with end of text.
Attention sees across the documents of a sequence, as in most pretraining.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from puzzle.config import CorpusConfig, SourceConfig
from puzzle.data.rows import Spans
from puzzle.data.sequences import Split
from puzzle.data.sources import Document, documents

TOKENIZE_BATCH = 64  # documents per tokeniser call: the fast tokenisers run one call on all cores
QUARTERS: tuple[Split, ...] = ("score", "validation", "test", "test")  # of the held-out documents


class Tokenised(NamedTuple):
    """A document's token ids, and its number on its side of the split.

    `counted` says of every token whether quality is measured on it.
    """

    number: int
    ids: list[int]
    counted: list[bool]


class Frame(NamedTuple):
    """What the parent's tokenizer puts around a text by default."""

    prefix: list[int]
    suffix: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Frame":
        """As seen on a short text; without a suffix, the end-of-text token."""
        bare, framed = (
            tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True)
        )
        at = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
        return cls(framed[:at], framed[at + len(bare) :] or [tokenizer.eos_token_id])

    def around(self, number: int, ids: list[int], counted: list[bool] | None) -> Tokenised:
        """A whole document; one that has the prefix already, as chat templates write it, keeps it.

        The end is always added: a chat that ends with its last turn is followed by another text.
        `counted` None: all of it, with what is added.
        """
        start = [] if self.prefix and ids[: len(self.prefix)] == self.prefix else self.prefix
        framed = [*start, *ids, *self.suffix]
        if counted is None:
            return Tokenised(number, framed, [True] * len(framed))
        before, after = [False] * len(start), [False] * len(self.suffix)
        return Tokenised(number, framed, [*before, *counted, *after])


def split_of(document: Document, held_out_fraction: float) -> Split:
    """The side a document belongs to, fixed by a hash of its name (files) or of its text (rows).

    Of the held-out documents a quarter is for scores, a quarter for validation and half for tests.
    """
    key = document.name or document.text
    digest = hashlib.sha256(key.encode("utf-8", "replace")).digest()
    if int.from_bytes(digest[:8], "big") >= held_out_fraction * 2**64:
        return "train"
    return QUARTERS[digest[8] >> 6]


def tokenised_documents(
    source: SourceConfig,
    split: Split,
    config: CorpusConfig,
    tokenizer: PreTrainedTokenizerBase,
    taken: dict[str, None],
) -> Iterator[Tokenised]:
    """One source's documents on one side.

    Args:
        source: where the documents come from.
        split: the side to take.
        config: the seed and the share that is held out.
        tokenizer: the parent's.
        taken: digests of the texts that are taken, on this side or one before it, to which this
            adds its own: a document's number is its place there. All sources of a side share it.
    """
    frame = Frame.of(tokenizer)
    texts = _new_texts(documents(source, tokenizer, config.seed), split, config, taken)
    while batch := list(itertools.islice(texts, TOKENIZE_BATCH)):
        encoded = tokenizer(
            [document.text for _, document in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=any(document.counted is not None for _, document in batch),
            verbose=False,
        )
        for index, (number, document) in enumerate(batch):
            counted = None
            if document.counted is not None:
                counted = _counted(encoded["offset_mapping"][index], document.counted)
            yield frame.around(number, encoded["input_ids"][index], counted)


def _counted(offsets: Sequence[tuple[int, int]], spans: Spans) -> list[bool]:
    """Of every token, from its first and last character, whether it lies in one of the spans."""
    return [any(low <= first < high for low, high in spans) for first, _ in offsets]


def _new_texts(
    stream: Iterable[Document], split: Split, config: CorpusConfig, taken: dict[str, None]
) -> Iterator[tuple[int, Document]]:
    """Numbers and documents of one side that are not in `taken`, which grows by them."""
    for document in stream:
        key = hashlib.sha256(document.text.encode("utf-8", "replace")).hexdigest()[:24]
        if key not in taken and split_of(document, config.held_out_fraction) == split:
            taken[key] = None
            yield len(taken) - 1, document


def mixture(streams: list[Iterator[Tokenised]], weights: list[float]) -> Iterator[Tokenised]:
    """Interleave streams so that their token counts stay proportional to `weights`.

    The next document comes from the stream that is furthest behind its share. A stream that ends
    leaves the rest to the others.
    """
    token_counts = dict.fromkeys(range(len(streams)), 0)
    while token_counts:
        index = min(token_counts, key=lambda i: token_counts[i] / weights[i])
        document = next(streams[index], None)
        if document is None:
            del token_counts[index]
        else:
            token_counts[index] += len(document.ids)
            yield document


def pack(
    stream: Iterable[Tokenised], sequence_length: int, prefix: Sequence[int] = ()
) -> Iterator[npt.NDArray[np.int32]]:
    """Cut a stream of documents into sequences of exactly `sequence_length` tokens, int32 [3, S].

    The second row has every token's document, the third 1 where quality is measured on the token. A
    sequence that begins inside a document begins with `prefix`. What does not fill the last
    sequence is dropped.
    """
    prefix = list(prefix)
    pending: list[int] = []
    numbers: list[int] = []
    marks: list[bool] = []
    for number, ids, counted in stream:
        pending += ids
        numbers += [number] * len(ids)
        marks += counted
        at = 0
        while True:
            start = [] if pending[at : at + len(prefix)] == prefix else prefix
            end = at + sequence_length - len(start)
            if end > len(pending):
                break
            of_start = [numbers[at]] * len(start)
            row = [
                [*start, *pending[at:end]],
                [*of_start, *numbers[at:end]],
                [*([marks[at]] * len(start)), *marks[at:end]],
            ]
            yield np.asarray(row, dtype=np.int32)
            at = end
        del pending[:at], numbers[:at], marks[:at]
