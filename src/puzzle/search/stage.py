"""Stage `search`: one block per layer, the best sum of scores within the constraints.

Solved exactly on HiGHS (`mip.py`; the rows are built in `space_program.py`). Every solution carries
its objective, proven bound, gap and seconds. Where no architecture meets the constraints,
`Infeasible` says what binds, the best attainable value of each and the nearest possible relaxation.
With `cost.batch_sizes` there is one program per batch size of the main scenario, and the best sum
of scores wins. Paper: section 4.1, appendix B.

Reads: scores and costs. Writes: `search/solutions.json`, `frontier.jsonl`, `baselines.jsonl`
(`answers.py`).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from puzzle import artifacts
from puzzle.artifacts import Inputs
from puzzle.config import SearchConfig
from puzzle.cost import table as costs
from puzzle.errors import Infeasible, UserError
from puzzle.model.architecture import Architecture
from puzzle.score import SCORE
from puzzle.score import results as scores
from puzzle.search import mip, promise
from puzzle.search.answers import (
    ANSWER,
    BASELINES,
    FRONTIER,
    Answer,
    Solution,
    SweepPoint,
    predict,
)
from puzzle.search.constraints import Constraint, Tables, check, constraints
from puzzle.search.frontier import baseline_choices, frontier
from puzzle.search.program import Program
from puzzle.search.space_program import Choices, Limit, build, explain_infeasible, homogeneous
from puzzle.stage import Job, Need, Work


@dataclass(frozen=True)
class Searched:
    """One batch size of the main scenario, searched."""

    tables: Tables
    constraints: list[Constraint]
    limits: list[Limit]
    program: Program
    solutions: list[Solution]

    @property
    def batch_size(self) -> int:
        """Of the main scenario."""
        return self.tables["main"].scenario.batch_size


def _facts(job: Job) -> Inputs:
    return {}


def _check(job: Job) -> None:
    check(job.child.search, ["main", *job.place.cost.scenarios])
    if job.child.search.architecture is not None:
        given = Architecture.from_names(job.child.search.architecture)
        expected = job.run.parent.shape.num_hidden_layers
        if len(given) != expected:
            raise UserError(
                f"search.architecture: got {len(given)} layers, expected the parent's {expected}"
            )


def _execute(job: Job, folder: Path) -> None:
    choices = read_choices(job)
    answer, best = search(job, choices)
    answer.write(folder / ANSWER)
    settings, table = job.child.search, best.tables["main"]
    parent = Architecture.of_parent(job.run.parent.shape)
    points = frontier(choices, table, parent, settings, best.limits)
    artifacts.write_records(folder / FRONTIER, points)
    baselines = baseline_choices(best.program, choices, job.run.parent.shape, table)
    artifacts.write_records(folder / BASELINES, baselines)
    job.run.progress.say(f"  {summary(answer)}")


def read_choices(job: Job) -> Choices:
    """The scored blocks of every layer and their losses.

    Raises `UserError` where the scores are unfinished or out of date.
    """
    job.manifest(SCORE)
    losses = scores.losses(job.run)
    layers = [
        [block for block in layer if block in job.space.layers[index].blocks]
        for index, layer in enumerate(scores.scored_layers(job.run, losses))
    ]
    values = [losses[index, block.name] for index, layer in enumerate(layers) for block in layer]
    return Choices(layers, np.array(values))


def search(job: Job, choices: Choices) -> tuple[Answer, Searched]:
    """The answer to what the job's child asks, from tables only; nothing is written.

    Raises `Infeasible` where no architecture meets the constraints.
    """
    settings, cost = job.child.search, job.place.cost
    _check(job)
    tables = {name: costs.read(job, name) for name in cost.measured}
    swept = [_search_one(job, name, tables, choices) for name in cost.sweep]
    solved = [one for one in swept if one.solutions]
    if not solved:
        first = swept[0]
        raise Infeasible(
            explain_infeasible(
                first.program, first.constraints, first.tables, settings.time_limit_s
            )
        )
    best = min(solved, key=lambda one: one.solutions[0].objective)
    parent = Architecture.of_parent(job.run.parent.shape)
    answer = Answer(
        constraints=best.constraints,
        time_factor=promise.time_factor(job),
        margin=settings.margin,
        batch_size=best.batch_size,
        sweep=[
            SweepPoint(
                batch_size=one.batch_size,
                objective=one.solutions[0].objective if one.solutions else None,
            )
            for one in swept
        ],
        parent=predict(best.tables | {"main": tables["main"]}, parent),
        solutions=best.solutions,
    )
    return answer, best


def summary(answer: Answer) -> str:
    """One line: the sum of scores, its proof, and the predicted speed."""
    best = answer.best
    child, parent = (
        f"{figures['main'].throughput_tok_per_s:,.0f} tok/s"
        for figures in (best.predicted, answer.parent)
    )
    batch = f" at batch {answer.batch_size}" if len(answer.sweep) > 1 else ""
    return (
        f"score sum {best.objective:.4f}, proven gap {best.gap:.2%}, {best.seconds:.2f} s; "
        f"predicted {child}{batch} (parent {parent})"
    )


def _search_one(job: Job, name: str, all_tables: Tables, choices: Choices) -> Searched:
    """Search with the table called `name` as the main scenario's."""
    settings, factor = job.child.search, promise.time_factor(job)
    tables = {"main": all_tables[name]}
    tables |= {other: all_tables[other] for other in job.place.cost.scenarios}
    parent = Architecture.of_parent(job.run.parent.shape)
    asked = constraints(settings, tables, all_tables["main"], parent)
    limits = [Limit(c.kind, tables[c.scenario], _aimed_limit(c, settings, factor)) for c in asked]
    program = build(choices, limits, settings)
    if settings.architecture is not None:
        solutions = [_given(choices, settings.architecture, tables)]
    else:
        solutions = _solve(program, choices, settings, tables)
    return Searched(tables, asked, limits, program, solutions)


def _aimed_limit(constraint: Constraint, settings: SearchConfig, factor: float) -> float:
    """Timed constraints are aimed at with a margin, from corrected predictions."""
    if not constraint.kind.timed:
        return constraint.limit
    return constraint.limit * (1 - settings.margin) / factor


def _solve(
    program: Program, choices: Choices, settings: SearchConfig, tables: Tables
) -> list[Solution]:
    if settings.homogeneous:
        began = time.perf_counter()
        columns = homogeneous(program, choices)
        if columns is None:
            return []
        loss = float(program.costs[columns].sum())  # all of them were tried: it is the bound, too
        optima = [mip.Optimum(columns, loss, loss, time.perf_counter() - began)]
    else:
        layers = len(choices.layers)
        differ = settings.diversity if settings.diversity >= 1 else settings.diversity * layers
        optima = mip.diverse(
            program,
            solutions=settings.solutions,
            overlap=int(np.floor(layers - differ + 1e-9)),
            gap=settings.gap,
            time_limit_s=settings.time_limit_s,
        )
    return [_solution(optimum, choices, tables) for optimum in optima]


def _solution(optimum: mip.Optimum, choices: Choices, tables: Tables) -> Solution:
    blocks = choices.names(optimum.columns)
    return Solution(
        blocks=blocks,
        objective=optimum.objective,
        bound=optimum.bound,
        gap=optimum.gap,
        seconds=optimum.seconds,
        predicted=predict(tables, Architecture.from_names(blocks)),
    )


def _given(choices: Choices, names: Sequence[str], tables: Tables) -> Solution:
    """Exactly this architecture, with its sum of scores."""
    columns = []
    starts = choices.starts
    for index, (name, layer) in enumerate(zip(names, choices.layers, strict=True)):
        known = [block.name for block in layer]
        if name not in known:
            raise UserError(
                f"search.architecture: layer {index}: got {name!r}, which has no score; expected "
                f"one of {', '.join(known)}"
            )
        columns.append(int(starts[index]) + known.index(name))
    chosen = np.array(columns)
    loss = float(choices.losses[chosen].sum())
    return _solution(mip.Optimum(chosen, loss, loss, 0.0), choices, tables)


def _need(job: Job) -> Need:
    return Need(memory_bytes=2e8, disk_bytes=1e6, seconds=5.0)


WORK = Work(facts=_facts, execute=_execute, need=_need, check=_check)
