"""Several processes: the curve of one, a clean end when one is killed, and going on after it."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from uptrainings import assembled, assert_same_curve, uptrained, weights

from puzzle import artifacts, pipeline
from puzzle.errors import UserError
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.stage import Job
from puzzle.training import snapshots
from puzzle.uptrain import UPTRAIN, trainer

pytestmark = pytest.mark.training
STEPS = 80
SEVERAL = {"tokens": STEPS * 8 * 32, "checkpoint_steps": 2, "validate_steps": 40, "processes": 2}
# On top of several processes: micro-batches and recomputed activations
SAVING = {"micro_batch_sequences": 2, "activation_checkpointing": True}


def last_checkpoint(job: Job) -> Path:
    return job.folder(UPTRAIN) / artifacts.UNFINISHED / f"{trainer.LAST}.json"


def read_process(number: str, file: str) -> bytes:
    """A file of /proc; empty where the process is gone."""
    try:
        return Path("/proc", number, file).read_bytes()
    except OSError:
        return b""


def processes_of(run: Run) -> list[str]:
    """The processes whose command line names this run."""
    numbers = [folder.name for folder in Path("/proc").glob("[0-9]*")]
    return [n for n in numbers if str(run.folder).encode() in read_process(n, "cmdline")]


def kill_process_one(job: Job) -> None:
    """As soon as there is a checkpoint: SIGKILL for the process of rank 1 of this run."""
    while not last_checkpoint(job).exists():
        time.sleep(0.02)
    for number in processes_of(job.run):
        if b"RANK=1" in read_process(number, "environ").split(b"\0"):
            os.kill(int(number), signal.SIGKILL)


@pytest.fixture(scope="module")
def on_two(finished_run, tmp_path_factory) -> Job:
    """An uptraining on two processes, without interruption."""
    return uptrained(finished_run, tmp_path_factory.mktemp("two") / "run", **SEVERAL, **SAVING)


@pytest.fixture(scope="module")
def killed(finished_run, tmp_path_factory) -> tuple[Job, str]:
    """An uptraining on two processes of which one was killed, and what it ended with."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    job = assembled(finished_run, folder, **SEVERAL, **SAVING)
    killer = threading.Thread(target=kill_process_one, args=(job,), daemon=True)
    killer.start()
    with pytest.raises(UserError) as error:
        pipeline.execute_stage(UPTRAIN, job)
    return job, str(error.value)


def test_two_processes_give_the_curve_of_one(finished_run, on_two, tmp_path):
    on_one = uptrained(finished_run, tmp_path / "one", **(SEVERAL | {"processes": 1}))
    assert_same_curve(on_two, on_one, rel=1e-3)
    expected = weights(on_one)
    for name, tensor in weights(on_two).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0.02, atol=2e-3)


def test_a_killed_process_ends_the_run_with_one_line_and_nothing_left_behind(killed):
    job, line = killed
    assert "process 1 was killed (SIGKILL); the same command goes on (log: " in line
    assert Path(line.partition("(log: ")[2].rstrip(")")).name == "stderr.log"
    assert "\n" not in line
    assert not processes_of(job.run)


def test_workers_end_with_the_command_that_started_them_even_if_it_is_killed(
    finished_run, tmp_path
):
    job = assembled(finished_run, tmp_path / "run", **(SEVERAL | {"tokens": 10_000_000}))
    arguments = ["uptrain", str(job.run.folder), "--quiet"]
    command = subprocess.Popen([sys.executable, "-m", "puzzle.cli", *arguments])
    while not last_checkpoint(job).exists():
        assert command.poll() is None
        time.sleep(0.05)
    assert len(processes_of(job.run)) == 4  # the command, torchrun, two workers
    command.kill()
    command.wait()
    deadline = time.monotonic() + 20
    while processes_of(job.run) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(job.run)


def test_it_goes_on_bit_identically_on_as_many_processes_and_alike_on_fewer(
    killed, on_two, tmp_path
):
    job, _ = killed
    shutil.copytree(job.run.folder, tmp_path / "fewer")
    one_process = job.run.recipe.model_copy(update={"processes": 1})
    fewer = Run(one_process, tmp_path / "fewer", Progress(quiet=True)).child_job("main")
    started = snapshots.read(last_checkpoint(job).parent, trainer.LAST).step
    assert 0 < started < STEPS
    pipeline.execute_stage(UPTRAIN, job)
    ours, uninterrupted = (j.folder(UPTRAIN) / "model.safetensors" for j in (job, on_two))
    assert ours.read_bytes() == uninterrupted.read_bytes()
    pipeline.execute_stage(UPTRAIN, fewer)
    assert_same_curve(fewer, on_two, rel=1e-3)
