import copy
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle import artifacts, pipeline
from puzzle.data import tasks
from puzzle.errors import UserError
from puzzle.evaluate import stage as evaluate
from puzzle.library import stage as library
from puzzle.model import child
from puzzle.model.architecture import FFN, Attention, Block, ModelShape, parse_block
from puzzle.run import Run
from puzzle.score import fisher
from puzzle.score import stage as score
from puzzle.search import validate

pytestmark = pytest.mark.training


def test_every_score_is_the_loss_of_a_really_swapped_model(finished_run):
    """Oracle: put the library's weights into a copy of the parent and run it whole, with plain
    torch.
    """
    parent, scores = finished_run.parent_model, score.read(finished_run)
    tokens = finished_run.corpus["validation"].head(finished_run.recipe.score.sequences)
    with torch.no_grad():
        reference = F.log_softmax(parent(tokens, use_cache=False).logits[:, :-1], -1)
    checked = 0
    for layer, options in enumerate(finished_run.space.layers):
        variants = score.Variants(finished_run, layer, parent.model.layers[layer], options.blocks)
        for block in options.blocks:
            swapped = copy.deepcopy(parent)
            attention, ffn = variants.halves[block]
            swapped.model.layers[layer].forward = lambda x, a=attention, f=ffn, **context: f(
                a(x, **context)
            )
            with torch.no_grad():
                logits = swapped(tokens, use_cache=False).logits[:, :-1]
            kl = (
                F.kl_div(F.log_softmax(logits, -1), reference, log_target=True, reduction="none")
                .sum(-1)
                .mean()
                .item()
            )
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
        reference, logits = (
            F.log_softmax(m(tokens, use_cache=False).logits[:, :-1], -1) for m in (parent, swapped)
        )
    per_sequence = (reference.exp() * (reference - logits)).sum(-1).mean(-1)
    expected = per_sequence.std(unbiased=True).item() / len(per_sequence) ** 0.5
    assert found.stderrs["kl"] == pytest.approx(expected, rel=1e-3)


def test_an_interrupted_scoring_goes_on_and_ends_with_the_same_records(
    tiny_run, finished_run, monkeypatch
):
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
    path.write_text(
        "".join(lines[:-3]) + lines[-3][:20]
    )  # and a power cut in the middle of a shard's records
    monkeypatch.setattr(score, "score_layer", real)
    pipeline.execute_stage(tiny_run, "score")
    assert path.read_bytes() == (finished_run.stage_folder("score") / "scores.jsonl").read_bytes()


def test_a_block_shares_its_subblocks_with_the_library(finished_run):
    block = parse_block("gqa_1+gated_64")
    layer = finished_run.parent_model.model.layers[1]
    variants = score.Variants(finished_run, 1, layer, [block])
    for variant, module in zip((block.attention, block.ffn), variants.halves[block], strict=True):
        stored = library.read_state(finished_run, 1, variant, layer.state_dict())
        assert all(t.equal(stored[n]) for n, t in module.state_dict().items())


def test_records_carry_what_the_error_bars_need(finished_run):
    record = artifacts.read_jsonl(finished_run.stage_folder("score") / "scores.jsonl")[0]
    assert {
        "layer",
        "block",
        "shard",
        "tokens",
        "sequences",
        "kl",
        "lm_loss",
        "top1",
        "top5",
    } <= set(record)


# ------------------------------------------------------------------------------------- cheaper ways


def rescored(finished_run, **settings):
    """The finished run's library under other score settings, in a folder of its own."""
    recipe = finished_run.recipe
    changed = recipe.model_copy(update={"score": recipe.score.model_copy(update=settings)})
    folder = finished_run.folder.with_name(
        "rescored-" + "-".join(map(str, settings.values())).replace("/", "_")
    )
    shutil.copytree(
        finished_run.folder,
        folder,
        ignore=shutil.ignore_patterns("score", "search"),
        dirs_exist_ok=True,
    )
    run = Run(changed, folder, finished_run.progress)
    pipeline.execute_stage(run, "score")
    return run


class Nudged:
    """A variant that changes its block's output by a small random amount."""

    def __init__(self, states, layer, size):
        self.states, self.layer, self.size = states, layer, size

    def outputs(self, x_BSD, context):
        output = self.states[self.layer + 1]
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(self.layer))
        yield parse_block("gqa_2+gated_96"), output + self.size * noise


def test_the_fisher_estimate_of_a_small_change_is_its_kl(tiny_run):
    """Second order and unbiased: for small changes and many samples the estimate meets the measured
    KL.
    """
    recipe = tiny_run.recipe.model_copy(
        update={"score": tiny_run.recipe.score.model_copy(update={"fisher_samples": 400})}
    )
    run = Run(recipe, tiny_run.folder, tiny_run.progress)
    parent, tokens = run.parent_model, run.corpus["validation"].head(8)
    states = score.parent_states(run, parent, tokens)
    estimator = fisher.Estimator(run, parent, tokens, states)
    for layer in (3, 2, 0):
        variants = Nudged(states, layer, 2e-3)
        (found,) = estimator.estimate(layer, variants).values()
        (exact,) = score.score_layer(
            run, parent, layer, variants, states, score.Shard(0, tokens)
        ).values()
        assert found["tokens"] == exact["tokens"]
        assert found["kl"] == pytest.approx(
            exact["kl"], rel=0.1
        )  # 3200 squares: a standard error of about 3 %


def test_fisher_gradients_equal_autograd_through_the_whole_model(tiny_run):
    """Oracle: one backward pass of plain torch through everything after the block, for the same
    draws.
    """
    parent, tokens = tiny_run.parent_model, tiny_run.corpus["validation"].head(2)
    states = score.parent_states(tiny_run, parent, tokens)
    estimator = fisher.Estimator(tiny_run, parent, tokens, states)
    draws = []
    real = torch.multinomial
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch, "multinomial", lambda *a, **k: draws.append(real(*a, **k)) or draws[-1]
        )
        estimator = fisher.Estimator(tiny_run, parent, tokens, states)
    x = states[2].clone().requires_grad_()
    _, context = parent.model.embed(tokens[:1])
    hidden = x
    for module in list(parent.model.layers)[2:]:
        hidden = module(hidden, **context)
    logits = parent.lm_head(parent.model.norm(hidden))[:, :-1].flatten(0, 1)
    while estimator.layer > 1:
        estimator._step_back()
    for sample, drawn in enumerate(draws):
        total = F.log_softmax(logits, -1).gather(-1, drawn).sum()
        (expected,) = torch.autograd.grad(total, x, retain_graph=True)
        torch.testing.assert_close(estimator.gradient_KBSD[sample], expected, rtol=1e-4, atol=1e-5)


def test_hybrid_scores_are_the_exact_ones_of_fewer_blocks(finished_run):
    run = rescored(finished_run, method="hybrid")
    found, exact = score.read(run), score.read(finished_run)
    assert len(found) < len(exact) and set(found) <= set(exact)
    assert all(
        value.means == pytest.approx(exact[key].means, rel=1e-5, abs=1e-7)
        for key, value in found.items()
    )
    assert len(score.read_estimates(run)) == len(exact)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(-3, 1))
def test_a_search_never_wants_a_block_that_is_no_candidate(seed, share, power):
    """Whatever the prices: the best block by the true losses is kept when estimates err by what is
    promised.
    """
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
    sizes = np.array([[score._size(b.attention, shape), score._size(b.ffn, shape)] for b in blocks])
    priced = true + estimate.max() * 10**power * sizes @ np.array([share, 1 - share])
    assert blocks[int(priced.argmin())] in score.candidates(blocks, estimate, shape)


def test_subblock_scores_add_up(finished_run):
    run = rescored(finished_run, granularity="subblock")
    whole, found = score.read(finished_run), score.losses(run)
    parent = finished_run.parent.shape.parent_block
    assert len(score.read(run)) < len(whole)
    for layer, options in enumerate(run.space.layers):
        for block in options.blocks:
            halves = (Block(block.attention, parent.ffn), Block(parent.attention, block.ffn))
            assert found[layer, block.name] == pytest.approx(
                sum(whole[layer, half.name].kl for half in halves), abs=1e-6
            )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda records: [r | {"kl": float("nan")} for r in records],
            r"kl is nan; expected a number",
        ),
        (
            lambda records: [r for r in records if r["layer"] != 2],
            "layer 2 has no score of the parent's block",
        ),
    ],
)
def test_bad_scores_are_one_clear_line(finished_run, tmp_path, change, message):
    shutil.copytree(finished_run.folder, tmp_path / "run")
    run = Run(finished_run.recipe, tmp_path / "run", finished_run.progress)
    path = run.stage_folder("score") / "scores.jsonl"
    artifacts.write_jsonl(path, change(artifacts.read_jsonl(path)))
    with pytest.raises(UserError, match=message):
        score.losses(run)


# -------------------------------------------------------------------------------------------- tasks


def test_task_accuracy_is_that_of_a_really_swapped_model(finished_run):
    run = rescored(finished_run, task="held-out", task_questions=12)
    parent, questions = run.parent_model, tasks.load(run, "held-out")[:12]
    scores = score.read(run)
    for layer, name in ((0, "no_op+gated_64"), (3, "gqa_1+no_op")):
        swapped = copy.deepcopy(parent)
        variants = score.Variants(run, layer, parent.model.layers[layer], [parse_block(name)])
        attention, ffn = variants.halves[parse_block(name)]
        swapped.model.layers[layer].forward = lambda x, a=attention, f=ffn, **context: f(
            a(x, **context)
        )
        right = 0
        for question in questions:
            means = []
            for choice in question.choices:
                row = torch.tensor([question.context + choice])
                with torch.no_grad():
                    logs = F.log_softmax(swapped(row, use_cache=False).logits[0, :-1], -1)
                own = logs.gather(-1, row[0, 1:, None])[-len(choice) :]
                means.append(own.mean().item())
            right += means.index(max(means)) == question.answer
        assert scores[layer, name].task == pytest.approx(right / len(questions))
    own = scores[0, run.parent.shape.parent_block.name].task
    assert evaluate.task_accuracy(run, parent, "held-out") == pytest.approx(own)


def test_a_local_file_of_questions_is_a_task(finished_run, tmp_path):
    path = tmp_path / "quiz.jsonl"
    records = [
        {"context": "def add(left, right):\n", "choices": ["    return left", " zzz!"], "answer": 0}
    ] * 3
    path.write_text("\n".join(map(json.dumps, records)))
    run = rescored(finished_run, task=str(path), metric="task")
    losses, parent = score.losses(run), run.parent.shape.parent_block.name
    assert all(losses[layer, parent] == 0 for layer in range(4))
    assert 0 <= score.read(run)[0, parent].task <= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"context": "a"}', "line 1 is not a question"),
        ("nonsense", "line 1 is not a question"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', "line 1 is not a question"),
    ],
)
def test_a_bad_question_is_one_clear_line(tiny_run, tmp_path, text, message):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        tasks.load(tiny_run, str(tmp_path / "bad.jsonl"))


def test_a_task_of_lm_eval_in_a_local_file(tiny_run, tmp_path):
    pytest.importorskip("lm_eval")
    rows = [
        {"q": "def add(a, b):\n", "choices": ["    return a + b", "    zzz"], "a": i % 2}
        for i in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "task": "my_quiz",
        "dataset_path": "json",
        "test_split": "test",
        "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{a}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "quiz.yaml").write_text(json.dumps(settings))
    found = tasks.load(tiny_run, str(tmp_path / "quiz.yaml"))
    decoded = [tiny_run.parent.tokenizer.decode(choice) for choice in found[0].choices]
    assert (
        len(found) == 6
        and [q.answer for q in found] == [0, 1] * 3
        and decoded == rows[0]["choices"]
    )
    with pytest.raises(UserError, match="lm-eval cannot load 'no_such_quiz'"):
        tasks.load(tiny_run, "no_such_quiz")


def test_an_unknown_task_says_what_is_expected(tiny_run, monkeypatch):
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="expected held-out, a JSON Lines file"):
        tasks.load(tiny_run, "arc_quiz")


def test_the_kl_of_an_assembled_child_is_that_of_the_saved_one(finished_run):
    """Oracle: the child on disk, loaded again and run whole."""
    architecture = child.read_architecture(finished_run.stage_folder("assemble"))
    shards = score.all_shards(finished_run)
    parent = finished_run.parent_model
    states = [score.parent_states(finished_run, parent, shard.tokens_BS)[-1] for shard in shards]
    found = validate.assembled_kl(finished_run, architecture, shards, states)
    model = child.load(finished_run.stage_folder("assemble"), torch.float32, torch.device("cpu"))
    tokens = finished_run.corpus["validation"].head(finished_run.recipe.score.sequences)
    with torch.no_grad():
        reference, own = (
            F.log_softmax(m(tokens, use_cache=False).logits[:, :-1], -1) for m in (parent, model)
        )
    assert found == pytest.approx(
        (reference.exp() * (reference - own)).sum(-1).mean().item(), rel=1e-4
    )


def test_validation_compares_sums_with_assembled_children(finished_run):
    run = rescored(finished_run)  # a validation makes the report stale
    found = validate.run(run, 10)
    written = artifacts.read_json(run.stage_folder("score") / "validation.json")
    assert found["count"] == 10 and -1 <= found["spearman"] <= 1 and -1 <= found["pearson"] <= 1
    assert {point["origin"] for point in written["points"]} == {"random", "searched"}
    one = next(p for p in written["points"] if sum(b != "gqa_2+gated_96" for b in p["blocks"]) >= 1)
    scores = score.losses(finished_run)
    assert one["sum"] == pytest.approx(sum(scores[i, name] for i, name in enumerate(one["blocks"])))


def test_correlations_know_order_and_line():
    line = [{"sum": x, "kl": 2 * x + 1} for x in (0.0, 1.0, 2.0, 5.0)]
    bent = [{"sum": x, "kl": x**5} for x in (0.0, 1.0, 2.0, 5.0)]
    assert validate.correlations(line) == {
        "count": 4,
        "spearman": pytest.approx(1),
        "pearson": pytest.approx(1),
    }
    found = validate.correlations(bent)
    assert found["spearman"] == pytest.approx(1) and found["pearson"] < 0.95
