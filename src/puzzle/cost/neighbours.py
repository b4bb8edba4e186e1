"""Neighbours of a child, served beside it in one engine: what its next search will choose from.

A probe (`probe.py`) serves the child and a few architectures near it in turn, so that all share the
machine's drift. What they take relative to the child joins the cost model of the child's searches
(`refit.py`).
"""

import random
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from puzzle.config import ScenarioConfig
from puzzle.cost.probe import Probe, write_checkpoint
from puzzle.cost.refit import Observation
from puzzle.cost.scenarios import element_bytes, served
from puzzle.cost.table import distinct_parts, windows
from puzzle.engines import Session
from puzzle.engines.intervals import Figure, Phase, Seconds, Start, intervals
from puzzle.engines.turns import settled, turn_lengths, warm_prefill
from puzzle.model.architecture import Architecture
from puzzle.stage import Job

ROUNDS = 8  # turns of every architecture
PROBE = ".probe-"  # the probe's folder in the child's, as large as the parent; removed at the end


def measure(
    job: Job, architectures: Sequence[Architecture], tables: Mapping[str, ScenarioConfig]
) -> list[Observation]:
    """Every architecture but the first, compared with the first, in every scenario.

    Args:
        job: a child's.
        architectures: the child, then its neighbours.
        tables: the scenarios by the names of their costs.
    """
    run, engine = job.run, job.engine
    seen: list[Observation] = []
    run.release_models()
    job.child.folder.mkdir(parents=True, exist_ok=True)
    for left in job.child.folder.glob(f"{PROBE}*"):  # by a kill
        shutil.rmtree(left)
    for name, one in tables.items():
        scenario = served(job, one)
        shape, element = run.parent.shape, element_bytes(scenario)
        probe = Probe.of(distinct_parts(job), shape, windows(job), element)
        near = [probe.with_first_layer(architecture) for architecture in architectures]
        title = f"{len(near) - 1} neighbours of {job.child.name} on {engine.name} ({scenario})"
        with (
            tempfile.TemporaryDirectory(prefix=PROBE, dir=job.child.folder) as folder,
            job.measuring(),
            run.progress.task(title, ROUNDS, "rounds") as task,
        ):
            weights = not engine.makes_weights
            write_checkpoint(
                run.parent, Path(folder), probe.architecture, probe.windows, weights=weights
            )
            with engine.probe(Path(folder), scenario) as session:
                start = _serve(session, scenario, probe, near, task.advance)
        seen += _observations(name, near, start)
    return seen


def _serve(
    session: Session,
    scenario: ScenarioConfig,
    probe: Probe,
    architectures: Sequence[Architecture],
    on_round: Callable[[], None],
) -> Start:
    """Phases with a column for every architecture.

    Their decode steps share batches. Who comes when is drawn anew in every round, so that no
    architecture has the longer contexts.
    """
    rng, count = random.Random(0), len(architectures)
    prefills, steps = np.zeros((ROUNDS, count)), np.zeros((ROUNDS, count))
    turns: list[int] = []
    models = [probe.parts(architecture) for architecture in architectures]
    for number in range(ROUNDS):
        order = rng.sample(range(count), count)
        layers = {index: probe.layers_of(models[index], rng) for index in order}
        for index in order:
            prefills[number, index] = warm_prefill(session, scenario, layers[index])
        turns = []
        for index in order if scenario.output_length > 1 else ():
            if not turns:
                session.begin(scenario)
                session.advance(1, layers[index])
                turns = turn_lengths(scenario.output_length)
            steps[number, index] = settled(session.advance(turns.pop(), layers[index]))
        on_round()
    phases = [Phase.of(1, prefills)]
    return phases if scenario.output_length == 1 else [*phases, Phase.of(1, steps)]


def _observations(
    table: str, architectures: Sequence[Architecture], start: Start
) -> list[Observation]:
    figures: dict[str, Figure] = {}
    for index in range(1, len(architectures)):
        figures[f"prefill {index}"] = partial(_ratio, "prefill", index)
        if len(start) > 1:
            figures[f"decode {index}"] = partial(_ratio, "decode", index)
    known = intervals([start], figures, looks=1)
    return [
        Observation(
            scenario=table,
            blocks=architecture.names,
            compared_with=architectures[0].names,
            prefill=known[f"prefill {index}"],
            decode=known.get(f"decode {index}"),
        )
        for index, architecture in enumerate(architectures[1:], 1)
    ]


def _ratio(phase: str, index: int, seconds: Seconds) -> float:
    """An architecture's seconds over the first one's."""
    of_all: NDArray[np.float64] = getattr(seconds, phase)
    return float(of_all[index] / of_all[0])
