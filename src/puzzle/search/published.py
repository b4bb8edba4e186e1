"""`puzzle search --table`: search a published block-library table (`table.py`), without a run.

One variant is chosen per layer. Any dotted key of the table can be minimised or maximised, and
bounded from above and below in its sum over layers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from pydantic import JsonValue

from puzzle.errors import Infeasible, UserError
from puzzle.search import mip
from puzzle.search.program import Program
from puzzle.search.table import Table


@dataclass(frozen=True)
class Bound:
    """The sum of `key` over layers is at most `value`, or at least."""

    key: str
    value: float
    at_least: bool = False

    @property
    def sign(self) -> float:
        """The program knows only upper limits: what is bounded from below is negated."""
        return -1.0 if self.at_least else 1.0

    def __str__(self) -> str:
        return f"{self.key} {'at least' if self.at_least else 'at most'} {self.value:g}"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of a table.

    Args:
        target: The key whose sum over layers is minimised, or maximised with `maximize`.
        bounds: What every solution keeps.
        gap: The relative gap to prove.
        solutions: How many are asked for.
        differ: In how many layers each differs from those before it.
        time_limit_s: Seconds for each solution.
    """

    target: str
    maximize: bool = False
    bounds: Sequence[Bound] = ()
    gap: float = 1e-4
    solutions: int = 1
    differ: int = 1
    time_limit_s: float = 60.0

    @property
    def sign(self) -> float:
        """The program only minimises: what is maximised is negated."""
        return -1.0 if self.maximize else 1.0

    @property
    def keys(self) -> list[str]:
        """Every key that the question names, once."""
        return list(dict.fromkeys([self.target, *(bound.key for bound in self.bounds)]))


@dataclass(frozen=True)
class TableSolution:
    """One answer: the sum of the target, what it cannot be better than, and the choices.

    `seconds` is the time to find and prove it, `totals` the sum of every key that the question
    names, `choices` the variant of every layer.
    """

    objective: float
    bound: float
    gap: float
    seconds: float
    totals: dict[str, float]
    choices: dict[str, str]

    def as_dict(self) -> dict[str, JsonValue]:
        """What `puzzle search --table --json` prints."""
        return asdict(self)


def parse_bounds(texts: Sequence[str], *, at_least: bool) -> list[Bound]:
    """The bounds in the `KEY=NUMBER` texts of `--max`, or `--min` with `at_least`."""
    option = "--min" if at_least else "--max"
    bounds = []
    for text in texts:
        key, _, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not key or not math.isfinite(number):
            raise UserError(
                f"{option} {text!r}: expected KEY=NUMBER, "
                f"for example {option} stats.runtime_ms=32679"
            )
        bounds.append(Bound(key, number, at_least))
    return bounds


def search(table: Table, question: Question) -> list[TableSolution]:
    """Solutions, best first, each different enough from those before it.

    Raises `Infeasible`, which names the bounds that cannot be met, where there is none.
    """
    columns = {key: table.column(key) for key in question.keys}
    program = _program(table, question, columns)
    optima = mip.diverse(
        program,
        solutions=question.solutions,
        overlap=len(table.layers) - question.differ,
        gap=question.gap,
        time_limit_s=question.time_limit_s,
    )
    if not optima:
        raise Infeasible(_explain(program, question))
    names = table.names
    return [
        TableSolution(
            objective=question.sign * optimum.objective,
            bound=question.sign * optimum.bound,
            gap=optimum.gap,
            seconds=round(optimum.seconds, 4),
            totals={key: float(figures[optimum.columns].sum()) for key, figures in columns.items()},
            choices={
                layer: names[column]
                for layer, column in zip(table.layers, optimum.columns, strict=True)
            },
        )
        for optimum in optima
    ]


def _program(table: Table, question: Question, columns: Mapping[str, np.ndarray]) -> Program:
    """The question as a program; `columns` are the figures of its keys."""
    for key, figures in columns.items():
        if key.startswith("stats.") and (figures < 0).any():
            raise UserError(
                f"table: {key} is {figures.min():g} somewhere; expected resources of at least 0"
            )
    starts, bounds = table.starts, question.bounds
    rows = [bound.sign * columns[bound.key] for bound in bounds]
    return Program(
        starts,
        costs=question.sign * columns[question.target],
        resources=np.array(rows).reshape(len(rows), starts[-1]),
        limits=np.array([bound.sign * bound.value for bound in bounds]),
    )


def _explain(program: Program, question: Question) -> str:
    """One line: the best attainable of every bound alone, and the nearest choice to all."""
    lines = []
    for bound, best, limit in zip(question.bounds, program.least, program.limits, strict=True):
        alone = "reachable alone" if best <= limit else "out of reach"
        lines.append(f"{bound} is {alone} (best attainable: {bound.sign * best:.8g})")
    nearest = mip.nearest(program, question.time_limit_s)
    if nearest is not None:
        used = program.resources[:, nearest].sum(axis=1)
        totals = [
            f"{bound.key}={bound.sign * total:.8g}"
            for bound, total in zip(question.bounds, used, strict=True)
        ]
        lines.append(f"the nearest that is possible: {', '.join(totals)}")
    return "search: no choice meets the bounds: " + "; ".join(lines)
