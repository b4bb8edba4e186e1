"""The corpus: documents -> sequences of token ids on disk, split into train and validation.

`build` tokenises the documents of the configured sources, joins them with the end-of-text token,
cuts the stream into sequences of `sequence_length` tokens and writes safetensors shards. Every
later stage reads those shards through `Sequences`.

Train and validation never overlap: a document belongs to one side by a hash of its name (files) or
of its text (rows), and a text seen twice, in whichever source, is dropped the second time.

Reads: what `sources.py` reads. Writes: `<out>/{train,validation}-NNNNN.safetensors` (int32,
[sequences, sequence_length]), `<out>/{train,validation}.json` (`SideRecord`) and a manifest.
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from puzzle import artifacts
from puzzle.artifacts import Record
from puzzle.config import CorpusConfig
from puzzle.data.packing import mixture, pack, tokenised_documents
from puzzle.data.sequences import Sequences, Split
from puzzle.data.sources import source_fingerprints
from puzzle.errors import UserError
from puzzle.progress import Progress

SHARD_TOKENS = 1 << 26  # 256 MiB of int32: small enough to redo after an interruption


class SideRecord(Record):
    """What is known of one side once its shards are complete; written after them."""

    split: Split
    sequences: int
    texts: tuple[str, ...]  # digests of validation's texts, which train must not hold; train: none


@dataclass(frozen=True)
class _BuildContext:
    """What both sides of the split are made with."""

    config: CorpusConfig
    tokenizer: PreTrainedTokenizerBase
    out: Path
    progress: Progress


def build(
    config: CorpusConfig,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    tokenizer_fingerprint: str,
    progress: Progress,
) -> dict[Split, Sequences]:
    """Tokenise and pack until each side holds its tokens or the sources end.

    A corpus that was finished from the same inputs is only opened. Raises `UserError` where a side
    ends up without a single sequence.

    Args:
        config: sources, sequence length, tokens of each side.
        tokenizer: the parent's.
        out: the corpus folder.
        tokenizer_fingerprint: of the tokenizer's files; another one makes the corpus anew.
        progress: where to report.

    Returns:
        Both sides, to read from.
    """
    inputs: artifacts.Inputs = {
        "config": config.model_dump(mode="json"),
        "sources": dict(source_fingerprints(config)),
        "tokenizer": tokenizer_fingerprint,
    }
    if not artifacts.is_done(out, inputs):
        artifacts.begin(out, inputs)
        began = time.perf_counter()
        context = _BuildContext(config, tokenizer, out, progress)
        validation = _build_side(context, "validation", config.validation_tokens, set())
        held_out = {bytes.fromhex(text) for text in validation.texts}
        train = _build_side(context, "train", config.train_tokens, held_out)
        _warn_if_short(context, train, config.train_tokens)
        _warn_if_short(context, validation, config.validation_tokens)
        artifacts.write_manifest(out, inputs, time.perf_counter() - began)
    return {
        "train": Sequences(out, "train", seed=config.seed),
        "validation": Sequences(out, "validation", seed=config.seed),
    }


def _warn_if_short(context: _BuildContext, side: SideRecord, requested_tokens: int) -> None:
    tokens = side.sequences * context.config.sequence_length
    if tokens < requested_tokens:
        context.progress.say(
            f"  the corpus ends at {tokens:,} {side.split} tokens, less than the "
            f"{requested_tokens:,} asked for: they will be seen again"
        )


def _build_side(context: _BuildContext, split: Split, tokens: int, seen: set[bytes]) -> SideRecord:
    """Write the shards of one side, about `tokens` in all, then its record.

    A side whose record exists is complete and is left as it is.
    """
    config, out = context.config, context.out
    record_path = out / f"{split}.json"
    if record_path.exists():
        return SideRecord.read(record_path)
    for stale in out.glob(f"{split}-*.safetensors"):
        stale.unlink()
    streams = [
        tokenised_documents(source, split, config, context.tokenizer, seen)
        for source in config.sources
    ]
    stream = mixture(streams, [source.weight for source in config.sources])
    rows = pack(stream, config.sequence_length)
    rows = itertools.islice(rows, -(-tokens // config.sequence_length))
    count = _write_shards(context, split, tokens, rows)
    if not count:
        names = ", ".join(source.label for source in config.sources)
        raise UserError(
            f"corpus ({names}): the {split} side holds less than one sequence of "
            f"{config.sequence_length} tokens; "
            "add text, lower corpus.sequence_length or change corpus.validation_fraction"
        )
    texts = sorted(key.hex() for key in seen) if split == "validation" else []
    record = SideRecord(split=split, sequences=count, texts=tuple(texts))
    record.write(record_path)
    return record


def _write_shards(
    context: _BuildContext, split: Split, tokens: int, rows: Iterator[npt.NDArray[np.int32]]
) -> int:
    """Write rows of S tokens as shards of at most `SHARD_TOKENS`; returns how many there were."""
    rows_per_shard = max(1, SHARD_TOKENS // context.config.sequence_length)
    count = 0
    with context.progress.task(f"tokenising ({split})", total=tokens, unit="tokens") as task:
        for index in itertools.count():
            shard = []
            for row in itertools.islice(rows, rows_per_shard):
                shard.append(row)
                task.advance(len(row))
            if not shard:
                break
            count += len(shard)
            with artifacts.atomic_path(context.out / f"{split}-{index:05d}.safetensors") as path:
                save_file({"tokens": np.stack(shard)}, path)
    return count
