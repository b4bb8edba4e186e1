"""The core of a program: the columns that may be in the best solution, searched by counting types.

Why the columns outside the core can be left out, and why counting types suffices, is proven in
`mip.py`.
"""

from dataclasses import dataclass

import numpy as np

from puzzle.errors import UserError
from puzzle.search.highs import Model
from puzzle.search.program import TOLERANCE, Program, one_hot


@dataclass(frozen=True)
class Types:
    """Columns of equal resources have one type: `resources` [R, T] and `of_column` [N]."""

    resources: np.ndarray
    of_column: np.ndarray

    @classmethod
    def of(cls, resources: np.ndarray) -> "Types | None":
        """The types of columns with these resources [R, N], or None where few columns are equal."""
        if not len(resources):
            return None
        rounded = np.round(resources, 12)
        _, first, types = np.unique(rounded, axis=1, return_index=True, return_inverse=True)
        if len(first) > resources.shape[1] / 2:
            return None
        return cls(resources[:, first], types.ravel())

    @property
    def count(self) -> int:
        """T."""
        return len(self.resources[0])


@dataclass(frozen=True)
class CoreSolution:
    """The column taken in every group [G]; no choice within the core costs less than `bound`.

    The bound is in scaled costs.
    """

    columns: np.ndarray
    bound: float


@dataclass(frozen=True)
class Core:
    """The columns [N] of a program that are searched.

    `scaled` is what HiGHS is given; a solution is checked against the `program` as it was asked.
    """

    program: Program
    scaled: Program
    columns: np.ndarray
    types: Types | None
    base: float  # of the objective beside the scaled costs; gaps are relative to both

    @classmethod
    def of(cls, program: Program, scaled: Program, columns: np.ndarray, base: float) -> "Core":
        """The core of these columns, sorted into types where that makes the program smaller."""
        return cls(program, scaled, columns, Types.of(scaled.resources[:, columns]), base)

    def solve(self, gap: float, time_limit_s: float) -> CoreSolution | None:
        """The best choice within the core, or None where it holds none that keeps the limits.

        Raises `UserError` where the time ends without a solution.
        """
        options = {
            "mip_rel_gap": gap,
            "mip_abs_gap": TOLERANCE,
            "mip_feasibility_tolerance": TOLERANCE,
            "primal_feasibility_tolerance": TOLERANCE,
            "dual_feasibility_tolerance": TOLERANCE,
            "time_limit": time_limit_s,
            "random_seed": 0,
        }
        # Integral counts make the columns integral too. Only ties can leave a mixture of equal
        # solutions; then the columns are made integral as well.
        counts_suffice = self.types is not None and not self.program.extra
        for integral_columns in (False, True) if counts_suffice else (True,):
            answer = self._model(integral_columns).run(options)
            if answer.infeasible:
                return None
            columns = self._choice(answer.values)
            if columns is not None:
                return CoreSolution(columns, answer.bound - self.base)
        raise UserError(
            f"search: no solution within {time_limit_s:.0f} s; "
            "raise search.time_limit_s or search.gap"
        )

    def _choice(self, values: np.ndarray) -> np.ndarray | None:
        """The columns HiGHS took, or None where they are not one per group within the limits."""
        if not len(values):
            return None
        taken = self.columns[values[: len(self.columns)] > 0.5]
        groups = np.arange(self.program.group_count)
        if not np.array_equal(self.program.groups[taken], groups):
            return None
        return taken if self.program.feasible(taken) else None

    def _model(self, integral_columns: bool) -> Model:
        """The core for HiGHS: its columns and after them the count of every type."""
        column_count, type_count = len(self.columns), self.types.count if self.types else 0
        costs = np.concatenate([self.scaled.costs[self.columns], np.zeros(type_count)])
        model = Model(costs, self._rows(), self.base)
        ends = np.cumsum([self.scaled.group_count, len(self.scaled.extra), len(self.scaled.limits)])
        model.lower[: ends[0]] = model.upper[: ends[0]] = 1.0
        model.upper[ends[0] : ends[1]] = self.scaled.extra_limits
        model.upper[ends[1] : ends[2]] = self.scaled.limits
        model.lower[ends[2] :] = model.upper[ends[2] :] = 0.0
        model.largest[column_count:] = self.scaled.group_count
        model.integral[:column_count] = integral_columns
        model.integral[column_count:] = True
        return model

    def _rows(self) -> np.ndarray:
        """[G + E + R, N], or [G + E + R + T, N + T] with types.

        Without types the resources are those of the columns; with types, those of the counts, and
        every count equals the number of its columns that are taken.
        """
        scaled, columns, types = self.scaled, self.columns, self.types
        one_per_group = one_hot(scaled.groups[columns], scaled.group_count)
        choice = np.vstack([one_per_group, scaled.extra_rows[:, columns]])
        if types is None:
            return np.vstack([choice, scaled.resources[:, columns]])
        return np.block(
            [
                [choice, np.zeros((len(choice), types.count))],
                [np.zeros((len(scaled.limits), len(columns))), types.resources],
                [one_hot(types.of_column, types.count), -np.eye(types.count)],
            ]
        )
