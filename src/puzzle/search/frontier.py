"""The frontier: the best sum of scores for a range of one resource, and what baselines reach."""

from collections.abc import Sequence

import numpy as np

from puzzle.config import SearchConfig
from puzzle.cost.table import CostTable
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, ModelShape
from puzzle.search import baselines, mip
from puzzle.search.answers import BaselineChoice, Figures, FrontierPoint
from puzzle.search.constraints import KINDS, Kind
from puzzle.search.program import Program
from puzzle.search.space_program import Choices, Limit, build, homogeneous

FARTHEST = 10.0  # times the parent: where a frontier ends; costs are fitted nearer to it


def frontier(
    choices: Choices,
    table: CostTable,
    parent: Architecture,
    settings: SearchConfig,
    held: Sequence[Limit] = (),
) -> list[FrontierPoint]:
    """The best sum of scores from the parent's use of a resource to the least attainable.

    Points that another one dominates are left out.

    Args:
        choices: the blocks and their losses.
        table: costs of the swept resource.
        parent: where the sweep begins.
        settings: `frontier` names the resource, `points` how many limits are tried.
        held: other limits that every point keeps; timed ones do not count while a timed resource
            is swept, for they limit the same seconds.
    """
    kind = KINDS[settings.frontier]
    kept = [h for h in held if h.kind is not kind and not (h.kind.timed and kind.timed)]
    points: list[tuple[float, FrontierPoint]] = []
    for limit in _limits(kind, choices, table, parent, settings.points) * (1 + 1e-12):
        program = build(choices, [Limit(kind, table, float(limit)), *kept], settings)
        optimum = mip.solve(program, gap=settings.gap, time_limit_s=settings.time_limit_s)
        if optimum is None:
            continue
        architecture = Architecture.from_names(choices.names(optimum.columns))
        used = kind.resource(table.predict(architecture))
        if used <= 0:  # a straight line through measured costs may cross zero far from them
            continue
        point = FrontierPoint(
            objective=float(choices.losses[optimum.columns].sum()),
            gap=optimum.gap,
            blocks=architecture.names,
            figures=Figures.of(table, architecture),
        )
        points.append((used, point))
    return _undominated(points)


def _limits(
    kind: Kind, choices: Choices, table: CostTable, parent: Architecture, count: int
) -> np.ndarray:
    costs = [
        [kind.resource(table.block(block, layer)) for block in blocks]
        for layer, blocks in enumerate(choices.layers)
    ]
    most = kind.resource(table.predict(parent))
    least = kind.resource(table.constant) + sum(map(min, costs))
    least = max(least, most / FARTHEST)
    if kind.at_least:  # equal steps of throughput, not of seconds
        return 1 / np.linspace(1 / most, 1 / least, count)
    return np.linspace(most, least, count)


def _undominated(points: list[tuple[float, FrontierPoint]]) -> list[FrontierPoint]:
    """By falling use of the resource.

    A point stays only where nothing that uses as little has as good an objective.
    """
    kept: list[FrontierPoint] = []
    for _, point in sorted(points, key=lambda pair: (pair[0], pair[1].objective)):
        if not kept or point.objective < kept[-1].objective:
            kept.append(point)
    return kept[::-1]


def baseline_choices(
    program: Program, choices: Choices, shape: ModelShape, table: CostTable
) -> list[BaselineChoice]:
    """What other ways of choosing reach within the same limits."""
    parameters = np.array([float(shape.parameters(block)) for block in choices.blocks])
    parent_or_no_op = np.array(
        [
            block.attention in (layer[0].attention, NO_ATTENTION)
            and block.ffn in (layer[0].ffn, NO_FFN)
            for layer in choices.layers  # the parent's block comes first
            for block in layer
        ]
    )
    columns_by_name = baselines.choices(program, parameters, parent_or_no_op)
    columns_by_name["homogeneous"] = homogeneous(program, choices)
    records = []
    for name, columns in columns_by_name.items():
        if columns is None:
            records.append(BaselineChoice(name=name))
            continue
        blocks = choices.names(columns)
        records.append(
            BaselineChoice(
                name=name,
                objective=float(choices.losses[columns].sum()),
                blocks=blocks,
                figures=Figures.of(table, Architecture.from_names(blocks)),
            )
        )
    return records
