"""Multiple-choice questions: downstream accuracy as a metric.

Three sources, by the text of `score.task`:
- `held-out`: which of four continuations follows this piece of held-out text? It needs no file and
  no download;
- a JSON Lines file of `{"context": text, "choices": [text, ...], "answer": index}`;
- the name of a multiple-choice task of the lm-eval package (the extra `eval`), whose data it
  fetches, or the path of a task's YAML file in its format.

Questions that scored blocks are not those that are reported: held-out text has its own sides of the
split, a file's questions are dealt out in turn, and of lm-eval's tasks the test
or else validation documents are reported, the training or else validation documents score, and a
task that has but one kind is dealt out, too.

A model chooses the continuation whose tokens have the highest mean log-probability after the
context.

Shape legend: N sequences, S positions, R rows (one per choice of each question), T the S - 1
positions with a next token.
"""

import difflib
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from puzzle import artifacts
from puzzle import settings as settings_files
from puzzle.config import YAML_SUFFIXES, Recipe
from puzzle.data.sequences import Sequences, Split
from puzzle.errors import UserError, reason

Thing = TypeVar("Thing")
HELD_OUT = "held-out"
CHOICES, CHOICE_TOKENS = 4, 16  # of a held-out question
QUESTION_FORM = '{"context": text, "choices": [text, text, ...], "answer": index}'


@dataclass(frozen=True)
class TaskSettings:
    """How many questions are asked, and how they become batches."""

    questions: int  # at most
    shard_sequences: int  # questions per batch
    sequence_length: int  # tokens of a row, at most
    is_reported: bool  # or else for scores

    @classmethod
    def of(cls, recipe: Recipe, split: Split) -> "TaskSettings":
        """What the recipe's sections `score` and `corpus` say; `split` is `score` or `test`."""
        score, length = recipe.score, recipe.corpus.sequence_length
        return cls(score.task_questions, score.shard_sequences, length, split == "test")


@dataclass(frozen=True)
class TextQuestion:
    """A question before it is tokenised. `answer` is the index of the right choice."""

    context: str
    choices: list[str]
    answer: int


@dataclass(frozen=True)
class Question:
    """A question in token ids. `answer` is the index of the right choice."""

    context: list[int]
    choices: list[list[int]]
    answer: int


@dataclass(frozen=True)
class QuestionBatch:
    """Several questions as one batch: a row per choice, padded on the right."""

    tokens_RS: torch.Tensor
    is_choice_RT: torch.Tensor  # True where the predicted token belongs to the choice
    choice_counts: list[int]  # rows of each question
    answers: list[int]

    def right(self, loss_RT: torch.Tensor) -> list[bool]:
        """For every question, whether the model's choice is the answer.

        `loss_RT` is the cross entropy of each next token; the choice with the lowest mean wins.
        """
        is_choice_RT = self.is_choice_RT.to(loss_RT.device)
        mean_R = ((loss_RT * is_choice_RT).sum(-1) / is_choice_RT.sum(-1)).cpu()
        return [
            int(choice_means.argmin()) == answer
            for choice_means, answer in zip(
                mean_R.split(self.choice_counts), self.answers, strict=True
            )
        ]

    def said(self, is_first_RT: torch.Tensor) -> list[bool]:
        """For every question with one choice, whether greedy decoding says just that.

        `is_first_RT` is 1 where the next token is the model's most likely one.
        """
        is_choice_RT = self.is_choice_RT.to(is_first_RT.device)
        found: list[bool] = (is_first_RT.bool() | ~is_choice_RT).all(-1).tolist()
        return found


def fingerprint(task: str | None) -> str:
    """What a score depends on besides the task's name: a file's content, a package's version."""
    if task is None or task == HELD_OUT:
        return ""
    if Path(task).is_file():
        return artifacts.file_fingerprint(Path(task))
    return version("lm_eval") if find_spec("lm_eval") else ""


def batches(
    task: str, tokenizer: PreTrainedTokenizerBase, text: Sequences, settings: TaskSettings
) -> list[QuestionBatch]:
    """The questions of a task in batches of `settings.shard_sequences`; see `load`."""
    questions = load(task, tokenizer, text, settings)[: settings.questions]
    return to_batches(questions, settings.shard_sequences, settings.sequence_length)


def to_batches(questions: Sequence[Question], size: int, length: int) -> list[QuestionBatch]:
    """Batches of `size` questions, in rows no longer than `length`."""
    return [_batch(questions[i : i + size], length) for i in range(0, len(questions), size)]


def load(
    task: str, tokenizer: PreTrainedTokenizerBase, text: Sequences, settings: TaskSettings
) -> list[Question]:
    """The questions of a task; a source may hold more than are needed.

    `text` is where held-out questions come from. Raises `UserError` for a task that does not exist
    or a file that is not in the form above.
    """
    if task == HELD_OUT:
        return held_out(text.head(4 * settings.questions))
    if Path(task).is_file() and Path(task).suffix not in YAML_SUFFIXES:
        questions = _dealt(_file_questions(Path(task)), settings.is_reported)
    elif find_spec("lm_eval"):
        questions = _lm_eval_questions(task, settings)
    else:
        raise _not_installed(task)
    return [_encode(tokenizer, question) for question in questions]


def check(task: str) -> None:
    """Raise `UserError` for a task that does not exist or a file that is no task; asks no model."""
    path = Path(task)
    if task == HELD_OUT:
        return
    if path.is_file() and path.suffix not in YAML_SUFFIXES:
        if sum(1 for _ in _file_questions(path)) < 2:
            raise UserError(
                f"score.task {path}: got less than two questions; expected some that score blocks "
                "and others that are reported"
            )
    elif path.is_dir() or (path.suffix and not path.exists()):
        raise UserError(
            f"score.task {path}: {'is a folder' if path.is_dir() else 'no such file'}; expected "
            f"{HELD_OUT}, a JSON Lines file, or a task of lm-eval"
        )
    elif not find_spec("lm_eval"):
        raise _not_installed(task)
    elif path.suffix in YAML_SUFFIXES:
        name_in_file(path)
    else:
        names = _lm_eval_names()
        if task not in names:
            close = ", ".join(difflib.get_close_matches(task, names, n=3)) or "no name like it"
            raise UserError(
                f"score.task: got {task!r}; expected {HELD_OUT}, a JSON Lines file, or a task of "
                f"lm-eval, which has {close}"
            )


@cache
def _lm_eval_names() -> list[str]:
    """The tasks of lm-eval, whose index takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return sorted(TaskManager().all_tasks)


def name_in_file(path: Path, setting: str = "score.task") -> str:
    """The name of the lm-eval task that a YAML file defines. Raises `UserError` for none.

    `setting`: the one that names the file.
    """
    name = settings_files.read_yaml(path, setting).get("task")
    if not isinstance(name, str):
        raise UserError(f"{setting} {path}: names no task; expected a task's file of lm-eval")
    return name


def _not_installed(task: str) -> UserError:
    return UserError(
        f"score.task: got {task!r}; expected {HELD_OUT}, a JSON Lines file, "
        "or a task of lm-eval (not installed)"
    )


def held_out(tokens_NS: torch.Tensor) -> list[Question]:
    """Questions from validation sequences: the first half of each is a context.

    Other sequences give the wrong choices. Raises `UserError` where there are fewer than `CHOICES`.
    """
    generator, half = random.Random(0), tokens_NS.shape[1] // 2
    rows: list[list[int]] = tokens_NS.tolist()
    if len(rows) < CHOICES:
        raise UserError(
            f"score.task {HELD_OUT}: got {len(rows)} validation sequences; "
            f"expected at least {CHOICES}"
        )
    questions = []
    for index, row in enumerate(rows):
        others = generator.sample([i for i in range(len(rows)) if i != index], CHOICES - 1)
        answer = generator.randrange(CHOICES)
        sources = [rows[other] for other in others]
        sources.insert(answer, row)
        choices = [source[half : half + CHOICE_TOKENS] for source in sources]
        if choices.count(choices[answer]) == 1:  # two sequences may continue with the same tokens
            questions.append(Question(row[:half], choices, answer))
    return questions


def _file_questions(path: Path) -> Iterator[TextQuestion]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"score.task {path}: not UTF-8 text; expected {QUESTION_FORM}") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            context, choices, answer = record["context"], record["choices"], record["answer"]
            is_text = isinstance(context, str) and isinstance(choices, list)
            is_text = is_text and all(isinstance(choice, str) and choice for choice in choices)
            is_index = type(answer) is int and 0 <= answer < len(choices)
            if not is_text or len(choices) < 2 or not is_index:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"score.task {path}: line {number} is not a question; expected {QUESTION_FORM}"
            ) from None
        yield TextQuestion(context, list(choices), int(answer))


def _dealt(things: Iterable[Thing], is_reported: bool) -> Iterator[Thing]:
    """Every second one, from the first on for scores, from the second on for reports."""
    return itertools.islice(things, int(is_reported), None, 2)


def _lm_eval_questions(task: str, settings: TaskSettings) -> Iterator[TextQuestion]:
    """Questions of an lm-eval task for scores or for reports."""
    from lm_eval.tasks import TaskManager, get_task_dict

    is_file = Path(task).suffix in YAML_SUFFIXES and Path(task).is_file()
    try:
        manager = TaskManager(include_path=str(Path(task).parent) if is_file else None)
        name = task
        if is_file:
            name = name_in_file(Path(task))
        lm_task = get_task_dict([name], manager)[name]
    except Exception as error:
        raise UserError(f"score.task: lm-eval cannot load {task!r}: {reason(error)}") from None
    if lm_task.OUTPUT_TYPE != "multiple_choice":
        raise UserError(
            f"score.task: {task} is a {lm_task.OUTPUT_TYPE} task of lm-eval; "
            "expected a multiple-choice one"
        )
    sources = {
        lm_task.training_docs: lm_task.has_training_docs(),
        lm_task.validation_docs: lm_task.has_validation_docs(),
        lm_task.test_docs: lm_task.has_test_docs(),
    }
    first, *others = [documents for documents, is_there in sources.items() if is_there]
    if not others:
        docs = _dealt(first(), settings.is_reported)
    else:
        docs = iter(others[-1]() if settings.is_reported else first())
    delimiter = lm_task.config.target_delimiter
    for doc in itertools.islice(docs, settings.questions):
        choices = [delimiter + choice for choice in lm_task.doc_to_choice(doc)]
        yield TextQuestion(lm_task.doc_to_text(doc), choices, int(lm_task.doc_to_target(doc)))


def _encode(tokenizer: PreTrainedTokenizerBase, question: TextQuestion) -> Question:
    """Context and choices tokenised apart, so that no token spans the boundary.

    An empty context becomes one token, the tokenizer's beginning or else end of text: a choice's
    first token needs one before it.
    """
    context = tokenizer.encode(question.context, add_special_tokens=False)
    choices = [tokenizer.encode(text, add_special_tokens=False) for text in question.choices]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return Question(context or [start or 0], choices, question.answer)


def _batch(questions: Sequence[Question], length: int) -> QuestionBatch:
    """A batch of rows no longer than `length`: contexts lose their beginning where they must."""
    rows, spans = [], []  # of each span [first, last) the next tokens are the choice's
    for question in questions:
        for choice in question.choices:
            choice = choice[: length - 1]
            context = question.context[-(length - len(choice)) :]
            rows.append(context + choice)
            spans.append((len(context) - 1, len(context) + len(choice) - 1))
    width = max(map(len, rows))
    tokens_RS = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    is_choice_RT = torch.zeros(len(rows), width - 1, dtype=torch.bool)
    for row_T, (first, last) in zip(is_choice_RT, spans, strict=True):
        row_T[first:last] = True
    choice_counts = [len(question.choices) for question in questions]
    answers = [question.answer for question in questions]
    return QuestionBatch(tokens_RS, is_choice_RT, choice_counts, answers)
