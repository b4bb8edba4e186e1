import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from puzzle import artifacts, config, pipeline
from puzzle.evaluate import EVALUATE
from puzzle.library import LIBRARY, bld, memory, records, stage, weights
from puzzle.library.bld import VariantTrainer
from puzzle.library.records import LossPoint
from puzzle.library.relay import Relay
from puzzle.library.training import LibraryTraining
from puzzle.model import variants
from puzzle.model.architecture import FFN, Attention, parse_block
from puzzle.model.layers import ParentLayers
from puzzle.run import Run
from puzzle.stage import Job
from puzzle.training import schedules
from puzzle.training.losses import normalized_mse

pytestmark = pytest.mark.training


def library_folder(run: Run) -> Path:
    return Job(run).folder(LIBRARY)


def train_library(run: Run) -> None:
    pipeline.execute_stage(LIBRARY, Job(run))


def weights_of(run: Run) -> dict[str, bytes]:
    """The bytes of every file of weights in the library."""
    return {p.name: p.read_bytes() for p in sorted(library_folder(run).glob("*.safetensors"))}


def index_of(run: Run) -> list[records.VariantRecord]:
    return records.read_index(Job(run))


def trained_of(run: Run) -> list[records.VariantRecord]:
    """The records of what was trained: no-ops have no file."""
    return [record for record in index_of(run) if record.file]


def with_library(run: Run, **settings) -> Run:
    """The same run with other library settings."""
    values = run.recipe.model_dump(mode="json")
    values["library"] |= settings
    return Run(config.parse(values), run.folder, run.progress)


def initialised_trainers(run: Run) -> list[bld.VariantTrainer]:
    """Every variant with its first weights, in memory."""
    trainers, layers = stage.make_trainers(run), ParentLayers(run.parent_model)
    relay = Relay.of(run)
    LibraryTraining(run, library_folder(run), layers, trainers, None, relay).initialise()
    return trainers


def parent_batch(run: Run, layer: int, tokens_BS: torch.Tensor) -> bld.ParentBatch:
    """These tokens at a layer of the parent, which computed everything before it."""
    with torch.no_grad():
        x_BSD, context = run.parent_model.model.embed(tokens_BS)
        for module in run.parent_model.model.layers[:layer]:
            x_BSD = module(x_BSD, **context)
    return bld.ParentBatch.from_layer(run.parent_model.model.layers[layer], x_BSD, context)


def replaced_output(trainer: bld.VariantTrainer, batch: bld.ParentBatch) -> torch.Tensor:
    """The parent's layer with the variant in its place, by plain module calls."""
    is_attention = isinstance(trainer.variant, Attention)
    first = trainer.module if is_attention else batch.parent
    second = batch.parent if is_attention else trainer.module
    return second.feed_forward(first.attention(batch.x_BSD, **batch.context))


def test_every_variant_that_can_be_trained_is_and_ends_below_its_start(finished_run):
    index = trained_of(finished_run)
    kinds = {
        ("attention", "gqa_1"),
        ("attention", "linear"),
        ("ffn", "gated_64"),
        ("ffn", "linear"),
    }
    assert {(r.layer, r.slot, r.variant) for r in index} == {
        (i, *kind) for i in range(4) for kind in kinds
    }
    worse = [r for r in index if not r.nmse_after < r.nmse_before]
    assert not worse, worse


def test_the_loss_is_that_of_a_really_replaced_block(tiny_run):
    """Oracle: run the parent's layer with the variant's weights put in by hand."""
    trainers = initialised_trainers(tiny_run)
    tokens_BS = tiny_run.corpus["train"].batch(0, 4)
    for layer, module in enumerate(tiny_run.parent_model.model.layers):
        batch = parent_batch(tiny_run, layer, tokens_BS)
        for trainer in (t for t in trainers if t.layer == layer):
            with torch.no_grad():
                replaced = replaced_output(trainer, batch)
            expected = normalized_mse(replaced, module(batch.x_BSD, **batch.context))
            torch.testing.assert_close(
                trainer.error(batch).detach(), expected, rtol=1e-4, atol=1e-7
            )
            assert expected > 0


def test_the_recorded_loss_of_a_no_op_is_that_of_a_block_without_it(finished_run):
    run = finished_run
    recorded = {(r.layer, r.slot): r.nmse_after for r in index_of(run) if r.variant == "no_op"}
    x, context = run.parent_model.model.embed(run.corpus["validation"].head(8))
    with torch.no_grad():
        for layer, module in enumerate(run.parent_model.model.layers):
            o = module(x, **context)
            without = {"attention": module.feed_forward(x), "ffn": module.attention(x, **context)}
            for slot, output in without.items():
                expected = normalized_mse(output, o).item()
                assert recorded[layer, slot] == pytest.approx(expected, rel=1e-4)
            x = o


def test_gradients_equal_those_of_plain_autograd_on_the_replaced_block(tiny_run):
    """The folded norm and the short loss change the arithmetic, not the gradient."""
    trainers = initialised_trainers(tiny_run)
    batch = parent_batch(tiny_run, 2, tiny_run.corpus["train"].batch(0, 4))
    for trainer in (t for t in trainers if t.layer == 2):
        trainer.error(batch).backward()
        gradients = [p.grad.clone() for p in trainer.module.parameters()]
        trainer.module.zero_grad()
        normalized_mse(replaced_output(trainer, batch), batch.o_BSD).backward()
        expected = [p.grad for p in trainer.module.parameters()]
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-6)


def test_massive_first_tokens_do_not_hide_the_others(tiny_run):
    """The loss, and the learning rate that follows from it, stay about what they are without."""
    trainers = [t for t in initialised_trainers(tiny_run) if t.layer == 2]
    plain = parent_batch(tiny_run, 2, tiny_run.corpus["train"].batch(0, 4))
    x_BSD = plain.x_BSD.clone()
    x_BSD[:, 0, 5] = 1000 * x_BSD.square().mean().sqrt()
    layer = tiny_run.parent_model.model.layers[2]
    massive = bld.ParentBatch.from_layer(layer, x_BSD, plain.context)
    for trainer in trainers:
        with torch.no_grad():
            usual, beside_it = float(trainer.error(plain)), float(trainer.error(massive))
            replaced = replaced_output(trainer, massive)
        assert usual / 3 < beside_it < 3 * usual
        assert normalized_mse(replaced, massive.o_BSD).item() < usual / 100


def test_training_together_equals_training_each_variant_alone(tiny_run, finished_run):
    """Oracle: the obvious loop, one variant at a time with its own optimiser and plain modules."""
    run, settings = tiny_run, tiny_run.recipe.library
    for trainer in (t for t in initialised_trainers(run) if t.layer == 1):
        for step in range(trainer.steps):
            tokens_BS = run.corpus["train"].batch(step, settings.batch_sequences)
            batch = parent_batch(run, 1, tokens_BS)
            normalized_mse(replaced_output(trainer, batch), batch.o_BSD).backward()
            torch.nn.utils.clip_grad_norm_(trainer.module.parameters(), settings.gradient_clip)
            factor = schedules.cosine(step, trainer.steps, settings.warmup_share)
            rate = settings.learning_rate * factor * trainer.rate_share
            trainer.optimizer.param_groups[0]["lr"] = rate
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        stored = weights.read_state(finished_run, 1, trainer.variant, {})
        for name, tensor in trainer.module.state_dict().items():
            # Adam's first steps are sign-like, so rounding in a gradient near 0 shows; 1 % of one
            # step's length
            torch.testing.assert_close(
                stored[name], tensor, rtol=1e-3, atol=settings.learning_rate * 0.01 * 8
            )


def test_the_streamed_library_is_the_resident_one(tiny_run, finished_run, monkeypatch):
    streamed = with_library(tiny_run, memory="streamed")
    monkeypatch.setattr(
        Run, "parent_model", property(lambda self: pytest.fail("the whole parent was loaded"))
    )
    train_library(streamed)
    assert weights_of(streamed) == weights_of(finished_run)


def test_no_gradient_reaches_the_parent(tiny_run):
    train_library(tiny_run)
    assert all(p.grad is None for p in tiny_run.parent_model.parameters())


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("saves", [3, 21, 40])
def test_an_interrupted_library_ends_bit_identical(
    tiny_run, finished_run, monkeypatch, saves, memory
):
    """Killed after so many checkpoints: while initialising (16 of them), or amid a chunk's 16."""
    run = with_library(tiny_run, memory=memory)
    real, calls = bld.VariantTrainer.save, []

    def dies(self, path):
        calls.append(1)
        if len(calls) == saves:
            raise KeyboardInterrupt
        real(self, path)

    monkeypatch.setattr(bld.VariantTrainer, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        train_library(run)
    assert artifacts.read_manifest(library_folder(run)) is None
    monkeypatch.setattr(bld.VariantTrainer, "save", real)
    train_library(run)
    assert weights_of(run) == weights_of(finished_run)
    assert index_of(run) == index_of(finished_run)


def test_a_gradient_that_is_not_finite_stops_that_variant_alone(
    tiny_run, finished_run, monkeypatch
):
    real = bld.VariantTrainer.error

    def sick(self, batch):
        broken = self.key == "001.ffn.gated_64" and self.step == 4 and torch.is_grad_enabled()
        return real(self, batch) * (math.nan if broken else 1.0)

    monkeypatch.setattr(bld.VariantTrainer, "error", sick)
    said = []
    monkeypatch.setattr(tiny_run.progress, "say", said.append)
    train_library(tiny_run)
    stopped = [(r.layer, r.variant, r.stopped) for r in index_of(tiny_run) if r.stopped]
    assert stopped == [(1, "gated_64", "gradient not finite at step 4")]
    assert any("001.ffn.gated_64: stopped" in line for line in said)
    ours, theirs = weights_of(tiny_run), weights_of(finished_run)
    assert [name for name in ours if ours[name] != theirs[name]] == ["001.ffn.gated_64.safetensors"]
    assert all(r.nmse_after < r.nmse_before for r in trained_of(tiny_run))


def test_a_variant_has_its_own_budget(tiny_run):
    run = with_library(tiny_run, budgets={"linear": 1024, "attention.gqa_1": 4096})
    train_library(run)
    assert {(r.slot, r.variant): r.tokens for r in trained_of(run)} == {
        ("attention", "gqa_1"): 4096,
        ("attention", "linear"): 1024,
        ("ffn", "gated_64"): 2048,
        ("ffn", "linear"): 1024,
    }


def test_a_budget_of_all_attentions_and_what_it_is_planned_to_take(tiny_run):
    run = with_library(tiny_run, budgets={"attention": 512, "ffn.linear": 1024})
    planned = memory.need(Job(run))
    train_library(run)
    tokens = {(r.slot, r.variant): r.tokens for r in trained_of(run)}
    assert tokens == {
        ("attention", "gqa_1"): 512,
        ("attention", "linear"): 512,
        ("ffn", "gated_64"): 2048,
        ("ffn", "linear"): 1024,
    }
    assert planned.tokens == max(tokens.values())
    all_alike = memory.need(Job(with_library(tiny_run)))
    few = with_library(tiny_run, tokens=512)
    assert memory.need(Job(few)).flops < planned.flops < all_alike.flops


def test_a_variant_whose_validation_loss_is_flat_stops(tiny_run):
    # nothing gains 90 % a chunk
    run = with_library(tiny_run, stop_when_flat=0.9, stop_patience=1)
    train_library(run)
    index = trained_of(run)
    assert all(r.stopped.startswith("validation loss flat") for r in index)
    assert all(r.tokens == 3 * 8 * 32 for r in index)


def test_what_was_gained_before_the_last_chunks_does_not_count():
    trainer = VariantTrainer(0, FFN("linear"), steps=100)
    settings = config.LibraryConfig(stop_when_flat=0.1, stop_patience=2)
    stopped = []
    for number, loss in enumerate([1.0, 0.5, 0.49, 0.3, 0.29, 0.28]):
        trainer.end_chunk(LossPoint(tokens=number, validation=loss), settings)
        stopped.append(trainer.stopped)
    assert stopped == [""] * 5 + ["validation loss flat after 5 tokens"]


def test_least_squares_starts_lower_than_the_paper(tiny_run, finished_run):
    settings = {"initialization": "least_squares", "tokens": 256, "calibration_sequences": 64}
    run = with_library(tiny_run, **settings)
    train_library(run)
    before = {(r.layer, r.slot, r.variant): r.nmse_before for r in trained_of(run)}
    for record in trained_of(finished_run):
        if record.variant != "gqa_1":
            assert before[record.layer, record.slot, record.variant] < record.nmse_before


def test_parent_and_no_op_variants_are_read_without_files(finished_run):
    layer_state = {
        name.removeprefix("model.layers.1."): tensor
        for name, tensor in finished_run.parent.weights().items()
        if "layers.1." in name
    }
    assert weights.read_state(finished_run, 1, FFN("no_op"), layer_state) == {}
    parent_ffn = finished_run.parent.shape.widest_block.ffn
    state = weights.read_state(finished_run, 1, parent_ffn, layer_state)
    assert state == variants.subblock_state(layer_state, FFN) and state


def test_coupled_training_narrows_the_space_and_improves_on_the_composed_pair(tiny_run):
    """Appendix F.1.1: decoupled library, search, then pairs in what the search has left."""
    run = with_library(tiny_run, coupled=2)
    pipeline.execute(run)
    for layer, options in enumerate(run.space.layers):  # the parent's, two, and the answer's
        assert options.blocks[0] == run.parent.shape.widest_block and len(options.blocks) <= 4
        assert set(options.blocks) <= set(run.full_space.layers[layer].blocks)
    pairs = trained_of(run)
    assert pairs and all(r.slot == "block" and r.nmse_after < r.nmse_before for r in pairs)
    block = parse_block(pairs[0].variant)
    assert weights.read_block(run, pairs[0].layer, block, {})
    assert run.corpus_folder == run.first.corpus_folder
    assert artifacts.read_manifest(run.child_job("main").folder(EVALUATE)) is not None


def test_streaming_is_estimated_to_take_less_memory(tiny_run):
    resident = memory.memory_bytes(tiny_run, streamed=False)
    assert memory.memory_bytes(tiny_run, streamed=True) < resident


def test_the_library_names_its_curves(finished_run):
    points = [
        point.validation
        for point in records.read_curve(Job(finished_run))
        if (point.layer, point.slot, point.variant) == (2, "attention", "gqa_1")
    ]
    assert len(points) == 1 + math.ceil(8 / 3)
    assert Attention("gqa", 1).name == "gqa_1"


@pytest.mark.parametrize(("loss", "share"), [(0.5, 1.0), (0.02, 1.0), (0.005, 0.5), (2e-4, 0.1)])
def test_the_learning_rate_falls_with_the_root_of_a_small_first_loss(loss, share):
    trainer = VariantTrainer(0, FFN("linear"), steps=1)
    trainer.history = [LossPoint(tokens=0, validation=loss), LossPoint(tokens=8, validation=9.0)]
    assert trainer.rate_share == pytest.approx(share)


def test_a_step_is_taken_with_that_share_of_the_learning_rate(monkeypatch):
    monkeypatch.setattr(VariantTrainer, "error", lambda self, batch: self.module(batch.x_BSD).sum())
    rates = []
    for loss in (0.5, 2e-4):
        trainer = VariantTrainer(0, FFN("linear"), steps=4)
        trainer.history = [LossPoint(tokens=0, validation=loss)]
        trainer.begin(torch.nn.Linear(4, 4))
        batch = SimpleNamespace(x_BSD=torch.ones(1, 2, 4))
        trainer.train_step(batch, config.LibraryConfig(warmup_share=0.0))
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates[1] == pytest.approx(0.1 * rates[0])
