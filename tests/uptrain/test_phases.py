"""Batches of an uptraining: sequence lengths in stages, joined rows, seeds."""

import pytest
from uptrainings import uptrained

from puzzle.errors import UserError
from puzzle.uptrain import gkd
from puzzle.uptrain.phases import Batches, phases

pytestmark = pytest.mark.training


def test_sequence_lengths_change_in_stages_and_join_neighbouring_rows(
    finished_run, tmp_path, monkeypatch
):
    real, batches = gkd.Pair.losses, []

    def watched(pair, tokens):
        batches.append(tokens)
        return real(pair, tokens)

    monkeypatch.setattr(gkd.Pair, "losses", watched)
    stages = [{"sequence_length": 32, "share": 0.5}, {"sequence_length": 128, "share": 0.5}]
    job = uptrained(finished_run, tmp_path / "run", tokens=1024, stages=stages)
    assert [tuple(tokens.shape) for tokens in batches] == [(8, 32), (8, 32), (2, 128), (2, 128)]
    data = job.run.corpus["train"]
    stream = data.rows(range(len(data))).flatten()
    packed = stream[: len(stream) // 128 * 128].view(-1, 128)
    long_rows = {tuple(row.tolist()) for row in packed}
    assert all(tuple(row.tolist()) in long_rows for tokens in batches[2:] for row in tokens)


def test_a_corpus_too_short_for_one_long_sequence_is_refused(finished_run):
    with pytest.raises(UserError, match="do not fill one of"):
        finished_run.corpus["train"].view(join=100_000)


def test_another_seed_gives_the_same_rows_in_another_order(finished_run):
    data = finished_run.corpus["train"]
    first, second = (data.view(seed=seed).batch(0, len(data)).tolist() for seed in (0, 1))
    assert first == data.batch(0, len(data)).tolist() != second
    assert sorted(first) == sorted(second)


def test_fresh_text_comes_first_what_bld_has_read_comes_last(finished_run):
    job = finished_run.child_job("main")
    ((tokens_BS, share),) = Batches(job, phases(job), 8).micro(0)
    data, settings = finished_run.corpus["train"], finished_run.recipe.library
    assert share == 1.0
    steps = settings.tokens // (settings.batch_sequences * 32)
    assert tokens_BS.equal(data.batch(steps, 8))  # batches 0 to steps - 1 were BLD's
    assert not any(tokens_BS.equal(data.batch(step, 8)) for step in range(steps))
