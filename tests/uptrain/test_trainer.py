"""The training loop: what it reports, keeps and skips, and where it stops."""

import importlib.machinery
import sys
import types

import pytest
import torch
from uptrainings import (
    assembled,
    assert_same_curve,
    held_out_means,
    load,
    uptrained,
    weights,
)

from puzzle import pipeline
from puzzle.assemble import ASSEMBLE
from puzzle.config import UptrainConfig
from puzzle.evaluate import results
from puzzle.training import schedules
from puzzle.training.losses import METRICS
from puzzle.uptrain import UPTRAIN, gkd, trainer
from puzzle.uptrain.memory import choose

pytestmark = pytest.mark.training


def test_terms_of_weight_zero_are_left_out_and_not_reported(finished_run, tmp_path):
    only_cosine = uptrained(finished_run, tmp_path / "cosine", kl_weight=0.0, tokens=512)
    point = trainer.read_curve(only_cosine)[-1]
    assert set(point.losses) == {"cosine"} and "kl" in point.validation
    only_lm = uptrained(
        finished_run, tmp_path / "lm", kl_weight=0.0, cosine_weight=0.0, lm_weight=1.0, tokens=512
    )
    assert set(trainer.read_curve(only_lm)[-1].losses) == {"lm_loss"}


def test_validation_equals_the_evaluation_of_the_saved_child(finished_run):
    job = finished_run.child_job("main")
    validation = trainer.read_curve(job)[-1].validation
    child = held_out_means(job, load(job))
    parent = held_out_means(job, finished_run.parent_model)
    assert validation.keys() == {*METRICS, "retention"}
    for name in METRICS:
        assert validation[name] == pytest.approx(child[name], rel=1e-5), name
    assert validation["retention"] == pytest.approx(child["top1"] / parent["top1"])


def test_uptraining_brings_the_child_closer_to_the_parent(finished_run):
    models = results.read(finished_run.child_job("main"))
    assert models.uptrained.quality.kl.value < models.child.quality.kl.value
    assert models.parent.quality.kl.value == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("optimizer_memory", ["device", "host"])
def test_an_interrupted_uptraining_ends_bit_identical(
    finished_run, tmp_path, monkeypatch, optimizer_memory
):
    """In float32 the place of the optimiser changes no bit either."""
    job = assembled(finished_run, tmp_path / "run", optimizer_memory=optimizer_memory)
    real, calls = gkd.Pair.losses, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(gkd.Pair, "losses", dies)
    with pytest.raises(KeyboardInterrupt):
        pipeline.execute_stage(UPTRAIN, job)
    monkeypatch.setattr(gkd.Pair, "losses", real)
    pipeline.execute_stage(UPTRAIN, job)
    ours, uninterrupted = (
        j.folder(UPTRAIN) / "model.safetensors" for j in (job, finished_run.child_job("main"))
    )
    assert ours.read_bytes() == uninterrupted.read_bytes()


def test_what_a_trainer_has_counted_survives_an_interruption(finished_run, tmp_path):
    """The best KL above all: without it a worse validation would replace the best weights."""
    job = assembled(finished_run, tmp_path / "run")
    folder = tmp_path / "uptrained"

    def made():
        pair = gkd.Pair(load(job, ASSEMBLE), job.run.parent_model, job.child.uptrain)
        return trainer.Trainer(job, folder, pair, choose(job))

    before = made()
    before.best_kl, before.stale, before.skipped = 0.125, 3, 2
    before._save(4)
    before.snapshots.wait()
    after = made()
    assert after._restore() == 4
    assert (after.best_kl, after.stale, after.skipped) == (0.125, 3, 2)


def test_a_non_finite_step_is_skipped_and_counted(finished_run, tmp_path, monkeypatch):
    real, calls = gkd.Pair.losses, []

    def once_nan(*args):
        calls.append(1)
        loss, terms = real(*args)
        return loss * (float("nan") if len(calls) == 2 else 1.0), terms

    monkeypatch.setattr(gkd.Pair, "losses", once_nan)
    job = uptrained(finished_run, tmp_path / "run")
    assert trainer.read_curve(job)[-1].skipped_steps == 1
    assert all(tensor.isfinite().all() for tensor in weights(job).values())


def test_micro_batches_add_up_to_the_full_batch(finished_run, tmp_path):
    """Eight sequences as 3 + 3 + 2, their activations computed twice.

    It is the same run to float tolerance.
    """
    job = uptrained(
        finished_run, tmp_path / "run", micro_batch_sequences=3, activation_checkpointing=True
    )
    reference = finished_run.child_job("main")
    assert_same_curve(job, reference)
    expected = weights(reference)
    for name, tensor in weights(job).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


def test_the_rate_follows_the_schedule_of_the_settings():
    wsd = UptrainConfig(schedule="wsd")
    assert trainer.rate_factor(wsd, 70, 100) == 1.0
    assert trainer.rate_factor(UptrainConfig(), 70, 100) == schedules.cosine(70, 100, 0.05)


def test_uptraining_stops_early_where_nothing_improves(finished_run, tmp_path):
    """A learning rate of nothing: the first validation is the best, two more are not better."""
    job = uptrained(
        finished_run, tmp_path / "run", learning_rate=1e-30, patience=2, validate_steps=1
    )
    assert [point.step for point in trainer.read_curve(job)] == [1, 2, 3]


# First it gets better, then the steps are too large
RISING = {"learning_rate": 0.02, "warmup_share": 0.99}


def test_the_best_weights_are_kept_or_the_last(finished_run, tmp_path):
    kl_of_result, validated_kl = {}, {}
    for keep in ("best", "last"):
        job = uptrained(finished_run, tmp_path / keep, keep=keep, validate_steps=1, **RISING)
        kl_of_result[keep] = held_out_means(job, load(job))["kl"]
        validated_kl[keep] = [point.validation["kl"] for point in trainer.read_curve(job)]
    best, last = min(validated_kl["best"]), validated_kl["last"][-1]
    assert best < 0.9 * validated_kl["best"][-1]  # otherwise this would show nothing
    assert kl_of_result["best"] == pytest.approx(best, rel=1e-4)
    assert kl_of_result["last"] == pytest.approx(last, rel=1e-4)


def test_the_curve_reaches_weights_and_biases(finished_run, tmp_path, monkeypatch):
    logged, finished, fake = [], [], types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.init = lambda **_: types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)),
        finish=lambda: finished.append(True),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    job = uptrained(finished_run, tmp_path / "run", wandb=True)
    curve = trainer.read_curve(job)
    assert [step for step, _ in logged] == [point.step for point in curve]
    assert logged[-1][1]["validation/kl"] == curve[-1].validation["kl"]
    assert not finished
    job.run.metrics.close()
    assert finished == [True]
