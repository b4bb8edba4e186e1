"""What parent, child and uptrained child write: the same prompts, the same seed."""

import torch

from puzzle.artifacts import Record
from puzzle.model.modeling_puzzle import PuzzleForCausalLM
from puzzle.model.sampling import sample
from puzzle.run import Run

PROMPT_TOKENS = 64  # at most; half of a sequence where that is less
TEMPERATURE, SEED = 0.7, 0


class Sample(Record):
    """A piece of test text: its beginning, and how it goes on."""

    prompt: str
    text: str


def prompts(run: Run, count: int) -> torch.Tensor:
    """int64 [count, tokens]: the beginnings of test sequences."""
    side = run.corpus["test"]
    return side.head(count)[:, : min(PROMPT_TOKENS, side.sequence_length // 2)]


def originals(run: Run, count: int, tokens: int) -> list[Sample]:
    """How the texts themselves go on."""
    side, length = run.corpus["test"], prompts(run, count).shape[1]
    tokenizer = run.parent.tokenizer
    return [
        Sample(
            prompt=str(tokenizer.decode(row[:length])),
            text=str(tokenizer.decode(row[length:][:tokens])),
        )
        for row in side.head(count)
    ]


def written(run: Run, model: PuzzleForCausalLM, count: int, tokens: int) -> list[str]:
    """How a model goes on, prompt by prompt; each starts from the same seed."""
    asked = prompts(run, count).tolist()
    if not asked:
        return []
    with run.device.autocast():
        texts = sample(model, asked, tokens, TEMPERATURE, [SEED] * len(asked))
    tokenizer = run.parent.tokenizer
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in texts]
