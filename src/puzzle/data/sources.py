"""Where text comes from: the sources of a corpus, read as documents in an order fixed by a seed.

Reads: local files, folders, JSON Lines, Parquet, Hugging Face datasets, and the source code of the
interpreter's standard library. Writes `RUN/datasets.json`, the revisions of the hub's datasets.
"""

import itertools
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from puzzle import artifacts
from puzzle.artifacts import Record
from puzzle.config import CorpusConfig, SourceConfig
from puzzle.data.rows import hub_commit, hub_rows, jsonl_rows, parquet_rows, row_text
from puzzle.errors import UserError

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
ROW_SUFFIXES = {".jsonl", ".parquet"}
PIECE_CHARACTERS = 4000
CHECKED_DOCUMENTS = 64  # of every source, before anything is spent
NOT_READ_FROM_STDLIB = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",  # 1.5 MB of character tables that teach nothing
    "pydoc_data",  # one generated 700 kB string literal: most of whichever side it fell on
}
NamedFile = tuple[str, Path]  # name relative to its source, path


@dataclass(frozen=True)
class Document:
    """One text; its name, the same on all machines, is a relative path, or empty for a row."""

    name: str
    text: str
    # The parts, from a character to before another, that quality is measured on: the assistant's
    # turns of a chat; None: all of it.
    counted: tuple[tuple[int, int], ...] | None = None


class Revisions(Record):
    """`datasets.json`: the commit of each dataset of the hub, by name and what was asked for."""

    commits: dict[str, str]


def documents(
    source: SourceConfig, tokenizer: PreTrainedTokenizerBase | None, seed: int
) -> Iterator[Document]:
    """Documents of one source in an order fixed by `seed`.

    The tokenizer's chat template turns rows that are chats into text; sources of plain text need
    no tokenizer. Raises `UserError` for a file or row that cannot be read.
    """
    if source.dataset:
        for number, row in enumerate(hub_rows(source, seed), start=1):
            place = f"{source.label}, row {number}"
            yield Document("", *row_text(row, source, tokenizer, place))
        return
    files = stdlib_files() if source.stdlib else _local_files(Path(source.path or "").expanduser())
    for index in np.random.default_rng(seed).permutation(len(files)):
        name, path = files[index]
        if path.suffix in ROW_SUFFIXES:
            rows = jsonl_rows(path) if path.suffix == ".jsonl" else parquet_rows(path)
            for number, row in enumerate(rows, start=1):
                yield Document("", *row_text(row, source, tokenizer, f"{path}, row {number}"))
        elif source.path and len(files) == 1:
            yield from _pieces(path)
        else:
            text = _read_text(path)
            if text and text.strip():
                yield Document(name, text)


def source_fingerprints(config: CorpusConfig) -> dict[str, str]:
    """What changes, per source, when its content may have changed.

    That is the interpreter's version for the standard library, names, sizes and times of local
    files, and the revision of a dataset of the hub (see `pinned`). Raises `UserError` for a path
    that does not exist.
    """
    fingerprints = {}
    for source in config.sources:
        if source.stdlib:
            fingerprints[source.label] = platform.python_version()
        elif source.parent:  # the parent's fingerprint and the settings say it
            continue
        elif source.dataset and not Path(source.dataset).exists():
            fingerprints[f"{source.label} {source.subset} {source.split}"] = source.revision or ""
        else:
            root = Path(source.path or source.dataset or "").expanduser()
            if not root.exists():
                raise UserError(
                    f"corpus source {root}: no such file or folder; a dataset of the hub is "
                    "written {dataset: NAME}"
                )
            files = _local_files(root) if source.path else _every_file(root)
            stats = [(name, path.stat()) for name, path in files]
            fingerprints[source.label] = artifacts.fingerprint(
                [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
            )
    return fingerprints


def check(config: CorpusConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Read the first documents of every local source.

    Raises `UserError` for one without text, and for what is wrong in what was read.
    """
    source_fingerprints(config)
    for source in config.sources:
        if source.path:
            first = itertools.islice(documents(source, tokenizer, config.seed), CHECKED_DOCUMENTS)
            if sum(bool(document.text.strip()) for document in first) == 0:
                raise UserError(
                    f"corpus source {source.path}: holds no text; expected UTF-8 text, JSON Lines "
                    "or Parquet"
                )


def pinned(config: CorpusConfig, path: Path) -> CorpusConfig:
    """The settings with every dataset of the hub at a commit.

    `path` keeps the commits, so that a run of days reads the same text to its end, whatever is
    published meanwhile. Raises `UserError` where the hub does not know or cannot be asked.
    """
    commits = dict(Revisions.read(path).commits) if path.exists() else {}
    known, sources = len(commits), []
    for source in config.sources:
        if source.dataset and not Path(source.dataset).exists():
            name = f"{source.dataset}@{source.revision or 'newest'}"
            if name not in commits:
                commits[name] = hub_commit(source)
            source = source.model_copy(update={"revision": commits[name]})
        sources.append(source)
    if len(commits) > known:
        Revisions(commits=commits).write(path)
    return config.model_copy(update={"sources": sources})


def stdlib_files() -> list[NamedFile]:
    """Every source file of the running interpreter's standard library, sorted by name.

    `NOT_READ_FROM_STDLIB` and installed packages are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not NOT_READ_FROM_STDLIB & set(relative.parts):
            files.append((relative.as_posix(), path))
    return sorted(files)


def _local_files(root: Path) -> list[NamedFile]:
    if root.is_file():
        return [(root.name, root)]
    suffixes = TEXT_SUFFIXES | ROW_SUFFIXES
    files = [
        (path.relative_to(root).as_posix(), path)
        for path in root.rglob("*")
        if path.suffix in suffixes and path.is_file()
    ]
    if not files:
        expected = " ".join(sorted(suffixes))
        raise UserError(f"corpus source {root}: no readable file; expected any of {expected}")
    return sorted(files)


def _every_file(root: Path) -> list[NamedFile]:
    paths = (path for path in root.rglob("*") if path.is_file())
    return sorted((path.relative_to(root).as_posix(), path) for path in paths)


def _read_text(path: Path) -> str | None:
    """A file's text, or None where it is not UTF-8, as in a few tests of the standard library."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def _pieces(path: Path) -> Iterator[Document]:
    """A file that is a source by itself, cut at line ends into documents without a name.

    A document without a name belongs to a side of the split by its text, so both sides get some.
    """
    text = _read_text(path)
    if text is None:
        raise UserError(
            f"corpus source {path}: not UTF-8 text; expected text, or a file that ends in .jsonl "
            "or .parquet"
        )
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
