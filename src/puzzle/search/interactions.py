"""What replacements do to each other: a form with interactions, and its least value, proven.

Replace-1-block scores say what an exchange of one block costs at the parent; scores around a child
(`around.py`) say what the same exchange costs there. If blocks were independent the two would be
equal. Their difference is what the block does together with all blocks that the child has replaced.
The simplest form in which it occurs, with x the blocks that are taken,

    KL(x) = sum_a private_a x_a + (sum_a shared_a x_a)^2,

has two unknowns a block, and the two sets of scores determine them: no pair is ever measured. With
U the sum of the child's shared parts, u that of the child's block in this layer and v that of
another one,

    (cost of the exchange at the child) - (cost at the parent) = 2 (U - u) (v - u).

For the parent's own block, v = 0, these are G equations in the u; the others follow one by one.
docs/log.md (2026-11-26) has how well it predicts children that are many exchanges away.

The form is convex and its only square is that of one number, t = sum_a shared_a x_a. Wherever t^2
is replaced by its tangent 2 m t - m^2, which is never above it, an ordinary program is left, and
what `mip.py` proves of that is a bound for the form; at t = m it is exact. So the least value is
found by branching on t alone.
"""

import heapq
import itertools
import time
from dataclasses import dataclass, replace

import numpy as np

from puzzle.errors import UserError
from puzzle.search import mip
from puzzle.search.mip import Optimum
from puzzle.search.program import Program, Row

LEAST_SHARED = 0.02  # of the child's KL; less cannot be told from none
ROUNDS = 1000  # of the fixed point
INNER_GAP = 0.25  # of the gap that is asked for is left to every program


@dataclass(frozen=True)
class Interactions:
    """The form, for the columns [C] of a program of G groups."""

    private: np.ndarray
    shared: np.ndarray

    def value(self, columns: np.ndarray) -> float:
        """KL of taking `columns` [G], nats per token."""
        return float(self.private[columns].sum() + self.shared[columns].sum() ** 2)

    @classmethod
    def between(
        cls, program: Program, own: np.ndarray, kl: float, exchanged: np.ndarray
    ) -> "Interactions":
        """From the scores at the parent and around a child. At the child the shared part is 0.

        Args:
            program: its costs [C] are the scores at the parent; the parent's block is the first
                column of every group.
            own: the child's columns [G].
            kl: the child's KL, nats per token.
            exchanged: the KL with one block exchanged, for every column [C]; for the child's own
                columns the child's KL.
        """
        groups, parents = program.groups, program.starts[:-1]
        at_child = exchanged - kl
        at_parent = program.costs - program.costs[own][groups]
        together = (at_child - at_parent) / 2  # (U - u) (v - u)
        products = -together[parents]  # (U - u) u
        shared = np.zeros(len(groups))
        if products.sum() > LEAST_SHARED * abs(kl):  # the parent's may round to below zero
            others = _others(products)  # U - u
            shared = together / others[groups]
        shared[own] = 0.0
        private = at_child - shared**2 + kl / program.group_count
        return cls(private, shared)


def _others(products: np.ndarray) -> np.ndarray:
    """U - u of every group [G], from the products (U - u) u, whose sum is above 0.

    Where a product is larger than any u allows, u is taken for half of U.
    """
    total = float(np.sqrt(products.sum()))
    parts = np.zeros(len(products))
    for _ in range(ROUNDS):
        parts = total / 2 - np.sqrt(np.maximum(total**2 / 4 - products, 0.0))
        following = float(np.sqrt(products.sum() + (parts**2).sum()))
        if abs(following - total) <= 1e-12 * total:
            break
        total = (total + following) / 2
    others: np.ndarray = total - parts
    return others


@dataclass(frozen=True, order=True)
class _Part:
    """The solutions with low <= t <= high; none of them costs less than `bound`."""

    bound: float
    number: int  # parts of equal bound are taken in their order
    low: float
    high: float
    at: float  # where the tangent touches


def solve(
    program: Program, form: Interactions, *, gap: float = 1e-4, time_limit_s: float = 60.0
) -> Optimum | None:
    """The choice of the form's least value, or None where none keeps the limits.

    Raises `UserError` where the time ends without a solution.

    Args:
        program: what must be kept; its costs do not count.
        form: what is least.
        gap: of the value, to be proven.
        time_limit_s: seconds; then the best is returned with the gap that is left.
    """
    began = time.perf_counter()
    starts, numbers = program.starts[:-1], itertools.count()
    least = float(np.minimum.reduceat(form.shared, starts).sum())
    most = float(np.maximum.reduceat(form.shared, starts).sum())
    best: np.ndarray | None = None
    value, closed = np.inf, np.inf  # closed: the least bound of what was not looked at further
    open_parts = [_Part(-np.inf, next(numbers), least, most, min(max(0.0, least), most))]
    while open_parts:
        part = heapq.heappop(open_parts)
        left_s = time_limit_s - (time.perf_counter() - began)
        if best is not None and (value - part.bound <= gap * abs(value) or left_s <= 0):
            closed = min(closed, part.bound)
            break  # no other part has a lower bound
        try:
            found = _tangent(program, form, part, (least, most), INNER_GAP * gap, max(left_s, 0.1))
        except UserError:  # the time has ended
            if best is None:
                raise
            closed = min(closed, part.bound)
            break
        if found is None:
            continue
        bound, t = max(part.bound, found.bound), float(form.shared[found.columns].sum())
        if form.value(found.columns) < value:
            best, value = found.columns, form.value(found.columns)
        if value - bound <= gap * abs(value) or part.high - part.low <= 1e-12 * (most - least):
            closed = min(closed, bound)
            continue
        cut, width = (t + part.at) / 2, part.high - part.low
        if not part.low + width / 8 <= cut <= part.high - width / 8:
            cut = (part.low + part.high) / 2
        for low, high in ((part.low, cut), (cut, part.high)):
            at = t if low <= t <= high else (low + high) / 2
            heapq.heappush(open_parts, _Part(bound, next(numbers), low, high, at))
    if best is None:
        return None
    return Optimum(best, value, min(closed, value), time.perf_counter() - began)


def _tangent(
    program: Program,
    form: Interactions,
    part: _Part,
    whole: tuple[float, float],
    gap: float,
    time_limit_s: float,
) -> Optimum | None:
    """The best of a part where t^2 is its tangent; its bound is one of the form."""
    costs = form.private + 2 * part.at * form.shared
    every, extra, unit = np.arange(len(costs)), list(program.extra), whole[1] - whole[0]
    if part.low > whole[0]:
        extra.append(Row(every, -form.shared / unit, -part.low / unit))
    if part.high < whole[1]:
        extra.append(Row(every, form.shared / unit, part.high / unit))
    cut = replace(program, costs=costs, extra=tuple(extra))
    found = mip.solve(cut, gap=gap, time_limit_s=time_limit_s)
    if found is None:
        return None
    square = part.at**2
    return replace(found, objective=found.objective - square, bound=found.bound - square)
