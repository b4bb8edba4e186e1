"""Tasks that need no network: questions made from test text, and how a model answers them.

    continuation   which of four texts follows this one?
    cloze          the last word of a text, one that it has used before, by greedy decoding
    copying        a run of shuffled tokens, shown twice: what follows the second time?
    needle         a number that was told somewhere in a long text: which of four was it?

Copying and needles are asked at contexts of growing length, for that is where a child that has lost
attention fails first. A parent may be at chance itself; then a child's answers say nothing.
"""

import random
import re
from collections.abc import Iterator

import torch
from transformers import PreTrainedTokenizerBase

from puzzle.data import tasks
from puzzle.data.packing import Frame
from puzzle.data.tasks import CHOICES, Question, QuestionBatch
from puzzle.engines.intervals import Interval
from puzzle.evaluate import context
from puzzle.evaluate.bootstrap import bootstrap
from puzzle.model.modeling_puzzle import PuzzleForCausalLM
from puzzle.run import Run
from puzzle.training import sharding
from puzzle.training.losses import METRICS, token_metrics

COPIED = 4  # tokens of an answer
CITIES = ("Amsterdam", "Bogota", "Cairo", "Dakar", "Edinburgh", "Florence", "Geneva", "Havana")
WORD = re.compile(r"(?<=\S) \w{4,}\b")  # with the space before it, as tokenizers have it
# What guessing gets right, by the first word of a task's name.
CHANCE = {"continuation": 1 / CHOICES, "cloze": 0.0, "copying": 0.0, "needle": 1 / CHOICES}
LAST_PART = 0.5  # of a text, in which a cloze word is looked for


def questions(run: Run, context_tokens: int, count: int) -> dict[str, list[Question]]:
    """At most `count` questions of each task, by its name; a task without any is left out."""
    side, tokenizer = run.corpus["test"], run.parent.tokenizer
    texts_NS = side.head(4 * count)
    made = {"cloze": list(_cloze(tokenizer, texts_NS))}
    if len(texts_NS) >= CHOICES:
        made["continuation"] = tasks.held_out(texts_NS)
    for length in context.ends(context_tokens)[1:]:
        rows = _rows(run, length, count)
        made[f"copying over {length}"] = list(_copying(rows))
        made[f"needle in {length}"] = list(_needles(tokenizer, rows))
    return {name: asked[:count] for name, asked in made.items() if asked}


def tokens_per_question(row: int, context_tokens: int) -> int:
    """Tokens that a model reads for one question of every task, about.

    Args:
        row: tokens of a sequence of the corpus.
        context_tokens: of the longest questions.
    """
    lengths = sum(context.ends(context_tokens)[1:])
    return row + CHOICES * (row // 2) + lengths + CHOICES * lengths  # cloze, continuation, ...


def _rows(run: Run, length: int, count: int) -> list[list[int]]:
    side = run.corpus["test"]
    longer = side.view(join=max(1, -(-length // side.sequence_length)))
    rows: list[list[int]] = longer.head(count)[:, :length].tolist()
    return rows


def _cloze(tokenizer: PreTrainedTokenizerBase, texts_NS: torch.Tensor) -> Iterator[Question]:
    prefix = Frame.of(tokenizer).prefix
    for row in texts_NS.tolist():
        text = str(tokenizer.decode(row, skip_special_tokens=True))
        found = [match for match in WORD.finditer(text) if match.start() > LAST_PART * len(text)]
        match = next((m for m in found if text.find(m.group(), 0, m.start()) >= 0), None)
        if match is not None:
            before, word = text[: match.start()], match.group()
            ids = (tokenizer.encode(part, add_special_tokens=False) for part in (before, word))
            context_ids, word_ids = ids
            yield Question([*prefix, *context_ids], [word_ids], 0)


def _copying(rows: list[list[int]]) -> Iterator[Question]:
    generator = random.Random(0)
    for row in rows:
        run = row[: len(row) // 2]
        generator.shuffle(run)
        at = generator.randrange(len(run) // 2, len(run) - COPIED)
        yield Question([*run, *run[:at]], [run[at : at + COPIED]], 0)


def _needles(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> Iterator[Question]:
    generator = random.Random(0)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    for row in rows:
        city = generator.choice(CITIES)
        numbers = generator.sample(range(1000, 10_000), CHOICES)
        answer = generator.randrange(CHOICES)
        asked, choices = encode(f"\nThe number of {city} is"), [encode(f" {n}") for n in numbers]
        told = [*asked, *choices[answer], *encode(".\n")]
        around = row[: len(row) - len(told) - len(asked) - max(map(len, choices))]
        if not around:
            return
        at = generator.randrange(1, max(2, len(around)))
        yield Question([*around[:at], *told, *around[at:], *asked], choices, answer)


def right_answers(
    run: Run,
    model: PuzzleForCausalLM,
    batches: list[QuestionBatch],
    tokens_at_once: int,
) -> list[bool]:
    """Of each question whether a model answers it rightly.

    At most `tokens_at_once` go through the model together, but at least one row of a batch.
    Processes of a group share the batches.
    """
    right: dict[int, list[bool]] = {}
    for number, asked in sharding.dealt(list(enumerate(batches))):
        rows = max(1, tokens_at_once // asked.tokens_RS.shape[1])
        parts = [_judged(run, model, tokens_RS) for tokens_RS in asked.tokens_RS.split(rows)]
        loss_RT, first_RT = (torch.cat(kind) for kind in zip(*parts, strict=True))
        is_choice = max(asked.choice_counts) > 1
        right[number] = asked.right(loss_RT) if is_choice else asked.said(first_RT)
    of_all = {
        number: answers for part in sharding.all_of(right) for number, answers in part.items()
    }
    return [answer for number in range(len(batches)) for answer in of_all[number]]


@torch.no_grad()
def _judged(
    run: Run, model: PuzzleForCausalLM, tokens_RS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(LM loss, top1) of every token but the first, [R, S - 1] each."""
    tokens_RS = tokens_RS.to(run.device.torch_device)
    with run.device.autocast():
        hidden_RSD = model.model(tokens_RS, use_cache=False).last_hidden_state
        hidden_TD = hidden_RSD[:, :-1].flatten(0, 1)
        metrics_CMT = token_metrics(
            hidden_TD,
            model.lm_head.weight,
            hidden_TD[None],
            model.lm_head.weight,
            tokens_RS[:, 1:].flatten(),
            soft_cap=model.config.final_logit_softcapping,
        )
    loss_RT, first_RT = (
        metrics_CMT[0, METRICS.index(name)].view(len(tokens_RS), -1) for name in ("lm_loss", "top1")
    )
    return loss_RT, first_RT


def accuracy(right: list[bool]) -> Interval:
    """The share of right answers, with its interval over the questions."""
    columns = [[float(one) for one in right], [1.0] * len(right)]
    return bootstrap(columns, lambda sums: sums[0] / sums[1])
