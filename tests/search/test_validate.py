"""Sums of scores against children that are assembled and measured."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from puzzle.assemble import ASSEMBLE
from puzzle.model import child
from puzzle.run import Run
from puzzle.score import results, stage
from puzzle.search import validate

pytestmark = pytest.mark.training


def test_the_kl_of_an_assembled_child_is_that_of_the_saved_one(finished_run):
    """Oracle: the child on disk, loaded again and run whole."""
    folder = finished_run.child_job("main").folder(ASSEMBLE)
    measurement = validate.AssembledKL(finished_run, stage.all_shards(finished_run))
    kl = measurement.kl(child.read_architecture(folder))
    models = finished_run.parent_model, child.load(folder, torch.float32, torch.device("cpu"))
    tokens_BS = finished_run.corpus["score"].head(finished_run.recipe.score.sequences)
    with torch.no_grad():
        parent_logs, child_logs = (
            F.log_softmax(model(tokens_BS, use_cache=False).logits[:, :-1], -1) for model in models
        )
    expected = (parent_logs.exp() * (parent_logs - child_logs)).sum(-1).mean().item()
    assert kl == pytest.approx(expected, rel=1e-4)


def test_validation_compares_sums_with_assembled_children(finished_run, tmp_path):
    # a copy, because a validation makes the report stale
    shutil.copytree(finished_run.folder, tmp_path / "run")
    run = Run(finished_run.recipe, tmp_path / "run", finished_run.progress)
    validation = validate.validate(run, 10)
    overall = validation.overall
    assert overall.count == 10 and -1 <= overall.spearman <= 1 and -1 <= overall.pearson <= 1
    path = run.folder / validate.FOLDER / validate.FILE
    assert json.loads(path.read_text()) == validation.as_json()
    assert validate.read(run) == validation
    assert {point.origin for point in validation.points} == {"random", "searched"}
    losses, parent = results.losses(finished_run), run.parent.shape.widest_block.name
    changed = [p for p in validation.points if any(name != parent for name in p.blocks)]
    assert changed
    for point in changed:
        expected = sum(losses[layer, name] for layer, name in enumerate(point.blocks))
        assert point.score_sum == pytest.approx(expected)


def points_of(function):
    return [
        validate.ValidationPoint(
            origin="random", blocks=[], removed=0.0, score_sum=x, kl=function(x)
        )
        for x in (0.0, 1.0, 2.0, 5.0)
    ]


def test_correlations_know_order_and_line():
    line = validate.correlation(points_of(lambda x: 2 * x + 1))
    assert line.count == 4
    assert line.spearman == pytest.approx(1) and line.pearson == pytest.approx(1)
    bent = validate.correlation(points_of(lambda x: x**5))
    assert bent.spearman == pytest.approx(1) and bent.pearson < 0.95
