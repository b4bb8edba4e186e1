"""Parent and child served side by side, each advanced a few steps in turn.

A turn is a few decode steps, or two prefills; then the other side takes the same of its own batch.
Drift of seconds is in both times of a turn and cancels in their ratio. The first steps after a
switch warm caches and threads, and so does the first prefill: they do not count. Where two engines
do not fit beside each other they take turns whole, one engine after the other, and drift does not
cancel. What is made of the times is in `intervals.py`.
"""

import contextlib
import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from puzzle.artifacts import Record
from puzzle.config import ScenarioConfig
from puzzle.engines import (
    Engine,
    Session,
    available_bytes,
    cache_bytes,
    overhead_bytes,
)
from puzzle.engines.intervals import (
    Figure,
    Interval,
    Percentiles,
    Phase,
    Start,
    disturbed,
    intervals,
    step_percentiles,
)
from puzzle.model.weight_files import stored_bytes

TURN_STEPS = 8
SETTLING_STEPS = 4  # of a turn, that do not count (docs/log.md)
TURNS_PER_START = 14  # at least, of decode steps
# More of them where they are fast, for so many seconds: their ratios scatter by more than those of
# whole starts (docs/log.md), and another start has prefills and warm-up steps of its own.
SECONDS_PER_START = 8.0
MOST_TURNS = 56
PREFILLS_PER_START = 4  # at least, unless they take longer than the decode steps
SECTION_TURNS = 8  # of a batch, that are looked at together: their contexts are about as long
MOST_SECTIONS = 8
LOOKS = 3  # at a measurement: one that has decided nothing goes on twice


@dataclass(frozen=True)
class Served:
    """A checkpoint and the scenario it is served in."""

    folder: Path
    scenario: ScenarioConfig
    kv_cache_bytes: int  # as predicted, to know whether two engines fit

    @property
    def tokens(self) -> int:
        """Output tokens of a batch."""
        return self.scenario.batch_size * self.scenario.output_length

    @property
    def memory_bytes(self) -> int:
        """What serving it takes of each device, about."""
        weights = stored_bytes(self.folder)
        shared = (weights + self.kv_cache_bytes) // self.scenario.tensor_parallel
        return shared + overhead_bytes()


class ServedFigures(Record):
    """What serving one side has shown."""

    batch_size: int
    latency_s: Interval
    time_to_first_token_s: Interval
    inter_token_latency_s: Interval | None  # the mean over the output; None for one token
    throughput_tok_per_s: Interval  # output tokens
    kv_cache_bytes: int  # of the whole batch, as the engine allocates it
    memory_bytes: int | None  # at the peak, above an idle engine; None where it cannot tell
    first_token: Percentiles = Percentiles()  # over `time_to_first_token_s`
    inter_token: Percentiles = Percentiles()  # over `inter_token_latency_s`

    def time_to_first_token(self, percentile: int | None = None) -> Interval:
        """Until so many per cent of the batch's sequences have their first token, or all."""
        return self.time_to_first_token_s.times(self.first_token.at(percentile))

    def inter_token_latency(self, percentile: int | None = None) -> Interval:
        """Within which so many per cent of the steps are done, or the mean; of several tokens."""
        assert self.inter_token_latency_s is not None, "the scenario puts out one token"
        return self.inter_token_latency_s.times(self.inter_token.at(percentile))

    def user_throughput_tok_per_s(self, percentile: int | None = None) -> Interval:
        """Output tokens of one sequence, while the batch is full."""
        return self.inter_token_latency(percentile).inverse


class Measurement(Record):
    """A child against the parent. Ratios are of the seconds of both in the same turns."""

    parent: ServedFigures
    child: ServedFigures
    speedup: Interval  # of throughput
    latency_ratio: Interval
    time_to_first_token_ratio: Interval
    decode_ratio: Interval | None  # of the seconds after the first token; None for one token
    starts: int  # of both engines
    turns: int
    disturbed: float  # the share of the turns that other work on the machine has slowed
    in_turn: bool  # False where the two did not fit beside each other

    def first_token_ratio(self, percentile: int | None = None) -> Interval:
        """The child's time to first token over the parent's."""
        child, parent = (side.first_token.at(percentile) for side in (self.child, self.parent))
        return self.time_to_first_token_ratio.times(child / parent)

    def inter_token_latency_ratio(self, percentile: int | None = None) -> Interval:
        """The child's over the parent's, of more than one token."""
        assert self.decode_ratio is not None, "the scenario puts out one token"
        child, parent = (side.inter_token.at(percentile) for side in (self.child, self.parent))
        return self.decode_ratio.times(child / parent)

    def user_throughput_ratio(self, percentile: int | None = None) -> Interval:
        """The child's over the parent's."""
        return self.inter_token_latency_ratio(percentile).inverse

    @property
    def same_batch(self) -> bool:
        """Whether both served as many sequences; with a sweep of batch sizes they may not."""
        return self.parent.batch_size == self.child.batch_size


def measure_pair(
    engine: Engine,
    parent: Served,
    child: Served,
    starts: int,
    decided: Callable[[Measurement], bool],
    on_start: Callable[[], None],
) -> Measurement:
    """Start both engines anew, again and again, and time turns of their steps.

    Args:
        engine: what serves. A modelled one is started once.
        parent: one side.
        child: the other; with a sweep of batch sizes their scenarios may differ.
        starts: of the engines, before the measurement is looked at.
        decided: whether it decides what is asked; if not, it goes on for as many starts again, up
            to `LOOKS` times.
        on_start: called after every start.
    """
    looks = LOOKS if engine.measured else 1
    starts = starts if engine.measured else 1
    in_turn = parent.memory_bytes + child.memory_bytes < available_bytes(engine.gpu)
    served = _beside(engine, (parent, child)) if in_turn else _alone(engine, (parent, child))
    shown: list[Start] = []
    with contextlib.closing(served):
        for look in range(1, looks + 1):
            while len(shown) < look * starts:
                start, seen = next(served)
                shown.append(start)
                on_start()
            measurement = _measurement(shown, (parent, child), seen, looks, in_turn)
            if decided(measurement):
                break
    return measurement


class Seen(NamedTuple):
    """What one side has shown besides times."""

    kv_cache_bytes: int  # of a batch
    memory_bytes: int | None  # the peak above an idle engine
    first_token: Percentiles


def _beside(engine: Engine, sides: Sequence[Served]) -> Generator[tuple[Start, list[Seen]]]:
    """Start after start of all sides together, for ever."""
    scenarios = [side.scenario for side in sides]
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(engine.serve(s.folder, s.scenario)) for s in sides]
        while True:
            start = serve_in_turn(opened, scenarios)
            yield (
                start,
                [
                    Seen(
                        cache_bytes(session.pages, scenario),
                        session.memory_bytes(),
                        Percentiles.of(session.first_tokens, whole=True),
                    )
                    for session, scenario in zip(opened, scenarios, strict=True)
                ],
            )
            for session in opened:
                session.restart()


def _alone(engine: Engine, sides: Sequence[Served]) -> Generator[tuple[Start, list[Seen]]]:
    """The same, one side after the other."""
    while True:
        parts = []
        for side in sides:
            with contextlib.closing(_beside(engine, [side])) as served:
                parts.append(next(served))
        phases = zip(*(start for start, _ in parts), strict=True)
        yield [_side_by_side(each) for each in phases], [seen for _, (seen,) in parts]


def _side_by_side(phases: Sequence[Phase]) -> Phase:
    """As many turns as all have: alone, a faster side has the time for more prefills."""
    count = min(len(phase.turns) for phase in phases)
    turns = np.concatenate([phase.turns[:count] for phase in phases], axis=1)
    return Phase(phases[0].steps, turns, phases[0].positions[:count])


def serve_in_turn(sessions: Sequence[Session], scenarios: Sequence[ScenarioConfig]) -> Start:
    """Batches of every session, step by step in turn; a phase has a column for each of them.

    The output lengths must be equal. The first prefill and the first turn do not count.
    """
    turns = turn_lengths(scenarios[0].output_length)
    prefills: list[list[float]] = []
    steps: list[list[list[float]]] = [[] for _ in turns]
    _prefill(sessions, scenarios)
    if turns:
        _turn(sessions, turns[0])
    number, rounds, per_round = 0, 1, 1
    while number < rounds:
        prefills.append(_prefill(sessions, scenarios))
        for index, count in enumerate(turns):
            steps[index].append(_turn(sessions, count))
        if number == 0:
            decode_s = sum(sum(turn[0]) * count for turn, count in zip(steps, turns, strict=True))
            rounds = _rounds(len(turns), decode_s)
            # more prefills, as many as take no longer than the decode steps
            most = int(decode_s / sum(prefills[0]))
            per_round = max(1, min(-(-PREFILLS_PER_START // rounds), most))
        prefills += [_prefill(sessions, scenarios) for _ in range(per_round - 1)]
        number += 1
    phases = [Phase.of(1, prefills)]
    sections = max(1, min(MOST_SECTIONS, len(turns) // SECTION_TURNS)) if turns else 0
    for section in np.array_split(np.arange(len(turns)), sections) if sections else []:
        shown = [turn for index in section for turn in steps[index]]
        positions = np.repeat(section.astype(float), rounds)
        phases.append(Phase(sum(turns[index] for index in section), np.array(shown), positions))
    return phases


def _rounds(turns: int, seconds: float) -> int:
    """Batches of a start: of so many turns each, which take so many seconds."""
    if not turns:
        return TURNS_PER_START
    wanted = min(MOST_TURNS, int(SECONDS_PER_START * turns / seconds))
    return -(-max(TURNS_PER_START, wanted) // turns)


def turn_lengths(output_length: int) -> list[int]:
    """The decode steps of a batch, cut into turns; a remainder goes to the last turn."""
    count = output_length - 1
    whole = [TURN_STEPS] * (count // TURN_STEPS)
    if not whole:
        return [count] if count else []
    return [*whole[:-1], TURN_STEPS + count % TURN_STEPS]


def _prefill(sessions: Sequence[Session], scenarios: Sequence[ScenarioConfig]) -> list[float]:
    """Begin a batch in every session: seconds until all of its sequences have a token."""
    return [warm_prefill(*each) for each in zip(sessions, scenarios, strict=True)]


def warm_prefill(session: Session, scenario: ScenarioConfig, layers: Sequence[int] = ()) -> float:
    """Seconds of a prefill; that of another batch comes before it, warms caches, does not count."""
    for _ in range(2):
        session.begin(scenario)
        (seconds,) = session.advance(1, layers)
    return seconds


def _turn(sessions: Sequence[Session], count: int) -> list[float]:
    """Seconds of a settled step of every session, the mean over one turn each."""
    return [settled(session.advance(count)) for session in sessions]


def settled(steps_s: Sequence[float]) -> float:
    """The mean of a turn's steps that count; of a turn too short to settle, its last step."""
    counted = steps_s[SETTLING_STEPS:] or steps_s[-1:]
    return sum(counted) / len(counted)


def _measurement(
    shown: Sequence[Start],
    sides: tuple[Served, Served],
    seen: Sequence[Seen],
    looks: int,
    in_turn: bool,
) -> Measurement:
    more_tokens = sides[1].tokens / sides[0].tokens
    figures: dict[str, Figure] = {
        "speedup": lambda s: more_tokens * s.total[0] / s.total[1],
        "latency_ratio": lambda s: s.total[1] / s.total[0],
        "time_to_first_token_ratio": lambda s: s.prefill[1] / s.prefill[0],
    }
    if len(shown[0]) > 1:
        figures["decode_ratio"] = lambda s: s.decode[1] / s.decode[0]
    for side, (one, served) in enumerate(zip(("parent", "child"), sides, strict=True)):
        figures |= _figures_of(one, side, served)
    known = intervals(shown, figures, looks, in_turn=in_turn)

    decode = [phase for start in shown for phase in start[1:]]
    steps = step_percentiles(decode) if decode else [Percentiles()] * len(sides)

    def side_figures(one: str, number: int) -> ServedFigures:
        side = sides[number]
        return ServedFigures(
            batch_size=side.scenario.batch_size,
            latency_s=known[f"{one}.latency_s"],
            time_to_first_token_s=known[f"{one}.time_to_first_token_s"],
            inter_token_latency_s=known.get(f"{one}.inter_token_latency_s"),
            throughput_tok_per_s=known[f"{one}.throughput_tok_per_s"],
            kv_cache_bytes=seen[number].kv_cache_bytes,
            memory_bytes=seen[number].memory_bytes,
            first_token=seen[number].first_token,
            inter_token=steps[number],
        )

    return Measurement(
        parent=side_figures("parent", 0),
        child=side_figures("child", 1),
        speedup=known["speedup"],
        latency_ratio=known["latency_ratio"],
        time_to_first_token_ratio=known["time_to_first_token_ratio"],
        decode_ratio=known.get("decode_ratio"),
        starts=len(shown),
        turns=sum(len(phase.turns) for phase in itertools.chain(*shown)),
        disturbed=disturbed(shown),
        in_turn=in_turn,
    )


def _figures_of(name: str, side: int, served: Served) -> dict[str, Figure]:
    steps = served.scenario.output_length - 1
    figures: dict[str, Figure] = {
        f"{name}.latency_s": lambda s: s.total[side],
        f"{name}.time_to_first_token_s": lambda s: s.prefill[side],
        f"{name}.throughput_tok_per_s": lambda s: served.tokens / s.total[side],
    }
    if steps:
        figures[f"{name}.inter_token_latency_s"] = lambda s: s.decode[side] / steps
    return figures
