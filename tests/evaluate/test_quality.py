"""Quality by document, and intervals that are as wide as documents differ."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from puzzle.commands.summary import print_summaries, summaries
from puzzle.evaluate.bootstrap import UnitSums, bootstrap
from puzzle.evaluate.quality import LEAST_DOCUMENTS, Text, unit_sums
from puzzle.evaluate.results import Quality
from puzzle.run import Run


def sums(values, tokens=None, units=None):
    tokens = tokens or [100] * len(values)
    return UnitSums(
        units=units or list(range(len(values))), tokens=tokens, metrics={"top1": values}
    )


def test_the_interval_holds_the_true_mean_of_all_documents_as_often_as_it_says():
    """Tokens of one document go up and down together: 40 documents, not 4000 tokens, are drawn."""
    held = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        of_documents = 100 * rng.normal(0.5, 0.1, size=40)
        interval = sums(of_documents.tolist()).mean("top1")
        held += interval.low <= 0.5 <= interval.high
    assert 180 <= held <= 199  # 95 %, a little less for few documents


def test_what_is_hard_for_both_models_cancels_in_their_ratio_and_their_difference():
    rng = np.random.default_rng(0)
    parent = 100 * rng.uniform(0.2, 0.9, size=30)
    child = 0.95 * parent + rng.normal(0, 0.5, size=30)
    one, other = sums(child.tolist()), sums(parent.tolist())
    kept = one.retention(other)
    assert kept.low < 0.95 < kept.high and kept.high - kept.low < 0.01
    alone = one.mean("top1")
    assert alone.high - alone.low > 0.1
    gap = other.difference(one, "top1")
    assert gap.low < 0.05 * 0.55 < gap.high and gap.high - gap.low < 0.3 * (alone.high - alone.low)


def test_two_models_on_different_text_do_not_compare():
    with pytest.raises(ValueError, match="not evaluated on the same text"):
        sums([1.0] * 12).difference(sums([1.0] * 12, units=list(range(1, 13))), "top1")


def test_a_parent_without_a_right_answer_has_no_retention():
    assert sums([1.0, 2.0]).retention(sums([0.0, 0.0])) is None


def test_an_interval_holds_its_own_value():
    interval = bootstrap([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]], lambda s: s[0] / s[1])
    assert interval.low == interval.value == interval.high == pytest.approx(1 / 3)


def test_every_token_counts_for_its_own_document(finished_run):
    """Sums over documents make up the sums over all sequences, whatever the cut."""
    run = finished_run
    tokens_NS = run.corpus["test"].head(6)
    N, S = tokens_NS.shape
    units_NS = (torch.arange(N * S) // 20).view(N, S)  # documents of 20 tokens
    found = unit_sums(run, run.parent_model, Text(tokens_NS, units_NS), 4)
    whole = unit_sums(run, run.parent_model, Text(tokens_NS, torch.zeros_like(units_NS)), 2)
    assert sum(found.tokens) == whole.tokens[0] == N * (S - 1)
    counts = units_NS[:, 1:].flatten().bincount()
    assert found.tokens == counts[counts > 0].tolist()
    for metric, values in found.metrics.items():
        assert sum(values) == pytest.approx(whole.metrics[metric][0], rel=1e-4, abs=1e-3)


def test_sequences_stand_in_where_there_are_few_documents(finished_run):
    side = finished_run.corpus["test"]
    count = len(side)
    documents = len(side.head_documents(count).unique())
    text = Text.of(finished_run, "test", count)
    expected = count if documents < LEAST_DOCUMENTS else documents
    assert len(text.units_NS.unique()) == expected


def test_the_quality_of_the_parent_against_itself_is_without_loss(finished_run):
    text = Text.of(finished_run, "test", 4)
    shown = unit_sums(finished_run, finished_run.parent_model, text, 4)
    found = Quality.of(shown)
    assert found.kl.value == pytest.approx(0, abs=1e-5)
    assert 0 <= found.kl.low <= found.kl.value <= found.kl.high
    assert found.perplexity.value == pytest.approx(math.exp(found.lm_loss.value))
    assert found.perplexity.low == pytest.approx(math.exp(found.lm_loss.low))


def test_children_are_compared_with_the_first_on_the_same_text(finished_run, tmp_path, capsys):
    shutil.copytree(finished_run.folder, tmp_path / "run")
    run = Run(finished_run.recipe, tmp_path / "run", finished_run.progress)
    shutil.copytree(run.folder / "children" / "main", run.folder / "children" / "worse")
    path = run.folder / "children" / "worse" / "evaluate" / "uptrained.quality.json"
    shown = json.loads(path.read_text())
    counts = shown["text"]["metrics"]["top1"]
    shown["text"]["metrics"]["top1"] = [count - 1 for count in counts]
    path.write_text(json.dumps(shown))
    main, worse = summaries([run])
    if main.retention is None:  # a random parent may have no right answer
        pytest.skip("the tiny parent has no right answer on its test text")
    expected = -len(counts) / sum(shown["text"]["tokens"])
    assert main.top1_difference is None
    assert worse.top1_difference.value == pytest.approx(expected)
    assert worse.top1_difference.high < 0
    print_summaries([main, worse])
    assert "worse against main: top-1 accuracy -" in capsys.readouterr().out

    shown["text"]["tokens"][0] += 1  # another text
    path.write_text(json.dumps(shown))
    assert summaries([run])[1].top1_difference is None
