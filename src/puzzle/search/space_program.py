"""The search program of a space: blocks become columns, constraints become rows.

minimise  sum_ij (score_ij + missing_ij) x_ij
subject   sum_j x_ij = 1                      every layer i takes one block j
          sum_ij resource_ij x_ij <= limit    one row per constraint and scenario

missing: what the parameters that a block lacks count as (`search.capacity`). Of children with the
same KL the smaller one tends to recover less by uptraining (docs/log.md), which no score made
before it can show.

The solvers add the first kind of rows themselves (`program.one_hot`); rows that keep away from an
earlier solution are added to a built program (`mip.overlap_row`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from puzzle.config import SearchConfig
from puzzle.cost.table import CostTable
from puzzle.errors import UserError
from puzzle.model.architecture import Block
from puzzle.search.constraints import Constraint, Kind, Tables
from puzzle.search.curve import Curve
from puzzle.search.mip import nearest
from puzzle.search.program import Program, Row, starts_of


@dataclass(frozen=True)
class Limit:
    """At most `limit` of a resource of the whole model."""

    kind: Kind
    table: CostTable
    limit: float


@dataclass(frozen=True)
class Choices:
    """The blocks that every layer may take, the parent's first, with the loss of each [C]."""

    layers: list[list[Block]]
    losses: np.ndarray
    curve: Curve | None = None  # of KLs that sums of the losses stand for
    missing: np.ndarray | None = None  # what the parameters that a block lacks count as [C]

    @property
    def blocks(self) -> list[Block]:
        """The block of every column."""
        return [block for layer in self.layers for block in layer]

    @property
    def starts(self) -> np.ndarray:
        """The first column of every layer, and the number of columns."""
        return starts_of([len(layer) for layer in self.layers])

    @property
    def costs(self) -> np.ndarray:
        """What a search makes least [C]."""
        return self.losses if self.missing is None else self.losses + self.missing

    def missing_of(self, columns: np.ndarray) -> float:
        """What the parameters that a child lacks count as, by its columns [G]."""
        return 0.0 if self.missing is None else float(self.missing[columns].sum())

    def has(self, names: Sequence[str]) -> bool:
        """Whether every layer may take its block."""
        named = zip(names, self.layers, strict=True)
        return all(any(block.name == name for block in layer) for name, layer in named)

    def keeping(self, layers: list[list[Block]]) -> "Choices":
        """Of these blocks of every layer only, in their order."""
        columns = [
            int(first) + layer.index(block)
            for first, layer, kept in zip(self.starts[:-1], self.layers, layers, strict=True)
            for block in kept
        ]
        missing = None if self.missing is None else self.missing[columns]
        return Choices(layers, self.losses[columns], missing=missing)

    def columns(self, names: Sequence[str]) -> np.ndarray:
        """The column of every layer's block [G]. Raises `UserError` for one without a score."""
        columns = []
        for index, (name, layer) in enumerate(zip(names, self.layers, strict=True)):
            known = [block.name for block in layer]
            if name not in known:
                raise UserError(
                    f"search.architecture: layer {index}: got {name!r}, which has no score; "
                    f"expected one of {', '.join(known)}"
                )
            columns.append(int(self.starts[index]) + known.index(name))
        return np.array(columns)

    def names(self, columns: np.ndarray) -> list[str]:
        """The blocks' names of one column per layer."""
        blocks = self.blocks
        return [blocks[column].name for column in columns]


def build(
    choices: Choices, limits: Sequence[Limit], settings: SearchConfig | None = None
) -> Program:
    """The program of a space. The model's constant part is taken off every limit."""
    blocks = choices.blocks
    rows, rights = [], []
    for limit in limits:
        rows.append(_used(limit, choices))
        rights.append(limit.limit - limit.kind.resource(limit.table.constant))
    extra: tuple[Row, ...] = ()
    if settings is not None and settings.changed_layers is not None:
        rows.append([float(b != layer[0]) for layer in choices.layers for b in layer])
        rights.append(float(settings.changed_layers))
    starts = choices.starts
    if settings is not None and settings.monotone:
        widths = np.array([float(block.ffn.intermediate_size) for block in blocks])
        layers = range(len(choices.layers) - 1)
        extra = tuple(_never_wider(starts, widths, layer) for layer in layers)
    resources = np.array(rows, dtype=float).reshape(len(rows), len(blocks))
    return Program(starts, choices.costs, resources, np.array(rights, dtype=float), extra)


def for_target(program: Program, choices: Choices, target: Limit, kl: float) -> Program:
    """The other direction: the least of a resource, with losses that stand for at most `kl`.

    `target` names the resource; its limit does not count.
    """
    return replace(
        program,
        costs=np.array(_used(target, choices), dtype=float),
        resources=np.vstack([program.resources, choices.losses]),
        limits=np.append(program.limits, choices.curve.score_sum(kl) if choices.curve else kl),
    )


def _used(limit: Limit, choices: Choices) -> list[float]:
    """What every choice takes of the limited resource."""
    table, known = limit.table, dict[tuple[Block, int | None], float]()
    used = []
    for layer, blocks in enumerate(choices.layers):
        for block in blocks:
            kind = block, table.window(layer)
            if kind not in known:
                known[kind] = limit.kind.resource(table.block(block, layer))
            used.append(known[kind])
    return used


def _never_wider(starts: np.ndarray, widths: np.ndarray, layer: int) -> Row:
    """width(layer + 1) - width(layer) <= 0, in units of the widest."""
    columns = np.arange(starts[layer], starts[layer + 2])
    sign = np.where(columns >= starts[layer + 1], 1.0, -1.0)
    return Row(columns, sign * widths[columns] / max(widths.max(), 1.0), 0.0)


def homogeneous(program: Program, choices: Choices) -> np.ndarray | None:
    """The best choice of one and the same block in every layer (as Minitron), or None."""
    best, best_columns = np.inf, None
    for block in choices.layers[0]:
        if not all(block in layer for layer in choices.layers):
            continue
        offsets = [layer.index(block) for layer in choices.layers]
        columns = program.starts[:-1] + np.array(offsets)
        loss = float(program.costs[columns].sum())
        if loss < best and program.feasible(columns):
            best, best_columns = loss, columns
    return best_columns


def explain_infeasible(
    program: Program, constraints: Sequence[Constraint], tables: Tables, time_limit_s: float
) -> str:
    """One line: which constraint cannot be met, the best attainable of each alone, the nearest.

    Every figure is in the unit that was asked: `13.4x` where `20x` was.
    """
    lines = []

    def value(constraint: Constraint, used: float) -> str:
        table = tables[constraint.scenario]
        used += constraint.kind.resource(table.constant)
        return constraint.in_unit(constraint.kind.figure(table, used, constraint.stretch))

    for row, constraint in enumerate(constraints):
        least = float(program.least[row])
        reachable = "reachable alone" if least <= program.limits[row] else "out of reach"
        lines.append(
            f"{constraint.label} {constraint.text} is {reachable} "
            f"(best attainable: {value(constraint, least)})"
        )
    columns = nearest(program, time_limit_s)
    if columns is not None:
        used = program.resources[:, columns].sum(axis=1)
        totals = [
            f"{constraint.label} {value(constraint, float(used[row]))}"
            for row, constraint in enumerate(constraints)
        ]
        lines.append(f"the nearest that is possible: {', '.join(totals)}")
    return "search: no architecture meets the constraints: " + "; ".join(lines)
