"""Finalists: which one decides, what is done again, and what is not."""

import shutil

import pytest

from puzzle import config, pipeline
from puzzle.errors import Infeasible
from puzzle.run import Run
from puzzle.search import SEARCH, answers, around, finalists, stage, tried
from puzzle.uptrain import UPTRAIN, trainer

pytestmark = pytest.mark.training


@pytest.fixture
def run(finished_run, tmp_path) -> Run:
    ignored = shutil.ignore_patterns("children")
    shutil.copytree(finished_run.folder, tmp_path / "run", ignore=ignored)
    recipe = finished_run.recipe.model_dump(mode="json")
    recipe["search"] = {"throughput": "1.5x", "finalists": 2, "refinements": 1}
    recipe["uptrain"] |= {"tokens": 4096}
    copied = Run(config.parse(recipe), tmp_path / "run", finished_run.progress)
    copied.write()
    return copied


def made(job):
    return answers.read(job).best


def test_the_best_after_a_part_of_the_uptraining_decides(run, monkeypatch):
    kls = {"main-capacity-0": 0.3, "main-capacity-4": 0.2}
    monkeypatch.setattr(finalists, "validation_kl", lambda job: kls[job.child.name])
    job = run.child_job("main")
    assert finalists.capacity(job) == 0.0
    pipeline.make_child(job)
    small, large = (run.child_job(name) for name in kls)
    assert large.child.uptrain.tokens == 512 and job.child.uptrain.tokens == 4096
    assert made(large).predicted["main"].parameters > made(small).predicted["main"].parameters
    assert finalists.capacity(job) == 4.0
    assert made(job).blocks == made(large).blocks and made(job).missing == made(large).missing > 0
    choice = finalists.read(job)
    assert [one.child for one in choice.finalists] == ["main-capacity-4", "main-capacity-0"]
    best = made(large)
    assert choice.finalists[0].before == best.loss < best.rank  # without missing parameters
    lines = finalists.describe(choice)
    assert len(lines) == 2 and "0.2000 after 12.5% of it" in lines[0]


def test_the_best_ones_measurements_are_the_childs(run, monkeypatch):
    monkeypatch.setattr(finalists, "validation_kl", lambda job: float(job.child.search.capacity))
    job = run.child_job("main")
    pipeline.choose_finalist(job)
    names = (around.ASSEMBLED, tried.MEASURED)
    known = [(job.child.folder / name).read_text().splitlines() for name in names]
    of_best = run.child_job("main-capacity-0").child.folder
    assert all(known) and known == [(of_best / name).read_text().splitlines() for name in names]
    monkeypatch.setattr(around.Measurement, "_on", None)  # nothing is left to be measured
    pipeline.search_and_serve(job)
    assert made(job).blocks == made(run.child_job("main-capacity-0")).blocks


def test_how_much_the_order_before_says_of_the_order_after():
    for kls, expected in (((1, 2, 3), 1.0), ((3, 2, 1), -1.0), ((2, 1, 3), 0.5)):
        ranked = [
            finalists.Finalist(child="x", capacity=0, parameters=1, before=before, kl=kl)
            for before, kl in enumerate(kls)
        ]
        told = finalists.describe(finalists.Choice(asked="", finalists=ranked))
        assert told[-1] == f"rank correlation of before and after: {expected:.2f}"


def test_a_finalist_is_worth_what_its_kept_weights_are(run):
    job = run.child_job("main")
    pipeline.choose_finalist(job)
    for one in finalists.read(job).finalists:
        shown = [p.validation["kl"] for p in trainer.read_curve(run.child_job(one.child))
                 if p.validation is not None]  # fmt: skip
        assert one.kl == min(shown)


def test_nothing_is_done_twice_and_another_wish_has_finalists_of_its_own(run, monkeypatch):
    job, executed = run.child_job("main"), []
    real = pipeline.execute_stage

    def dies_after_the_first(stage, job, **more):
        manifest = real(stage, job, **more)
        executed.append((stage.name, job.child.name))
        dies_at = (UPTRAIN.name, "main-capacity-0")
        if executed[-1] == dies_at and executed.count(dies_at) == 1:
            raise KeyboardInterrupt
        return manifest

    monkeypatch.setattr(pipeline, "execute_stage", dies_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        pipeline.choose_finalist(job)
    before = (run.child_job("main-capacity-0").folder(UPTRAIN) / "model.safetensors").stat()
    pipeline.choose_finalist(job)
    after = (run.child_job("main-capacity-0").folder(UPTRAIN) / "model.safetensors").stat()
    assert before.st_mtime_ns == after.st_mtime_ns
    count = len(executed)
    pipeline.choose_finalist(job)
    assert len(executed) == count
    wish = job.child.search.model_copy(update={"throughput": "1.4x"})
    child = run.child_config("main").model_copy(update={"search": wish})
    run.write_child("main", child)
    assert finalists.read(run.child_job("main")) is None
    pipeline.choose_finalist(run.child_job("main"))
    assert len(executed) > count


def test_a_choice_makes_the_search_out_of_date(run):
    job = run.child_job("main")
    manifest = pipeline.execute_stage(SEARCH, job)
    assert SEARCH.is_current(job, manifest)
    found = [
        finalists.Finalist(child="x", capacity=c, parameters=1, before=1.0, kl=c) for c in (2, 1)
    ]
    finalists.write(job, found)
    assert finalists.capacity(job) == 1.0
    assert not SEARCH.is_current(job, manifest)
    choices = stage.read_choices(job)
    assert choices.missing[choices.starts[:-1]].tolist() == [0.0] * len(choices.layers)
    assert choices.missing.max() > 0


def test_a_finalist_that_misses_is_left_out_and_all_that_miss_are_said(run, monkeypatch):
    real = pipeline.search_and_serve

    def misses(job):
        if job.child.name in missing:
            raise Infeasible("too slow")
        real(job)

    monkeypatch.setattr(pipeline, "search_and_serve", misses)
    missing = {"main-capacity-0"}
    job = run.child_job("main")
    pipeline.choose_finalist(job)
    assert [one.child for one in finalists.read(job).finalists] == ["main-capacity-4"]
    (job.child.folder / finalists.FINALISTS).unlink()
    missing |= {"main-capacity-4"}
    with pytest.raises(Infeasible, match="main-capacity-0: too slow; main-capacity-4: too slow"):
        pipeline.choose_finalist(job)


def test_a_given_architecture_and_a_single_child_have_none(run, tmp_path):
    given = run.child_config("main").search.model_copy(update={"architecture": ["x"] * 4})
    single = run.child_config("main").search.model_copy(update={"finalists": 1, "capacity": 3.0})
    for search, expected in ((given, 0.0), (single, 3.0)):
        run.write_child("other", run.child_config("main").model_copy(update={"search": search}))
        job = run.child_job("other")
        assert finalists.children(job) == {} and finalists.rounds(job) == 1
        assert finalists.capacity(job) == expected
