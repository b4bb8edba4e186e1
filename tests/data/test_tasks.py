import json

import pytest

from puzzle.data import tasks
from puzzle.errors import UserError


def load(task, parent):
    """Questions of a task that reads no text of the corpus: those that score, then the others."""
    sides = (tasks.TaskSettings(64, 8, 32, is_reported) for is_reported in (False, True))
    scored, reported = (tasks.load(str(task), parent.tokenizer, None, side) for side in sides)
    return scored, reported


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"context": "a"}', "line 1 is not a question"),
        ("nonsense", "line 1 is not a question"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', "line 1 is not a question"),
    ],
)
def test_a_bad_question_is_one_clear_line(tiny, tmp_path, text, message):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "bad.jsonl", tiny)


def test_a_task_of_lm_eval_in_a_local_file(tiny, tmp_path):
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
    scored, reported = load(tmp_path / "quiz.yaml", tiny)
    assert [question.answer for question in scored] == [0] * 3  # dealt out in turn
    assert [question.answer for question in reported] == [1] * 3
    assert [tiny.tokenizer.decode(choice) for choice in scored[0].choices] == rows[0]["choices"]

    others = [{**row, "q": "else:\n"} for row in rows]
    (tmp_path / "others.jsonl").write_text("\n".join(map(json.dumps, others)))
    settings["validation_split"] = "validation"
    settings["dataset_kwargs"]["data_files"]["validation"] = str(tmp_path / "others.jsonl")
    (tmp_path / "quiz.yaml").write_text(json.dumps(settings))
    scored, reported = load(tmp_path / "quiz.yaml", tiny)
    assert len(scored) == len(reported) == 6
    texts = [tiny.tokenizer.decode(side[0].context) for side in (scored, reported)]
    assert texts == ["else:\n", rows[0]["q"]]  # the test documents are reported
    with pytest.raises(UserError, match="lm-eval cannot load 'no_such_quiz'"):
        load("no_such_quiz", tiny)


def test_an_unknown_task_says_what_is_expected(tiny, monkeypatch):
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="expected held-out, a JSON Lines file"):
        load("arc_quiz", tiny)


@pytest.mark.slow  # lm-eval's index of tasks takes ten seconds
def test_a_task_is_checked_before_anything_is_spent(tmp_path):
    pytest.importorskip("lm_eval")
    tasks.check("arc_easy")
    with pytest.raises(
        UserError, match="got 'arc_eazy'; expected held-out, .* which has .*arc_easy"
    ):
        tasks.check("arc_eazy")
    (tmp_path / "quiz.yaml").write_text("dataset_path: json\n")
    with pytest.raises(UserError, match="quiz.yaml: names no task; expected a task's file"):
        tasks.check(str(tmp_path / "quiz.yaml"))
