"""`puzzle` in processes of their own that fail at a chosen write. Nothing of it is in the product.

    python tests/faults/command.py        # requests on standard input, replies on standard output

torch is imported once; every request is served by a fork of this process, in which what writes to
a folder is counted (opening, each write, fsync, rename, unlink, safetensors' own files) and the
chosen one goes wrong:

- "kill": half of it is written, then SIGKILL;
- "full", "read-only": it and all later ones raise ENOSPC or EROFS;
- "clock": `time.time` goes back by an hour at every call.
"""

import builtins
import errno
import io
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

UNWRITABLE = {"full": errno.ENOSPC, "read-only": errno.EROFS}


class Faults:
    """What writes to a run is counted by its parts; number `at` of `part` fails."""

    def __init__(self, run: str, parts: list[str], part: str, fault: tuple[str, int]) -> None:
        self.run, self.part, (self.kind, self.at) = run, part, fault
        self.counts = dict.fromkeys(parts, 0)

    def is_ours(self, path) -> bool:
        return str(path).startswith(self.run)

    def reached(self, path) -> bool:
        """Counts one write; whether it is the one that fails."""
        here = [part for part in self.counts if str(path).startswith(f"{self.run}/{part}")]
        for part in here:
            self.counts[part] += 1
        count = self.counts[self.part] if self.part in here else 0
        if self.kind in UNWRITABLE and count >= self.at:
            number = UNWRITABLE[self.kind]
            raise OSError(number, os.strerror(number), str(path))
        return self.kind == "kill" and count == self.at

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        for name in ("replace", "rename", "link", "mkdir"):
            setattr(os, name, self._before(getattr(os, name)))
        if self.kind not in UNWRITABLE:  # a full disk can be deleted from
            os.unlink, os.rmdir = self._before(os.unlink), self._before(os.rmdir)
        os.fsync = self._fsync(os.fsync)
        io.open = builtins.open = self._open(io.open)
        import safetensors.numpy
        import safetensors.torch

        for module in (safetensors.numpy, safetensors.torch):
            module.serialize_file = self._serialize(module.serialize_file)
        if self.kind == "clock":
            begin, calls = time.time(), itertools.count()
            time.time = lambda: begin - 3600.0 * next(calls)

    def _before(self, real):
        def faulty(path, *arguments, **options):
            if self.is_ours(path) and self.reached(path):
                self.kill()
            return real(path, *arguments, **options)

        return faulty

    def _fsync(self, real):
        def faulty(number):
            path = str(Path(f"/proc/self/fd/{number}").readlink())
            if self.is_ours(path) and self.reached(path):
                self.kill()
            return real(number)

        return faulty

    def _open(self, real):
        def faulty(file, mode="r", *arguments, **options):
            is_written = set(mode) & set("wax+") and self.is_ours(file)
            if is_written and self.reached(file):
                real(file, mode, *arguments, **options)  # it is there, and empty
                self.kill()
            opened = real(file, mode, *arguments, **options)
            return _Written(opened, str(file), self) if is_written else opened

        return faulty

    def _serialize(self, real):
        def faulty(tensors, filename, *arguments, **options):
            is_last = self.is_ours(filename) and self.reached(filename)
            real(tensors, filename, *arguments, **options)
            if is_last:
                os.truncate(filename, Path(filename).stat().st_size // 2)
                self.kill()

        return faulty


class _Written:
    """A file whose writes are counted."""

    def __init__(self, file, path: str, faults: Faults) -> None:
        self._file, self._path, self._faults = file, path, faults

    def write(self, data):
        if self._faults.reached(self._path):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            self._faults.kill()
        return self._file.write(data)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *exception):
        return self._file.__exit__(*exception)

    def __iter__(self):
        return iter(self._file)

    def __getattr__(self, name):
        return getattr(self._file, name)


def serve(request: dict) -> dict:
    """Runs `puzzle ARGUMENTS` in a fork; how it ended, what it said and how often it wrote."""
    said = Path(request["said"])
    child = os.fork()
    if not child:
        _run(request, said)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = said.read_text(encoding="utf-8").splitlines()
    counts = json.loads(lines.pop()[7:]) if lines and lines[-1].startswith("writes ") else {}
    return {"status": status, "lines": [line for line in lines if line.strip()], "writes": counts}


def _run(request: dict, said: Path) -> None:
    output = os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from puzzle import cli

    fault = request["kind"], request["at"]
    faults = Faults(request["run"], request["parts"], request["part"], fault)
    faults.install()
    sys.argv, status = ["puzzle", *request["arguments"]], 1
    try:
        cli.main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(2, f"\nwrites {json.dumps(faults.counts)}\n".encode())
    os._exit(status)


def main() -> None:
    import torch

    from puzzle import pipeline

    torch.set_num_threads(1)  # threads do not survive a fork
    for stage in pipeline.STAGES:
        stage.work()
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
