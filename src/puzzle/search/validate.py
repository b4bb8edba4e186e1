"""How well sums of scores predict: against the KL of children that are assembled and measured.

    puzzle score RUN --validate N

`puzzle run` does it with `score.assembled` children. What searched children have shown becomes a
curve, by which a sum of scores is told as the KL that it stands for, and a wish for a KL as a sum.

Half of the architectures are random, with a random share of layers changed; the other half are what
a search takes for falling limits on the parameters. Each is assembled from the library in memory
and run over the sequences that the scores were made on.

Reads: the parent, the library, scores. Writes: `RUN/score_validation/validation.json`, which the
report draws.
"""

import itertools
import random
import time
from typing import Literal

import numpy as np

from puzzle import artifacts
from puzzle.artifacts import Record
from puzzle.errors import UserError
from puzzle.model.architecture import Architecture
from puzzle.run import Run
from puzzle.score import SCORE, results
from puzzle.score.assembled import AssembledKL
from puzzle.score.stage import text_shards
from puzzle.search import mip
from puzzle.search.curve import Curve
from puzzle.search.program import Program
from puzzle.search.space_program import Choices
from puzzle.stage import Job

FOLDER, FILE = "score_validation", "validation.json"
BINS = (0.0, 0.2, 0.4, 0.6, 1.01)  # shares of the layers' parameters that are removed
LEAST_CHILDREN = 4
Origin = Literal["random", "searched"]


class ValidationPoint(Record):
    """One assembled child."""

    origin: Origin
    blocks: list[str]
    removed: float  # share of the layers' parameters
    score_sum: float
    kl: float  # of the assembled child, nats per token


class Correlation(Record):
    """Of sums of scores and measured KL; None below four children."""

    count: int
    spearman: float | None
    pearson: float | None


class Validation(Record):
    """`validation.json`."""

    metric: str
    overall: Correlation
    by_removed: dict[str, Correlation]  # by the share of parameters that is removed
    points: list[ValidationPoint]


def curve(run: Run) -> Curve | None:
    """Of the scores of now; None where no children were assembled, or the scores are no KLs."""
    found = read(run)
    if found is None or found.metric != "kl":
        return None
    return Curve.of([(p.score_sum, p.kl) for p in found.points if p.origin == "searched"])


def assemble_some(run: Run) -> None:
    """As many children as the recipe asks for, unless some were assembled before."""
    settings = run.recipe.score
    if settings.assembled and settings.metric == "kl" and read(run) is None:
        validate(run, settings.assembled)


def read(run: Run) -> Validation | None:
    """What `puzzle score --validate` has found for the scores of now, if it was asked."""
    folder = run.folder / FOLDER
    manifest = artifacts.read_manifest(folder)
    score = artifacts.read_manifest(Job(run).folder(SCORE))
    if manifest is None or score is None or manifest.inputs["score"] != score.fingerprint:
        return None
    if artifacts.damage(folder, manifest) is not None:  # it is made again when it is needed
        return None
    return Validation.read(folder / FILE)


def validate(run: Run, count: int) -> Validation:
    """Assemble and measure `count` children. Raises `UserError` for fewer than four."""
    if count < LEAST_CHILDREN:
        raise UserError(
            f"score --validate: got {count}, expected at least {LEAST_CHILDREN} architectures"
        )
    folder = run.folder / FOLDER
    inputs: artifacts.Inputs = {
        "score": Job(run).manifest(SCORE).fingerprint,
        "metric": run.recipe.score.metric,
        "count": count,
    }
    if not artifacts.is_done(folder, inputs):
        artifacts.begin(folder, inputs)
        began = time.perf_counter()
        _measure(run, count).write(folder / FILE)
        artifacts.write_manifest(folder, inputs, time.perf_counter() - began)
    return Validation.read(folder / FILE)


def lines(validation: Validation) -> list[str]:
    """What to print: correlations over all children and by how much is removed."""
    named = {"all": validation.overall} | validation.by_removed
    return [
        f"{name}: {c.count} children, Spearman {c.spearman:.3f}, Pearson {c.pearson:.3f}"
        for name, c in named.items()
        if c.spearman is not None and c.pearson is not None
    ]


def _measure(run: Run, count: int) -> Validation:
    losses, shape = results.losses(run), run.parent.shape
    choices = Choices(results.scored_layers(run, losses), np.array([]))
    architectures = _random_architectures(choices, count - count // 2)
    architectures += _searched_architectures(run, choices, losses, count // 2)
    measurement = AssembledKL(run, text_shards(run))
    parent = sum(shape.parameters(block) for block in Architecture.of_parent(shape))
    points: list[ValidationPoint] = []
    with run.progress.task("assembling and measuring", len(architectures), "children") as task:
        for origin, architecture in architectures:
            parameters = sum(shape.parameters(block) for block in architecture)
            points.append(
                ValidationPoint(
                    origin=origin,
                    blocks=architecture.names,
                    removed=1 - parameters / parent,
                    score_sum=sum(losses[i, b.name] for i, b in enumerate(architecture)),
                    kl=measurement.kl(architecture),
                )
            )
            task.advance()
    by_removed = {}
    for low, high in itertools.pairwise(BINS):
        inside = [point for point in points if low <= point.removed < high]
        by_removed[f"{low:.0%} to {min(high, 1):.0%} removed"] = correlation(inside)
    return Validation(
        metric=run.recipe.score.metric,
        overall=correlation(points),
        by_removed=by_removed,
        points=points,
    )


def _random_architectures(choices: Choices, count: int) -> list[tuple[Origin, Architecture]]:
    rng = random.Random(0)
    architectures: list[tuple[Origin, Architecture]] = []
    for _ in range(count):
        share = rng.random()
        blocks = [
            rng.choice(layer) if rng.random() < share else layer[0] for layer in choices.layers
        ]
        architectures.append(("random", Architecture(tuple(blocks))))
    return architectures


def _searched_architectures(
    run: Run, choices: Choices, losses: results.Losses, count: int
) -> list[tuple[Origin, Architecture]]:
    """The best sums of scores at equal steps of parameters, from little removed to most."""
    blocks, shape, starts = choices.blocks, run.parent.shape, choices.starts
    sizes = np.array([float(shape.parameters(block)) for block in blocks])
    costs = np.array([losses[i, b.name] for i, layer in enumerate(choices.layers) for b in layer])
    parent = float(sizes[starts[:-1]].sum())  # the parent's block comes first in every layer
    architectures: list[tuple[Origin, Architecture]] = []
    for share in np.linspace(0.95, 0.3, count):
        program = Program(starts, costs, sizes[None], np.array([share * parent]))
        optimum = mip.solve(program, gap=1e-3)
        if optimum is not None:
            chosen = tuple(blocks[column] for column in optimum.columns)
            architectures.append(("searched", Architecture(chosen)))
    return architectures


def correlation(points: list[ValidationPoint]) -> Correlation:
    """Spearman and Pearson of the sums of scores and the measured KL; None below four points."""
    pairs = np.array([[point.score_sum, point.kl] for point in points]).reshape(-1, 2)
    if len(pairs) < LEAST_CHILDREN or (pairs.std(axis=0) == 0).any():
        return Correlation(count=len(pairs), spearman=None, pearson=None)
    ranks = pairs.argsort(axis=0).argsort(axis=0)
    return Correlation(
        count=len(pairs),
        spearman=float(np.corrcoef(ranks.T)[0, 1]),
        pearson=float(np.corrcoef(pairs.T)[0, 1]),
    )
