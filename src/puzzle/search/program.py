"""The search program as data: one column per group within linear limits (appendix B).

    minimise    costs . x
    subject to  the x of every group sum to 1
                resources x <= limits
                extra rows
                x binary

A group is a layer and its columns are the block variants the layer may take; nothing here knows
that. Shapes: G groups, C columns, R resources, E extra rows. `mip.py` solves it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

# Of rows that are scaled to a limit of about 1, and of costs scaled to a maximum of 1.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Row:
    """`values . x[columns] <= limit`: couples single columns (diversity, order of widths)."""

    columns: np.ndarray
    values: np.ndarray
    limit: float

    def dense(self, column_count: int) -> np.ndarray:
        """The coefficient of every column of the program, [C]."""
        values = np.zeros(column_count)
        values[self.columns] = self.values
        return values


@dataclass(frozen=True)
class Program:
    """`starts` [G + 1] cuts the columns into groups; costs [C]; resources [R, C]; limits [R]."""

    starts: np.ndarray
    costs: np.ndarray
    resources: np.ndarray
    limits: np.ndarray
    extra: tuple[Row, ...] = ()

    @property
    def group_count(self) -> int:
        """G."""
        return len(self.starts) - 1

    @property
    def groups(self) -> np.ndarray:
        """The group of every column, [C]."""
        return np.repeat(np.arange(self.group_count), np.diff(self.starts))

    @property
    def extra_rows(self) -> np.ndarray:
        """The extra rows with a coefficient for every column, [E, C]."""
        rows = [row.dense(len(self.costs)) for row in self.extra]
        return np.array(rows).reshape(len(rows), len(self.costs))

    @property
    def extra_limits(self) -> np.ndarray:
        """The limits of the extra rows, [E]."""
        return np.array([row.limit for row in self.extra], dtype=float)

    @property
    def least(self) -> np.ndarray:
        """The least of every resource that any choice uses, [R]."""
        least_RG = np.minimum.reduceat(self.resources, self.starts[:-1], axis=1)
        least: np.ndarray = least_RG.sum(axis=1)
        return least

    @property
    def row_sizes(self) -> np.ndarray:
        """The unit of every row of resources, [R].

        It is the larger of the limit and of the largest single resource, in absolute value; 1 for a
        row of zeros.
        """
        largest = np.abs(self.resources).max(axis=1, initial=0.0)
        sizes: np.ndarray = np.maximum(np.abs(self.limits), largest)
        sizes[sizes == 0] = 1.0
        return sizes

    def scaled(self) -> tuple["Program", float]:
        """(the program in the units of HiGHS, the size of its unit of cost).

        The tolerances of HiGHS are absolute, so costs get a maximum of 1 and rows get limits of
        about 1.
        """
        cost_unit = float(np.abs(self.costs).max(initial=0.0)) or 1.0
        sizes = self.row_sizes
        program = replace(
            self,
            costs=self.costs / cost_unit,
            resources=self.resources / sizes[:, None],
            limits=self.limits / sizes,
        )
        return program, cost_unit

    def feasible(self, columns: np.ndarray) -> bool:
        """Whether taking `columns` [G], one per group, keeps every limit, to rounding."""
        used = self.resources[:, columns]
        slack = TOLERANCE * 10 * np.maximum(np.abs(self.limits), np.abs(used).sum(axis=1))
        if (used.sum(axis=1) > self.limits + slack).any():
            return False
        taken = np.zeros(len(self.costs))
        taken[columns] = 1
        return all(taken[r.columns] @ r.values <= r.limit + TOLERANCE for r in self.extra)


def starts_of(sizes: Sequence[int]) -> np.ndarray:
    """`Program.starts` of groups with so many columns each."""
    return np.array([0, *itertools.accumulate(sizes)])


def one_hot(labels: np.ndarray, count: int) -> np.ndarray:
    """[count, labels]: row r is 1.0 where the label is r, else 0.0.

    For the groups of columns it is the left side of "the x of every group sum to 1".
    """
    equal: np.ndarray = labels[None] == np.arange(count)[:, None]
    return equal.astype(float)
