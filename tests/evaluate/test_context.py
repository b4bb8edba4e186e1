"""Quality by position: sums of plain per-token losses, and a child that loses context is seen."""

import json
from pathlib import Path

import pytest
import torch

from puzzle.evaluate import context
from puzzle.evaluate.bootstrap import Buckets, UnitSums
from puzzle.evaluate.results import PositionCurve
from puzzle.model import child
from puzzle.uptrain import UPTRAIN


@pytest.fixture
def job(finished_run):
    return finished_run.child_job("main")


def test_buckets_double_up_to_the_context():
    assert context.ends(512) == [64, 128, 256, 512]
    assert context.ends(300) == [64, 128, 256, 300]
    assert context.ends(40) == [40]


def test_the_length_is_the_parents_context_as_far_as_the_text_goes(job):
    """The tiny parent reads 256 tokens; its test text fills eight sequences of fewer."""
    run, row = job.run, job.run.recipe.corpus.sequence_length
    tokens = len(run.corpus["test"]) * row
    found = context.length(run, None)
    assert found % row == 0 and found <= 256
    assert found == min(256, tokens // context.LEAST_SEQUENCES) // row * row
    assert context.length(run, 100) == 96


def test_every_position_is_in_its_bucket_with_plain_torchs_losses(job):
    run = job.run
    model = child.load(job.folder(UPTRAIN), torch.float32, torch.device("cpu"))
    found = context.by_position(run, model, 128, 128 * 3)
    rows = context.joined(run, 128).head(3)
    with torch.no_grad():
        parent_NSV, model_NSV = (
            one(rows).logits.double().log_softmax(-1) for one in (run.parent_model, model)
        )
    kl_NT = (parent_NSV.exp() * (parent_NSV - model_NSV)).sum(-1)[:, :-1]
    loss_NT = -model_NSV[:, :-1].gather(-1, rows[:, 1:, None])[..., 0]
    # the token at position p is predicted from those before it, so it stands at p - 1 here
    parts = [slice(0, 63), slice(63, 127)]
    for sums, part in zip(found.sums, parts, strict=True):
        assert sums.tokens == [part.stop - part.start] * 3
        assert sums.metrics["kl"] == pytest.approx(kl_NT[:, part].sum(-1).tolist(), rel=1e-3)
        assert sums.metrics["lm_loss"] == pytest.approx(loss_NT[:, part].sum(-1).tolist(), rel=1e-4)


def _buckets(first: list[float], last: list[float]) -> Buckets:
    sums = [
        UnitSums(
            units=list(range(len(values))),
            tokens=[10] * len(values),
            metrics={"kl": values, "lm_loss": values},
        )
        for values in (first, last)
    ]
    return Buckets(ends=[64, 128], sums=sums)


def test_a_loss_that_grows_with_the_context_is_told_from_one_that_may_not():
    grows = PositionCurve.of(_buckets([1.0, 1.1, 0.9, 1.0] * 4, [3.0, 3.2, 2.9, 3.1] * 4))
    assert grows.growth.value == pytest.approx(3.05) and grows.loses_context
    unsure = PositionCurve.of(_buckets([1.0, 2.0, 0.5, 1.0] * 4, [2.0, 0.6, 1.2, 1.0] * 4))
    assert unsure.growth.low < 1 < unsure.growth.high and not unsure.loses_context


def test_the_parent_has_no_growth(job):
    """Its KL is 0 everywhere, or rounding."""
    zero = _buckets([0.0] * 8, [0.0] * 8)
    assert zero.growth() is None


def test_what_a_model_has_shown_is_kept_when_evaluation_is_interrupted(job, monkeypatch, tmp_path):
    """Finished models are read, not run again; the file is complete or not there."""
    from puzzle.evaluate import stage

    asked = []
    monkeypatch.setattr(stage, "_shown", lambda job, name, model: asked.append(name))
    folder = Path(job.child.folder / "evaluate")
    stage._judge(job, folder, "parent", "resident")
    assert asked == []
    shown = json.loads((folder / "parent.quality.json").read_text())
    assert set(shown) == {"text", "by_position", "right", "samples"}


def test_long_texts_get_the_fused_kernel_and_the_parent_stays_as_it_was(job):
    """Modules that other stages build for the parent's masks would see the future otherwise."""
    run, parent = job.run, job.run.parent_model
    assert parent.config._attn_implementation == "eager"
    tokens_BS = run.corpus["test"].head(4)
    with torch.no_grad():
        before = parent(tokens_BS, use_cache=False).logits
        with context.attending(run, parent, 4096):
            assert parent.config._attn_implementation == "sdpa"
            fused = parent(tokens_BS, use_cache=False).logits
    assert parent.config._attn_implementation == "eager"
    torch.testing.assert_close(fused, before, rtol=1e-4, atol=1e-4)
