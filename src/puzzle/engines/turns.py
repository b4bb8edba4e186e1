"""Parent and child served side by side and timed in turn, so that drift cancels in the ratio."""

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from puzzle.artifacts import Record
from puzzle.config import ScenarioConfig
from puzzle.engines import Engine, Timing, cache_bytes

WARM_UPS = 2  # rounds that do not count


@dataclass(frozen=True)
class Served:
    """A checkpoint and the scenario it is served in."""

    folder: Path
    scenario: ScenarioConfig


class ServedFigures(Record):
    """Medians over the batches of one side."""

    latency_s: float
    time_to_first_token_s: float
    throughput_tok_per_s: float  # output tokens
    kv_cache_bytes: int  # of the whole batch, as the engine allocates it


class Measurement(Record):
    """A child against the parent, batch by batch in turn; ratios are medians over the pairs."""

    parent: ServedFigures
    child: ServedFigures
    speedup: float  # of throughput
    speedups: list[float]  # of every pair
    latency_ratio: float
    time_to_first_token_ratio: float


def time_in_turn(
    engine: Engine, served: Sequence[Served], repeats: int, on_batch: Callable[[], None]
) -> tuple[list[list[Timing]], list[int]]:
    """(timings of every checkpoint's batches, bytes of KV cache of a whole batch of each).

    The first rounds warm up and do not count. `on_batch` is called after every round.
    """
    with contextlib.ExitStack() as sessions:
        opened = [sessions.enter_context(engine.serve(one.folder, one.scenario)) for one in served]
        timings: list[list[Timing]] = [[] for _ in served]
        for repeat in range(repeats + WARM_UPS):
            for session, counted, one in zip(opened, timings, served, strict=True):
                timing = session.time_batch(one.scenario)
                if repeat >= WARM_UPS:
                    counted.append(timing)
            on_batch()
        caches = [
            cache_bytes(session.pages, one.scenario)
            for session, one in zip(opened, served, strict=True)
        ]
    return timings, caches


def measure_pair(
    engine: Engine, parent: Served, child: Served, pairs: int, on_batch: Callable[[], None]
) -> Measurement:
    """The child against the parent; with a sweep of batch sizes their scenarios may differ."""
    timings, caches = time_in_turn(engine, (parent, child), pairs, on_batch)
    tokens = [s.scenario.batch_size * s.scenario.output_length for s in (parent, child)]
    latencies = [c.total_s / p.total_s for p, c in zip(*timings, strict=True)]
    firsts = [c.prefill_s / p.prefill_s for p, c in zip(*timings, strict=True)]
    speedups = [tokens[1] / tokens[0] / ratio for ratio in latencies]
    return Measurement(
        parent=_figures(timings[0], tokens[0], caches[0]),
        child=_figures(timings[1], tokens[1], caches[1]),
        speedup=statistics.median(speedups),
        speedups=speedups,
        latency_ratio=statistics.median(latencies),
        time_to_first_token_ratio=statistics.median(firsts),
    )


def _figures(timings: Sequence[Timing], tokens: int, kv_cache_bytes: int) -> ServedFigures:
    total_s = statistics.median(timing.total_s for timing in timings)
    return ServedFigures(
        latency_s=total_s,
        time_to_first_token_s=statistics.median(timing.prefill_s for timing in timings),
        throughput_tok_per_s=tokens / total_s,
        kv_cache_bytes=kv_cache_bytes,
    )
