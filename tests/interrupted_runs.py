"""Runs that go wrong, and what an uninterrupted one would have given."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMMAND = Path(__file__).parent / "faults" / "command.py"
# Where a run writes; "" is anywhere
PARTS = (
    "corpus",
    "library",
    "score",
    "places/here/cost",
    "children/main/search",
    "children/main/child",
    "children/main/uptrained",
    "children/main/evaluate",
    "children/main/report",
    "",
)
# Times, and what tells one start from another
NOT_COMPARED = ("manifest.json", "started.json", "checksums.jsonl", "index.html", ".svg")


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int  # exit code, or minus the signal
    lines: list[str]
    writes: dict[str, int]  # by part; empty where it was killed


class Command:
    """`puzzle run` of the tiny recipe, in processes that can fail at a chosen write."""

    def __init__(self, recipe: dict, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.process = subprocess.Popen(
            [sys.executable, str(COMMAND)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def write_recipe(self, out: Path) -> Path:
        """The recipe of a run in `out`."""
        recipe = self.folder / f"{out.name}.yaml"
        recipe.write_text(json.dumps(self.recipe | {"out": str(out)}))  # JSON is YAML
        return recipe

    def run(self, out: Path, kind: str = "", at: int = 0, part: str = "") -> Outcome:
        """A run in `out`, in which the write number `at` to its folder `part` goes wrong."""
        request = {
            "arguments": ["run", str(self.write_recipe(out)), "--quiet"],
            "said": str(self.folder / f"{out.name}.said"),
            "run": str(out),
            "parts": PARTS,
            "part": part,
            "kind": kind,
            "at": at,
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Outcome(**json.loads(self.process.stdout.readline()))


@dataclass(frozen=True)
class Uninterrupted:
    """A run without faults."""

    folder: Path
    writes: dict[str, int]
    results: dict[str, str]


def results(folder: Path) -> dict[str, str]:
    """A checksum of every file that a run leaves, but for times and its own name."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith("logs/") or name.endswith(NOT_COMPARED) or ".lock" in name:
            continue
        data = path.read_bytes().replace(str(folder).encode(), b"RUN")
        if path.suffix in (".json", ".jsonl", ".yaml"):
            data = "\n".join(map(_without_times, data.decode().splitlines())).encode()
        found[name] = hashlib.sha256(data).hexdigest()[:12]
    return found


def _without_times(line: str) -> str:
    if line.lstrip().startswith('"seconds":') or line.startswith("out:"):
        return ""
    return line


class Tally:
    """Counts faults by kind; appended to the file that `make test-faults` names."""

    def __init__(self) -> None:
        self.tried: dict[str, int] = {}
        self.survived: dict[str, int] = {}

    @contextlib.contextmanager
    def fault(self, kind: str, count: int = 1) -> Iterator[None]:
        """Faults that are survived if the block ends well."""
        self.tried[kind] = self.tried.get(kind, 0) + count
        yield
        self.survived[kind] = self.survived.get(kind, 0) + count

    def write(self) -> None:
        """Append what was counted, if somebody asked for it."""
        path = os.environ.get("PUZZLE_FAULTS_TALLY")
        if path:
            with Path(path).open("a", encoding="utf-8") as lines:
                for kind, tried in self.tried.items():
                    row = {"kind": kind, "tried": tried, "survived": self.survived.get(kind, 0)}
                    lines.write(json.dumps(row) + "\n")


def assert_same(out: Path, uninterrupted: Uninterrupted) -> None:
    """Every file is the one that an uninterrupted run leaves."""
    found, expected = results(out), uninterrupted.results
    different = {name for name in found | expected if found.get(name) != expected.get(name)}
    assert not different, different
