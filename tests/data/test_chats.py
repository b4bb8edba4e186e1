"""Of a chat, quality is measured on what the assistant says, and on nothing else."""

import json

import pytest
from conftest import CHAT_TEMPLATE, make_tokenizer

from puzzle.config import CorpusConfig
from puzzle.data import corpus
from puzzle.data.rows import assistant_spans
from puzzle.evaluate.quality import NOT_COUNTED, Text
from puzzle.progress import Progress

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "Four. Are you sure?"},
    {"role": "assistant", "content": "  Yes.\n"},
]


def rendered(messages):
    return "".join(f"<{m['role']}>{m['content']}\n" for m in messages)


def test_the_assistants_words_are_found_where_the_template_has_put_them():
    """The user says "Four." too, after the assistant did: the order tells them apart."""
    chat = rendered(CHAT)
    spans = assistant_spans(chat, CHAT)
    assert [chat[low:high] for low, high in spans] == ["Four.", "Yes."]
    assert chat[: spans[0][0]].endswith("<assistant>")


def test_a_message_that_the_template_has_changed_does_not_count():
    chat = rendered(CHAT).replace("Four.\n<user>", "4\n<user>")
    spans = assistant_spans(chat, CHAT)
    assert "Yes." in [chat[low:high] for low, high in spans]
    assert all("4" not in chat[low:high] for low, high in spans)


@pytest.fixture
def sides(tmp_path):
    """Chats and plain text, packed with a tokenizer that has a chat template."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    chats = tmp_path / "chats.jsonl"
    rows = (
        [{"role": "user", "content": f"QQQ {i}"}, {"role": "assistant", "content": f"AAA {i * i}"}]
        for i in range(400)
    )
    chats.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    settings = {"sequence_length": 32, "train_tokens": 2048, "held_out_fraction": 0.5}
    config = CorpusConfig(sources=[{"path": str(chats)}], **settings)
    built = corpus.build(
        config,
        tokenizer,
        tmp_path / "corpus",
        tokenizer_fingerprint="",
        progress=Progress(quiet=True),
    )
    return built, tokenizer


def test_only_the_assistants_tokens_are_counted_in_a_corpus_of_chats(sides):
    built, tokenizer = sides
    side = built["test"]
    tokens_NS, counted_NS = side.head(len(side)), side.head_counted(len(side))
    said = tokenizer.decode(tokens_NS[counted_NS])
    assert "AAA" in said and "QQQ" not in said and "user" not in said
    assert "AAA" not in tokenizer.decode(tokens_NS[~counted_NS])


def test_what_is_not_counted_has_no_unit(sides):
    built, _ = sides

    class FakeRun:
        corpus = built

    text = Text.of(FakeRun(), "test", 8)
    counted = built["test"].head_counted(8)
    assert ((text.units_NS != NOT_COUNTED) == counted).all() and counted.any()
