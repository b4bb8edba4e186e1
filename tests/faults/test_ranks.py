"""One of several processes of an uptraining dies, twice in a run, at seeded checkpoints."""

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "uptrain"))
from test_launch import SEVERAL, last_checkpoint, processes_of, read_process
from uptrainings import assembled, uptrained

from puzzle import pipeline
from puzzle.errors import UserError
from puzzle.uptrain import UPTRAIN

pytestmark = [pytest.mark.training, pytest.mark.slow]


def kill_rank(job, rank: int, checkpoints: int) -> None:
    """SIGKILL for a rank after so many checkpoints."""
    times: set[int] = set()
    while len(times) < checkpoints:
        if last_checkpoint(job).exists():
            times.add(last_checkpoint(job).stat().st_mtime_ns)
        time.sleep(0.005)
    for number in processes_of(job.run):
        if f"RANK={rank}".encode() in read_process(number, "environ").split(b"\0"):
            os.kill(int(number), signal.SIGKILL)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_rank_that_dies_costs_no_more_than_the_steps_since_its_checkpoint(
    finished_run, tmp_path, tally, seed
):
    draw = random.Random(seed)
    reference = uptrained(finished_run, tmp_path / "reference", **SEVERAL)
    job = assembled(finished_run, tmp_path / "run", **SEVERAL)
    with tally.fault("rank that dies", 2):
        for _ in range(2):
            arguments = (job, draw.randint(0, 1), draw.randint(1, 8))
            killer = threading.Thread(target=kill_rank, args=arguments, daemon=True)
            killer.start()
            with pytest.raises(UserError, match="the same command goes on"):
                pipeline.execute_stage(UPTRAIN, job)
            assert not processes_of(job.run)
        pipeline.execute_stage(UPTRAIN, job)
        ours, expected = (j.folder(UPTRAIN) / "model.safetensors" for j in (job, reference))
        assert ours.read_bytes() == expected.read_bytes()
