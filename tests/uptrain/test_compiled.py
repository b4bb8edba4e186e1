"""Compiled layers: the curve that they give, and that nothing stays compiled."""

import pytest
from uptrainings import assembled, uptrained

from puzzle import pipeline
from puzzle.errors import UserError
from puzzle.uptrain import UPTRAIN, compiled, trainer

NEEDS_COMPILER = pytest.mark.skipif(
    not compiled.has_compiler(), reason="torch finds no C++ compiler"
)


@NEEDS_COMPILER
@pytest.mark.training
def test_compiled_layers_give_the_curve_of_others_and_are_as_they_were(finished_run, tmp_path):
    settings = {"tokens": 1024, "validate_steps": 2}
    plain = uptrained(finished_run, tmp_path / "plain", **settings)
    job = assembled(finished_run, tmp_path / "compiled", compile=True, **settings)
    pipeline.execute_stage(UPTRAIN, job)
    assert not [layer for layer in job.run.parent_model.model.layers if layer._compiled_call_impl]
    ours, theirs = (trainer.read_curve(one)[-1] for one in (job, plain))
    assert ours.validation["kl"] == pytest.approx(theirs.validation["kl"], rel=1e-3)
    assert ours.losses["kl"] == pytest.approx(theirs.losses["kl"], rel=1e-3)


@NEEDS_COMPILER
def test_long_uptrainings_on_a_cpu_are_compiled_unless_told_otherwise(finished_run, tmp_path):
    job = assembled(finished_run, tmp_path / "run")
    assert not compiled.is_wanted(job, compiled.PAYS_FROM_FLOPS / 2, 1)
    assert compiled.is_wanted(job, compiled.PAYS_FROM_FLOPS, 1)
    assert not compiled.is_wanted(job, compiled.PAYS_FROM_FLOPS, 2)
    told = assembled(finished_run, tmp_path / "told", compile=False)
    assert not compiled.is_wanted(told, compiled.PAYS_FROM_FLOPS, 1)


def test_without_a_compiler_it_is_refused_before_anything_is_spent(
    finished_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(compiled, "has_compiler", lambda: False)
    compiled.check(assembled(finished_run, tmp_path / "auto"))
    asked = assembled(finished_run, tmp_path / "asked", compile=True)
    with pytest.raises(UserError, match=r"no C\+\+ compiler; install one"):
        compiled.check(asked)
