"""The corpus: documents -> sequences of token ids on disk, split into four sides by document.

`build` tokenises the documents of the configured sources, cuts their stream into sequences of
`sequence_length` tokens (`packing.py`) and writes safetensors shards. Every later stage reads those
shards through `Sequences`, which says what each side is for.

The sides never overlap: a document belongs to one by a hash of its name (files) or of its text
(rows), and a text seen twice, in whichever source, is dropped the second time.

Reads: what `sources.py` reads. Writes: `<out>/<split>-NNNNN.safetensors` (as `Sequences` reads
them), `<out>/<split>.json` (`SideRecord`) and a manifest.
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from puzzle import artifacts
from puzzle.artifacts import Record
from puzzle.config import CorpusConfig
from puzzle.data.packing import QUARTERS, Frame, mixture, pack, tokenised_documents
from puzzle.data.sequences import HELD_OUT, Sequences, Split
from puzzle.data.sources import source_fingerprints
from puzzle.errors import UserError
from puzzle.progress import Progress

SHARD_TOKENS = 1 << 26  # 256 MiB of int32: small enough to redo after an interruption


class SideRecord(Record):
    """What is known of one side once its shards are complete; written after them."""

    split: Split
    sequences: int
    # Digests of the texts that later sides must not hold: of this side and of those before it. A
    # document's number is its place here. Empty for train, which comes last.
    texts: tuple[str, ...]


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
        All sides, to read from.
    """
    inputs: artifacts.Inputs = {
        "config": config.model_dump(mode="json"),
        "sources": dict(source_fingerprints(config)),
        "tokenizer": tokenizer_fingerprint,
        "versions": dict(artifacts.versions(("puzzle-nas", "tokenizers", "datasets"))),
    }
    if not artifacts.is_done(out, inputs):
        earlier = artifacts.read_manifest(out)
        damage = artifacts.damage(out, earlier) if earlier else None
        if damage is not None:
            progress.say(f"corpus: made again: {damage}")
        artifacts.begin(out, inputs)
        began = time.perf_counter()
        context = _BuildContext(config, tokenizer, out, progress)
        taken: dict[str, None] = {}
        for split in HELD_OUT:
            share = QUARTERS.count(split) / len(QUARTERS)
            tokens = max(1, int(config.held_out_tokens * share))
            held_out = _build_side(context, split, tokens, taken)
            taken = dict.fromkeys(held_out.texts)
        train = _build_side(context, "train", config.train_tokens, taken)
        _say_if_short(context, train)
        artifacts.write_manifest(out, inputs, time.perf_counter() - began)
    return {split: Sequences(out, split, seed=config.seed) for split in get_args(Split)}


def _say_if_short(context: _BuildContext, train: SideRecord) -> None:
    tokens = train.sequences * context.config.sequence_length
    if tokens < context.config.train_tokens:
        context.progress.say(
            f"  the corpus ends at {tokens:,} training tokens, less than the "
            f"{context.config.train_tokens:,} asked for: they will be seen again"
        )


def _build_side(
    context: _BuildContext, split: Split, tokens: int, taken: dict[str, None]
) -> SideRecord:
    """Write the shards of one side, about `tokens` in all, then its record.

    Texts that are `taken` are left out. A side whose record exists is complete and stays.
    """
    config, out = context.config, context.out
    record_path = out / f"{split}.json"
    if record_path.exists():
        return SideRecord.read(record_path)
    for stale in out.glob(f"{split}-*.safetensors"):
        stale.unlink()
    streams = [
        tokenised_documents(source, split, config, context.tokenizer, taken)
        for source in config.sources
    ]
    stream = mixture(streams, [source.weight for source in config.sources])
    rows = pack(stream, config.sequence_length, Frame.of(context.tokenizer).prefix)
    rows = itertools.islice(rows, -(-tokens // config.sequence_length))
    count = _write_shards(context, split, tokens, rows)
    if not count:
        names = ", ".join(source.label for source in config.sources)
        raise UserError(
            f"corpus ({names}): the {split} side holds less than one sequence of "
            f"{config.sequence_length} tokens; "
            "add text, lower corpus.sequence_length or change corpus.held_out_fraction"
        )
    texts = () if split == "train" else tuple(taken)
    record = SideRecord(split=split, sequences=count, texts=texts)
    record.write(record_path)
    return record


def _write_shards(
    context: _BuildContext, split: Split, tokens: int, rows: Iterator[npt.NDArray[np.int32]]
) -> int:
    """Write rows [3, S] as shards of at most `SHARD_TOKENS`; returns how many there were."""
    rows_per_shard = max(1, SHARD_TOKENS // context.config.sequence_length)
    count = 0
    with context.progress.task(f"tokenising ({split})", total=tokens, unit="tokens") as task:
        for index in itertools.count():
            shard = []
            for row in itertools.islice(rows, rows_per_shard):
                shard.append(row)
                task.advance(row.shape[1])
            if not shard:
                break
            count += len(shard)
            with artifacts.atomic_path(context.out / f"{split}-{index:05d}.safetensors") as path:
                tokens_NS, documents_NS, counted_NS = np.stack(shard, axis=1)
                tensors = {"tokens": tokens_NS, "documents": documents_NS}
                save_file(tensors | {"counted": counted_NS.astype(np.uint8)}, path)
    return count
