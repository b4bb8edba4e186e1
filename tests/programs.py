"""Random search programs, and their optimum by trying every choice."""

import itertools
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from puzzle.search.program import Program, starts_of


@st.composite
def programs(draw):
    """2 to 5 groups of 2 to 4 columns, 0 to 3 limits.

    Small integers make ties and tight limits common. Half of the programs have the same resources
    in every group, as measured costs do: these are solved by counting.
    """
    sizes = draw(st.lists(st.integers(2, 4), min_size=2, max_size=5))
    columns = sum(sizes)
    numbers = st.lists(st.integers(-3, 9), min_size=columns, max_size=columns)
    if draw(st.booleans()):
        kinds = draw(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), max_size=3))
        rows = [[kind[j] for n in sizes for j in range(n)] for kind in kinds]
    else:
        rows = draw(st.lists(numbers, max_size=3))
    limits = [draw(st.integers(0, 9 * len(sizes))) for _ in rows]
    costs = np.array(draw(numbers)) * draw(st.sampled_from([1.0, 1e-4, 1e5]))
    resources = np.array(rows, dtype=float).reshape(len(rows), columns)
    return Program(starts_of(sizes), costs, resources, np.array(limits, dtype=float))


@st.composite
def uneven_programs(draw):
    """The same with costs over ten orders of magnitude: a no-op beside a nearly lossless block."""
    program = draw(programs())
    count = len(program.costs)
    exponents = draw(st.lists(st.floats(-10, 0), min_size=count, max_size=count))
    powers = 10.0 ** np.array(exponents)
    return replace(program, costs=powers * draw(st.sampled_from([1.0, 1e3, 1e-4])))


def every_choice(program):
    """Every choice of one column per group."""
    ranges = [range(start, end) for start, end in itertools.pairwise(program.starts)]
    return [list(choice) for choice in itertools.product(*ranges)]


def brute_force(program):
    """The least cost of a choice within the limits, or None."""
    best = None
    for columns in every_choice(program):
        used = [row[columns].sum() for row in program.resources]
        if any(total > limit + 1e-9 for total, limit in zip(used, program.limits, strict=True)):
            continue
        taken = np.bincount(columns, minlength=len(program.costs))
        if any(taken[row.columns] @ row.values > row.limit + 1e-9 for row in program.extra):
            continue
        cost = program.costs[columns].sum()
        best = cost if best is None else min(best, cost)
    return best
