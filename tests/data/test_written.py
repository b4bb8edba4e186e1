"""Text that the parent writes: the same whoever was interrupted, and said where it is reported."""

import pytest
from conftest import NEEDS_VLLM, make_parent, tiny_recipe

from puzzle import artifacts, config
from puzzle.data import written
from puzzle.errors import UserError
from puzzle.progress import Progress
from puzzle.run import Run


@pytest.fixture
def recipe(tiny_folder, text_folder, tmp_path):
    made = tiny_recipe(tiny_folder, text_folder, tmp_path / "run")
    made["corpus"] |= {
        "sources": [{"parent": True, "document_tokens": 24}, str(text_folder)],
        "train_tokens": 3000,
        "held_out_tokens": 2000,
    }
    return made


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(written, "SHARD_DOCUMENTS", 32)


def run_of(recipe, folder) -> Run:
    run = Run(config.parse(recipe), folder, Progress(quiet=True))
    run.write()
    return run


def shards(run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run.folder / "written").glob("*.jsonl")}


def test_the_parent_writes_its_share_and_the_corpus_reads_it(recipe, tmp_path):
    run = run_of(recipe, tmp_path / "run")
    sides = run.corpus
    paths = sorted((run.folder / "written").glob("*.jsonl"))
    documents = [
        one for path in paths for one in artifacts.read_records(path, written.WrittenDocument)
    ]
    assert sum(one.tokens for one in documents) >= 2500  # half of it
    assert all(one.tokens <= 25 for one in documents)
    packed = run.parent.tokenizer.decode(sides["train"].head(len(sides["train"])).flatten())
    longest = max((one.text for one in documents), key=len)
    assert any(one.text[:12] in packed for one in documents) and longest


def test_what_is_written_after_an_interruption_is_the_same(recipe, tmp_path, monkeypatch):
    whole = run_of(recipe, tmp_path / "whole")
    _ = whole.corpus
    stopped = run_of(recipe, tmp_path / "stopped")
    original, made = written._write_shard, []

    def interrupted(run, writer, prompts, number, path):
        if number == 2:
            raise KeyboardInterrupt
        made.append(number)
        original(run, writer, prompts, number, path)

    monkeypatch.setattr(written, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _ = stopped.corpus
    monkeypatch.setattr(written, "_write_shard", original)
    assert len(made) == 2 and len(shards(stopped)) == 2
    _ = run_of(recipe, tmp_path / "stopped").corpus
    assert shards(stopped) == shards(whole) and len(shards(whole)) > 2


def test_prompts_are_taken_in_turn(recipe, tmp_path):
    (tmp_path / "prompts.txt").write_text("def add(\n\nfor number\n")
    recipe["corpus"]["sources"][0] |= {"prompts": str(tmp_path / "prompts.txt")}
    run = run_of(recipe, tmp_path / "run")
    _ = run.corpus
    path = run.folder / "written" / "00000.jsonl"
    texts = [one.text for one in artifacts.read_records(path, written.WrittenDocument)]
    assert all(text.startswith(("def add(", "for number")[i % 2]) for i, text in enumerate(texts))
    assert len(set(texts)) > 4


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("\n \n", "no prompt; expected one a line"), ("x " * 400, "fills")],
)
def test_prompts_that_cannot_be_used_are_named(recipe, tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_text(content)
    recipe["corpus"]["sources"][0] |= {"prompts": str(path)}
    with pytest.raises(UserError, match=message):
        _ = run_of(recipe, tmp_path / "run").corpus


@NEEDS_VLLM
@pytest.mark.vllm
@pytest.mark.training
def test_vllm_writes_the_same_text_again_and_stops_where_it_ends(tmp_path):
    from puzzle.engines import Sampling, vllm_engine

    parent = make_parent(tmp_path / "parent", hidden_size=128, head_dim=32)
    engine = vllm_engine.make(tmp_path / "logs")
    with engine.write(parent, Sampling(tokens=12, temperature=1.0)) as writer:
        first = writer.write([[0], [0], [5, 6]], [1, 2, 3])
        again = writer.write([[5, 6], [0]], [3, 1])
    assert again == [first[2], first[0]] and first[0] != first[1]
    assert all(0 < len(ids) <= 12 and 0 not in ids[:-1] for ids in first)
