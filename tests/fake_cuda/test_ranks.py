"""Two processes of an uptraining hold nothing but their shards between forward and backward.

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


def forwards(finished_run, folder, keeps: bool) -> dict:
    """What `worker` writes."""
    later = shutil.ignore_patterns("uptrained", "evaluate", "report")
    shutil.copytree(finished_run.folder, folder, ignore=later)
    recipe = finished_run.recipe.model_dump(mode="json") | {"precision": "bfloat16"}
    recipe["uptrain"] |= {"tokens": 512, "activation_checkpointing": False}
    run = Run(config.parse(recipe), folder, Progress(quiet=True))
    run.write()
    (run.child_job("main").folder(UPTRAIN) / artifacts.UNFINISHED).mkdir(parents=True)
    out = folder / "alive.json"
    multiprocessing.spawn(worker, (folder, out, keeps), nprocs=2)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def shares(finished_run, tmp_path_factory) -> dict[bool, float]:
    """Of all matrices, what is alive at the most; `True`: with copies planted that stay.

    But for the gradient of the child's head, which is made together with the loss.
    """
    found = {}
    for keeps in (False, True):
        shown = forwards(finished_run, tmp_path_factory.mktemp("run") / "run", keeps)
        assert len(shown["alive"]) >= 2
        found[keeps] = (max(shown["alive"]) - shown["head_gradient"]) / shown["matrices"]
    return found


def test_nothing_but_shards_is_alive_after_a_forward(shares):
    assert abs(shares[False]) < SMALL_SHARE


def test_copies_that_stay_are_seen(shares):
    assert shares[True] > shares[False] + SMALL_SHARE
