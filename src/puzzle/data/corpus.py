"""Token streams: text from anywhere -> fixed sequences of token ids on disk, split into train and
validation.

`build` reads documents from the configured sources, tokenises them, joins them with the end-of-text
token, cuts the stream into sequences of `sequence_length` tokens and writes safetensors shards.
Every later stage reads those shards through `Sequences`, whose batches are a pure function of
(seed, step): exact resume needs no data-loader state.

Train and validation never overlap: a document belongs to one side by a hash of its name (files) or
of its text (rows), and a text seen twice, in whichever source, is dropped the second time.

Reads: local files, folders, JSON Lines, Parquet, Hugging Face datasets, the interpreter's standard
library. Writes: `<out>/{train,validation}-NNNNN.safetensors` (int32, [sequences, sequence_length])
and a manifest.

Shape legend: N sequences, S sequence length, B batch.
"""

import copy
import hashlib
import itertools
import json
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from puzzle import artifacts
from puzzle.config import CorpusConfig, SourceConfig
from puzzle.errors import UserError
from puzzle.progress import Progress

Split = Literal["train", "validation"]
SHARD_TOKENS = 1 << 26  # 256 MiB of int32: small enough to redo after an interruption
TEXT_SUFFIXES = {
    ".txt",
    ".md",
    ".py",
    ".rst",
    ".html",
    ".tex",
    ".c",
    ".cpp",
    ".h",
    ".rs",
    ".go",
    ".java",
    ".js",
    ".ts",
}
PIECE_CHARACTERS = 4000
TOKENIZE_BATCH = 64  # documents per tokeniser call: the fast tokenisers run one call on all cores


@dataclass(frozen=True)
class Document:
    """One text with a name that is stable between machines (a relative path, or empty for a row)."""

    name: str
    text: str


def split_of(document: Document, validation_fraction: float) -> Split:
    """The side a document belongs to, fixed by a hash of its name (files) or of its text (rows)."""
    key = document.name or document.text
    digest = hashlib.sha256(key.encode("utf-8", "replace")).digest()
    return (
        "validation" if int.from_bytes(digest[:8], "big") < validation_fraction * 2**64 else "train"
    )


# ------------------------------------------------------------------------------------------ sources


def stdlib_files() -> list[tuple[str, Path]]:
    """(relative name, path) of every source file of the running interpreter's standard library,
    sorted.

    Left out: installed packages, `encodings` (1.5 MB of character tables that teach nothing) and
    `pydoc_data` (one generated 700 kB string literal: whichever side it fell on, it would be most
    of that side).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
    files = ((p.relative_to(root), p) for p in root.rglob("*.py"))
    return sorted((rel.as_posix(), p) for rel, p in files if not skip & set(rel.parts))


def _read_text(path: Path) -> str | None:
    """A file's text, or None where it is not UTF-8 (the standard library holds a few such test
    files).
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def _file_documents(files: Iterable[tuple[str, Path]]) -> Iterator[Document]:
    for name, path in files:
        text = _read_text(path)
        if text and text.strip():
            yield Document(name, text)


def _pieces(path: Path) -> Iterator[Document]:
    """A file that is a whole source, cut at line ends into nameless documents so that both sides
    get some.
    """
    text = _read_text(path)
    if text is None:
        raise UserError(f"corpus source {path}: not UTF-8 text")
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= PIECE_CHARACTERS:
            yield Document("", "".join(lines))
            lines, size = [], 0
    if lines:
        yield Document("", "".join(lines))


def _local_files(root: Path) -> list[tuple[str, Path]]:
    if root.is_file():
        return [(root.name, root)]
    suffixes = TEXT_SUFFIXES | {".jsonl", ".parquet"}
    found = [
        (p.relative_to(root).as_posix(), p)
        for p in root.rglob("*")
        if p.suffix in suffixes and p.is_file()
    ]
    if not found:
        raise UserError(
            f"corpus source {root}: no readable file; expected any of {' '.join(sorted(suffixes))}"
        )
    return sorted(found)


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not JSON ({error.msg}); expected one object a line"
                ) from None
            if not isinstance(row, dict):
                raise UserError(
                    f"{path}, line {number}: got {type(row).__name__}, expected a JSON object"
                )
            yield row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
    except Exception as error:
        raise UserError(f"{path}: not a readable Parquet file ({error})") from None
    for batch in file.iter_batches(batch_size=256):
        yield from batch.to_pylist()


def _hub_rows(source: SourceConfig, seed: int) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(
            source.dataset, source.subset, split=source.split, streaming=True
        )
    except Exception as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"corpus source {source.dataset!r}: cannot load the dataset: {first_line}"
        ) from None
    yield from rows.shuffle(seed=seed, buffer_size=1000)


def _row_text(row: dict[str, Any], source: SourceConfig, tokenizer: Any) -> str:
    """The text of a row: its text column, or its chat messages through the tokenizer's chat
    template.
    """
    if isinstance(row.get(source.text_column), str):
        return row[source.text_column]
    messages = row.get(source.messages_column)
    if isinstance(messages, list):
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"corpus source {source.label}: rows are chats ({source.messages_column!r}) but the parent's "
                "tokenizer has no chat template; use plain text, or a parent with a chat template"
            )
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # whatever a template raises
            raise UserError(
                f"corpus source {source.label}: the chat template refuses a row: {error}"
            ) from None
    raise UserError(
        f"corpus source {source.label}: a row has no {source.text_column!r} and no {source.messages_column!r}; "
        f"got columns {sorted(row)}; set text_column or messages_column"
    )


def documents(source: SourceConfig, tokenizer: Any, seed: int) -> Iterator[Document]:
    """Documents of one source in an order fixed by `seed`."""
    if source.dataset:
        for row in _hub_rows(source, seed):
            yield Document("", _row_text(row, source, tokenizer))
        return
    files = stdlib_files() if source.stdlib else _local_files(Path(source.path or "").expanduser())
    order = np.random.default_rng(seed).permutation(len(files))
    for name, path in (files[i] for i in order):
        if path.suffix in (".jsonl", ".parquet"):
            for row in _jsonl_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path):
                yield Document("", _row_text(row, source, tokenizer))
        elif source.path and len(files) == 1:
            yield from _pieces(path)
        else:
            yield from _file_documents([(name, path)])


def source_marks(config: CorpusConfig) -> dict[str, str]:
    """What tells, per source, whether its content may have changed: interpreter version, or names,
    sizes and times.

    Raises `UserError` for a source that does not exist.
    """
    marks = {}
    for source in config.sources:
        if source.stdlib:
            marks[source.label] = platform.python_version()
        elif source.path:
            root = Path(source.path).expanduser()
            if not root.exists():
                raise UserError(f"corpus source {root}: no such file or folder")
            stats = [(name, path.stat()) for name, path in _local_files(root)]
            marks[source.label] = artifacts.fingerprint(
                [(name, s.st_size, s.st_mtime_ns) for name, s in stats]
            )
    return marks


# ------------------------------------------------------------------------------------------ packing


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]


def _side(
    source: SourceConfig, split: Split, config: CorpusConfig, tokenizer: Any, seen: set[bytes]
) -> Iterator[list[int]]:
    """Token ids of the documents of one source on one side of the split, each closed by the
    end-of-text token.

    `seen` holds the digests of texts that are taken: shared by all sources, and by train from
    validation.
    """

    def wanted() -> Iterator[str]:
        for document in documents(source, tokenizer, config.seed):
            key = hashlib.sha256(document.text.encode("utf-8", "replace")).digest()[:12]
            if key not in seen and split_of(document, config.validation_fraction) == split:
                seen.add(key)
                yield document.text

    texts = wanted()
    while batch := list(itertools.islice(texts, TOKENIZE_BATCH)):
        for ids in _encode(tokenizer, batch):
            yield [*ids, tokenizer.eos_token_id]


def mixture(streams: list[Iterator[list[int]]], weights: list[float]) -> Iterator[list[int]]:
    """Interleave streams so that their token counts stay proportional to `weights`.

    The next document comes from the stream that is furthest behind its share. A stream that ends
    leaves the rest to the others.
    """
    given = dict.fromkeys(range(len(streams)), 0)
    while given:
        behind = min(given, key=lambda i: given[i] / weights[i])
        ids = next(streams[behind], None)
        if ids is None:
            del given[behind]
        else:
            given[behind] += len(ids)
            yield ids


def pack(stream: Iterable[list[int]], sequence_length: int) -> Iterator[np.ndarray]:
    """Cut a stream of documents into int32 sequences of exactly `sequence_length`; the rest at the
    end is dropped.
    """
    pending: list[int] = []
    for ids in stream:
        pending += ids
        whole = len(pending) // sequence_length * sequence_length
        if whole:
            yield from np.asarray(pending[:whole], dtype=np.int32).reshape(-1, sequence_length)
            pending = pending[whole:]


def build(
    config: CorpusConfig,
    tokenizer: Any,
    out: Path,
    *,
    tokenizer_fingerprint: str,
    progress: Progress,
) -> dict[Split, "Sequences"]:
    """Tokenise and pack until each side holds its tokens or the sources end. Does nothing where it
    is done.

    Raises `UserError` where a side ends up without a single sequence.
    """
    inputs = {
        "config": config.model_dump(mode="json"),
        "sources": source_marks(config),
        "tokenizer": tokenizer_fingerprint,
    }
    if not artifacts.is_done(out, inputs):
        artifacts.begin(out, inputs)
        validation = _build_side(
            config, tokenizer, out, "validation", config.validation_tokens, set(), progress
        )
        held_out = {bytes.fromhex(text) for text in validation["texts"]}
        train = _build_side(
            config, tokenizer, out, "train", config.train_tokens, held_out, progress
        )
        for side, asked in ((train, config.train_tokens), (validation, config.validation_tokens)):
            if side["sequences"] * config.sequence_length < asked:
                got = f"{side['sequences'] * config.sequence_length:,} {side['split']} tokens"
                progress.say(
                    f"  the corpus ends at {got}, less than the {asked:,} asked for: they will be seen again"
                )
        counts = {"train": train["sequences"], "validation": validation["sequences"]}
        artifacts.write_manifest(
            out, inputs, {"sequences": counts, "sequence_length": config.sequence_length}
        )
    return {split: Sequences(out, split, seed=config.seed) for split in ("train", "validation")}


def _build_side(
    config: CorpusConfig,
    tokenizer: Any,
    out: Path,
    split: Split,
    tokens: int,
    seen: set[bytes],
    progress: Progress,
) -> dict[str, Any]:
    """Write the shards of one side; its record (also on disk, last) counts sequences and names
    validation's texts.
    """
    record_path = out / f"{split}.json"
    if record_path.exists():
        return artifacts.read_json(record_path)
    for stale in out.glob(f"{split}-*.safetensors"):
        stale.unlink()
    streams = [_side(source, split, config, tokenizer, seen) for source in config.sources]
    rows = pack(
        mixture(streams, [source.weight for source in config.sources]), config.sequence_length
    )
    rows = itertools.islice(rows, -(-tokens // config.sequence_length))
    count = 0
    with progress.task(f"tokenising ({split})", total=tokens, unit="tokens") as task:
        rows_per_shard = max(1, SHARD_TOKENS // config.sequence_length)
        for index in itertools.count():
            shard = []
            for row in itertools.islice(rows, rows_per_shard):
                shard.append(row)
                task.advance(len(row))
            if not shard:
                break
            count += len(shard)
            with artifacts.atomic_path(out / f"{split}-{index:05d}.safetensors") as path:
                save_file({"tokens": np.stack(shard)}, path)
    if not count:
        names = ", ".join(source.label for source in config.sources)
        raise UserError(
            f"corpus ({names}): the {split} side holds less than one sequence of {config.sequence_length} tokens; "
            "add text, lower corpus.sequence_length or change corpus.validation_fraction"
        )
    texts = sorted(key.hex() for key in seen) if split == "validation" else []
    record = {"split": split, "sequences": count, "texts": texts}
    artifacts.write_json(record_path, record)
    return record


# ------------------------------------------------------------------------------------------ reading


class Sequences:
    """The packed sequences of one side of the split; rows are read from disk on demand.

    `batch(step, size)` walks through seeded permutations of the rows, one per epoch: it depends on
    nothing but (seed, step, size), so a resumed run sees exactly the batches it would have seen.
    """

    def __init__(self, folder: Path, split: Split, seed: int = 0) -> None:
        self.seed, self.join = [seed], 1
        self._files = [
            safe_open(path, framework="pt")
            for path in sorted(folder.glob(f"{split}-*.safetensors"))
        ]
        self._slices = [file.get_slice("tokens") for file in self._files]
        shapes = [part.get_shape() for part in self._slices]
        self._starts = np.cumsum([0, *(shape[0] for shape in shapes)])
        self.sequence_length: int = shapes[0][1]
        self._epoch: tuple[int, np.ndarray] | None = None

    def view(self, join: int = 1, seed: int = 0) -> "Sequences":
        """The same rows, `join` neighbours of the packed stream as one sequence; another order for
        another seed > 0.
        """
        other = copy.copy(self)
        other.join, other._epoch = self.join * join, None
        other.seed = [*self.seed, seed] if seed else self.seed
        other.sequence_length = self.sequence_length * join
        if not len(other):
            raise UserError(
                f"corpus: its {len(self)} sequences of {self.sequence_length} tokens do not fill one of "
                f"{other.sequence_length}; add text, raise corpus.train_tokens or ask for shorter sequences"
            )
        return other

    def __len__(self) -> int:
        return int(self._starts[-1]) // self.join

    def rows(self, indices: Iterable[int]) -> torch.Tensor:
        """int64 [len(indices), S]."""
        picked = []
        for index in (
            wanted * self.join + offset for wanted in indices for offset in range(self.join)
        ):
            part = int(np.searchsorted(self._starts, index, side="right")) - 1
            at = int(index - self._starts[part])
            picked.append(self._slices[part][at : at + 1])
        return torch.cat(picked).long().view(-1, self.sequence_length)

    def batch(self, step: int, size: int) -> torch.Tensor:
        """int64 [B, S]: batch number `step` of `size` sequences."""
        return self.rows(self._permuted(i) for i in range(step * size, (step + 1) * size))

    def head(self, count: int) -> torch.Tensor:
        """int64 [min(count, N), S]: a fixed sample without repetition, for validation and
        calibration.
        """
        return self.batch(0, min(count, len(self)))

    def _permuted(self, i: int) -> int:
        epoch, at = divmod(i, len(self))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, np.random.default_rng([*self.seed, epoch]).permutation(len(self)))
        return int(self._epoch[1][at])
