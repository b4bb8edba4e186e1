"""Local tasks: questions with one right answer, and models whose answers are known."""

import pytest
import torch

from puzzle.data import tasks
from puzzle.data.tasks import Question
from puzzle.evaluate import samples, skills
from puzzle.evaluate.results import TaskResult

CONTEXT = 128


@pytest.fixture(scope="module")
def asked(finished_run):
    return skills.questions(finished_run, CONTEXT, 6)


def test_every_task_has_its_questions_and_its_chance(asked):
    assert set(asked) == {"cloze", "continuation", "copying over 128", "needle in 128"}
    for name, questions in asked.items():
        assert 0 < len(questions) <= 6
        assert skills.CHANCE[name.split(" ")[0]] == (
            1 / len(questions[0].choices) if len(questions[0].choices) > 1 else 0.0
        )
        assert all(len(q.context) + max(map(len, q.choices)) <= CONTEXT for q in questions)


def test_a_needle_is_told_once_before_it_is_asked(asked, finished_run):
    tokenizer = finished_run.parent.tokenizer
    for question in asked["needle in 128"]:
        text = tokenizer.decode(question.context)
        told = [tokenizer.decode(choice) for choice in question.choices]
        query = text.splitlines()[-1]
        assert query.startswith("The number of ") and query.endswith(" is")
        assert [query + number in text for number in told] == [
            index == question.answer for index in range(len(told))
        ]


def test_what_is_copied_stands_in_the_context(asked):
    for question in asked["copying over 128"]:
        ids, wanted = question.context, question.choices[0]
        run = ids[: CONTEXT // 2]
        at = len(ids) - len(run)
        assert ids[len(run) :] == run[:at] and run[at : at + len(wanted)] == wanted


def test_a_cloze_word_was_used_before(asked, finished_run):
    tokenizer = finished_run.parent.tokenizer
    for question in asked["cloze"]:
        assert tokenizer.decode(question.choices[0]) in tokenizer.decode(question.context)


def test_a_model_is_right_where_greedy_decoding_says_the_answer(finished_run):
    """The answers are taken from the model itself; then they are changed. Row by row, or all."""
    run, model = finished_run, finished_run.parent_model
    questions = []
    for row in run.corpus["test"].head(4):
        context = row[:10]
        ids = model.generate(context[None], max_new_tokens=2, do_sample=False, eos_token_id=-1)
        questions.append(Question(context.tolist(), [ids[0, 10:].tolist()], 0))
    batches = tasks.to_batches(questions, 3, 32)
    assert skills.right_answers(run, model, batches, tokens_at_once=1) == [True] * 4
    assert skills.right_answers(run, model, batches, tokens_at_once=99) == [True] * 4
    wrong = [
        Question(q.context, [[q.choices[0][0], (q.choices[0][1] + 1) % 300]], 0) for q in questions
    ]
    assert skills.right_answers(run, model, tasks.to_batches(wrong, 3, 32), 99) == [False] * 4


def test_a_parent_at_chance_is_called_so():
    def result(low: float) -> TaskResult:
        interval = {"value": 0.4, "low": low, "high": 0.5}
        return TaskResult.model_validate(
            {
                "name": "needle in 128",
                "source": "local",
                "questions": 32,
                "chance": 0.25,
                "parent": interval,
                "child": interval,
                "uptrained": interval,
            }
        )

    assert result(0.2).at_chance and not result(0.3).at_chance
    assert result(0.3).in_words(result(0.3).parent) == "40.0 % (30.0 to 50.0)"


def test_the_same_seed_writes_the_same_text_and_leaves_torchs_seed_alone(finished_run):
    run = finished_run
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second = (samples.written(run, run.parent_model, 2, 6) for _ in range(2))
    assert first == second and len(first) == 2
    assert torch.rand(1) == expected
    originals = samples.originals(run, 2, 6)
    row = run.corpus["test"].head(2)[0].tolist()
    assert run.parent.tokenizer.decode(row[: 16 + 6]).startswith(originals[0].prompt)


def test_no_samples_are_no_error(finished_run):
    assert samples.originals(finished_run, 0, 6) == []
    assert samples.written(finished_run, finished_run.parent_model, 0, 6) == []
