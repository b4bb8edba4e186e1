"""Two processes of an uptraining hold nothing but their shards between a forward and the next.

On CPUs with gloo, where memory is real; what NCCL does besides needs GPUs.
"""

import json
import shutil

import pytest
from torch import multiprocessing

from fake_cuda.ranks import worker
from puzzle import artifacts, config
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.uptrain import UPTRAIN

pytestmark = pytest.mark.training
SMALL_SHARE = 0.05  # of the bytes of all matrices, for what is made of a few of them


def forwards(finished_run, folder, keeps: bool) -> tuple[list[int], int]:
    """(bytes of whole matrices alive after each forward, bytes of all of them)."""
    later = shutil.ignore_patterns("uptrained", "evaluate", "report")
    shutil.copytree(finished_run.folder, folder, ignore=later)
    recipe = finished_run.recipe.model_dump(mode="json") | {"precision": "bfloat16"}
    recipe["uptrain"] |= {"tokens": 512, "processes": 2, "activation_checkpointing": False}
    run = Run(config.parse(recipe), folder, Progress(quiet=True))
    run.write()
    (run.child_job("main").folder(UPTRAIN) / artifacts.UNFINISHED).mkdir(parents=True)
    out = folder / "alive.json"
    multiprocessing.spawn(worker, (folder, out, keeps), nprocs=2)
    shown = json.loads(out.read_text())
    return shown["alive"], shown["matrices"]


@pytest.fixture(scope="module")
def shares(finished_run, tmp_path_factory) -> dict[bool, float]:
    """Of all matrices, what is alive at the most; `True`: with copies planted that stay."""
    found = {}
    for keeps in (False, True):
        alive, matrices = forwards(finished_run, tmp_path_factory.mktemp("run") / "run", keeps)
        assert len(alive) >= 2
        found[keeps] = max(alive) / matrices
    return found


@pytest.mark.xfail(
    strict=False,
    reason="0.24 of all matrices stay alive with FSDP2's mixed precision (0.84 under autocast); "
    "which ones, and why, has not been looked into",
)
def test_nothing_but_shards_is_alive_after_a_forward(shares):
    assert shares[False] < SMALL_SHARE


def test_copies_that_stay_are_seen(shares):
    assert shares[True] > shares[False] + SMALL_SHARE
