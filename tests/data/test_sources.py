import json

import pytest
from conftest import TEXT, make_tokenizer

from puzzle.config import CorpusConfig
from puzzle.data import sources
from puzzle.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def texts(count):
    return [TEXT.replace("add", f"name_{i}") for i in range(count)]


def read(source, tokenizer):
    """The texts of one source, given as a recipe gives it."""
    parsed = CorpusConfig(sources=[source]).sources[0]
    return [document.text for document in sources.documents(parsed, tokenizer, 0)]


def test_json_lines_and_parquet_give_the_same_documents(tmp_path, tokenizer):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = [{"text": text} for text in texts(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    lines, table = (read(str(tmp_path / name), tokenizer) for name in ("a.jsonl", "b.parquet"))
    assert lines == table == texts(20)


def test_a_hugging_face_dataset_streams_by_name(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts(50)))
    streamed = read({"dataset": str(folder)}, tokenizer)
    assert sorted(streamed) == sorted(texts(50))
    assert streamed == read({"dataset": str(folder)}, tokenizer)


def test_chats_go_through_the_chat_template(tmp_path, tokenizer):
    path = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path.write_text(json.dumps({"messages": turns}))
    assert read(str(path), tokenizer) == ["<user>hi\n<assistant>yo\n"]


def test_chats_without_a_template_are_a_user_error(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": []}))
    with pytest.raises(UserError, match="no chat template"):
        read(str(path), None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{", "line 1: not JSON"),
        ("a.jsonl", "[1]", "expected a JSON object"),
        ("a.jsonl", '{"body": "x"}', "got columns 'body'"),
        ("a.parquet", "x", "not a readable Parquet"),
    ],
)
def test_a_broken_source_is_one_clear_line(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read(str(tmp_path / name), tokenizer)
