import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import tiny_recipe, write_recipe

from puzzle import artifacts, config, pipeline
from puzzle.cost import stage as cost
from puzzle.errors import Infeasible, UserError
from puzzle.progress import Progress
from puzzle.run import Run

pytestmark = pytest.mark.training


def manifests(run):
    return {
        stage: (run.stage_folder(stage) / "manifest.json").stat().st_mtime_ns
        for stage in pipeline.STAGES
    }


def with_search(run, **changes):
    search = run.recipe.search.model_copy(update=changes)
    return Run(run.recipe.model_copy(update={"search": search}), run.folder, Progress(quiet=True))


def test_running_again_does_nothing_and_a_new_constraint_redoes_search_and_what_follows(tiny_run):
    pipeline.execute(tiny_run)
    before = manifests(tiny_run)
    pipeline.execute(tiny_run)
    assert manifests(tiny_run) == before
    pipeline.execute(with_search(tiny_run, throughput="1.6x"))
    after = manifests(tiny_run)
    assert [stage for stage in pipeline.STAGES if after[stage] != before[stage]] == [
        "search",
        "assemble",
        "uptrain",
        "evaluate",
        "report",
    ]


def test_a_stage_on_an_outdated_one_is_refused(tiny_run):
    for stage in ("library", "score"):
        pipeline.execute_stage(tiny_run, stage)
    library = tiny_run.recipe.library.model_copy(update={"tokens": 4096})
    changed = Run(
        tiny_run.recipe.model_copy(update={"library": library}), tiny_run.folder, tiny_run.progress
    )
    with pytest.raises(UserError, match="stage library is out of date; run `puzzle library"):
        pipeline.execute_stage(changed, "score")


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("search", {"throughput": "2 times"}, "search.throughput: got '2 times'"),
        ("search", {"throughput": None}, "no constraint is set"),
        ("corpus", {"sequence_length": 512}, "the parent takes at most 256 positions"),
        ("cost", {"device_sheet": "H1000"}, "expected one of this-cpu"),
        ("cost", {"table": "nothing.jsonl"}, "cost.table nothing.jsonl: no such file"),
    ],
)
def test_what_is_wrong_in_a_late_section_is_found_before_anything_is_spent(
    tiny_run, section, changes, message
):
    recipe = tiny_run.recipe
    wrong = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=changes)})
    with pytest.raises(UserError, match=message):
        pipeline.execute(Run(wrong, tiny_run.folder, tiny_run.progress))
    assert not tiny_run.folder.exists()


def test_a_run_of_another_parent_is_not_overwritten(tiny_run):
    pipeline.execute_stage(tiny_run, "library")
    tiny_run.write_recipe()
    other = Run(
        tiny_run.recipe.model_copy(update={"parent": "pocket"}), tiny_run.folder, tiny_run.progress
    )
    with pytest.raises(UserError, match="holds a run of parent .*choose another --out"):
        pipeline.execute(other)
    assert artifacts.manifest(tiny_run.stage_folder("library")) is not None


def test_a_missed_promise_corrects_the_costs_and_searches_again(tiny_run, monkeypatch):
    real, calls = cost.measure_pair, []

    def slow_child_at_first(run, folder, scenarios, pairs, log):
        calls.append(log)
        paired = real(run, folder, scenarios, pairs, log)
        factor = 0.8 if calls.count("assemble-main") == 1 and log == "assemble-main" else 1.0
        return dataclasses.replace(paired, speedup=paired.speedup * factor)

    monkeypatch.setattr(cost, "measure_pair", slow_child_at_first)
    pipeline.execute(tiny_run)
    corrections = artifacts.read_jsonl(tiny_run.stage_folder("cost") / "corrections.jsonl")
    assert len(corrections) == 1 and corrections[0]["time_factor"] == pytest.approx(1.25, rel=1e-3)
    solved = artifacts.read_json(tiny_run.stage_folder("search") / "solutions.json")
    assert solved["time_factor"] == corrections[0]["time_factor"]
    predicted = (
        solved["parent"]["main"]["latency_s"]
        / solved["solutions"][0]["predicted"]["main"]["latency_s"]
    )
    assert predicted >= 1.3 * 1.25


def test_a_child_that_keeps_missing_is_never_called_done(tiny_run, monkeypatch):
    real = cost.measure_pair

    def never_faster(*args):
        return dataclasses.replace(real(*args), speedup=1.1)

    monkeypatch.setattr(cost, "measure_pair", never_faster)
    with pytest.raises(
        Infeasible,
        match=r"still misses: asked throughput 1.3x, measured 1.100x|no architecture meets",
    ):
        pipeline.execute(tiny_run)
    assert artifacts.manifest(tiny_run.stage_folder("uptrain")) is None


def test_status_tells_done_stale_and_not_begun(tiny_run):
    assert {row["state"] for row in pipeline.status(tiny_run)} == {"not begun"}
    pipeline.execute_stage(tiny_run, "library")
    pipeline.execute_stage(tiny_run, "score")
    states = {row["stage"]: row["state"] for row in pipeline.status(tiny_run)}
    assert (states["library"], states["score"], states["cost"]) == ("done", "done", "not begun")
    library = tiny_run.recipe.library.model_copy(update={"tokens": 4096})
    changed = Run(
        tiny_run.recipe.model_copy(update={"library": library}), tiny_run.folder, tiny_run.progress
    )
    states = {row["stage"]: row["state"] for row in pipeline.status(changed)}
    assert states["library"].startswith("stale") and states["score"].startswith("stale")


def test_sigkill_at_spread_moments_and_the_same_command_again_give_bit_identical_weights(
    tiny_folder, text_folder, tmp_path, finished_run
):
    """The real command in a real process, killed several times on its way; each start goes on from
    what is there.
    """
    recipe = tiny_recipe(tiny_folder, text_folder, tmp_path / "run")
    command = [
        sys.executable,
        "-m",
        "puzzle.cli",
        "run",
        str(write_recipe(tmp_path / "r.yaml", recipe)),
        "--quiet",
    ]
    kills = 0
    for stage in ("library", "score", "search", "uptrain", "report"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        status = tmp_path / "run" / "status.json"
        deadline = time.time() + 120
        while process.poll() is None and time.time() < deadline:
            if status.exists() and f'"{stage}"' in status.read_text():
                time.sleep(0.15)  # some way into the stage
                break
            time.sleep(0.005)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 3
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for stage in ("assemble", "uptrain"):
        name = f"{finished_run.stage_folder(stage).name}/model.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (finished_run.folder / name).read_bytes()


def test_the_recipe_of_a_run_is_written_and_read_back(finished_run):
    assert Run.open(finished_run.folder, Progress(quiet=True)).recipe == finished_run.recipe
    assert config.parse(config.read_yaml(finished_run.folder / "run.yaml")) == finished_run.recipe
