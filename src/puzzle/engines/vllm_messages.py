"""What a vLLM session and its worker process say to one another, one JSON line each."""

from puzzle.artifacts import Record
from puzzle.config import ScenarioConfig
from puzzle.engines import Page

REPLY = "@puzzle "  # marks our lines: vLLM prints to standard output too


class Ready(Record):
    """The worker's first reply: the page of every layer's KV cache."""

    pages: list[Page]


class StepsRequest(Record):
    """Take steps of a batch, or start the engine anew, which `Ready` answers.

    `begin`: of a new batch, whatever was running is dropped.
    """

    restart: bool = False
    begin: ScenarioConfig | None = None
    steps: int
    layers: list[int]  # to run, of the checkpoint's; empty: as before


class WriteRequest(Record):
    """Go on from prompts of token ids, each with its seed."""

    prompts: list[list[int]]
    seeds: list[int]


class WriteReply(Record):
    """The new token ids for every prompt."""

    texts: list[list[int]]


class StepsReply(Record):
    """Seconds of every step; the first of a batch is its prefill.

    Of the last prefill, when each sequence had its first token, as shares of its time. And since
    the engine's start: the most memory above an idle process, and how often a sequence lost its KV
    cache to others.
    """

    seconds: list[float]
    first_tokens: list[float]
    memory_bytes: int
    preemptions: int
