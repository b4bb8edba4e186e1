import copy

import pytest
import torch
import torch.nn.functional as F

from puzzle import artifacts, library, pipeline, score
from puzzle.architecture import parse_block

pytestmark = pytest.mark.training


def test_every_score_is_the_loss_of_a_really_swapped_model(finished_run):
    """Oracle: put the library's weights into a copy of the parent and run it whole, with plain torch."""
    parent, scores = finished_run.parent_model, score.read(finished_run)
    tokens = finished_run.corpus["validation"].head(finished_run.recipe.score.sequences)
    with torch.no_grad():
        reference = F.log_softmax(parent(tokens, use_cache=False).logits[:, :-1], -1)
    checked = 0
    for layer, options in enumerate(finished_run.space.layers):
        variants = score.Variants(finished_run, layer, parent.model.layers[layer])
        for block in options.blocks:
            swapped = copy.deepcopy(parent)
            attention, ffn = variants.halves[block]
            swapped.model.layers[layer].forward = lambda x, a=attention, f=ffn, **context: f(a(x, **context))
            with torch.no_grad():
                logits = swapped(tokens, use_cache=False).logits[:, :-1]
            kl = F.kl_div(F.log_softmax(logits, -1), reference, log_target=True, reduction="none").sum(-1).mean().item()
            lm = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
            found = scores[layer, block.name]
            assert found.kl == pytest.approx(kl, rel=1e-5, abs=1e-7)
            assert found.lm_loss == pytest.approx(lm, rel=1e-5)
            checked += 1
    assert checked == 4 * 4 * 4


def test_the_parents_own_block_costs_nothing(finished_run):
    scores, parent = score.read(finished_run), finished_run.parent.shape.parent_block.name
    assert all(scores[layer, parent].kl == pytest.approx(0.0, abs=1e-6) for layer in range(4))
    assert all(value.kl > 1e-6 for (_, name), value in scores.items() if name != parent)


def test_the_standard_error_is_over_sequences(finished_run):
    found = score.read(finished_run)[2, "no_op+no_op"]
    parent = finished_run.parent_model
    tokens = finished_run.corpus["validation"].head(finished_run.recipe.score.sequences)
    swapped = copy.deepcopy(parent)
    swapped.model.layers[2].forward = lambda x, **context: x
    with torch.no_grad():
        reference, logits = (F.log_softmax(m(tokens, use_cache=False).logits[:, :-1], -1) for m in (parent, swapped))
    per_sequence = (reference.exp() * (reference - logits)).sum(-1).mean(-1)
    expected = per_sequence.std(unbiased=True).item() / len(per_sequence) ** 0.5
    assert found.kl_stderr == pytest.approx(expected, rel=1e-3)


def test_an_interrupted_scoring_goes_on_and_ends_with_the_same_records(tiny_run, finished_run, monkeypatch):
    pipeline.execute_stage(tiny_run, "library")
    real, calls = score.score_layer, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(score, "score_layer", dies)
    with pytest.raises(KeyboardInterrupt):
        pipeline.execute_stage(tiny_run, "score")
    path = tiny_run.stage_folder("score") / "scores.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-3]) + lines[-3][:20])  # and a power cut in the middle of a shard's records
    monkeypatch.setattr(score, "score_layer", real)
    pipeline.execute_stage(tiny_run, "score")
    assert path.read_bytes() == (finished_run.stage_folder("score") / "scores.jsonl").read_bytes()


def test_a_block_shares_its_subblocks_with_the_library(finished_run):
    block = parse_block("gqa_1+gated_64")
    layer = finished_run.parent_model.model.layers[1]
    variants = score.Variants(finished_run, 1, layer)
    for variant, module in zip((block.attention, block.ffn), variants.halves[block], strict=True):
        stored = library.read_state(finished_run, 1, variant, layer.state_dict())
        assert all(t.equal(stored[n]) for n, t in module.state_dict().items())


def test_records_carry_what_the_error_bars_need(finished_run):
    record = artifacts.read_jsonl(finished_run.stage_folder("score") / "scores.jsonl")[0]
    assert {"layer", "block", "shard", "tokens", "sequences", "kl", "lm_loss", "top1", "top5"} <= set(record)
