"""The losses of one micro-batch against plain torch."""

import pytest
import torch
import torch.nn.functional as F
from uptrainings import load

from puzzle.assemble import ASSEMBLE
from puzzle.config import UptrainConfig
from puzzle.uptrain import gkd

pytestmark = pytest.mark.training


def test_the_losses_equal_plain_torch(finished_run):
    child = load(finished_run.child_job("main"), ASSEMBLE)
    parent, tokens = finished_run.parent_model, finished_run.corpus["train"].batch(3, 4)
    loss, terms = gkd.Pair(child, parent, UptrainConfig(lm_weight=0.5)).losses(tokens)
    cosine, kl, lm = terms
    with torch.no_grad():
        ours = child(tokens, use_cache=False, output_hidden_states=True)
        theirs = parent(tokens, use_cache=False, output_hidden_states=True)
    per_layer = [
        (1 - F.cosine_similarity(a, b, dim=-1)).mean()
        for a, b in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
    ]
    logits, target = (m.logits[:, :-1].flatten(0, 1) for m in (ours, theirs))
    plain_kl = F.kl_div(
        F.log_softmax(logits, -1), F.log_softmax(target, -1), log_target=True, reduction="batchmean"
    )
    plain_lm = F.cross_entropy(logits, tokens[:, 1:].flatten())
    assert cosine.item() == pytest.approx(sum(per_layer).item(), rel=1e-4)
    assert kl.item() == pytest.approx(plain_kl.item(), rel=1e-4)
    assert loss.item() == pytest.approx((cosine + kl + 0.5 * lm).item(), rel=1e-5)
    assert lm.item() == pytest.approx(plain_lm.item(), rel=1e-4)


def test_a_child_equal_to_the_parent_has_nothing_to_learn(finished_run):
    parent, tokens = finished_run.parent_model, finished_run.corpus["train"].batch(3, 4)
    cosine, kl, _ = gkd.Pair(parent, parent, UptrainConfig()).losses(tokens)[1]
    assert cosine.item() == pytest.approx(0.0, abs=1e-5)
    assert kl.item() == pytest.approx(0.0, abs=1e-5)


def test_activation_checkpointing_keeps_less_for_the_backward_pass(finished_run):
    tokens, kept_elements = finished_run.corpus["train"].batch(0, 4), []
    for checkpointing in (False, True):
        child = load(finished_run.child_job("main"), ASSEMBLE).train()
        saved = []
        pair = gkd.Pair(child, finished_run.parent_model, UptrainConfig(), checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            pair(tokens)[0].backward()
        kept_elements.append(sum(saved))
    assert kept_elements[1] < 0.5 * kept_elements[0]
