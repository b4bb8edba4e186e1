import pytest
import torch
import torch.nn.functional as F

from puzzle import artifacts, child, gkd, pipeline
from puzzle.config import UptrainConfig

pytestmark = pytest.mark.training


@pytest.fixture
def student(finished_run):
    return child.load(finished_run.stage_folder("assemble"), torch.float32, finished_run.device, "sdpa")


def test_the_losses_equal_plain_torch(finished_run, student):
    parent, tokens = finished_run.parent_model, finished_run.corpus["train"].batch(3, 4)
    loss, terms = gkd.Pair(student, parent, UptrainConfig(lm_weight=0.5)).losses(tokens)
    cosine, kl, lm = terms
    with torch.no_grad():
        ours = student(tokens, use_cache=False, output_hidden_states=True)
        theirs = parent(tokens, use_cache=False, output_hidden_states=True)
    per_layer = [
        (1 - F.cosine_similarity(a, b, dim=-1)).mean()
        for a, b in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
    ]
    logits, target = (m.logits[:, :-1].flatten(0, 1) for m in (ours, theirs))
    plain_kl = F.kl_div(F.log_softmax(logits, -1), F.log_softmax(target, -1), log_target=True, reduction="batchmean")
    assert cosine.item() == pytest.approx(sum(per_layer).item(), rel=1e-4)
    assert kl.item() == pytest.approx(plain_kl.item(), rel=1e-4)
    assert loss.item() == pytest.approx((cosine + kl + 0.5 * lm).item(), rel=1e-5)
    assert lm.item() == pytest.approx(F.cross_entropy(logits, tokens[:, 1:].flatten()).item(), rel=1e-4)


def test_a_student_equal_to_the_parent_has_nothing_to_learn(finished_run):
    parent, tokens = finished_run.parent_model, finished_run.corpus["train"].batch(3, 4)
    cosine, kl, _ = gkd.Pair(parent, parent, UptrainConfig()).losses(tokens)[1]
    assert cosine.item() == pytest.approx(0.0, abs=1e-5) and kl.item() == pytest.approx(0.0, abs=1e-5)


def test_uptraining_brings_the_child_closer_to_the_parent(finished_run):
    from puzzle import evaluate

    models = evaluate.read(finished_run)["models"]
    assert models["uptrained"]["kl"] < models["child"]["kl"]
    assert models["parent"]["kl"] == pytest.approx(0.0, abs=1e-6)


def test_an_interrupted_uptraining_ends_bit_identical(tiny_run, finished_run, monkeypatch):
    for stage in ("library", "score", "cost", "search", "assemble"):
        pipeline.execute_stage(tiny_run, stage)
    real, calls = gkd.Pair.losses, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(gkd.Pair, "losses", dies)
    with pytest.raises(KeyboardInterrupt):
        pipeline.execute_stage(tiny_run, "uptrain")
    monkeypatch.setattr(gkd.Pair, "losses", real)
    pipeline.execute_stage(tiny_run, "uptrain")
    names = "model.safetensors"
    ours, theirs = (r.stage_folder("uptrain") / names for r in (tiny_run, finished_run))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_non_finite_step_is_skipped_and_counted(tiny_run, monkeypatch):
    for stage in ("library", "score", "cost", "search", "assemble"):
        pipeline.execute_stage(tiny_run, stage)
    real, calls = gkd.Pair.losses, []

    def once_nan(*args):
        calls.append(1)
        loss, terms = real(*args)
        return loss * (float("nan") if len(calls) == 2 else 1.0), terms

    monkeypatch.setattr(gkd.Pair, "losses", once_nan)
    pipeline.execute_stage(tiny_run, "uptrain")
    assert artifacts.read_jsonl(tiny_run.stage_folder("uptrain") / "curve.jsonl")[-1]["skipped_steps"] == 1
    model = child.load(tiny_run.stage_folder("uptrain"), torch.float32, tiny_run.device)
    assert all(p.isfinite().all() for p in model.parameters())
