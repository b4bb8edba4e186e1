"""The functions of a notebook, as their docstrings show them."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import tiny_recipe

from puzzle import api
from puzzle.errors import Infeasible, UserError
from puzzle.search.published import Bound, Question


def test_importing_it_does_not_import_torch():
    code = "import sys; from puzzle import api; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.training
def test_run_search_and_load_a_child(tiny_folder, text_folder, tmp_path):
    recipe = tiny_recipe(tiny_folder, text_folder, tmp_path / "run")
    run = api.run(recipe, quiet=True, search={"throughput": "1.2x"})
    assert api.open_run(run.folder).recipe == run.recipe
    assert run.recipe.search.throughput == "1.2x"
    answer = api.search(run, throughput="1.5x", solutions=2)
    figures = answer.best.predicted["main"]
    parent = answer.parent["main"]
    assert figures.throughput_tok_per_s >= 1.5 * parent.throughput_tok_per_s * (1 - 1e-9)
    with pytest.raises(Infeasible, match="out of reach"):
        api.search(run, throughput="99x")
    folder = api.child_folder(run)
    assert folder.name == "uptrained"
    model = api.load_child(folder)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 320)


@pytest.mark.training
def test_plan_spends_nothing(tiny_folder, text_folder, tmp_path):
    recipe = tiny_recipe(tiny_folder, text_folder, tmp_path / "run")
    stages = api.plan(recipe)
    assert [stage.stage for stage in stages][:2] == ["library", "score"]
    assert not (tmp_path / "run").exists()


def test_a_wrong_recipe_is_a_user_error():
    with pytest.raises(UserError, match="unknown key 'serach'"):
        api.plan({"serach": {}})


def test_a_published_table_is_searched(tmp_path):
    variants = {
        "parent": {"metrics": {"kl": 0.0}, "stats": {"ms": 10.0}},
        "small": {"metrics": {"kl": 1.0}, "stats": {"ms": 4.0}},
    }
    (tmp_path / "table.json").write_text(json.dumps({"layer_0": variants, "layer_1": variants}))
    question = Question(target="metrics.kl", bounds=[Bound("stats.ms", 15.0)])
    (solution,) = api.search_table(tmp_path / "table.json", question)
    assert solution.objective == 1.0 and solution.totals["stats.ms"] == 14.0
