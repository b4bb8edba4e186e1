"""Locks: a folder is held while it is written, a measuring device while it measures.

A lock is a small file that names its holder: host and process. A process that holds a folder may
hold it again. A dead holder is recognised: on this host its process is gone, on another its file
has not been touched for a while (every holder touches its lock, so that this works on a shared file
system, too).
"""

import contextlib
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from puzzle.artifacts import Record
from puzzle.errors import UserError

TOUCH_EVERY_S = 20.0
DEAD_AFTER_S = 300.0  # without a touch, for a holder on another host
LOOK_EVERY_S = 1.0


class Holder(Record):
    """Who holds a lock."""

    host: str
    pid: int
    started: str  # of the process, as the kernel counts; tells a process from a later one

    @classmethod
    def this_process(cls) -> "Holder":
        """This process."""
        pid = os.getpid()
        return cls(host=socket.gethostname(), pid=pid, started=_started(pid))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _started(pid: int) -> str:
    """When a process was started, in the kernel's ticks; empty where that is unknown or it ended.

    A process that ended but was not waited for (a zombie) has ended.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return ""


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is somebody else's
    return True


def lock_path(folder: Path) -> Path:
    """The lock of a folder, beside it."""
    return folder.with_name(f".{folder.name}.lock")


@contextlib.contextmanager
def hold(folder: Path, *, wait: bool, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a folder while the block runs.

    Where another process holds it: with `wait` a line is said and the block begins when the folder
    is free; otherwise `UserError`.
    """
    path = lock_path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _held(path, f"{folder} is being written", wait=wait, say=say):
        yield


@contextlib.contextmanager
def hold_device(device: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a measuring device of this machine; waits for whoever measures there now."""
    name = "".join(letter if letter.isalnum() else "-" for letter in device)
    path = Path(tempfile.gettempdir()) / f"puzzle-measuring-{name}.lock"
    with _held(path, f"{device} is being measured on", wait=True, say=say):
        yield


@contextlib.contextmanager
def _held(path: Path, what: str, *, wait: bool, say: Callable[[str], None]) -> Iterator[None]:
    this, told, pause_s = Holder.this_process(), False, 0.02
    while not _take(path, this):
        holder = _read_holder(path)
        if holder == this:
            yield  # whoever took it first gives it back
            return
        if holder is not None and not wait:
            raise UserError(
                f"{what} by {holder}; wait for it with --wait, or stop it (lock: {path})"
            )
        if holder is not None and not told and pause_s >= LOOK_EVERY_S:
            say(f"  {what} by {holder}: waiting")
            told = True
        time.sleep(pause_s if holder is not None else 0.01)  # None: it was just given back
        pause_s = min(2 * pause_s, LOOK_EVERY_S)
    ended = threading.Event()
    toucher = threading.Thread(target=_keep_touching, args=(path, this, ended), daemon=True)
    toucher.start()
    try:
        yield
    finally:
        ended.set()
        toucher.join()
        if _read_holder(path) == this:
            path.unlink(missing_ok=True)


def _take(path: Path, this: Holder) -> bool:
    """Whether this process has got the lock. A dead holder's lock is removed first."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(this.model_dump_json(), encoding="utf-8")
        now_s = temporary.stat().st_mtime  # by the clock of the file system
        holder = _read_holder(path)
        if holder is not None and _is_dead(holder, path, now_s):
            _remove(path, holder)
        os.link(temporary, path)  # fails where the lock exists, on shared file systems too
        return True
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"lock {path}: {error.strerror}; remove it, or check its folder") from None
    finally:
        temporary.unlink(missing_ok=True)


def _remove(path: Path, dead: Holder) -> None:
    """Remove a dead holder's lock, but not one that a third process has just taken."""
    aside = path.with_name(f"{path.name}.dead.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        path.replace(aside)
        if _read_holder(aside) != dead:
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _read_holder(path: Path) -> Holder | None:
    """Who holds a lock; None where nobody does. Raises `UserError` for a file that is no lock."""
    for _ in range(5):  # it may be given back, and taken by another, while it is read
        try:
            return Holder.read(path)
        except UserError:
            if not path.exists():
                return None
            time.sleep(0.01)
    raise UserError(
        f"lock {path}: names no holder; remove it if no other puzzle command is running"
    )


def _is_dead(holder: Holder, path: Path, now_s: float) -> bool:
    if holder.host == socket.gethostname():
        return not _is_alive(holder.pid) or holder.started != _started(holder.pid)
    try:
        return now_s - path.stat().st_mtime > DEAD_AFTER_S
    except FileNotFoundError:
        return True


def _keep_touching(path: Path, this: Holder, ended: threading.Event) -> None:
    while not ended.wait(TOUCH_EVERY_S):
        with contextlib.suppress(OSError):
            if _read_holder(path) == this:
                os.utime(path)
