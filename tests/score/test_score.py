import contextlib
import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle import artifacts, pipeline
from puzzle.data import tasks
from puzzle.errors import UserError
from puzzle.evaluate.skills import right_answers
from puzzle.library import LIBRARY, weights
from puzzle.model.architecture import FFN, Attention, Block, ModelShape, parse_block
from puzzle.model.modeling_puzzle import PuzzleForCausalLM
from puzzle.run import Run
from puzzle.score import SCORE, candidates, exact, fisher, results
from puzzle.score.modules import LayerBlocks
from puzzle.search import mip
from puzzle.search.program import Program, starts_of
from puzzle.stage import Job

pytestmark = pytest.mark.training


def scores_path(run: Run) -> Path:
    return Job(run).folder(SCORE) / results.SCORES


def scored_text(run: Run) -> torch.Tensor:
    return run.corpus["score"].head(run.recipe.score.sequences)


def with_block(run: Run, layer: int, block: Block) -> PuzzleForCausalLM:
    """A copy of the parent with the library's block in one layer, to be run whole."""
    parent_layer = run.parent_model.model.layers[layer]
    attention, ffn = LayerBlocks.load(run, layer, parent_layer, [block]).halves[block]
    swapped = copy.deepcopy(run.parent_model)
    swapped.model.layers[layer].forward = lambda x, **context: ffn(attention(x, **context))
    return swapped


@torch.no_grad()
def log_probabilities(model: PuzzleForCausalLM, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Of every next token, [B, S - 1, V], with plain torch."""
    return F.log_softmax(model(tokens_BS, use_cache=False).logits[:, :-1], -1)


def test_every_score_is_the_loss_of_a_really_swapped_model(finished_run):
    """Oracle: a copy of the parent with the library's weights, run whole with plain torch."""
    run, scores = finished_run, results.read(finished_run)
    tokens_BS = scored_text(run)
    parent = log_probabilities(run.parent_model, tokens_BS)
    checked = 0
    for layer, options in enumerate(run.space.layers):
        for block in options.blocks:
            swapped = log_probabilities(with_block(run, layer, block), tokens_BS)
            kl_BS = F.kl_div(swapped, parent, log_target=True, reduction="none").sum(-1)
            lm_loss = F.nll_loss(swapped.flatten(0, 1), tokens_BS[:, 1:].flatten()).item()
            score = scores[layer, block.name]
            assert score.kl == pytest.approx(kl_BS.mean().item(), rel=1e-5, abs=1e-7)
            assert score.means["lm_loss"] == pytest.approx(lm_loss, rel=1e-5)
            checked += 1
    assert checked == 4 * 4 * 4


def test_the_parents_own_block_costs_nothing(finished_run):
    scores, parent = results.read(finished_run), finished_run.parent.shape.widest_block.name
    assert all(scores[layer, parent].kl == pytest.approx(0.0, abs=1e-6) for layer in range(4))
    assert all(score.kl > 1e-6 for (_, name), score in scores.items() if name != parent)


def test_the_standard_error_is_over_sequences(finished_run):
    score = results.read(finished_run)[2, "no_op+no_op"]
    tokens_BS = scored_text(finished_run)
    swapped_model = copy.deepcopy(finished_run.parent_model)
    swapped_model.model.layers[2].forward = lambda x, **context: x
    parent = log_probabilities(finished_run.parent_model, tokens_BS)
    swapped = log_probabilities(swapped_model, tokens_BS)
    per_sequence = (parent.exp() * (parent - swapped)).sum(-1).mean(-1)
    expected = per_sequence.std(unbiased=True).item() / len(per_sequence) ** 0.5
    assert score.stderrs["kl"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("means", "expected"), [([1.0, 3.0], 1.0), ([2.0], 0.0)])
def test_the_standard_error_of_few_sequences(means, expected):
    """Each is a shard of its own, of ten tokens: std / sqrt(count); of one nothing is known."""
    parts = [
        results.Sums(sums={"kl": 10 * mean}, squares={"kl": mean**2}, tokens=10, sequences=1)
        for mean in means
    ]
    records = [
        results.BlockScore(method="exact", layer=0, block="b", shard=str(index), result=part)
        for index, part in enumerate(parts)
    ]
    score = results.summarise(records, "exact")[0, "b"]
    assert (score.kl, score.stderrs["kl"]) == (pytest.approx(2.0), pytest.approx(expected))


def test_an_interrupted_scoring_goes_on_and_ends_with_the_same_records(
    tiny_run, finished_run, monkeypatch
):
    pipeline.execute_stage(LIBRARY, Job(tiny_run))
    real, calls = exact.Scorer.score, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(exact.Scorer, "score", dies)
    with pytest.raises(KeyboardInterrupt):
        pipeline.execute_stage(SCORE, Job(tiny_run))
    monkeypatch.setattr(exact.Scorer, "score", lambda *args: calls.append(1) or real(*args))
    pipeline.execute_stage(SCORE, Job(tiny_run))
    assert len(calls) == 2 * 4 + 1  # the units, and the one that was interrupted
    assert scores_path(tiny_run).read_bytes() == scores_path(finished_run).read_bytes()


def test_streamed_scores_are_the_resident_ones(finished_run, tmp_path, monkeypatch):
    """To the bit, and for both methods; blocks of all layers go on together."""
    run = rescored(finished_run, tmp_path / "resident", method="hybrid")
    monkeypatch.setattr(
        Run, "parent_model", property(lambda self: pytest.fail("the whole parent was loaded"))
    )
    streamed = rescored(finished_run, tmp_path / "streamed", method="hybrid", memory="streamed")
    assert scores_path(streamed).read_bytes() == scores_path(run).read_bytes()


def test_a_block_shares_its_subblocks_with_the_library(finished_run):
    block = parse_block("gqa_1+gated_64")
    layer = finished_run.parent_model.model.layers[1]
    halves = LayerBlocks.load(finished_run, 1, layer, [block]).halves[block]
    for variant, module in zip(block.subblocks, halves, strict=True):
        stored = weights.read_state(finished_run, 1, variant, layer.state_dict())
        assert all(t.equal(stored[n]) for n, t in module.state_dict().items())


def test_records_carry_what_the_error_bars_need(finished_run):
    record = artifacts.read_records(scores_path(finished_run), results.BlockScore)[0]
    assert (record.layer, record.block, record.shard) == (3, "gqa_2+gated_96", "0")
    assert (record.result.tokens, record.result.sequences) == (4 * 31, 4)
    assert {"kl", "lm_loss", "top1", "top5"} <= set(record.result.sums)
    assert set(record.result.squares) == set(record.result.sums)


# ------------------------------------------------------------------------------------- cheaper ways


def with_score(run: Run, folder: Path, **settings) -> Run:
    """The run under other score settings."""
    score = run.recipe.score.model_copy(update=settings)
    return Run(run.recipe.model_copy(update={"score": score}), folder, run.progress)


def rescored(finished_run: Run, folder: Path, **settings) -> Run:
    """The finished run's library under other score settings, in a folder of its own."""
    ignored = shutil.ignore_patterns("score", "children")
    shutil.copytree(finished_run.folder, folder, ignore=ignored)
    run = with_score(finished_run, folder, **settings)
    pipeline.execute_stage(SCORE, Job(run))
    return run


class Nudged:
    """Blocks of a layer: one that changes the layer's output by a small random amount."""

    def __init__(self, states, layer, size):
        self.states, self.layer, self.size = states, layer, size

    def outputs(self, x_BSD, context):
        output = self.states[self.layer + 1]
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(self.layer))
        yield parse_block("gqa_2+gated_96"), output + self.size * noise


def test_the_fisher_estimate_of_a_small_change_is_its_kl(tiny_run):
    """Second order and unbiased: for small changes and many samples it meets the measured KL."""
    run = with_score(tiny_run, tiny_run.folder, fisher_samples=400)
    parent, tokens_BS = run.parent_layers(streamed=False), run.corpus["train"].batch(0, 8)
    states, context = exact.parent_states(run, parent, tokens_BS)
    estimator = fisher.Estimator(run, parent, tokens_BS, states, context)
    scorer = exact.Scorer(run, parent, exact.Shard("0", tokens_BS), states, context)
    for layer in (3, 2, 0):
        blocks = Nudged(states, layer, 4e-3)
        (estimate,) = estimator.estimate(layer, lambda module, made=blocks: made).values()
        (measured,) = scorer.score({layer: lambda module, made=blocks: made})[layer].values()
        assert estimate.tokens == measured.tokens
        # 3200 squares: a standard error of about 3 %
        assert estimate.sums["kl"] == pytest.approx(measured.sums["kl"], rel=0.1)


def test_fisher_gradients_equal_autograd_through_the_whole_model(tiny_run, monkeypatch):
    """Oracle: plain torch backward through everything after the block, for the same draws."""
    parent, tokens_BS = tiny_run.parent_model, tiny_run.corpus["score"].head(2)
    layers = tiny_run.parent_layers(streamed=False)
    states, context = exact.parent_states(tiny_run, layers, tokens_BS)
    draws, real = [], torch.multinomial

    def recorded(*args, **kwargs):
        draws.append(real(*args, **kwargs))
        return draws[-1]

    monkeypatch.setattr(torch, "multinomial", recorded)
    estimator = fisher.Estimator(tiny_run, layers, tokens_BS, states, context)
    x = states[2].clone().requires_grad_()
    hidden = x
    for module in list(parent.model.layers)[2:]:
        hidden = module(hidden, **context)
    logits = parent.lm_head(parent.model.norm(hidden))[:, :-1].flatten(0, 1)
    while estimator.layer > 1:
        estimator._step_back()
    assert draws
    for sample, drawn in enumerate(draws):
        total = F.log_softmax(logits, -1).gather(-1, drawn).sum()
        (expected,) = torch.autograd.grad(total, x, retain_graph=True)
        torch.testing.assert_close(estimator.gradient_KBSD[sample], expected, rtol=1e-4, atol=1e-5)


def test_hybrid_scores_are_the_exact_ones_of_fewer_blocks(finished_run, tmp_path):
    run = rescored(finished_run, tmp_path / "run", method="hybrid")
    scores, exact_scores = results.read(run), results.read(finished_run)
    assert len(scores) < len(exact_scores) and set(scores) <= set(exact_scores)
    for key, score in scores.items():
        assert score.means == pytest.approx(exact_scores[key].means, rel=1e-5, abs=1e-7)
    assert len(results.read_method(run, "fisher")) == len(exact_scores)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(0, 1),
    st.floats(-3, 1),
    st.sampled_from(candidates.KV_SHARES),
)
def test_a_search_never_wants_a_block_that_is_no_candidate(seed, share, power, kv_share):
    """At any prices the best block by the true losses is kept, if estimates err as promised."""
    shape = ModelShape(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        vocab_size=320,
        tie_word_embeddings=True,
    )
    blocks = [
        Block(a, f)
        for a in (Attention("gqa", 2), Attention("gqa", 1), Attention("no_op"))
        for f in (FFN("gated", 96), FFN("gated", 64), FFN("gated", 32), FFN("no_op"))
    ]
    rng = np.random.default_rng(seed)
    true = np.concatenate([[0.0], rng.exponential(size=len(blocks) - 1)])
    estimate = true * rng.uniform(1 - 0.04, 1 + 0.04, size=len(blocks))
    sizes = candidates._sizes(blocks, shape, kv_share)
    priced = true + estimate.max() * 10**power * sizes @ np.array([share, 1 - share])
    assert blocks[int(priced.argmin())] in candidates.candidates(blocks, estimate, shape)


@pytest.mark.parametrize("bound", ["cache", "parameters", "cache and parameters"])
@pytest.mark.parametrize("seed", range(3))
def test_what_binds_a_search_loses_nothing_to_hybrid_scores(bound, seed):
    """An 8B parent of 8 layers: the optimum of all blocks against that of the candidates."""
    shape = ModelShape(
        hidden_size=4096,
        num_hidden_layers=8,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=14336,
        vocab_size=128256,
        tie_word_embeddings=False,
    )
    rng, losses, kept, sizes = np.random.default_rng(seed), [], [], []
    attentions = [*(Attention("gqa", n) for n in (8, 4, 2, 1)), Attention("no_op")]
    ffns = [FFN("gated", 14336 * n // 100) for n in (100, 75, 50, 25, 10)] + [FFN("no_op")]
    blocks = [Block(attention, ffn) for attention in attentions for ffn in ffns]
    for _ in range(8):
        harm = rng.uniform(0.5, 2, 2)
        attention = harm[0] * np.array([0.0, 0.01, 0.03, 0.06, 0.2])
        ffn = harm[1] * np.array([0.0, 0.01, 0.03, 0.08, 0.15, 0.3])
        loss = (attention[:, None] + ffn).ravel() * rng.uniform(0.97, 1.03, len(blocks))
        loss[0] = 0.0
        names = candidates.candidates(blocks, loss * rng.uniform(0.96, 1.04, len(blocks)), shape)
        losses.append(loss)
        kept.append([block in names for block in blocks])
        parameters = [sum(map(shape.parameters, block.subblocks)) for block in blocks]
        sizes.append([[block.attention.kv_heads for block in blocks], parameters])
    rows = {"cache": [0], "parameters": [1], "cache and parameters": [0, 1]}[bound]
    resources = np.concatenate(np.array(sizes, dtype=float), axis=1)[rows]
    shares = np.array([0.25, 0.5])  # of the parent's cache and parameters
    limits = (shares * 8 * np.array(sizes, dtype=float).max((0, 2)))[rows]
    costs = np.concatenate(losses)
    program = Program(starts_of([len(blocks)] * 8), costs, resources, limits)
    of_all = mip.solve(program, gap=1e-4).objective
    only = np.where(np.concatenate(kept), costs, 1e3)
    assert mip.solve(replace(program, costs=only), gap=1e-4).objective <= 1.01 * of_all


def test_subblock_scores_add_up(finished_run, tmp_path):
    run = rescored(finished_run, tmp_path / "run", granularity="subblock")
    block_scores, losses = results.read(finished_run), results.losses(run)
    parent = finished_run.parent.shape.widest_block
    assert len(results.read(run)) < len(block_scores)
    for layer, options in enumerate(run.space.layers):
        for block in options.blocks:
            halves = (Block(block.attention, parent.ffn), Block(parent.attention, block.ffn))
            expected = sum(block_scores[layer, half.name].kl for half in halves)
            assert losses[layer, block.name] == pytest.approx(expected, abs=1e-6)


def without_numbers(record: results.BlockScore) -> results.BlockScore:
    sums = record.result.sums | {"kl": float("nan")}
    return record.model_copy(update={"result": record.result.model_copy(update={"sums": sums})})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda records: [without_numbers(record) for record in records],
            r"kl is nan; expected a number",
        ),
        (
            lambda records: [record for record in records if record.layer != 2],
            "layer 2 has no score of the parent's block",
        ),
    ],
)
def test_bad_scores_are_one_clear_line(finished_run, tmp_path, change, message):
    shutil.copytree(finished_run.folder, tmp_path / "run")
    run = Run(finished_run.recipe, tmp_path / "run", finished_run.progress)
    path = scores_path(run)
    records = artifacts.read_records(path, results.BlockScore)
    artifacts.write_records(path, change(records))
    with pytest.raises(UserError, match=message):
        results.losses(run)


# -------------------------------------------------------------------------------------------- tasks


def test_task_accuracy_is_that_of_a_really_swapped_model(finished_run, tmp_path, monkeypatch):
    run = rescored(finished_run, tmp_path / "run", task="held-out", task_questions=12)
    settings = tasks.TaskSettings.of(run.recipe, "score")
    questions = tasks.load("held-out", run.parent.tokenizer, run.corpus["score"], settings)[:12]
    scores = results.read(run)
    for layer, name in ((0, "no_op+gated_64"), (3, "gqa_1+no_op")):
        swapped = with_block(run, layer, parse_block(name))
        right = 0
        for question in questions:
            means = []
            for choice in question.choices:
                row = torch.tensor([question.context + choice])
                logs = log_probabilities(swapped, row)[0].gather(-1, row[0, 1:, None])
                means.append(logs[-len(choice) :].mean().item())
            right += means.index(max(means)) == question.answer
        assert scores[layer, name].means["task"] == pytest.approx(right / len(questions))
    parent = scores[0, run.parent.shape.widest_block.name].means["task"]
    monkeypatch.setattr(run, "questions", lambda split, real=run.questions: real("score"))
    # the same questions, as `evaluate` counts them
    right = right_answers(run, run.parent_model, run.questions("test"), tokens_at_once=256)
    assert sum(right) / len(right) == pytest.approx(parent)


def test_a_local_file_of_questions_is_a_task(finished_run, tmp_path):
    path = tmp_path / "quiz.jsonl"
    question = {
        "context": "def add(left, right):\n",
        "choices": ["    return left", " zzz!"],
        "answer": 0,
    }
    path.write_text("\n".join([json.dumps(question)] * 3))
    run = rescored(finished_run, tmp_path / "run", task=str(path), metric="task")
    losses, parent = results.losses(run), run.parent.shape.widest_block.name
    assert all(losses[layer, parent] == 0 for layer in range(4))
    assert 0 <= results.read(run)[0, parent].means["task"] <= 1


def test_blocks_whose_estimates_may_be_wrong_about_their_order_are_all_candidates():
    sizes = np.array([[1.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    near = 1 + candidates.ERROR_OF_FISHER
    assert candidates._candidates(sizes, [0.0, 1.0, near]) == [0, 1, 2]
    assert candidates._candidates(sizes, [0.0, 1.0, near**3]) == [0, 1]


def test_half_of_a_square_is_left_by_a_half_plane():
    square = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)]
    left = candidates._clip(square, np.array([1.0, 0.0]), 0.5)
    assert sorted(left) == [(0.0, 0.0), (0.0, 1.0), (0.5, 0.0), (0.5, 1.0)]
    assert candidates._clip(square, np.array([1.0, 1.0]), -0.1) == []


def test_only_attention_has_a_share_in_the_cache(finished_run):
    shape, blocks = finished_run.parent.shape, finished_run.space.layers[0].blocks
    none, half = (candidates._sizes(blocks, shape, share) for share in (0.0, 0.5))
    assert (none[:, 1] == half[:, 1]).all()
    parent = blocks.index(shape.parent_blocks[0])
    assert none[parent].tolist() == half[parent].tolist() == [1.0, 1.0]


def test_gradients_of_drawn_predictions_are_those_of_autograd_with_soft_caps():
    """log p(y) of logits cap * tanh(z / cap), for the very tokens that were drawn."""
    cap, shape = 3.0, (2, 4, 6)
    torch.manual_seed(0)
    head_VD, normed_BSD = torch.randn(9, 6), 2 * torch.randn(shape)
    estimator = object.__new__(fisher.Estimator)
    estimator.parent = SimpleNamespace(soft_cap=cap, head_VD=head_VD)
    drawn = estimator._head_gradients(normed_BSD, 3, torch.Generator().manual_seed(1))

    hidden = normed_BSD.clone().requires_grad_()
    logits = (cap * torch.tanh(hidden[:, :-1].flatten(0, 1) @ head_VD.T / cap)).log_softmax(-1)
    generator = torch.Generator().manual_seed(1)
    for gradient in drawn:
        tokens = torch.multinomial(logits.exp().detach(), 1, generator=generator)
        (expected,) = torch.autograd.grad(logits.gather(1, tokens).sum(), hidden, retain_graph=True)
        torch.testing.assert_close(gradient, expected)


def test_what_goes_on_together_has_no_more_tokens_than_a_pass_may_have():
    batches = []

    class Layers:
        def __len__(self):
            return 2

        def layer(self, index):
            def run(hidden_BSD):
                batches.append((index, len(hidden_BSD)))
                return hidden_BSD + 1

            return contextlib.nullcontext(run)

    parent = SimpleNamespace(norm=lambda hidden_BSD: hidden_BSD)
    tokens_BS = torch.zeros(1, 4, dtype=torch.long)
    suffix = exact.Suffix(Layers(), parent, {}, torch.zeros(1, 4, 2), tokens_BS)
    outputs = {0: [(number, torch.full((1, 4, 2), float(number))) for number in range(5)]}
    finals = dict(suffix.finals(outputs, tokens_per_pass=8))
    assert batches == [(1, 2), (1, 2), (1, 1)]
    assert all(torch.equal(finals[number], torch.full((3, 2), number + 1.0)) for number in finals)
    assert sorted(finals) == [*range(5)]
