"""What a child's next search will choose from: proposed by the search, served in the probe."""

import contextlib
from dataclasses import replace

from puzzle.cost import neighbours as cost_neighbours
from puzzle.errors import Infeasible
from puzzle.model.architecture import Architecture
from puzzle.search import stage, tried
from puzzle.search.space_program import Choices
from puzzle.stage import Job

# Beside the margin that a search aims with.
STEPS = (0.0, 0.015, -0.01)


def learn(job: Job) -> None:
    """Serve the neighbours of the last try that was not accepted, and remember what they took.

    Once: what is remembered is not served again.
    """
    tries = tried.Tries.of(job).children
    if not tries or len(tries) >= job.child.search.attempts or not job.engine.measured:
        return
    child = tries[-1]
    if tried.has_neighbours(job, child):
        return
    near = propose(job, stage.read_choices(job), child.blocks)
    if not near:
        return
    scenarios = job.place.cost.measured
    tables = {name: scenarios[name] for name in child.tables.values()}
    architectures = [Architecture.from_names(blocks) for blocks in (child.blocks, *near)]
    seen = cost_neighbours.measure(job, architectures, tables)
    tried.record_neighbours(job, child.source, seen)


def propose(job: Job, choices: Choices, child: list[str]) -> list[list[str]]:
    """What the search would give now, and a little faster and slower; not the child itself."""
    margin = job.child.search.margin
    margin = 2 * stage.LEAST_MARGIN if margin is None else margin
    near: list[list[str]] = []
    for step in STEPS:
        settings = job.child.search.model_copy(update={"margin": max(0.0, margin + step)})
        asking = replace(job, wish=replace(job.child, search=settings))
        with contextlib.suppress(Infeasible):
            answer, _ = stage.search(asking, choices)
            if answer.best.blocks not in (child, *near):
                near.append(answer.best.blocks)
    return near
