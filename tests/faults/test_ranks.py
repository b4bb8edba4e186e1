"""Processes that die: of an uptraining, and of a run that goes on with other numbers of them."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parents[1] / "uptrain"), str(Path(__file__).parents[1])]
from alike import assert_same_run
from conftest import tiny_recipe, write_recipe
from test_launch import SEVERAL, last_checkpoint, processes_of, read_process
from uptrainings import assembled, uptrained

from puzzle import config, pipeline
from puzzle.errors import UserError
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.uptrain import UPTRAIN

pytestmark = [pytest.mark.training, pytest.mark.slow]


def kill_process(run: Run, rank: int) -> None:
    """SIGKILL for a process of a group, by its number."""
    for number in processes_of(run):
        if f"RANK={rank}".encode() in read_process(number, "environ").split(b"\0"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(number), signal.SIGKILL)


def kill_rank(job, rank: int, checkpoints: int) -> None:
    """SIGKILL for a rank after so many checkpoints."""
    times: set[int] = set()
    while len(times) < checkpoints:
        if last_checkpoint(job).exists():
            times.add(last_checkpoint(job).stat().st_mtime_ns)
        time.sleep(0.005)
    kill_process(job.run, rank)


def test_a_rank_that_dies_costs_no_more_than_the_steps_since_its_checkpoint(
    finished_run, tmp_path, tally
):
    draw = random.Random(0)
    reference = uptrained(finished_run, tmp_path / "reference", **SEVERAL)
    job = assembled(finished_run, tmp_path / "run", **SEVERAL)
    with tally.fault("rank that dies", 3):
        for _ in range(3):
            arguments = (job, draw.randint(0, 1), draw.randint(1, 8))
            killer = threading.Thread(target=kill_rank, args=arguments, daemon=True)
            killer.start()
            with pytest.raises(UserError, match="the same command goes on"):
                pipeline.execute_stage(UPTRAIN, job)
            assert not processes_of(job.run)
        pipeline.execute_stage(UPTRAIN, job)
        ours, expected = (j.folder(UPTRAIN) / "model.safetensors" for j in (job, reference))
        assert ours.read_bytes() == expected.read_bytes()


def written_to(folder: Path) -> set[tuple[str, int]]:
    """Names and times of a stage's checkpoints and units."""
    found = set()
    for path in folder.glob("training/*"):
        with contextlib.suppress(FileNotFoundError):  # just replaced
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def kill_in(recipe: Path, run: Run, processes: int, stage: str, draw: random.Random) -> None:
    """`puzzle run`, of which one process is killed after a seeded number of writes of a stage.

    On a busy machine the stage may be over before it is seen to have written so often: then it is
    removed, and the first write will do.
    """
    rank, folder = draw.randrange(processes), run.folder / stage
    at = draw.randint(1, 5)
    while True:
        started = begun_and_written(recipe, folder, processes, at)
        if processes > 1:
            kill_process(run, rank)
        else:
            started.kill()
        _, said = started.communicate(timeout=120)
        if started.returncode != 0:
            break
        shutil.rmtree(folder)
        at = 1
    if processes > 1:
        assert started.returncode == 2, said
        assert f"process {rank} was killed (SIGKILL); the same command goes on (log: " in said
        assert len(said.splitlines()) == 1, said
    assert not processes_of(run)


def begun_and_written(recipe: Path, folder: Path, processes: int, at: int) -> subprocess.Popen:
    """A `puzzle run` that has written so often into a stage's folder, or that has ended."""
    command = [sys.executable, "-m", "puzzle.cli", "run", str(recipe), "--quiet"]
    started = subprocess.Popen(
        [*command, "--set", f"processes={processes}"], stderr=subprocess.PIPE, text=True
    )
    before, seen = written_to(folder), set()
    while len(seen) < at and started.poll() is None:
        seen |= written_to(folder) - before
        time.sleep(0.002)
    return started


def test_a_run_that_goes_on_with_other_numbers_of_processes_is_the_uninterrupted_one(
    tiny_folder, text_folder, tmp_path, tally
):
    """Begun on two, killed at ten seeded points, gone on with one, three and two."""
    draw = random.Random(0)
    settings = tiny_recipe(tiny_folder, text_folder, tmp_path / "run")
    settings["uptrain"] |= {"batch_sequences": 12, "tokens": 12 * 12 * 32}
    expected = Run(config.parse(settings), tmp_path / "expected", Progress(quiet=True))
    pipeline.execute(expected)
    recipe = write_recipe(tmp_path / "recipe.yaml", settings)
    run = Run(config.parse(settings), tmp_path / "run", Progress(quiet=True))
    kills = [(2, "library"), (1, "library"), (3, "library"), (2, "library")]
    kills += [(2, "score"), (1, "score"), (3, "score")]
    kills += [(processes, "children/main/uptrained") for processes in (2, 1, 3)]
    with tally.fault("process of a group that dies", len(kills)):
        for processes, stage in kills:
            kill_in(recipe, run, processes, stage, draw)
        arguments = ["run", str(recipe), "--quiet", "--set", f"processes={draw.choice([1, 2, 3])}"]
        subprocess.run([sys.executable, "-m", "puzzle.cli", *arguments], check=True)
        assert_same_run(Run.open(tmp_path / "run", Progress(quiet=True)), expected)
