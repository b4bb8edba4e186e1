"""Other ways to choose one block per layer, to compare the exact search with.

The paper compares with its greedy, with the most parameters and with random choices (sections 5 and
F); evolutionary search is the way of LLaMA-NAS. Each returns the column taken in every layer, or
None where it finds no choice within the limits. Shapes: L layers, C columns, P population.
"""

import itertools
from dataclasses import replace

import numpy as np

from puzzle.search import mip
from puzzle.search.program import Program, starts_of

RANDOM_CHOICES, POPULATION, GENERATIONS = 20, 100, 100


def choices(
    program: Program, parameters: np.ndarray, parent_or_no_op: np.ndarray
) -> dict[str, np.ndarray | None]:
    """The choice [L] of every baseline, by its name.

    The columns are described by their number of `parameters` [C] and by whether both subblocks are
    the parent's or a no-op, so that nothing is shrunk: `parent_or_no_op` [C].
    """
    return {
        "greedy": greedy(program),
        "most parameters": most_parameters(program, parameters),
        "random": random_scores(program, seed=0),
        "no-op only": no_op_only(program, parent_or_no_op),
        "evolutionary": evolutionary(program, seed=0),
    }


def greedy(program: Program) -> np.ndarray | None:
    """The paper's: equal budgets, layers by rising mean score, in each the best block that fits.

    What a layer leaves of its budget passes on to the next.
    """
    starts, layer_count = program.starts, program.group_count
    means = [program.costs[start:end].mean() for start, end in itertools.pairwise(starts)]
    allowance = program.limits / layer_count
    unit = np.maximum(np.abs(allowance), 1e-12)
    remainder = np.zeros(len(program.limits))
    selected = np.zeros(layer_count, dtype=int)
    for layer in np.argsort(means, kind="stable"):
        columns = np.arange(starts[layer], starts[layer + 1])
        resources = program.resources[:, columns]
        budget = allowance + remainder
        fits = (resources <= budget[:, None] * (1 + 1e-12)).all(axis=0)
        if fits.any():
            affordable = columns[fits]
            best = affordable[program.costs[affordable].argmin()]
        else:
            # The block that takes least, in shares of the allowance; the debt is passed on.
            best = columns[(resources / unit[:, None]).max(axis=0, initial=0).argmin()]
        remainder = budget - program.resources[:, best]
        selected[layer] = best
    return selected if program.feasible(selected) else None


def most_parameters(program: Program, parameters: np.ndarray) -> np.ndarray | None:
    """The paper's ablation: as many `parameters` [C] as the limits allow, scores ignored."""
    optimum = mip.solve(replace(program, costs=-parameters), gap=1e-4)
    return None if optimum is None else optimum.columns


def random_scores(program: Program, seed: int) -> np.ndarray | None:
    """The median by score of several choices within the limits, each the best for random scores."""
    generator = np.random.default_rng(seed)
    selections = []
    for _ in range(RANDOM_CHOICES):
        scores = generator.random(len(program.costs))
        optimum = mip.solve(replace(program, costs=scores), gap=0.05)
        if optimum is not None:
            selections.append(optimum.columns)
    selections.sort(key=lambda columns: program.costs[columns].sum())
    return selections[len(selections) // 2] if selections else None


def no_op_only(program: Program, parent_or_no_op: np.ndarray) -> np.ndarray | None:
    """The best choice where every subblock is kept as it is or removed.

    None as well where the program has extra rows, which name columns that are left out here.
    """
    columns = np.flatnonzero(parent_or_no_op)
    pairs = itertools.pairwise(program.starts)
    sizes = [int(parent_or_no_op[start:end].sum()) for start, end in pairs]
    if not all(sizes) or program.extra:
        return None
    costs, resources = program.costs[columns], program.resources[:, columns]
    optimum = mip.solve(Program(starts_of(sizes), costs, resources, program.limits), gap=1e-4)
    return None if optimum is None else columns[optimum.columns]


def evolutionary(program: Program, seed: int) -> np.ndarray | None:
    """Tournaments, uniform crossover and mutation; the fittest of parents and offspring survive."""
    generator = np.random.default_rng(seed)
    starts, sizes = program.starts[:-1], np.diff(program.starts)
    population_PL = (generator.random((POPULATION, len(sizes))) * sizes).astype(int)
    ranks_P = _ranks(program, starts + population_PL)
    for _ in range(GENERATIONS):
        offspring_PL = _offspring(generator, population_PL, ranks_P, sizes)
        candidates = np.concatenate([population_PL, offspring_PL])
        ranks = np.concatenate([ranks_P, _ranks(program, starts + offspring_PL)])
        survivors = np.argsort(ranks, kind="stable")[:POPULATION]
        population_PL, ranks_P = candidates[survivors], ranks[survivors]
    columns = starts + population_PL[0]
    return columns if program.feasible(columns) else None


def _ranks(program: Program, columns_PL: np.ndarray) -> np.ndarray:
    """The score of every choice [P], lower is better.

    What exceeds a limit ranks after everything that does not (Deb's rule), by its excess.
    """
    used = program.resources[:, columns_PL].sum(axis=2)  # [R, P]
    excess = (used - program.limits[:, None]) / program.row_sizes[:, None]
    violation = np.maximum(0.0, excess).sum(axis=0)
    scores = program.costs[columns_PL].sum(axis=1)
    return np.where(violation > 1e-9, np.abs(program.costs).sum() * (1 + violation), scores)


def _offspring(
    generator: np.random.Generator,
    population_PL: np.ndarray,
    ranks_P: np.ndarray,
    sizes: np.ndarray,
) -> np.ndarray:
    """As many children as parents: each mixes the winners of two tournaments and then mutates."""
    shape = population_PL.shape
    pairs = generator.integers(len(population_PL), size=(2, len(population_PL), 2))
    first, second = pairs[..., 0], pairs[..., 1]
    winners = np.where(ranks_P[first] <= ranks_P[second], first, second)
    from_first = generator.random(shape) < 0.5
    mixed = np.where(from_first, population_PL[winners[0]], population_PL[winners[1]])
    mutations = (generator.random(shape) * sizes).astype(int)
    mutates = generator.random(shape) < 1.5 / len(sizes)
    return np.where(mutates, mutations, mixed)
