import math

import pytest
import torch

from puzzle import artifacts, config, pipeline, plan
from puzzle.library import bld
from puzzle.library import stage as library
from puzzle.model import variants as subblocks
from puzzle.model.architecture import FFN, Attention, Block
from puzzle.model.layers import ParentLayers
from puzzle.run import Run
from puzzle.training.losses import normalized_mse

pytestmark = pytest.mark.training


def weights_of(run, stage="library"):
    return {p.name: p.read_bytes() for p in sorted(run.stage_folder(stage).glob("*.safetensors"))}


def with_library(run, folder, **settings):
    """The same run elsewhere, with other library settings."""
    values = run.recipe.model_dump(mode="json")
    values["library"] |= settings
    return Run(config.parse(values), folder, run.progress)


def trainees_of(run):
    """Initialised trainees and the parent's layers, in memory."""
    trainees, layers = library.enrol(run), ParentLayers(run.parent_model)
    library.initialise(run, run.folder / "library", layers, trainees, keep=True)
    return trainees, layers


def first_lesson(run, layer):
    tokens = run.corpus["train"].batch(0, 4)
    with torch.no_grad():
        x, context = run.parent_model.model.embed(tokens)
        for module in run.parent_model.model.layers[:layer]:
            x = module(x, **context)
    return bld.Lesson.of(run.parent_model.model.layers[layer], x, context)


def test_every_variant_that_can_be_trained_is_and_ends_below_its_start(finished_run):
    index = [r for r in library.read_index(finished_run) if r["file"]]
    kinds = {
        ("attention", "gqa_1"),
        ("attention", "linear"),
        ("ffn", "gated_64"),
        ("ffn", "linear"),
    }
    assert {(r["layer"], r["slot"], r["variant"]) for r in index} == {
        (i, *kind) for i in range(4) for kind in kinds
    }
    worse = [r for r in index if not r["nmse_after"] < r["nmse_before"]]
    assert not worse, worse


def test_the_loss_is_that_of_a_really_replaced_block(tiny_run):
    """Oracle: run the parent's layer with the trainee's weights put in by hand."""
    trainees, _ = trainees_of(tiny_run)
    for layer, module in enumerate(tiny_run.parent_model.model.layers):
        lesson = first_lesson(tiny_run, layer)
        for trainee in (t for t in trainees if t.layer == layer):
            first = trainee.module if trainee.attention else module
            second = trainee.module if trainee.ffn else module
            with torch.no_grad():
                replaced = second.feed_forward(first.attention(lesson.x_BSD, **lesson.context))
            expected = normalized_mse(replaced, module(lesson.x_BSD, **lesson.context))
            torch.testing.assert_close(
                trainee.error(lesson).detach(), expected, rtol=1e-4, atol=1e-7
            )
            assert expected > 0


def test_the_recorded_loss_of_a_no_op_is_that_of_a_block_without_it(finished_run):
    run = finished_run
    found = {
        (r["layer"], r["slot"]): r["nmse_after"]
        for r in library.read_index(run)
        if r["variant"] == "no_op"
    }
    batches = run.corpus["validation"].head(8).split(8)
    x, context = run.parent_model.model.embed(batches[0])
    with torch.no_grad():
        for layer, module in enumerate(run.parent_model.model.layers):
            o = module(x, **context)
            no_attention, no_ffn = module.feed_forward(x), module.attention(x, **context)
            assert found[layer, "attention"] == pytest.approx(
                normalized_mse(no_attention, o).item(), rel=1e-4
            )
            assert found[layer, "ffn"] == pytest.approx(normalized_mse(no_ffn, o).item(), rel=1e-4)
            x = o


def test_gradients_equal_those_of_plain_autograd_on_the_replaced_block(tiny_run):
    """The folded norm and the short loss change the arithmetic, not the gradient."""
    trainees, _ = trainees_of(tiny_run)
    lesson = first_lesson(tiny_run, 2)
    for trainee in (t for t in trainees if t.layer == 2):
        trainee.error(lesson).backward()
        found = [p.grad.clone() for p in trainee.module.parameters()]
        trainee.module.zero_grad()
        first = trainee.module if trainee.attention else lesson.parent
        second = trainee.module if trainee.ffn else lesson.parent
        out = second.feed_forward(first.attention(lesson.x_BSD, **lesson.context))
        normalized_mse(out, lesson.o_BSD).backward()
        for ours, theirs in zip(found, [p.grad for p in trainee.module.parameters()], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-6)


def test_training_together_equals_training_each_variant_alone(tiny_run, finished_run, tmp_path):
    """Oracle: the obvious loop, one variant at a time with its own optimiser and plain modules."""
    run, settings = tiny_run, tiny_run.recipe.library
    trainees, _ = trainees_of(run)
    for trainee in (t for t in trainees if t.layer == 1):
        for step in range(trainee.steps):
            tokens = run.corpus["train"].batch(step, settings.batch_sequences)
            with torch.no_grad():
                x, context = run.parent_model.model.embed(tokens)
                x = run.parent_model.model.layers[0](x, **context)
            lesson = bld.Lesson.of(run.parent_model.model.layers[1], x, context)
            first = trainee.module if trainee.attention else lesson.parent
            second = trainee.module if trainee.ffn else lesson.parent
            normalized_mse(
                second.feed_forward(first.attention(x, **context)), lesson.o_BSD
            ).backward()
            torch.nn.utils.clip_grad_norm_(trainee.module.parameters(), settings.gradient_clip)
            factor = bld.checkpoint.cosine_schedule(step, trainee.steps, settings.warmup_share)
            trainee.optimizer.param_groups[0]["lr"] = (
                settings.learning_rate * factor * trainee.rate_share
            )
            trainee.optimizer.step()
            trainee.optimizer.zero_grad()
        variant = trainee.attention or trainee.ffn
        stored = library.read_state(finished_run, 1, variant, {})
        for name, tensor in trainee.module.state_dict().items():
            # Adam's first steps are sign-like, so rounding in a gradient near 0 shows; 1 % of one
            # step's length
            torch.testing.assert_close(
                stored[name], tensor, rtol=1e-3, atol=settings.learning_rate * 0.01 * 8
            )


def test_the_streamed_library_is_the_resident_one(tiny_run, finished_run, monkeypatch):
    streamed = with_library(tiny_run, tiny_run.folder, memory="streamed")
    monkeypatch.setattr(
        Run, "parent_model", property(lambda self: pytest.fail("the whole parent was loaded"))
    )
    pipeline.execute_stage(streamed, "library")
    assert weights_of(streamed) == weights_of(finished_run)


def test_no_gradient_reaches_the_parent(tiny_run):
    pipeline.execute_stage(tiny_run, "library")
    assert all(p.grad is None for p in tiny_run.parent_model.parameters())


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("saves", [3, 21, 40])
def test_an_interrupted_library_ends_bit_identical(
    tiny_run, finished_run, monkeypatch, saves, memory
):
    """Killed after so many checkpoints: while initialising (32 of them), and in the middle of a
    layer twice.
    """
    run = with_library(tiny_run, tiny_run.folder, memory=memory)
    real, calls = bld.Trainee.save, []

    def dies(self, path):
        calls.append(1)
        if len(calls) == saves:
            raise KeyboardInterrupt
        real(self, path)

    monkeypatch.setattr(bld.Trainee, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        pipeline.execute_stage(run, "library")
    assert artifacts.manifest(run.stage_folder("library")) is None
    monkeypatch.setattr(bld.Trainee, "save", real)
    pipeline.execute_stage(run, "library")
    assert weights_of(run) == weights_of(finished_run)
    assert library.read_index(run) == library.read_index(finished_run)


def test_a_gradient_that_is_not_finite_stops_that_variant_alone(
    tiny_run, finished_run, monkeypatch
):
    real = bld.Trainee.error

    def sick(self, lesson):
        broken = self.key == "001.ffn.gated_64" and self.step == 4 and torch.is_grad_enabled()
        return real(self, lesson) * (math.nan if broken else 1.0)

    monkeypatch.setattr(bld.Trainee, "error", sick)
    said = []
    monkeypatch.setattr(tiny_run.progress, "say", said.append)
    pipeline.execute_stage(tiny_run, "library")
    stopped = [r for r in library.read_index(tiny_run) if r.get("stopped")]
    assert [(r["layer"], r["variant"], r["stopped"]) for r in stopped] == [
        (1, "gated_64", "gradient not finite at step 4")
    ]
    assert any("001.ffn.gated_64: stopped" in line for line in said)
    ours, theirs = weights_of(tiny_run), weights_of(finished_run)
    assert [name for name in ours if ours[name] != theirs[name]] == ["001.ffn.gated_64.safetensors"]
    assert all(
        r["nmse_after"] < r["nmse_before"] for r in library.read_index(tiny_run) if r["file"]
    )


def test_a_variant_has_its_own_budget(tiny_run):
    run = with_library(tiny_run, tiny_run.folder, budgets={"linear": 1024, "attention.gqa_1": 4096})
    pipeline.execute_stage(run, "library")
    tokens = {(r["slot"], r["variant"]): r["tokens"] for r in library.read_index(run) if r["file"]}
    assert tokens == {
        ("attention", "gqa_1"): 4096,
        ("attention", "linear"): 1024,
        ("ffn", "gated_64"): 2048,
        ("ffn", "linear"): 1024,
    }


def test_a_variant_whose_validation_loss_is_flat_stops(tiny_run):
    run = with_library(
        tiny_run, tiny_run.folder, stop_when_flat=0.9, stop_patience=1
    )  # nothing gains 90 % a chunk
    pipeline.execute_stage(run, "library")
    index = [r for r in library.read_index(run) if r["file"]]
    assert all(
        r["stopped"].startswith("validation loss flat") and r["tokens"] == 3 * 8 * 32 for r in index
    )


def test_least_squares_starts_lower_than_the_paper(tiny_run, finished_run):
    settings = {"initialization": "least_squares", "tokens": 256, "calibration_sequences": 64}
    run = with_library(tiny_run, tiny_run.folder, **settings)
    pipeline.execute_stage(run, "library")
    before = {
        (r["layer"], r["slot"], r["variant"]): r["nmse_before"]
        for r in library.read_index(run)
        if r["file"]
    }
    for record in (
        r for r in library.read_index(finished_run) if r["file"] and r["variant"] != "gqa_1"
    ):
        assert before[record["layer"], record["slot"], record["variant"]] < record["nmse_before"]


def test_parent_and_no_op_variants_are_read_without_files(finished_run):
    own = {
        n.removeprefix("model.layers.1."): t
        for n, t in finished_run.parent.weights().items()
        if "layers.1." in n
    }
    assert library.read_state(finished_run, 1, FFN("no_op"), own) == {}
    parent_block = finished_run.parent.shape.parent_block
    found = library.read_state(finished_run, 1, parent_block.ffn, own)
    assert found == subblocks.subblock_state(own, FFN) and found


def test_coupled_training_narrows_the_space_and_improves_on_the_composed_pair(tiny_run):
    """The paper's order (appendix F.1.1): decoupled library, search, then pairs in what the search
    left.
    """
    run = with_library(tiny_run, tiny_run.folder, coupled=2)
    pipeline.execute(run)
    for layer, options in enumerate(run.space.layers):
        assert options.blocks[0] == run.parent.shape.parent_block and len(options.blocks) <= 3
        assert set(options.blocks) <= set(run.full_space.layers[layer].blocks)
    pairs = [r for r in library.read_index(run) if r["file"]]
    assert pairs and all(r["slot"] == "block" and r["nmse_after"] < r["nmse_before"] for r in pairs)
    record = pairs[0]
    state = library.read_block(run, record["layer"], Block(*_halves(record["variant"])), {})
    assert state and run.corpus_folder == run.first.corpus_folder
    assert artifacts.manifest(run.stage_folder("evaluate")) is not None


def _halves(name):
    from puzzle.model.architecture import parse_block

    block = parse_block(name)
    return block.attention, block.ffn


def test_the_plan_says_less_memory_for_streaming(tiny_run):
    assert plan.library_memory_bytes(tiny_run, streamed=True) < plan.library_memory_bytes(
        tiny_run, streamed=False
    )


def test_the_library_names_its_curves(finished_run):
    curve = library.read_curve(finished_run)
    one = [
        r["validation"]
        for r in curve
        if (r["layer"], r["slot"], r["variant"]) == (2, "attention", "gqa_1")
    ]
    assert len(one) == 1 + math.ceil(8 / 3)
    assert Attention("gqa", 1).name == "gqa_1"
