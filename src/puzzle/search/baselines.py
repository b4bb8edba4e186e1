"""Other ways to choose one block per layer, to compare the exact search with. Each is a function on
a `mip.Program`.

The paper compares with its greedy, with the most parameters and with random choices (sections 5 and
F); evolutionary search is the way of LLaMA-NAS. Each returns the chosen column of every layer, or
None where it finds none that fits.
"""

import itertools
from dataclasses import replace

import numpy as np

from puzzle.search import mip

RANDOM_CHOICES, POPULATION, GENERATIONS = 20, 100, 100


def choices(
    program: mip.Program, parameters: np.ndarray, parent_or_no_op: np.ndarray
) -> dict[str, np.ndarray | None]:
    """Every baseline by name; `parameters` [C] and `parent_or_no_op` [C] (nothing is shrunk)
    describe the columns.
    """
    return {
        "greedy": greedy(program),
        "most parameters": most_parameters(program, parameters),
        "random": random(program, seed=0),
        "no-op only": no_op_only(program, parent_or_no_op),
        "evolutionary": evolutionary(program, seed=0),
    }


def greedy(program: mip.Program) -> np.ndarray | None:
    """The paper's: equal budgets, layers by rising mean score, the best block that fits; what is
    left passes on.
    """
    starts, layers = program.starts, len(program.starts) - 1
    means = [program.costs[a:b].mean() for a, b in itertools.pairwise(starts)]
    allowance, left = program.limits / layers, np.zeros(len(program.limits))
    chosen = np.zeros(layers, dtype=int)
    for layer in np.argsort(means, kind="stable"):
        columns = np.arange(starts[layer], starts[layer + 1])
        budget = allowance + left
        fits = (program.resources[:, columns] <= budget[:, None] * (1 + 1e-12)).all(axis=0)
        if fits.any():
            best = columns[fits][program.costs[columns[fits]].argmin()]
        # Nothing fits: the block that is furthest below, in shares of the allowance; the debt is
        # passed on
        else:
            best = columns[
                (program.resources[:, columns] / np.maximum(np.abs(allowance), 1e-12)[:, None])
                .max(axis=0, initial=0)
                .argmin()
            ]
        left = budget - program.resources[:, best]
        chosen[layer] = best
    return chosen if program.feasible(chosen) else None


def most_parameters(program: mip.Program, parameters: np.ndarray) -> np.ndarray | None:
    """The paper's ablation: as many parameters as the limits allow, scores ignored."""
    found = mip.solve(replace(program, costs=-parameters), gap=1e-4)
    return None if found is None else found.chosen


def random(program: mip.Program, seed: int) -> np.ndarray | None:
    """The median by score of several choices that fit, each the best for random scores."""
    generator = np.random.default_rng(seed)
    found = [
        mip.solve(replace(program, costs=generator.random(len(program.costs))), gap=0.05)
        for _ in range(RANDOM_CHOICES)
    ]
    ranked = sorted(
        (one.chosen for one in found if one), key=lambda chosen: program.costs[chosen].sum()
    )
    return ranked[len(ranked) // 2] if ranked else None


def no_op_only(program: mip.Program, parent_or_no_op: np.ndarray) -> np.ndarray | None:
    """The best with whole subblocks kept or removed."""
    columns = np.flatnonzero(parent_or_no_op)
    sizes = [int(parent_or_no_op[a:b].sum()) for a, b in itertools.pairwise(program.starts)]
    if not all(sizes) or program.extra:
        return None
    limited = mip.Program(
        mip.starts_of(sizes), program.costs[columns], program.resources[:, columns], program.limits
    )
    found = mip.solve(limited, gap=1e-4)
    return None if found is None else columns[found.chosen]


def evolutionary(program: mip.Program, seed: int) -> np.ndarray | None:
    """Tournaments, uniform crossover, mutation; what does not fit ranks after all that does (Deb's
    rule).
    """
    generator = np.random.default_rng(seed)
    starts, sizes = program.starts[:-1], np.diff(program.starts)
    layers = len(sizes)
    scale = np.maximum(np.abs(program.limits), np.abs(program.resources).max(axis=1, initial=1e-12))

    def rank(population_PL: np.ndarray) -> np.ndarray:
        columns = starts + population_PL
        used = program.resources[:, columns].sum(axis=2)  # [R, P]
        over = np.maximum(0.0, (used - program.limits[:, None]) / scale[:, None]).sum(axis=0)
        scores = program.costs[columns].sum(axis=1)
        return np.where(over > 1e-9, np.abs(program.costs).sum() * (1 + over), scores)

    population = (generator.random((POPULATION, layers)) * sizes).astype(int)
    ranks = rank(population)
    for _ in range(GENERATIONS):
        pairs = generator.integers(POPULATION, size=(2, POPULATION, 2))
        winners = np.where(
            ranks[pairs[..., 0]] <= ranks[pairs[..., 1]], pairs[..., 0], pairs[..., 1]
        )
        mixed = np.where(
            generator.random((POPULATION, layers)) < 0.5,
            population[winners[0]],
            population[winners[1]],
        )
        fresh = (generator.random((POPULATION, layers)) * sizes).astype(int)
        children = np.where(generator.random((POPULATION, layers)) < 1.5 / layers, fresh, mixed)
        everyone, all_ranks = (
            np.concatenate([population, children]),
            np.concatenate([ranks, rank(children)]),
        )
        best = np.argsort(all_ranks, kind="stable")[:POPULATION]
        population, ranks = everyone[best], all_ranks[best]
    chosen = starts + population[0]
    return chosen if program.feasible(chosen) else None
