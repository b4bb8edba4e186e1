"""The least cost of one column per group within linear limits, solved exactly (appendix B).

`program.py` states the program.

Three steps make it fast where plain branch and bound is slow; each is a proof, not a heuristic.

1. The linear relaxation gives multipliers for the rows, and they give every column a reduced cost
   d: a solution that takes a column costs at least bound + d (Lagrange). Only the columns with
   small d, the core, are searched.
2. Variants cost the same in whichever layer they stand, so columns fall into few types of equal
   resources. The core program gets one integer variable per type, the number of layers that use it.
   Once these are fixed what is left is a transportation problem, whose vertices are integral: HiGHS
   branches on a dozen counts instead of on a thousand interchangeable columns (`core.py`).
3. If bound + d of the best column outside the core beats the best solution so far, the core grows
   and is solved again; otherwise the solution is optimal (to `gap`) for the full program.

HiGHS works to absolute tolerances, of costs that are scaled to at most 1, so what it proves is in
the scale of the largest cost. A known solution tells which costs are too large to matter: counted
from the least of its group, a column that costs more than that whole solution is in none that is
better, and twice that solution's cost keeps it out as well. So the program is solved again with
larger costs cut down, until the largest is of the size of the objective: then so is the proof.
"""

import time
from dataclasses import dataclass, replace

import numpy as np

from puzzle.search.core import Core
from puzzle.search.highs import Model
from puzzle.search.program import TOLERANCE, Program, Row, one_hot

# The core starts with this many columns of least reduced cost per group, and so many more.
CORE_PER_GROUP, CORE_SPARE = 2, 30
LARGE = 100.0  # costs of so many objectives, and larger ones, are cut down


@dataclass(frozen=True)
class Optimum:
    """The column taken in every group [G]; no solution costs less than `bound`, which is proven."""

    columns: np.ndarray
    objective: float
    bound: float
    seconds: float

    @property
    def gap(self) -> float:
        """(objective - bound) / |objective|."""
        return max(0.0, self.objective - self.bound) / max(abs(self.objective), 1e-12)


def solve(program: Program, *, gap: float, time_limit_s: float = 60.0) -> Optimum | None:
    """The best choice, or None where none keeps the limits.

    Raises `UserError` where the time ends without a solution.
    """
    began = time.perf_counter()
    least_G = np.minimum.reduceat(program.costs, program.starts[:-1])
    base = float(least_G.sum())
    extra_C = program.costs - least_G[program.groups]  # at least 0: beyond the least of the group
    best: Optimum | None = None
    while True:
        time_left_s = max(time_limit_s - (time.perf_counter() - began), 0.1)
        optimum = _solve(replace(program, costs=extra_C), base, gap, time_left_s)
        if optimum is None:
            return None
        if best is None or optimum.objective < best.objective:
            best = optimum
        size = best.objective
        is_late = time.perf_counter() - began > time_limit_s
        if is_late or not size or extra_C.max() <= LARGE * max(size, abs(base + size) * gap):
            break
        extra_C = np.minimum(extra_C, 2 * size)
    bound = min(optimum.bound, best.objective)
    seconds = time.perf_counter() - began
    objective = float(program.costs[best.columns].sum())
    return Optimum(best.columns, objective, min(objective, base + bound), seconds)


def _solve(program: Program, base: float, gap: float, time_limit_s: float) -> Optimum | None:
    """The best choice of a program whose costs, and `base`, add up to the objective."""
    began = time.perf_counter()
    scaled, cost_unit = program.scaled()
    relaxation = _relaxation(scaled)
    if relaxation is None:
        return None
    reduced_C = relaxation.reduced_costs
    core_size = min(len(reduced_C), CORE_PER_GROUP * program.group_count + CORE_SPARE)
    width = np.sort(reduced_C)[core_size - 1]
    while True:
        columns = np.flatnonzero(reduced_C <= width)
        complete = len(columns) == len(reduced_C)
        time_left_s = time_limit_s - (time.perf_counter() - began)
        core = Core.of(program, scaled, columns, base / cost_unit)
        solution = core.solve(gap, max(time_left_s, 0.1))
        if solution is None:
            if complete:
                return None
            narrow = len(columns) < len(reduced_C) / 2
            width = max(3 * width, TOLERANCE) if narrow else reduced_C.max()
            continue
        value = scaled.costs[solution.columns].sum()
        outside = np.inf if complete else relaxation.bound + reduced_C[reduced_C > width].min()
        allowed = gap * abs(value + base / cost_unit)
        proven = complete or value - outside <= max(allowed, TOLERANCE)
        if proven or time.perf_counter() - began > time_limit_s:
            objective = float(program.costs[solution.columns].sum())
            bound = float(max(relaxation.bound, min(solution.bound, outside)) * cost_unit)
            seconds = time.perf_counter() - began
            return Optimum(solution.columns, objective, min(objective, bound), seconds)
        width = max(value - relaxation.bound, np.nextafter(width, np.inf))


@dataclass(frozen=True)
class _Relaxation:
    """No solution costs less than `bound`; one that takes a column, than bound + reduced cost.

    `reduced_costs` [C] are at least 0.
    """

    bound: float
    reduced_costs: np.ndarray


def _relaxation(scaled: Program) -> _Relaxation | None:
    """The linear relaxation, or None where even that is infeasible.

    The bound is Lagrange's for the multipliers of the relaxation: valid whatever the tolerances of
    HiGHS did to them.
    """
    group_count = scaled.group_count
    rows = np.vstack([scaled.resources, scaled.extra_rows])
    limits = np.concatenate([scaled.limits, scaled.extra_limits])
    model = Model(scaled.costs, np.vstack([one_hot(scaled.groups, group_count), rows]))
    model.lower[:group_count] = model.upper[:group_count] = 1.0
    model.upper[group_count:] = limits
    answer = model.run({})
    if answer.infeasible:
        return None
    multipliers = np.maximum(0.0, -answer.row_duals[group_count:])
    priced_C = scaled.costs + multipliers @ rows
    cheapest_G = np.minimum.reduceat(priced_C, scaled.starts[:-1])
    bound = float(cheapest_G.sum() - multipliers @ limits)
    return _Relaxation(bound, priced_C - cheapest_G[scaled.groups])


def diverse(
    program: Program, *, solutions: int, overlap: int, gap: float, time_limit_s: float
) -> list[Optimum]:
    """The best solution, then the best that differs enough from it, and so on.

    Raises `UserError` where the time ends without a solution.

    Args:
        program: What to solve; its extra rows hold for every solution.
        solutions: How many are asked for.
        overlap: In how many groups at most two solutions may take the same column.
        gap: The relative gap to prove, for each solution.
        time_limit_s: Seconds for each solution.

    Returns:
        The solutions, best first; fewer than asked for where there are no more.
    """
    optima: list[Optimum] = []
    while len(optima) < solutions:
        optimum = solve(program, gap=gap, time_limit_s=time_limit_s)
        if optimum is None:
            break
        optima.append(optimum)
        program = replace(program, extra=(*program.extra, overlap_row(optimum.columns, overlap)))
    # Within the gap a later one can be better. What is proven of the first holds for all.
    ranked = sorted(optima, key=lambda optimum: optimum.objective)
    return [replace(ranked[0], bound=optima[0].bound), *ranked[1:]] if ranked else []


def overlap_row(columns: np.ndarray, most: int) -> Row:
    """At most `most` groups may take the column that an earlier solution took there.

    `columns` [G] is the earlier solution. The paper's alpha constraint (appendix B).
    """
    return Row(columns, np.ones(len(columns)), float(most))


def nearest(program: Program, time_limit_s: float) -> np.ndarray | None:
    """The choice [G] whose worst violated limit is violated least: the nearest relaxation.

    A violation is relative to the limit, or to the largest resource of its row where that is
    larger. None where the time ends without a choice or the extra rows alone allow none.
    """
    scaled, _ = program.scaled()
    group_count, column_count = scaled.group_count, len(scaled.costs)
    one_per_group = one_hot(scaled.groups, group_count)
    rows = np.vstack([one_per_group, scaled.resources, scaled.extra_rows])
    excess = np.zeros((len(rows), 1))  # one more column: by how much every limit is raised
    excess[group_count : group_count + len(scaled.limits)] = -1.0
    model = Model(np.append(np.zeros(column_count), 1.0), np.hstack([rows, excess]))
    model.lower[:group_count] = model.upper[:group_count] = 1.0
    model.upper[group_count:] = np.concatenate([scaled.limits, scaled.extra_limits])
    model.largest[-1] = np.inf
    model.integral[:column_count] = True
    answer = model.run({"mip_rel_gap": 1e-3, "time_limit": time_limit_s, "random_seed": 0})
    columns = np.flatnonzero(answer.values[:column_count] > 0.5)
    return columns if len(columns) == group_count else None
