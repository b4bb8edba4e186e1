"""SIGKILL, a full disk, a read-only folder, a clock that jumps back, two commands at once.

Whatever happened, the same command again gives the bytes of a run that nothing happened to.
"""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from interrupted_runs import PARTS, assert_same

pytestmark = pytest.mark.training
WRITES_OF_A_FINISHED_RUN = 50  # at least: locks, the recipe, places, children


def one_line(outcome, *words) -> None:
    """The command ended with exit code 2 and one line that has these words."""
    assert outcome.status == 2, outcome.lines
    assert len(outcome.lines) == 1 and outcome.lines[0].startswith("puzzle: "), outcome.lines
    assert all(word in outcome.lines[0] for word in words), outcome.lines


def kill_in_each(command, uninterrupted, tally, parts, seed) -> None:
    """A run killed once in each part, at a seeded write, and then not killed."""
    draw, out = random.Random(seed), command.folder / f"killed-{seed}"
    with tally.fault("kill", len(parts)):
        for part in parts:
            most = uninterrupted.writes[part] if part else WRITES_OF_A_FINISHED_RUN
            at = draw.randint(1, most * 9 // 10)  # what goes on writes a little less
            outcome = command.run(out, "kill", at, part)
            assert outcome.status == -9, (part, at, outcome.lines)
        assert command.run(out).status == 0
        assert_same(out, uninterrupted)
    shutil.rmtree(out)


def test_one_run_survives_kills_a_full_disk_a_read_only_folder_and_a_clock_that_jumps_back(
    command, uninterrupted, tally
):
    draw, out = random.Random(0), command.folder / "unlucky"
    kills = ["library", "score", "children/main/search", "children/main/uptrained"]
    with (
        tally.fault("kill", len(kills)),
        tally.fault("full disk"),
        tally.fault("read-only folder"),
        tally.fault("clock that jumps back"),
    ):
        for part in kills:
            at = draw.randint(1, uninterrupted.writes[part])
            assert command.run(out, "kill", at, part).status == -9
            if part == "library":
                one_line(command.run(out, "read-only", 1), str(out), "Read-only file system")
            if part == "score":
                one_line(command.run(out, "full", 20), str(out), "No space left on device")
        assert command.run(out, "clock").status == 0
        assert_same(out, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_a_run_killed_in_every_part_gives_the_same_bytes(command, uninterrupted, tally, seed):
    kill_in_each(command, uninterrupted, tally, PARTS, seed)


@pytest.mark.slow
def test_a_disk_that_is_full_in_one_part_after_the_other(command, uninterrupted, tally):
    """Each time from a seeded write on; then there is room for the next part."""
    draw, out = random.Random(101), command.folder / "full"
    with tally.fault("full disk", len(PARTS)):
        for part in PARTS:
            most = uninterrupted.writes[part] if part else WRITES_OF_A_FINISHED_RUN
            at = draw.randint(1, most * 6 // 10)  # what is deleted is among them and does not fail
            one_line(command.run(out, "full", at, part), str(out), "No space left on device")
        assert command.run(out).status == 0
        assert_same(out, uninterrupted)
    shutil.rmtree(out)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if subprocess.run(mounted, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


@pytest.mark.slow
def test_a_real_disk_that_is_full_and_then_larger(command, uninterrupted, tally, small_disk):
    out = small_disk / "run"
    with tally.fault("full disk"):
        one_line(command.run(out), str(out), "No space left on device")
        remount(small_disk, "size=100m")
        assert command.run(out).status == 0
        assert_same(out, uninterrupted)


@pytest.mark.slow
def test_a_real_disk_that_is_read_only_and_then_not(command, uninterrupted, tally, small_disk):
    out = small_disk / "run"
    remount(small_disk, "size=100m")
    assert command.run(out, "kill", 300).status == -9
    with tally.fault("read-only folder"):
        remount(small_disk, "ro")
        one_line(command.run(out), str(out), "cannot be written to")
        remount(small_disk, "rw")
        assert command.run(out).status == 0
        assert_same(out, uninterrupted)


@pytest.mark.slow
def test_a_folder_that_is_read_only_in_one_part_after_the_other(command, uninterrupted, tally):
    out = command.folder / "read-only"
    with tally.fault("read-only folder", len(PARTS)):
        for part in ("", *PARTS[:-1]):  # the first write of all, then of every part
            one_line(command.run(out, "read-only", 1, part), str(out), "Read-only file system")
        assert command.run(out).status == 0
        assert_same(out, uninterrupted)
    shutil.rmtree(out)


@pytest.mark.slow
def test_a_clock_that_jumps_back_changes_nothing(command, uninterrupted, tally):
    out = command.folder / "clock"
    with tally.fault("clock that jumps back"):
        assert command.run(out, "kill", uninterrupted.writes["score"] // 2, "score").status == -9
        assert command.run(out, "clock").status == 0
        assert_same(out, uninterrupted)


@pytest.mark.slow
def test_two_commands_on_one_run_give_one_result(command, uninterrupted, tally):
    """The second begins while the first is at work, and waits or is refused in one line."""
    out = command.folder / "two"
    recipe = command.write_recipe(out)
    puzzle = [sys.executable, "-m", "puzzle.cli", "run", str(recipe), "--quiet"]
    with tally.fault("two commands on one run", 2):
        started = [
            subprocess.Popen([*puzzle, *more], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
            for more in ([], [], ["--wait"])
        ]
        ended = [(p.communicate(timeout=300)[1].decode(), p.returncode) for p in started]
        for said, status in ended:
            assert status == 0 or (status == 2 and said.count("\n") == 1 and "--wait" in said), said
        assert ended[-1][1] == 0, ended[-1][0]
        assert command.run(out).status == 0
        assert_same(out, uninterrupted)
