"""Several processes on one run: the results of one, whatever their number, also after deaths."""

import fcntl
import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from alike import assert_same_run, library_of, scores_of
from conftest import write_recipe

from puzzle import artifacts, config, pipeline
from puzzle.evaluate import EVALUATE
from puzzle.evaluate.results import MODELS, ModelQuality, quality_path
from puzzle.library import LIBRARY
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.score import SCORE
from puzzle.stage import Job
from puzzle.training import launch

pytestmark = pytest.mark.training


def copied(finished_run: Run, folder: Path, *later: str, **settings) -> Run:
    """A copy of a finished run without what is made later, and with other settings."""
    shutil.copytree(finished_run.folder, folder, ignore=shutil.ignore_patterns(*later))
    recipe = finished_run.recipe.model_dump(mode="json") | settings
    run = Run(config.parse(recipe), folder, Progress(quiet=True))
    run.write()
    return run


def torchrun(arguments: list[str], processes: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "puzzle.worker", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_a_group_of_torchruns_does_a_whole_run(finished_run, tmp_path, processes):
    recipe = finished_run.recipe.model_dump(mode="json") | {"out": str(tmp_path / "run")}
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    done = torchrun([str(path), "--quiet"], processes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(Run.open(tmp_path / "run", Progress(quiet=True)), finished_run)


@pytest.mark.parametrize(
    ("exits", "said", "words"),
    [
        ({0: 1, 1: -9}, "", "process 1 was killed (SIGKILL); the same command goes on (log: "),
        ({0: 2, 1: -15}, "puzzle: score: no", "score: no"),
        ({1: -15, 0: 1}, "Traceback\nboom", "process 0 ended with exit code 1; the same"),
        ({0: 1}, "puzzle: process 3 has gone", "exit code 1, process 3 has gone; the same"),
    ],
)
def test_the_process_that_died_first_is_named_with_what_it_said(tmp_path, exits, said, words):
    for rank in exits:
        log = tmp_path / "run_1" / "attempt_0" / str(rank) / "stderr.log"
        log.parent.mkdir(parents=True)
        log.write_text(said)
    lines = [
        f"  rank      : {n} (local_rank: {n})\n  exitcode  : {e} (pid: 7)" for n, e in exits.items()
    ]
    failure = launch.what_failed("\n".join(lines), tmp_path)
    assert failure.startswith(words) or words in failure
    assert "\n" not in failure


def test_what_another_process_is_about_to_append_is_not_cut_off(tmp_path):
    """A line that has no end yet is torn only if nobody is writing it."""
    path = tmp_path / "lines.jsonl"
    with path.open("ab") as lines:
        fcntl.flock(lines, fcntl.LOCK_EX)
        lines.write(b'{"of": ')
        lines.flush()
        spawned = multiprocessing.get_context("spawn")  # a fork would hold the lock, too
        other = spawned.Process(target=artifacts.append_line, args=(path, {"of": 2}))
        other.start()
        time.sleep(2.0)  # until it waits
        assert path.read_bytes() == b'{"of": '
        lines.write(b"1}\n")
    other.join(60)
    assert other.exitcode == 0
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"of": 1}, {"of": 2}]


def test_what_is_wrong_under_torchrun_is_one_line(tmp_path):
    done = torchrun([str(tmp_path / "none.yaml"), "--quiet"], 2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("puzzle: ")]
    assert done.returncode and len(lines) == 1 and "none.yaml" in lines[0]


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_the_library_of_one(finished_run, tmp_path, processes, memory):
    library = finished_run.recipe.library.model_dump(mode="json") | {"memory": memory}
    later = ("library", "score", "children")
    run = copied(finished_run, tmp_path / "run", *later, library=library, processes=processes)
    pipeline.execute_stage(LIBRARY, Job(run))
    (weights, index), (expected, expected_index) = library_of(run), library_of(finished_run)
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    assert [r.file for r in index] == [r.file for r in expected_index]
    for ours, theirs in zip(index, expected_index, strict=True):
        assert ours.nmse_after == pytest.approx(theirs.nmse_after, rel=1e-4)


def evaluated(finished_run: Run, folder: Path, **settings) -> dict[str, ModelQuality]:
    """What an evaluation of the finished child has shown."""
    processes = settings.pop("processes", 1)
    evaluate = finished_run.recipe.evaluate.model_dump(mode="json") | {"sequences": 13} | settings
    later = ("evaluate", "report")
    run = copied(finished_run, folder, *later, evaluate=evaluate, processes=processes)
    job = run.child_job("main")
    pipeline.execute_stage(EVALUATE, job)
    return {name: ModelQuality.read(quality_path(job.folder(EVALUATE), name)) for name in MODELS}


@pytest.fixture(scope="module")
def shown_by_one(finished_run, tmp_path_factory) -> dict[str, ModelQuality]:
    return evaluated(finished_run, tmp_path_factory.mktemp("one") / "run")


@pytest.mark.parametrize(
    "settings",
    [
        {"memory": "streamed"},
        {"processes": 2},
        pytest.param({"processes": 4, "memory": "streamed"}, marks=pytest.mark.slow),
    ],
)
def test_an_evaluation_shows_the_same_streamed_and_by_several(
    finished_run, shown_by_one, tmp_path, settings
):
    shown = evaluated(finished_run, tmp_path / "run", **settings)
    for name, expected in shown_by_one.items():
        ours = shown[name]
        assert ours.right == expected.right
        assert ours.samples == expected.samples
        for sums, others in (
            (ours.text, expected.text),
            *zip(ours.by_position.sums, expected.by_position.sums, strict=True),
        ):
            assert (sums.units, sums.tokens) == (others.units, others.tokens)
            for metric, values in others.metrics.items():  # added up in another order
                assert sums.metrics[metric] == pytest.approx(values, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("method", ["exact", "hybrid"])
def test_two_processes_score_as_one(finished_run, tmp_path, method):
    """Three shards: one for each, and the third is shared by its layers."""
    score = finished_run.recipe.score.model_dump(mode="json")
    score |= {"method": method, "shard_sequences": 3}
    runs = [
        copied(finished_run, tmp_path / f"{n}", "score", "children", score=score, processes=n)
        for n in (1, 2)
    ]
    for run in runs:
        pipeline.execute_stage(SCORE, Job(run))
    one, two = map(scores_of, runs)
    assert len(one) == len(two)
    for ours, expected in zip(two, one, strict=True):
        assert ours.model_copy(update={"result": expected.result}) == expected
        # products of other shapes of the same numbers, if at all
        assert ours.result.sums == pytest.approx(expected.result.sums, rel=1e-5, abs=1e-6)
    assert list((runs[1].folder / "logs" / "score").glob("*/attempt_0/1/stderr.log"))
