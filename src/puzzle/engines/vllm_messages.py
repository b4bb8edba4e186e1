"""What a vLLM session and its worker process say to one another, one JSON line each."""

from puzzle.artifacts import Record
from puzzle.config import ScenarioConfig

REPLY = "@puzzle "  # marks our lines: vLLM prints to standard output too


class Ready(Record):
    """The worker's first reply: (tokens, bytes) of a page of every layer's KV cache."""

    pages: list[tuple[int, int]]


class BatchRequest(Record):
    """Serve one batch. `layers`: see `Session.time_batch`."""

    scenario: ScenarioConfig
    layers: list[list[int]]


class BatchReply(Record):
    """Seconds of a batch."""

    prefill_s: float
    steps_s: list[float]
