"""The order of work: what runs again and what does not, misses, kills, status."""

import contextlib
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
from puzzle.engines.intervals import Interval
from puzzle.engines.turns import LOOKS
from puzzle.errors import Infeasible, UserError
from puzzle.library import LIBRARY
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.score import SCORE
from puzzle.search import SEARCH, answers, tried
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

    def scaled(interval, factor):
        return interval.model_copy(
            update={key: factor * value for key, value in interval.model_dump().items()}
        )

    def slowed(*arguments):
        calls.append(arguments)
        pair, factor = real(*arguments), factor_of_call(len(calls))
        ratios = ("latency_ratio", "time_to_first_token_ratio", "decode_ratio")
        updates = {name: scaled(getattr(pair, name), 1 / factor) for name in ratios}
        return pair.model_copy(update=updates | {"speedup": scaled(pair.speedup, factor)})

    monkeypatch.setattr(measured, "measure_pair", slowed)
    return calls


def verdicts(job):
    return [record.verdict for record in tried.read_measured(job)]


def test_a_missed_promise_corrects_the_costs_and_searches_again(tiny_run, monkeypatch):
    calls = slower(monkeypatch, lambda call: 0.92)
    pipeline.execute(tiny_run)
    job = job_of(tiny_run)
    assert verdicts(job) == ["missed", "met"] and len(calls) == 3  # assembled twice, evaluated
    first, second = tried.read_measured(job)
    assert first.blocks != second.blocks == answers.read(job).best.blocks
    before = manifests(tiny_run)
    pipeline.execute(tiny_run)
    assert manifests(tiny_run) == before and len(calls) == 3


def test_a_child_that_is_faster_than_asked_gives_way_to_one_that_keeps_more(tiny_run, monkeypatch):
    calls = slower(monkeypatch, lambda call: 1.25)
    pipeline.execute(tiny_run)
    job = job_of(tiny_run)
    first, second, *_ = tried.read_measured(job)
    assert first.verdict == "met" and first.gives_away
    assert second.objective < first.objective  # the sum of scores: less is lost
    best = min((r for r in tried.read_measured(job) if r.verdict == "met"), key=by_objective)
    assert answers.read(job).best.blocks == best.blocks
    assert len(calls) <= job.child.search.attempts + 1
    before = manifests(tiny_run)
    pipeline.execute(tiny_run)
    assert manifests(tiny_run) == before


def by_objective(record):
    return record.objective


def test_where_the_better_child_misses_the_first_one_goes_on_and_is_not_served_again(
    tiny_run, monkeypatch
):
    """The first is a quarter faster than asked, all that follow miss."""
    calls = slower(monkeypatch, lambda call: 1.25 if call in (1, 4) else 0.5)
    run, said = changed(tiny_run, "search", attempts=3), []
    monkeypatch.setattr(run.progress, "say", said.append)
    pipeline.execute(run)
    job = job_of(run)
    first, *others = tried.read_measured(job)
    assert (first.verdict, first.gives_away) == ("met", True)
    assert [child.verdict for child in others] == ["missed", "missed"] and len(calls) == 4
    answer = answers.read(job)
    assert (answer.final, answer.best.blocks) == (first.source, first.blocks)
    assert "  this architecture was measured before and is not served again" in said
    assert measured.read(job).known_before


def test_a_child_that_keeps_missing_is_never_called_done(tiny_run, monkeypatch):
    slower(monkeypatch, lambda call: 0.1)
    with pytest.raises(Infeasible, match=r"does not meet its wish: asked throughput 1.3x|no arch"):
        pipeline.execute(tiny_run)
    assert artifacts.read_manifest(job_of(tiny_run).folder(UPTRAIN)) is None


def uncertain(monkeypatch, low_of_call, factor=1.0, starts=1):
    """Let the lower ends of speed-ups be such shares of them, after so many starts."""
    real, calls = measured.measure_pair, []

    def widened(*arguments):
        calls.append(arguments)
        pair = real(*arguments)
        value = factor * pair.speedup.value
        speedup = Interval(value=value, low=low_of_call(len(calls)) * value, high=1.5 * value)
        return pair.model_copy(update={"speedup": speedup, "starts": starts})

    monkeypatch.setattr(measured, "measure_pair", widened)
    return calls


def test_the_best_undecided_child_is_finished_and_not_called_met(tiny_run, monkeypatch):
    """Likely met, and the last try is used up: nothing is lost."""
    calls = uncertain(monkeypatch, lambda call: 0.7)
    run = changed(tiny_run, "search", attempts=2)
    for _ in range(2):
        with pytest.raises(Infeasible, match="is finished, but its wish is undecided: .*1.3x"):
            pipeline.execute(run)
        job = job_of(run)
        assert verdicts(job) == ["undecided"] * 2 and len(calls) == 3 and is_finished(job)


@pytest.mark.parametrize(("looks", "least"), [(LOOKS, 0.05), (LOOKS / 4, 0.03)])
def test_after_an_undecided_child_the_next_is_aimed_beyond_the_interval(
    tiny_run, monkeypatch, looks, least
):
    """Of that after all looks: of a quarter of them it is twice as wide. And .01 in any case."""
    run = changed(tiny_run, "search", attempts=2)
    starts = round(looks * run.recipe.cost.starts)
    assert starts == looks * run.recipe.cost.starts
    uncertain(monkeypatch, lambda call: 1 / 1.04, starts=starts)
    pipeline.execute(run)
    job = job_of(run)
    assert verdicts(job)[0] == "undecided"
    assert answers.read(job).margin == pytest.approx(least)


def test_a_child_that_is_likely_less_than_asked_is_looked_at_again_only_as_the_last(
    tiny_run, monkeypatch
):
    real, decided = measured.measure_pair, []

    def looked_at(engine, parent, child, starts, decides, on_start):
        pair = real(engine, parent, child, starts, decides, on_start)
        speedup = Interval(value=1.29, low=1.2, high=1.4)
        pair = pair.model_copy(update={"speedup": speedup, "starts": starts})
        decided.append(decides(pair))
        return pair

    monkeypatch.setattr(measured, "measure_pair", looked_at)
    with pytest.raises(Infeasible, match="after 2 attempts"):
        pipeline.execute(changed(tiny_run, "search", attempts=2))
    assert decided == [True, False]


def test_where_the_last_measurement_decides_the_child_is_met(tiny_run, monkeypatch):
    uncertain(monkeypatch, lambda call: 0.7 if call == 1 else 1.0)
    run = changed(tiny_run, "search", attempts=1)
    pipeline.execute(run)
    assert verdicts(job_of(run)) == ["undecided"] and is_finished(job_of(run))


def test_an_undecided_child_that_is_not_likely_met_is_not_called_met(tiny_run, monkeypatch):
    uncertain(monkeypatch, lambda call: 0.7, factor=0.8)
    run = changed(tiny_run, "search", attempts=1)
    with pytest.raises(Infeasible, match="undecided; the same command tries further ones"):
        pipeline.execute(run)
    assert verdicts(job_of(run)) == ["undecided"] and not is_finished(job_of(run))


def test_a_given_architecture_that_is_likely_met_goes_on_and_says_so(tiny_run, monkeypatch):
    uncertain(monkeypatch, lambda call: 0.01 if call == 1 else 1.0)
    blocks, said = [layer.blocks[-1].name for layer in tiny_run.full_space.layers], []
    run = changed(tiny_run, "search", architecture=blocks)
    monkeypatch.setattr(run.progress, "say", said.append)
    pipeline.execute(run)
    assert verdicts(job_of(run)) == ["undecided"] and is_finished(job_of(run))
    assert "  this one is likely met, and is measured again at the end" in said


def test_a_given_architecture_that_misses_is_not_made_again(tiny_run, monkeypatch):
    """Nothing could come out otherwise, so its finished uptraining is not given up."""
    slower(monkeypatch, lambda call: 0.01 if call == 2 else 1.0)  # `assemble` meets, `evaluate` not
    blocks = [layer.blocks[-1].name for layer in tiny_run.full_space.layers]
    run = changed(tiny_run, "search", architecture=blocks)
    with pytest.raises(Infeasible):
        pipeline.execute(run)
    job = job_of(run)
    uptrained = artifacts.read_manifest(job.folder(UPTRAIN))
    assert verdicts(job) == ["met", "missed"]
    assert is_finished(job)  # so its table is printed
    with pytest.raises(Infeasible):
        pipeline.execute(run)
    assert artifacts.read_manifest(job.folder(UPTRAIN)) == uptrained


def test_a_given_architecture_that_misses_when_it_is_assembled_is_one_line(tiny_run, monkeypatch):
    slower(monkeypatch, lambda call: 0.01)
    blocks = [layer.blocks[-1].name for layer in tiny_run.full_space.layers]
    with pytest.raises(Infeasible, match="after 1 attempt .*ask for less of this architecture"):
        pipeline.execute(changed(tiny_run, "search", architecture=blocks))


def test_one_attempt_takes_a_child_that_is_faster_than_asked(tiny_run, monkeypatch):
    calls = slower(monkeypatch, lambda call: 1.25)
    run = changed(tiny_run, "search", attempts=1)
    pipeline.execute(run)
    assert verdicts(job_of(run)) == ["met"] and len(calls) == 2 and is_finished(job_of(run))


def test_a_child_that_misses_at_the_end_is_not_chosen_again(tiny_run, monkeypatch):
    slower(monkeypatch, lambda call: 0.5 if call == 2 else 1.0)
    with pytest.raises(Infeasible, match="with the same wish looks for another"):
        pipeline.execute(tiny_run)
    job = job_of(tiny_run)
    refused = answers.read(job).best.blocks
    pipeline.execute(tiny_run)
    assert answers.read(job).best.blocks != refused


def test_a_miss_that_was_measured_before_a_kill_still_corrects(tiny_run, monkeypatch):
    """The kill falls between the manifest of `assemble` and the record of the miss."""
    slower(monkeypatch, lambda call: 0.92)
    tiny_run.write()
    job = job_of(tiny_run)
    for stage in (LIBRARY, SCORE, COST, SEARCH, ASSEMBLE):
        pipeline.execute_stage(stage, job)
    assert measured.read(job).verdict == "missed" and tried.read_measured(job) == []
    pipeline.execute(tiny_run)
    assert verdicts(job) == ["missed", "met"]


def test_two_measurements_that_disagree_are_said(tiny_run, monkeypatch):
    slower(monkeypatch, lambda call: 1.0 if call == 1 else 0.98)
    said = []
    monkeypatch.setattr(tiny_run.progress, "say", said.append)
    with contextlib.suppress(Infeasible):
        pipeline.execute(tiny_run)
    assert any("too busy for one of the two measurements" in line for line in said)


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


@pytest.mark.slow
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
