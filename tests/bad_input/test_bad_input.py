"""Every wrong input is one line that says what, got, expected and how to mend; exit code 2;
nothing is written, nothing is lost.
"""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import directories
import parents
import pytest
import tables
import texts
from conftest import DEVICE_SHEET, make_parent, make_text, tiny_recipe
from faults import tally

import recipes
from puzzle import cli, config, pipeline
from puzzle.progress import Progress
from puzzle.run import Run

pytestmark = pytest.mark.training  # hundreds of commands: half a minute
TABLE = [*recipes.CASES, *parents.CASES, *texts.CASES, *tables.CASES, *directories.CASES]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A parent, text, a recipe for them, and a run that has not begun."""
    folder = tmp_path_factory.mktemp("good")
    make_parent(folder / "parent")
    (folder / "text").mkdir()
    make_text(folder / "text")
    for path in sorted((folder / "text").iterdir())[12:]:
        path.unlink()  # copied for every case
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = tiny_recipe("parent", "text", "run")
        recipe["cost"]["device_sheet"] = "device.yaml"
        shutil.copyfile(DEVICE_SHEET, "device.yaml")
        (folder / "good.yaml").write_text(json.dumps(recipe))
        run = Run(config.parse(recipe), folder / "run", Progress(quiet=True))
        run.write()
    return folder


def content(folder):
    """What is in a folder, without the notes of files that were read, which decide nothing."""
    paths = [path for path in sorted(folder.rglob("*")) if path.name != "checksums.jsonl"]
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in paths}


def began(folder, *_):
    raise AssertionError(f"work has begun in {folder}")


def answer(arguments, monkeypatch, capsys):
    """(exit code, standard output, standard error) of a command, in this process."""
    monkeypatch.setattr("sys.argv", ["puzzle", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


@pytest.fixture
def here(good, monkeypatch):
    """The same folder for every test, put right after those that change it."""
    before = content(good)
    monkeypatch.chdir(good)
    monkeypatch.setenv("HOME", str(good))
    yield good
    after = content(good)
    for path in sorted(after.keys() - before.keys(), reverse=True):
        (good / path).rmdir() if after[path] is None else (good / path).unlink()
    for path in [path for path in before if after.get(path) != before[path]]:
        (good / path).write_bytes(before[path])


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_a_wrong_input_is_one_line(case, here, monkeypatch, capsys):
    for name, text in case.files.items():
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = content(here)
    if case.stays:  # what is not refused would be done, for hours perhaps
        monkeypatch.setattr(pipeline.artifacts, "begin", began)
    code, out, err = answer(case.arguments, monkeypatch, capsys)
    *progress, line = err.splitlines()
    pattern = re.escape(f"puzzle: {case.message}").replace("…", ".+")
    assert re.fullmatch(pattern, line), line
    assert code == 2 and out == ""
    if case.stays:
        assert not progress and content(here) == before
    tally("bad input", 1)


def test_no_two_cases_are_the_same():
    assert len({case.name for case in TABLE}) == len(TABLE) >= 150


# ------------------------------------------------------------------------------------- the machine


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.EACCES, "Permission denied; change its permissions, or choose another place"),
        (errno.EROFS, "Read-only file system; choose a place that can be written to"),
        (errno.ENOSPC, "No space left on device; free some space; the same command goes on from"),
        (errno.EISDIR, "Is a directory; expected a file there"),
    ],
)
def test_what_the_machine_refuses_is_one_line(number, hint, here, monkeypatch, capsys):
    """As the superuser, who may write everywhere, a test can only pretend."""

    write_text = Path.write_text

    def refuse(path, *arguments, **options):
        if ".lock" in path.name:
            return write_text(path, *arguments, **options)
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    before = content(here)
    code, out, err = answer(["cost", "run", "--place", "moon"], monkeypatch, capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("puzzle: run/places/moon/") and f": {hint}" in err
    assert {p: c for p, c in content(here).items() if c is not None} == {
        p: c for p, c in before.items() if c is not None
    }
    tally("bad input", 1)


def test_a_folder_without_permission_is_told_before_anything_is_spent(here, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    code, _, err = answer(["run", "good.yaml", "--out", "new"], monkeypatch, capsys)
    assert code == 2
    assert err == "puzzle: run directory new: . cannot be written to; choose another --out\n"
    assert not (here / "new").exists()


def test_an_error_of_ours_keeps_its_traceback(here, monkeypatch):
    def fail(*_):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "ours")

    monkeypatch.setattr(pipeline, "status", fail)
    monkeypatch.setattr("sys.argv", ["puzzle", "status", "run"])
    with pytest.raises(FileNotFoundError):
        cli.main()


def test_a_home_is_found_in_every_path(here, monkeypatch, capsys):
    """`~` is the shell's, but not in `--out=~/x`, in a recipe, or in quotes."""
    recipe = json.loads((here / "good.yaml").read_text())
    recipe |= {"parent": "~/parent", "out": "~/out", "score": {"task": "~/q.jsonl"}}
    recipe["corpus"]["sources"] = ["~/text"]
    recipe["cost"] |= {"device_sheet": "~/device.yaml", "table": "~/costs.jsonl"}
    parsed = config.parse(recipe)
    given = (parsed.parent, parsed.out, parsed.score.task, parsed.corpus.sources[0].path)
    given += (parsed.cost.device_sheet, parsed.cost.table)
    names = ("parent", "out", "q.jsonl", "text", "device.yaml", "costs.jsonl")
    assert given == tuple(str(here / name) for name in names)
    for command in (["status", "~/run"], ["plan", "~/good.yaml"], ["children", "~/run"]):
        monkeypatch.setattr("sys.argv", ["puzzle", *command])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code, capsys.readouterr().err
    assert not (here / "~").exists()
