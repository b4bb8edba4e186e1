"""The order of work: what runs again and what does not, misses, kills, status."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import tiny_recipe, write_recipe

from puzzle import artifacts, config, pipeline, settings
from puzzle.assemble import ASSEMBLE, measured
from puzzle.commands.children import is_finished
from puzzle.cost import COST
from puzzle.errors import Infeasible, UserError
from puzzle.library import LIBRARY
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.score import SCORE
from puzzle.search import SEARCH, answers, promise
from puzzle.stage import Job
from puzzle.uptrain import UPTRAIN

pytestmark = pytest.mark.training


def job_of(run):
    return next(run.recipe_jobs())


def manifests(run):
    job = job_of(run)
    paths = {stage.name: job.folder(stage) / "manifest.json" for stage in pipeline.STAGES}
    return {name: path.stat().st_mtime_ns for name, path in paths.items()}


def changed(run, section, **changes):
    """The same run with other settings in one section of its recipe."""
    updated = getattr(run.recipe, section).model_copy(update=changes)
    return Run(run.recipe.model_copy(update={section: updated}), run.folder, Progress(quiet=True))


def test_running_again_does_nothing_and_a_new_constraint_redoes_search_and_what_follows(
    tiny_run, monkeypatch
):
    pipeline.execute(tiny_run)
    before = manifests(tiny_run)
    pipeline.execute(tiny_run)
    assert manifests(tiny_run) == before
    faster, said = changed(tiny_run, "search", throughput="1.6x"), []
    monkeypatch.setattr(faster.progress, "say", said.append)
    pipeline.execute(faster)
    assert "  made again: settings.search.throughput has changed from 1.3x to 1.6x" in said
    assert "  made again: search has changed" in said  # of `assemble`
    after = manifests(tiny_run)
    assert [name for name in before if after[name] != before[name]] == [
        "search",
        "assemble",
        "uptrain",
        "evaluate",
        "report",
    ]


def test_a_stage_on_an_outdated_one_is_refused(tiny_run):
    for stage in (LIBRARY, SCORE):
        pipeline.execute_stage(stage, Job(tiny_run))
    with pytest.raises(UserError, match="stage library is out of date; run `puzzle library"):
        pipeline.execute_stage(SCORE, Job(changed(tiny_run, "library", tokens=4096)))


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
    with pytest.raises(UserError, match=message):
        pipeline.execute(changed(tiny_run, section, **changes))
    assert not tiny_run.folder.exists()


def test_a_run_of_another_parent_is_not_overwritten(tiny_run):
    pipeline.execute_stage(LIBRARY, Job(tiny_run))
    tiny_run.write()
    recipe = tiny_run.recipe.model_copy(update={"parent": "pocket"})
    with pytest.raises(UserError, match="holds a run of parent .*choose another --out"):
        pipeline.execute(Run(recipe, tiny_run.folder, tiny_run.progress))
    assert artifacts.read_manifest(Job(tiny_run).folder(LIBRARY)) is not None


def slower(monkeypatch, factor_of_call):
    """Let measured speed-ups be multiplied by a factor of the number of the measurement."""
    real, calls = measured.measure_pair, []

    def slowed(*arguments):
        calls.append(arguments)
        pair = real(*arguments)
        return pair.model_copy(update={"speedup": pair.speedup * factor_of_call(len(calls))})

    monkeypatch.setattr(measured, "measure_pair", slowed)


def test_a_missed_promise_corrects_the_costs_and_searches_again(tiny_run, monkeypatch):
    slower(monkeypatch, lambda call: 0.8 if call == 1 else 1.0)
    pipeline.execute(tiny_run)
    job = job_of(tiny_run)
    (miss,) = promise.misses(job)
    assert miss.time_factor == pytest.approx(1.25, rel=1e-3)
    answer = answers.read(job)
    assert answer.time_factor == miss.time_factor
    predicted = answer.best.predicted["main"]
    assert answer.parent["main"].latency_s / predicted.latency_s >= 1.3 * 1.25
    served = promise.read_measured(job)
    assert [record.met for record in served] == [False, True, True]  # twice assembled, evaluated


def test_a_child_that_keeps_missing_is_never_called_done(tiny_run, monkeypatch):
    real = measured.measure_pair

    def never_faster(*arguments):
        return real(*arguments).model_copy(update={"speedup": 1.1})

    monkeypatch.setattr(measured, "measure_pair", never_faster)
    with pytest.raises(Infeasible, match=r"still misses: asked throughput 1.3x|no architecture"):
        pipeline.execute(tiny_run)
    assert artifacts.read_manifest(job_of(tiny_run).folder(UPTRAIN)) is None


def test_a_given_architecture_that_misses_is_not_made_again(tiny_run, monkeypatch):
    """Nothing could come out otherwise, so its finished uptraining is not given up."""
    slower(monkeypatch, lambda call: 0.01 if call == 2 else 1.0)  # `assemble` meets, `evaluate` not
    blocks = [layer.blocks[-1].name for layer in tiny_run.full_space.layers]
    run = changed(tiny_run, "search", architecture=blocks)
    with pytest.raises(Infeasible):
        pipeline.execute(run)
    job = job_of(run)
    uptrained = artifacts.read_manifest(job.folder(UPTRAIN))
    assert [record.met for record in promise.read_measured(job)] == [True, False]
    assert is_finished(job)  # so its table is printed
    with pytest.raises(Infeasible):
        pipeline.execute(run)
    assert artifacts.read_manifest(job.folder(UPTRAIN)) == uptrained


def test_a_miss_that_was_measured_before_a_kill_still_corrects(tiny_run, monkeypatch):
    """The kill falls between the manifest of `assemble` and the record of the miss."""
    slower(monkeypatch, lambda call: 0.8 if call == 1 else 1.0)
    tiny_run.write()
    job = job_of(tiny_run)
    for stage in (LIBRARY, SCORE, COST, SEARCH, ASSEMBLE):
        pipeline.execute_stage(stage, job)
    assert not measured.read(job).met and promise.read_measured(job) == []
    pipeline.execute(tiny_run)
    assert len(promise.misses(job)) == 1


def states(run):
    return {row.stage: row.state for row in pipeline.status(run)}


def test_status_tells_done_out_of_date_and_not_begun(tiny_run):
    assert set(states(tiny_run).values()) == {"not begun"}
    for stage in (LIBRARY, SCORE):
        pipeline.execute_stage(stage, Job(tiny_run))
    found = states(tiny_run)
    assert (found["library"], found["score"], found["cost"]) == ("done", "done", "not begun")
    found = states(changed(tiny_run, "library", tokens=4096))
    assert found["library"] == found["score"] == "out of date"


def test_status_and_help_need_no_torch(finished_run):
    """On a machine that has only the run directory: no torch, no engine, no parent."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from puzzle import cli\n"
        f"sys.argv = ['puzzle', 'status', {str(finished_run.folder)!r}, '--json']\n"
        "cli.main()"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    rows = json.loads(out.stdout.splitlines()[-1])
    assert {row["state"] for row in rows} == {"done"}
    assert {row["stage"] for row in rows} == {stage.name for stage in pipeline.STAGES}


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
    run = tmp_path / "run"
    begun = [
        run / "library" / "started.json",
        run / "score" / "started.json",
        run / "children" / "main" / "search" / "started.json",
        run / "children" / "main" / "uptrained" / "started.json",
        run / "children" / "main" / "report" / "started.json",
    ]
    for path in begun:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.time() + 120
        while process.poll() is None and time.time() < deadline:
            if path.exists():
                time.sleep(0.1)  # some way into the stage
                break
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 3
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for folder in ("child", "uptrained"):
        name = f"children/main/{folder}/model.safetensors"
        assert (run / name).read_bytes() == (finished_run.folder / name).read_bytes()


def test_the_recipe_of_a_run_is_written_and_read_back(finished_run):
    opened = Run.open(finished_run.folder, Progress(quiet=True))
    assert opened.recipe == finished_run.recipe
    path = finished_run.folder / "run.yaml"
    assert config.parse(settings.read_yaml(path)) == finished_run.recipe
    assert opened.child_job("main").child == job_of(finished_run).child
    assert opened.place_job().place == job_of(finished_run).place


def test_every_stage_writes_into_its_own_folder_only(tiny_run):
    """Whatever is new after a stage lies in its folder (logs, the corpus and run files aside)."""
    tiny_run.write()
    job = job_of(tiny_run)

    def files():
        paths = [path for path in tiny_run.folder.rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in paths}

    shared = [tiny_run.folder / "logs", tiny_run.folder / "corpus"]
    for stage in pipeline.STAGES:
        before = files()
        pipeline.execute_stage(stage, job)
        touched = [path for path, time_ns in files().items() if before.get(path) != time_ns]
        allowed = [job.folder(stage), *shared]
        assert not [p for p in touched if not any(p.is_relative_to(a) for a in allowed)], stage.name
        assert any(path.is_relative_to(job.folder(stage)) for path in touched)
