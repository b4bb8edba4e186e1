"""One column per group, the least cost within linear limits: the program of appendix B, solved
exactly.

    minimise  costs . x     subject to  one x = 1 in every group,  resources x <= limits,  extra rows,  x binary

Three steps make it fast where plain branch and bound is slow; each is a proof, not a heuristic.

1. The linear relaxation gives multipliers for the rows, and they give every column a reduced cost
   d: a solution that takes a column costs at least bound + d (Lagrange). Only the columns with
   small d, the core, are searched.
2. Variants cost the same in whichever layer they stand, so columns fall into few types of equal
   resources. The core program gets one integer variable per type, the number of layers that use it.
   Once these are fixed what is left is a transportation problem, whose vertices are integral: HiGHS
   branches on a dozen counts instead of on a thousand interchangeable columns.
3. If bound + d of the best column outside the core beats the solution found, the core grows and is
   solved again; otherwise the solution is optimal (to `gap`) for the whole program.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import highspy
import numpy as np

from puzzle.errors import UserError

TOLERANCE = (
    1e-9  # of rows that are scaled to a limit of about 1, and of costs scaled to a maximum of 1
)


@dataclass(frozen=True)
class Row:
    """sum of values x[columns] <= limit, for what couples single columns (diversity, order of
    widths).
    """

    columns: np.ndarray
    values: np.ndarray
    limit: float


@dataclass(frozen=True)
class Program:
    """`starts` [groups + 1] cuts the columns into groups; costs [C]; resources [R, C]; limits [R]."""

    starts: np.ndarray
    costs: np.ndarray
    resources: np.ndarray
    limits: np.ndarray
    extra: tuple[Row, ...] = field(default=())

    @property
    def groups(self) -> np.ndarray:
        """The group of every column, [C]."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    @property
    def least(self) -> np.ndarray:
        """The least of every resource that any choice uses, [R]."""
        return np.minimum.reduceat(self.resources, self.starts[:-1], axis=1).sum(axis=1)

    def feasible(self, chosen: np.ndarray) -> bool:
        """Whether one column per group keeps every limit, to rounding."""
        used = self.resources[:, chosen]
        slack = TOLERANCE * 10 * np.maximum(np.abs(self.limits), np.abs(used).sum(axis=1))
        if (used.sum(axis=1) > self.limits + slack).any():
            return False
        picked = np.zeros(len(self.costs))
        picked[chosen] = 1
        return all(picked[row.columns] @ row.values <= row.limit + TOLERANCE for row in self.extra)


@dataclass(frozen=True)
class Optimum:
    """`bound` is proven: no solution costs less. `gap` = (objective - bound) / |objective|."""

    chosen: np.ndarray  # [groups], the column taken in each
    objective: float
    bound: float
    seconds: float

    @property
    def gap(self) -> float:
        return max(0.0, self.objective - self.bound) / max(abs(self.objective), 1e-12)


def solve(program: Program, *, gap: float = 1e-4, time_limit_s: float = 60.0) -> Optimum | None:
    """The best choice, or None where none keeps the limits. Raises `UserError` where time ends
    without a solution.
    """
    began = time.perf_counter()
    costs, resources, limits, scale = _scaled(program)
    rows = np.vstack([resources, *(_dense(row, len(costs)) for row in program.extra)])
    rights = np.concatenate([limits, [row.limit for row in program.extra]])
    relaxed = _relaxation(program, costs, rows, rights)
    if relaxed is None:
        return None
    bound, extra_cost = relaxed
    groups = len(program.starts) - 1
    width = np.sort(extra_cost)[min(len(costs), 2 * groups + 30) - 1]
    while True:
        core = np.flatnonzero(extra_cost <= width)
        whole = len(core) == len(costs)
        left = time_limit_s - (time.perf_counter() - began)
        found = _solve_core(program, core, costs, resources, limits, gap, max(left, 0.1))
        if found is None and whole:
            return None
        if found is None:
            width = max(3 * width, TOLERANCE) if len(core) < len(costs) / 2 else extra_cost.max()
            continue
        chosen, inner = found
        value = costs[chosen].sum()
        outside = np.inf if whole else bound + extra_cost[extra_cost > width].min()
        proven = max(bound, min(inner, outside))
        if (
            whole
            or value - outside <= max(gap * abs(value), TOLERANCE)
            or time.perf_counter() - began > time_limit_s
        ):
            objective = float(program.costs[chosen].sum())
            return Optimum(
                chosen,
                objective,
                min(objective, float(proven * scale)),
                time.perf_counter() - began,
            )
        width = max(value - bound, np.nextafter(width, np.inf))


def _scaled(program: Program) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Costs with a maximum of 1 and rows with limits of about 1, for the solver's tolerances are
    absolute.
    """
    scale = float(np.abs(program.costs).max(initial=0.0)) or 1.0
    sizes = np.maximum(np.abs(program.limits), np.abs(program.resources).max(axis=1, initial=0.0))
    sizes[sizes == 0] = 1.0
    return program.costs / scale, program.resources / sizes[:, None], program.limits / sizes, scale


def _dense(row: Row, columns: int) -> np.ndarray:
    values = np.zeros(columns)
    values[row.columns] = row.values
    return values


def _relaxation(
    program: Program, costs: np.ndarray, rows: np.ndarray, rights: np.ndarray
) -> tuple[float, np.ndarray] | None:
    """(a lower bound, what each column adds to it at least), or None where even the relaxation is
    infeasible.

    The bound is Lagrange's for the multipliers of the relaxation: valid whatever the solver's
    tolerances did.
    """
    groups, one_each = _choice_rows(program)
    model = _Model(costs, np.vstack([one_each, rows]))
    model.lower[:groups] = model.upper[:groups] = 1.0
    model.upper[groups:] = rights
    highs = model.run({})
    if highs.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return None
    multipliers = np.maximum(0.0, -np.array(highs.getSolution().row_dual)[groups:])
    priced = costs + multipliers @ rows
    best = np.minimum.reduceat(priced, program.starts[:-1])
    return float(best.sum() - multipliers @ rights), priced - best[program.groups]


def _choice_rows(program: Program) -> tuple[int, np.ndarray]:
    groups = len(program.starts) - 1
    return groups, (program.groups[None] == np.arange(groups)[:, None]).astype(float)


def _solve_core(
    program: Program,
    core: np.ndarray,
    costs: np.ndarray,
    resources: np.ndarray,
    limits: np.ndarray,
    gap: float,
    time_limit_s: float,
) -> tuple[np.ndarray, float] | None:
    """(chosen columns, lower bound) over the columns of the core, or None where they hold no
    solution.
    """
    counted = _by_type(resources[:, core])
    free = not program.extra and counted is not None  # counts alone need to be integral
    while True:
        found = _branch(program, core, costs, resources, limits, counted, free, gap, time_limit_s)
        if found is None or found[0] is not None:
            return found  # type: ignore[return-value]
        if not free:
            raise UserError(
                f"search: no solution within {time_limit_s:.0f} s; raise search.time_limit_s or search.gap"
            )
        free = False  # ties can leave a mixture of equal solutions


def _by_type(resources: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(types [R, T], type of every column), or None where columns have little in common."""
    if not len(resources):
        return None
    _, first, types = np.unique(
        np.round(resources, 12), axis=1, return_index=True, return_inverse=True
    )
    return (resources[:, first], types.ravel()) if len(first) <= resources.shape[1] / 2 else None


def _branch(
    program: Program,
    core: np.ndarray,
    costs: np.ndarray,
    resources: np.ndarray,
    limits: np.ndarray,
    counted: tuple[np.ndarray, np.ndarray] | None,
    free: bool,
    gap: float,
    time_limit_s: float,
) -> tuple[np.ndarray | None, float] | None:
    """HiGHS on the core; the chosen columns are None where its solution is not one column per
    group.
    """
    groups, one_each = _choice_rows(program)
    n, types = len(core), 0 if counted is None else counted[0].shape[1]
    extra = [_dense(row, len(costs))[core] for row in program.extra]
    rows = [one_each[:, core], *(row[None] for row in extra)]
    body = np.hstack([np.vstack(rows), np.zeros((groups + len(extra), types))])
    if counted is None:
        body = np.vstack([body, resources[:, core]])
    else:
        of_type = (counted[1][None] == np.arange(types)[:, None]).astype(float)
        used = np.hstack([np.zeros((len(limits), n)), counted[0]])
        body = np.vstack([body, used, np.hstack([of_type, -np.eye(types)])])
    model = _Model(np.concatenate([costs[core], np.zeros(types)]), body)
    model.lower[:groups] = model.upper[:groups] = 1.0
    model.upper[groups : groups + len(extra)] = [row.limit for row in program.extra]
    model.upper[groups + len(extra) : groups + len(extra) + len(limits)] = limits
    if types:
        model.lower[-types:] = model.upper[-types:] = 0.0
        model.largest[n:] = groups
    model.integral[:n] = not free
    model.integral[n:] = True
    options = {
        "mip_rel_gap": gap,
        "mip_abs_gap": TOLERANCE,
        "mip_feasibility_tolerance": TOLERANCE,
        "primal_feasibility_tolerance": TOLERANCE,
        "time_limit": time_limit_s,
        "random_seed": 0,
    }
    highs = model.run(options)
    if highs.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return None
    values = np.array(highs.getSolution().col_value)
    taken = core[values[:n] > 0.5] if len(values) else core[:0]
    one_per_group = np.array_equal(program.groups[taken], np.arange(groups))
    return (taken if one_per_group and program.feasible(taken) else None), float(
        highs.getInfo().mip_dual_bound
    )


class _Model:
    """A program for HiGHS, as dense arrays: minimise cost . x, lower <= rows x <= upper, 0 <= x <=
    largest.
    """

    def __init__(self, cost: np.ndarray, rows: np.ndarray) -> None:
        self.cost, self.rows = cost, rows
        self.lower, self.upper = np.full(len(rows), -np.inf), np.full(len(rows), np.inf)
        self.largest = np.ones(len(cost))
        self.integral = np.zeros(len(cost), dtype=bool)

    def run(self, options: dict[str, float | int]) -> highspy.Highs:
        lp = highspy.HighsLp()
        lp.num_row_, lp.num_col_ = self.rows.shape
        lp.col_cost_ = self.cost.astype(float)
        lp.col_lower_, lp.col_upper_ = np.zeros(len(self.cost)), self.largest
        lp.row_lower_, lp.row_upper_ = self.lower, self.upper
        rows, columns = np.nonzero(self.rows)
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.cumsum([0, *np.bincount(rows, minlength=len(self.rows))]).astype(
            np.int32
        )
        lp.a_matrix_.index_ = columns.astype(np.int32)
        lp.a_matrix_.value_ = self.rows[rows, columns]
        if self.integral.any():
            kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
            lp.integrality_ = [kinds[int(integral)] for integral in self.integral]
        highs = highspy.Highs()
        highs.setOptionValue("output_flag", False)
        for option, value in options.items():
            highs.setOptionValue(option, value)
        highs.passModel(lp)
        highs.run()
        return highs


def nearest(program: Program, time_limit_s: float) -> np.ndarray | None:
    """The choice whose worst violated limit is violated least, relative to the limit: the nearest
    relaxation.
    """
    groups, one_each = _choice_rows(program)
    columns = len(program.costs)
    sizes = np.maximum(np.abs(program.limits), np.abs(program.resources).max(axis=1, initial=1e-12))
    rows = np.hstack([program.resources / sizes[:, None], -np.ones((len(sizes), 1))])
    extra = [np.append(_dense(row, columns), 0.0)[None] for row in program.extra]
    model = _Model(
        np.append(np.zeros(columns), 1.0),
        np.vstack([np.hstack([one_each, np.zeros((groups, 1))]), rows, *extra]),
    )
    model.lower[:groups] = model.upper[:groups] = 1.0
    model.upper[groups:] = [*(program.limits / sizes), *(row.limit for row in program.extra)]
    model.largest[-1] = np.inf
    model.integral[:columns] = True
    highs = model.run({"mip_rel_gap": 1e-3, "time_limit": time_limit_s, "random_seed": 0})
    values = np.array(highs.getSolution().col_value)
    chosen = np.flatnonzero(values[:columns] > 0.5)
    return chosen if len(chosen) == groups else None


def overlap_row(chosen: np.ndarray, most: int) -> Row:
    """At most `most` groups may choose as an earlier solution did (the paper's alpha constraint)."""
    return Row(chosen, np.ones(len(chosen)), float(most))


def diverse(
    program: Program, *, solutions: int, overlap: int, gap: float, time_limit_s: float
) -> list[Optimum]:
    """The best solution, then the best that shares at most `overlap` groups with each before it,
    and so on.
    """
    found: list[Optimum] = []
    while len(found) < solutions:
        one = solve(program, gap=gap, time_limit_s=time_limit_s)
        if one is None:
            break
        found.append(one)
        program = replace(program, extra=(*program.extra, overlap_row(one.chosen, overlap)))
    return found


def starts_of(sizes: Sequence[int]) -> np.ndarray:
    return np.array([0, *itertools.accumulate(sizes)])
