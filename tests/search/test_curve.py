"""The KL that a sum of scores stands for."""

import shutil

import pytest

from puzzle import config
from puzzle.config import ChildConfig, SearchConfig
from puzzle.run import Run
from puzzle.search import stage, validate
from puzzle.search.curve import Curve

POINTS = [(0.2, 0.22), (0.5, 1.0), (0.4, 0.7), (0.9, 2.8), (0.6, 0.9)]


def test_a_curve_goes_through_its_points_and_never_falls():
    curve = Curve.of(POINTS)
    assert curve.kl(0.2) == pytest.approx(0.22) and curve.kl(0.45) == pytest.approx(0.85)
    assert curve.kl(0.6) == pytest.approx(1.0)  # a smaller sum has shown 1.0
    assert curve.kl(1.8) == pytest.approx(5.6) and curve.kl(0.1) == pytest.approx(0.11)


@pytest.mark.parametrize("kl", [0.05, 0.22, 0.5, 0.999, 1.7, 2.8, 4.0])
def test_the_sum_for_a_kl_is_the_largest_that_stands_for_it(kl):
    curve = Curve.of(POINTS)
    found = curve.score_sum(kl)
    assert curve.kl(found) == pytest.approx(kl) and curve.kl(found * 1.01) > kl


def test_one_child_makes_no_curve():
    assert Curve.of([(0.1, 0.2)]) is None and Curve.of([(0.0, 0.0), (0.1, 0.2)]) is None


@pytest.mark.training
def test_a_wish_for_a_kl_goes_by_assembled_children(finished_run, tmp_path):
    shutil.copytree(finished_run.folder, tmp_path / "run")
    recipe = finished_run.recipe.model_dump(mode="json")
    recipe["score"]["assembled"] = 12
    run = Run(config.parse(recipe), tmp_path / "run", finished_run.progress)
    run.write()

    def ask():
        wish = SearchConfig(maximize="throughput", kl=0.3)
        job = run.job_of("main", ChildConfig(search=wish))
        choices = stage.read_choices(job)
        return stage.search(job, choices)[0].best, choices

    before, _ = ask()
    assert before.predicted_kl is None and before.objective <= 0.3
    validate.assemble_some(run)
    after, choices = ask()
    assert after.predicted_kl == pytest.approx(choices.curve.kl(after.objective))
    assert after.predicted_kl <= 0.3 + 1e-9
    found = validate.read(run)
    validate.assemble_some(run)  # once
    assert validate.read(run) == found


def test_fewer_than_four_assembled_children_are_refused_before_anything_is_made():
    from puzzle.errors import UserError

    with pytest.raises(UserError, match="assembled: got 2; expected 0, or at least 4"):
        config.parse({"score": {"assembled": 2}})
