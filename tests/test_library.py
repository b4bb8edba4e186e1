import pytest
import torch

from puzzle import artifacts, library, pipeline, subblocks
from puzzle.architecture import FFN, Attention
from puzzle.losses import normalized_mse

pytestmark = pytest.mark.training


def test_every_variant_that_can_be_trained_is_and_ends_below_its_start(finished_run):
    index = library.read_index(finished_run)
    kinds = {("attention", "gqa_1"), ("attention", "linear"), ("ffn", "gated_64"), ("ffn", "linear")}
    assert {(r["layer"], r["slot"], r["variant"]) for r in index} == {(i, *kind) for i in range(4) for kind in kinds}
    worse = [r for r in index if not r["nmse_after"] < r["nmse_before"]]
    assert not worse, worse


def test_the_loss_is_that_of_a_really_replaced_block(tiny_run):
    """Oracle: run the parent's layer with the trainee's weights put in by hand."""
    parent = tiny_run.parent_model
    trainees = library.initialise(tiny_run, parent)
    tokens = tiny_run.corpus["train"].batch(0, 4)
    for layer, module, x, h, o, context in library.parent_activations(tiny_run, parent, tokens):
        with torch.no_grad():
            torch.testing.assert_close(o, module(x, **context))
            for trainee in (t for t in trainees if t.layer == layer):
                both = {Attention: (trainee.module, module), FFN: (module, trainee.module)}[type(trainee.variant)]
                expected = both[1].feed_forward(both[0].attention(x, **context))
                found = trainee.block_output(module, x, h, context)
                torch.testing.assert_close(found, expected)
                assert normalized_mse(found, o) > 0


def test_no_gradient_reaches_the_parent(tiny_run):
    pipeline.execute_stage(tiny_run, "library")
    assert all(p.grad is None for p in tiny_run.parent_model.parameters())


def test_an_interrupted_library_ends_bit_identical(tiny_run, finished_run, monkeypatch):
    real, calls = library.parent_activations, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 7:  # two validation passes and some steps in
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(library, "parent_activations", dies)
    with pytest.raises(KeyboardInterrupt):
        pipeline.execute_stage(tiny_run, "library")
    assert artifacts.manifest(tiny_run.stage_folder("library")) is None
    monkeypatch.setattr(library, "parent_activations", real)
    pipeline.execute_stage(tiny_run, "library")
    ours, theirs = (sorted(r.stage_folder("library").glob("*.safetensors")) for r in (tiny_run, finished_run))
    assert [p.name for p in ours] == [p.name for p in theirs]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(ours, theirs, strict=True))


def test_a_non_finite_step_is_skipped_and_counted(tiny_run, monkeypatch):
    real, calls = library.normalized_mse, []

    def sometimes_nan(child, parent):
        calls.append(1)
        return real(child, parent) * (float("nan") if child.requires_grad and len(calls) % 50 == 0 else 1.0)

    monkeypatch.setattr(library, "normalized_mse", sometimes_nan)
    pipeline.execute_stage(tiny_run, "library")
    index = library.read_index(tiny_run)
    assert sum(r["skipped_steps"] for r in index) > 0
    assert all(r["nmse_after"] == r["nmse_after"] for r in index)


def test_parent_and_no_op_variants_are_read_without_files(finished_run):
    own = {n.removeprefix("model.layers.1."): t for n, t in finished_run.parent.weights().items() if "layers.1." in n}
    assert library.read_state(finished_run, 1, FFN("no_op"), own) == {}
    parent_block = finished_run.parent.shape.parent_block
    found = library.read_state(finished_run, 1, parent_block.ffn, own)
    assert found == subblocks.subblock_state(own, FFN) and found
