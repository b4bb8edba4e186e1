"""Multiple-choice questions: downstream accuracy as a metric, without leaving the machine where
need be.

Three sources, by the text of `score.task`:
- `held-out`: which of four continuations follows this piece of the validation text? No file, no
  download;
- a JSON Lines file of `{"context": text, "choices": [text, ...], "answer": index}`;
- the name of a multiple-choice task of the lm-eval package (the extra `eval`), whose data it
  fetches, or the path of a task's YAML file in its format.

A model chooses the continuation whose tokens have the highest mean log-probability after the
context.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from puzzle import artifacts
from puzzle.errors import UserError
from puzzle.run import Run
from puzzle.training.losses import METRICS

HELD_OUT = "held-out"
CHOICES, CHOICE_TOKENS = 4, 16  # of a held-out question
YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Question:
    """Token ids. `answer` is the index of the right choice."""

    context: list[int]
    choices: list[list[int]]
    answer: int


@dataclass(frozen=True)
class Rows:
    """Several questions as one batch: a row per choice, padded on the right. R rows, S positions."""

    tokens_RS: torch.Tensor
    asked_RT: torch.Tensor  # [R, S - 1], True where the predicted token belongs to the choice
    sizes: list[int]  # rows of each question
    answers: list[int]

    def sums(self, metrics_MRT: torch.Tensor) -> dict[str, float]:
        """What a score's record holds: questions, right answers and (for the standard error) their
        squares.
        """
        right = float(sum(self.right(metrics_MRT[METRICS.index("lm_loss")])))
        return {
            "questions": len(self.answers),
            "task": right,
            "task_squares": right,
            "tokens": 0,
            "sequences": 0,
        }

    def right(self, loss_RT: torch.Tensor) -> list[bool]:
        """For every question, whether the model's choice is the answer; from the loss of each next
        token.
        """
        asked = self.asked_RT.to(loss_RT.device)
        mean_R = (loss_RT * asked).sum(-1) / asked.sum(-1)
        return [
            int(own.argmin()) == answer
            for own, answer in zip(mean_R.split(self.sizes), self.answers, strict=True)
        ]


def fingerprint(task: str | None) -> str:
    """What a score depends on besides the task's name: the file's content, the package's version."""
    if task is None or task == HELD_OUT:
        return ""
    if Path(task).is_file():
        return artifacts.file_fingerprint(Path(task))
    return version("lm_eval") if find_spec("lm_eval") else ""


def batches(run: Run, task: str) -> list[Rows]:
    """The questions of a task, `score.task_questions` at most, in batches of
    `score.shard_sequences` questions.
    """
    questions = load(run, task)[: run.recipe.score.task_questions]
    size, length = run.recipe.score.shard_sequences, run.recipe.corpus.sequence_length
    return [_rows(questions[i : i + size], length) for i in range(0, len(questions), size)]


def load(run: Run, task: str) -> list[Question]:
    """Raises `UserError` for a task that is not there or a file that is not in the form above."""
    if task == HELD_OUT:
        return held_out(run.corpus["validation"].head(4 * run.recipe.score.task_questions))
    if Path(task).is_file() and Path(task).suffix not in YAML:
        records: Iterator[dict[str, Any]] = _file_records(Path(task))
    elif find_spec("lm_eval"):
        records = _lm_eval_records(task, run.recipe.score.task_questions)
    else:
        raise UserError(
            f"score.task: got {task!r}; expected {HELD_OUT}, a JSON Lines file, or a task of lm-eval (not installed)"
        )
    return [_encode(run.parent.tokenizer, record) for record in records]


def held_out(tokens_NS: torch.Tensor) -> list[Question]:
    """Questions from validation sequences: the first half is the context; other sequences give the
    wrong choices.
    """
    rng, half = random.Random(0), tokens_NS.shape[1] // 2
    rows = tokens_NS.tolist()
    if len(rows) < CHOICES:
        raise UserError(
            f"score.task {HELD_OUT}: got {len(rows)} validation sequences; expected at least {CHOICES}"
        )
    questions = []
    for index, row in enumerate(rows):
        others = rng.sample([i for i in range(len(rows)) if i != index], CHOICES - 1)
        answer = rng.randrange(CHOICES)
        sources = [rows[i] for i in others[:answer]] + [row] + [rows[i] for i in others[answer:]]
        choices = [source[half : half + CHOICE_TOKENS] for source in sources]
        if choices.count(choices[answer]) == 1:  # two sequences may go on alike
            questions.append(Question(row[:half], choices, answer))
    return questions


def _file_records(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            context, choices, answer = record["context"], record["choices"], record["answer"]
            right = (
                isinstance(context, str)
                and len(choices) > 1
                and all(isinstance(c, str) and c for c in choices)
            )
            if not right or answer not in range(len(choices)):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"score.task {path}: line {number} is not a question; expected "
                '{"context": text, "choices": [text, text, ...], "answer": index}'
            ) from None
        yield record


def _lm_eval_records(task: str, count: int) -> Iterator[dict[str, Any]]:
    from lm_eval.tasks import TaskManager, get_task_dict

    own = Path(task).suffix in YAML and Path(task).is_file()
    try:
        manager = TaskManager(include_path=str(Path(task).parent) if own else None)
        name = yaml.safe_load(Path(task).read_text(encoding="utf-8"))["task"] if own else task
        found = get_task_dict([name], manager)[name]
    except Exception as error:
        raise UserError(
            f"score.task: lm-eval cannot load {task!r}: {str(error).splitlines()[0]}"
        ) from None
    if found.OUTPUT_TYPE != "multiple_choice":
        raise UserError(
            f"score.task: {task} is a {found.OUTPUT_TYPE} task of lm-eval; expected a multiple-choice one"
        )
    docs = found.test_docs() if found.has_test_docs() else found.validation_docs()
    for doc, _ in zip(docs, range(count), strict=False):
        choices = [found.config.target_delimiter + choice for choice in found.doc_to_choice(doc)]
        yield {
            "context": found.doc_to_text(doc),
            "choices": choices,
            "answer": found.doc_to_target(doc),
        }


def _encode(tokenizer: Any, record: dict[str, Any]) -> Question:
    """The boundary is the one of the characters: context and choice are tokenised apart."""
    context = tokenizer.encode(record["context"], add_special_tokens=False)
    choices = [tokenizer.encode(choice, add_special_tokens=False) for choice in record["choices"]]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return Question(context or [start or 0], choices, int(record["answer"]))


def _rows(questions: Sequence[Question], length: int) -> Rows:
    """A batch no longer than `length`: contexts lose their beginning where they must."""
    rows, spans = [], []
    for question in questions:
        for choice in question.choices:
            choice = choice[: length - 1]
            context = question.context[-(length - len(choice)) :]
            rows.append(context + choice)
            spans.append((len(context) - 1, len(context) + len(choice) - 1))
    width = max(map(len, rows))
    tokens_RS = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    asked_RT = torch.zeros(len(rows), width - 1, dtype=torch.bool)
    for row, (first, last) in zip(asked_RT, spans, strict=True):
        row[first:last] = True
    return Rows(
        tokens_RS, asked_RT, [len(q.choices) for q in questions], [q.answer for q in questions]
    )
