"""Places: costs of other engines and other machines, children there, and what is locked."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import DEVICE_SHEET
from test_cli import checksums, last_line, puzzle

from puzzle import artifacts, locks
from puzzle.cost import table
from puzzle.errors import UserError
from puzzle.progress import Progress
from puzzle.run import Run

pytestmark = pytest.mark.training
H100 = ("--engine", "roofline", "--set", "cost.device_sheet=H100")


@pytest.fixture
def run_copy(finished_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished_run.folder, copy)
    return copy


def test_costs_are_measured_elsewhere_from_the_parents_description_and_used_here(
    run_copy, tmp_path, monkeypatch
):
    """Another machine has run.yaml and parent/ only, no weights; its folder is copied back."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copyfile(run_copy / "run.yaml", elsewhere / "run.yaml")
    shutil.copytree(run_copy / "parent", elsewhere / "parent")
    text = (elsewhere / "run.yaml").read_text()
    parent = Run.open(run_copy, Progress(True)).recipe.parent
    (elsewhere / "run.yaml").write_text(text.replace(parent, "/models/on/the/first/machine"))
    assert not list(elsewhere.rglob("*.safetensors"))
    made = last_line(puzzle("cost", elsewhere, "--place", "far", *H100, "--json"))
    assert made["place"] == "far"

    main = checksums(run_copy / "children" / "main")
    shutil.copytree(elsewhere / "places" / "far", run_copy / "places" / "far")
    header = run_copy / "places" / "far" / "cost" / "header.json"
    measured = json.loads(header.read_text())
    measured["engine"]["device"] = "the other machine"  # so that it cannot be measured here
    header.write_text(json.dumps(measured))
    manifest = artifacts.read_manifest(header.parent)
    artifacts.write_manifest(header.parent, manifest.inputs, manifest.seconds)
    job = Run.open(run_copy, Progress(True)).place_job("far")
    assert table.are_from_elsewhere(job)
    out = puzzle(
        "child", run_copy, "--name", "far", "--place", "far", "--parameters", "70%", "--json"
    )
    child = last_line(out)
    assert child["served"]["scenarios"] == {}
    assert child["served"]["promises"][0]["verdict"] == "predicted"
    assert "predicted" in out.stdout and "not measured yet" in out.stdout
    listed = {row["child"]: row for row in last_line(puzzle("children", run_copy, "--json"))}
    assert listed["far"]["predicted_speedup"] > 1 and listed["far"]["measured_speedup"] is None
    assert checksums(run_copy / "children" / "main") == main


def test_a_second_place_its_child_and_its_removal_leave_the_first_child_untouched(run_copy):
    before = checksums(run_copy)
    assert puzzle("cost", run_copy, "--place", "gpu", *H100).returncode == 0
    command = ("child", run_copy, "--name", "gpu", "--place", "gpu", "--parameters", "70%")
    assert last_line(puzzle(*command, "--json"))["verdict"] == "met"
    assert puzzle("remove", run_copy, "--child", "gpu").returncode == 0
    shutil.rmtree(run_copy / "places" / "gpu")
    after = checksums(run_copy)
    logs = {name for name in {*before, *after} if name.startswith("logs/")}
    assert {k: v for k, v in after.items() if k not in logs} == {
        k: v for k, v in before.items() if k not in logs
    }


def test_a_search_leaves_out_what_the_place_cannot_serve(run_copy):
    """The library was trained for transformers, which serve everything; llama.cpp does not."""
    deploy = ("--set", "deploy=[llama.cpp]")
    assert puzzle("cost", run_copy, "--place", "laptop", *H100, *deploy).returncode == 0
    run = Run.open(run_copy, Progress(True))
    names = [{b.name for b in layer.blocks} for layer in run.place_job("laptop").space.layers]
    assert any("+linear" in name for name in {b.name for b in run.space.layers[1].blocks})
    assert not [name for layer in names for name in layer if name.endswith("+linear")]
    answer = last_line(
        puzzle("search", run_copy, "--place", "laptop", "--parameters", "50%", "--json")
    )
    blocks = answer["solutions"][0]["blocks"]
    assert all(block in names[index] for index, block in enumerate(blocks))


def test_a_child_is_measured_where_it_will_live_without_the_run(finished_run, tmp_path):
    child = tmp_path / "child"
    shutil.copytree(finished_run.folder / "children" / "main" / "uptrained", child)
    sheet = f"cost.device_sheet={DEVICE_SHEET}"
    scenario = "cost.scenario={batch_size: 8, input_length: 16, output_length: 16}"
    result = last_line(
        puzzle(
            "measure",
            child,
            "--parent",
            finished_run.recipe.parent,
            "--set",
            "cost.engine=roofline",
            "--set",
            sheet,
            "--set",
            scenario,
            "--json",
        )
    )
    listed = last_line(puzzle("children", finished_run.folder, "--json"))
    speedup = result["scenarios"]["main"]["speedup"]["value"]
    assert speedup == pytest.approx(listed[0]["measured_speedup"])


# ------------------------------------------------------------------------------------------- locks

HOLD = """
import sys, time
from pathlib import Path
from puzzle import locks
with locks.hold(Path(sys.argv[1]), wait=False, say=print):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(folder, seconds):
    """Another process that holds a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_gets_one_line_or_waits(tmp_path):
    folder, said = tmp_path / "library", []
    process = holder(folder, 2)
    with (
        pytest.raises(UserError, match=rf"is being written by process {process.pid} .*--wait"),
        locks.hold(folder, wait=False, say=said.append),
    ):
        pass
    with locks.hold(folder, wait=True, say=said.append):
        assert process.wait(10) == 0
    assert len(said) == 1 and "waiting" in said[0]
    assert list(tmp_path.iterdir()) == []


def test_a_dead_holders_lock_is_recognised(tmp_path):
    folder = tmp_path / "library"
    process = holder(folder, 60)
    process.kill()
    process.wait()
    assert locks.lock_path(folder).exists()
    with locks.hold(folder, wait=False, say=print):
        pass
    assert not locks.lock_path(folder).exists()


def test_a_zombie_holds_nothing(tmp_path):
    folder = tmp_path / "library"
    process = holder(folder, 60)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it ended; nobody has waited for it
    with locks.hold(folder, wait=False, say=print):
        assert locks.Holder.read(locks.lock_path(folder)).pid == os.getpid()
    process.wait()


@pytest.mark.parametrize("text", ["", "{}"])
def test_an_unreadable_lock_is_one_line_that_names_it(tmp_path, text):
    path = locks.lock_path(tmp_path / "library")
    path.write_text(text)
    with (
        pytest.raises(UserError, match=rf"lock {path}: names no holder; remove it"),
        locks.hold(tmp_path / "library", wait=True, say=print),
    ):
        pass
    assert path.read_text() == text


def test_a_later_process_with_the_same_number_does_not_keep_a_lock_alive(tmp_path):
    folder = tmp_path / "library"
    this = locks.Holder.this_process()
    earlier = this.model_copy(update={"started": "1"})
    earlier.write(locks.lock_path(folder))
    with locks.hold(folder, wait=False, say=print):
        assert locks.Holder.read(locks.lock_path(folder)) == this


def test_a_holder_on_another_host_is_dead_when_it_no_longer_touches_its_lock(tmp_path):
    folder = tmp_path / "library"
    path = locks.lock_path(folder)
    away = locks.Holder.this_process().model_copy(
        update={"host": "elsewhere", "command": "another"}
    )
    away.write(path)
    with pytest.raises(UserError, match="on elsewhere"), locks.hold(folder, wait=False, say=print):
        pass
    long_ago = time.time() - 2 * locks.DEAD_AFTER_S
    os.utime(path, (long_ago, long_ago))
    with locks.hold(folder, wait=False, say=print):
        assert locks.Holder.read(path).host != "elsewhere"


def test_a_process_may_hold_a_folder_twice(tmp_path):
    folder = tmp_path / "library"
    with locks.hold(folder, wait=False, say=print):
        with locks.hold(folder, wait=False, say=print):
            pass
        assert locks.lock_path(folder).exists()
    assert not locks.lock_path(folder).exists()


WRITE_OFTEN = """
import sys
from pathlib import Path
from puzzle.progress import Progress
from puzzle.run import Run
run = Run.open(Path(sys.argv[1]), Progress(quiet=True))
for _ in range(40):
    run.write()
"""


def test_two_processes_may_write_one_runs_settings(tiny_run):
    tiny_run.write()
    command = [sys.executable, "-c", WRITE_OFTEN, str(tiny_run.folder)]
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], errors
    assert Run.open(tiny_run.folder, Progress(quiet=True)).recipe == tiny_run.recipe
    assert not list(tiny_run.folder.rglob(".*"))


def test_two_children_made_at_once_end_well(run_copy):
    """Two terminals; the folders they share are done, and each has a child of its own."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "puzzle.cli", "child", str(run_copy), *options, "--wait"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for options in (
            ("--name", "one", "--throughput", "1.2x"),
            ("--name", "two", "--throughput", "1.5x"),
        )
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    rows = last_line(puzzle("status", run_copy, "--json"))
    assert {row["state"] for row in rows} == {"done"}
    assert not list(run_copy.rglob(".*.lock"))
    for name in ("one", "two"):
        folder = run_copy / "children" / name / "uptrained"
        assert artifacts.read_manifest(folder) is not None
