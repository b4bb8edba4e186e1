"""Stage `search`: one block per layer, the best sum of scores within the constraints (paper: section 4.1, appendix B).

    minimise  sum_ij score_ij x_ij
    subject   sum_j x_ij = 1                          every layer i takes one block j
              sum_ij resource_ij x_ij <= limit        one row per constraint
              sum_i x_i,y_i <= (1 - diversity) L      for every earlier solution y

A mixed-integer program for HiGHS, built as sparse rows without a modelling layer. Every solution carries its
objective, proven bound, gap and seconds. No solution is an answer too: `Infeasible` says what binds and the best
attainable value.

Reads: scores and costs. Writes: `search/solutions.json` and `frontier.json`.
"""

import itertools
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import highspy
import numpy as np

from puzzle import artifacts, cost, score
from puzzle.architecture import Architecture, Block
from puzzle.config import SearchConfig
from puzzle.cost import Cost, CostTable
from puzzle.errors import Infeasible, UserError
from puzzle.run import Run

UNITS = {
    "bytes": {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "seconds": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0},
    "tokens per second": {"tok/s": 1.0, "ktok/s": 1e3},
    "parameters": {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9},
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A constraint people can ask for: its unit and which resource of a `Cost` it limits."""

    unit: str
    resource: Callable[[Cost], float]
    at_least: bool = False  # throughput: more is better; it becomes a limit on seconds
    timed: bool = False  # measured on the engine, so corrections and the margin apply


KINDS = {
    "throughput": Kind("tokens per second", lambda c: c.total_s, at_least=True, timed=True),
    "latency": Kind("seconds", lambda c: c.total_s, timed=True),
    "time_to_first_token": Kind("seconds", lambda c: c.prefill_s, timed=True),
    "memory": Kind("bytes", lambda c: c.memory_bytes),
    "parameters": Kind("parameters", lambda c: c.parameters),
    "kv_cache": Kind("bytes", lambda c: c.kv_cache_bytes),
}


@dataclass(frozen=True)
class Constraint:
    """`limit` bounds the model's resource from above; `value` is what was asked, in the constraint's own unit."""

    name: str
    text: str
    value: float
    relative: float | None
    limit: float

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]


def parse_quantity(name: str, text: str) -> tuple[float, bool]:
    """(number in base units, whether it is relative to the parent). Raises `UserError` for anything unclear."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z/%]*)\s*", str(text))
    units = UNITS[KINDS[name].unit]
    expected = (
        f"expected a number with a unit ({', '.join(u or 'none' for u in units)}) or relative to the parent (2x, 50%)"
    )
    if not match or float(match[1]) <= 0:
        raise UserError(f"search.{name}: got {text!r}; {expected}")
    number, unit = float(match[1]), match[2]
    if unit in ("x", "%"):
        return number / (100 if unit == "%" else 1), True
    if unit not in units:
        raise UserError(f"search.{name}: got {text!r}; {expected}")
    return number * units[unit], False


def check(settings: SearchConfig) -> None:
    """Raise `UserError` where nothing is asked for or a quantity is unclear; needs no costs."""
    asked = {name: text for name in KINDS if (text := getattr(settings, name)) is not None}
    if not asked:
        names = ", ".join(KINDS)
        raise UserError(f"search: no constraint is set; set at least one of {names}, for example throughput: 2x")
    for name, text in asked.items():
        parse_quantity(name, text)


def constraints(settings: SearchConfig, table: CostTable, parent: Architecture) -> list[Constraint]:
    """What was asked, as limits on resources of the whole model."""
    found, reference = [], table.predict(parent)
    tokens = table.scenario.batch_size * table.scenario.output_length
    for name, kind in KINDS.items():
        text = getattr(settings, name)
        if text is None:
            continue
        number, relative = parse_quantity(name, text)
        of_parent = tokens / kind.resource(reference) if kind.at_least else kind.resource(reference)
        value = number * of_parent if relative else number
        limit = tokens / value if kind.at_least else value
        found.append(Constraint(name, str(text), value, number if relative else None, limit))
    return found


# ------------------------------------------------------------------------------------------------ the program


@dataclass(frozen=True)
class Problem:
    """The numbers of the program, over all (layer, block) columns in a row."""

    layers: list[list[Block]]
    scores: np.ndarray  # [columns]
    resources: np.ndarray  # [constraints, columns], each row scaled so that its limit is 1
    limits: np.ndarray  # [constraints]

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.layers)])


@dataclass(frozen=True)
class Solution:
    blocks: tuple[str, ...]
    objective: float
    bound: float
    gap: float
    seconds: float


def build(
    layers: list[list[Block]], scores: np.ndarray, table: CostTable, limits: Sequence[tuple[Kind, float]]
) -> Problem:
    """The program of a space. The model's constant part is taken off every limit."""
    costs = {block: table.block(block) for options in layers for block in options}
    rows, rights = [], []
    for kind, limit in limits:
        row = np.array([kind.resource(costs[block]) for options in layers for block in options])
        rows.append(row / limit)
        rights.append(1.0 - kind.resource(table.constant) / limit)
    return Problem(layers, scores, np.array(rows).reshape(len(rows), -1), np.array(rights))


def solve(
    problem: Problem, *, gap: float, time_limit_s: float, avoid: Sequence[np.ndarray] = (), overlap: float = 0.0,
    objective: np.ndarray | None = None,
) -> tuple[np.ndarray, Solution] | None:  # fmt: skip
    """(chosen column of every layer, solution), or None where the program is infeasible.

    `avoid` holds earlier choices; at most `overlap` layers may equal each.
    """
    began = time.perf_counter()
    starts, columns = problem.starts, len(problem.scores)
    target = problem.scores if objective is None else objective
    rows = [(1.0, 1.0, np.arange(a, b), np.ones(b - a)) for a, b in itertools.pairwise(starts)]
    for values, limit in zip(problem.resources, problem.limits, strict=True):
        used = np.flatnonzero(values)
        rows.append((-np.inf, limit, used, values[used]))
    rows += [(-np.inf, overlap, chosen, np.ones(len(chosen))) for chosen in avoid]
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = columns, len(rows)
    lp.col_cost_ = target.astype(float)
    lp.col_lower_, lp.col_upper_ = np.zeros(columns), np.ones(columns)
    lp.row_lower_ = np.array([row[0] for row in rows])
    lp.row_upper_ = np.array([row[1] for row in rows])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.cumsum([0, *(len(row[2]) for row in rows)]).astype(np.int32)
    lp.a_matrix_.index_ = np.concatenate([row[2] for row in rows]).astype(np.int32)
    lp.a_matrix_.value_ = np.concatenate([row[3] for row in rows])
    lp.integrality_ = [highspy.HighsVarType.kInteger] * columns
    highs = highspy.Highs()
    for option, value in (
        ("output_flag", False),
        ("mip_rel_gap", gap),
        ("time_limit", time_limit_s),
        ("random_seed", 0),
    ):
        highs.setOptionValue(option, value)
    highs.passModel(lp)
    highs.run()
    status = highs.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        return None
    values = np.array(highs.getSolution().col_value)
    if not len(values):
        raise UserError(f"search: HiGHS stopped with {status.name} before any solution; raise search.time_limit_s")
    chosen = np.array([a + int(values[a:b].argmax()) for a, b in itertools.pairwise(starts)])
    info = highs.getInfo()
    flat = [block for options in problem.layers for block in options]
    value, bound = float(target[chosen].sum()), float(info.mip_dual_bound)
    proven = max(0.0, (value - bound) / max(abs(value), 1e-12))
    return chosen, Solution(tuple(flat[i].name for i in chosen), value, bound, proven, time.perf_counter() - began)


def explain_infeasible(problem: Problem, asked: Sequence[Constraint], table: CostTable, settings: SearchConfig) -> str:
    """One line: which constraint cannot be met and the best attainable value of each."""
    lines = []
    tokens = table.scenario.batch_size * table.scenario.output_length
    for row, constraint in enumerate(asked):
        free = Problem(problem.layers, problem.scores, problem.resources[:0], problem.limits[:0])
        found = solve(free, gap=0.0, time_limit_s=settings.time_limit_s, objective=problem.resources[row])
        assert found is not None
        least = problem.resources[row][found[0]].sum()
        allowed = problem.limits[row]
        best = (least + (1 - allowed)) * constraint.limit
        best = tokens / best if constraint.kind.at_least else best
        reachable = "reachable alone" if least <= allowed else "out of reach"
        lines.append(
            f"{constraint.name} {constraint.text} is {reachable} (best attainable: {best:.6g} {constraint.kind.unit})"
        )
    return "search: no architecture meets the constraints: " + "; ".join(lines)


# ------------------------------------------------------------------------------------------------ the stage


def corrections(run: Run) -> list[dict[str, Any]]:
    """What measuring earlier children has taught about the cost model, one record per missed promise."""
    return artifacts.read_jsonl(run.stage_folder("cost") / "corrections.jsonl")


def inputs(run: Run) -> dict[str, Any]:
    return {
        "score": run.fingerprint_of("score"),
        "cost": run.fingerprint_of("cost"),
        "search": run.recipe.search.model_dump(mode="json"),
        "metric": run.recipe.score.metric,
        "corrections": corrections(run),
    }


def run(run: Run, folder: Path) -> dict[str, Any]:
    settings, table = run.recipe.search, cost.read(run)
    layers = [list(options.blocks) for options in run.space.layers]
    parent = Architecture.of_parent(run.parent.shape)
    check(settings)
    asked = constraints(settings, table, parent)
    scores = column_scores(run, layers)
    factor = max([1.0, *(c["time_factor"] for c in corrections(run))])
    limits = [(c.kind, _aimed(c, settings, factor)) for c in asked]
    problem = build(layers, scores, table, limits)
    solutions = _diverse(problem, settings)
    if not solutions:
        raise Infeasible(explain_infeasible(problem, asked, table, settings))
    records = [asdict(s) | {"predicted": _figures(table, Architecture.from_names(s.blocks))} for s in solutions]
    answer = {
        "constraints": [asdict(c) for c in asked],
        "time_factor": factor,
        "margin": settings.margin,
        "parent": _figures(table, parent),
        "solutions": records,
    }
    artifacts.write_json(folder / "solutions.json", answer)
    artifacts.write_json(folder / "frontier.json", frontier(layers, scores, table, parent, settings))
    best = records[0]
    speeds = [f"{side['throughput_tok_per_s']:,.0f} tok/s" for side in (best["predicted"], answer["parent"])]
    proof = f"score sum {best['objective']:.4f}, proven gap {best['gap']:.2%}, {best['seconds']:.2f} s"
    run.progress.say(f"  {proof}; predicted {speeds[0]} (parent {speeds[1]})")
    return {"blocks": best["blocks"]}


def _aimed(constraint: Constraint, settings: SearchConfig, factor: float) -> float:
    return constraint.limit * (1 - settings.margin) / factor if constraint.kind.timed else constraint.limit


def column_scores(run: Run, layers: list[list[Block]]) -> np.ndarray:
    """The score of every column, as a loss: the parent's own block costs 0."""
    scores, metric = score.read(run), run.recipe.score.metric
    parent = run.parent.shape.parent_block.name
    columns = []
    for index, options in enumerate(layers):
        base = getattr(scores[index, parent], metric)
        columns += [getattr(scores[index, block.name], metric) - base for block in options]
    return np.array(columns)


def _diverse(problem: Problem, settings: SearchConfig) -> list[Solution]:
    chosen: list[np.ndarray] = []
    solutions: list[Solution] = []
    overlap = np.floor((1 - settings.diversity) * len(problem.layers) + 1e-9)
    while len(solutions) < settings.solutions:
        found = solve(problem, gap=settings.gap, time_limit_s=settings.time_limit_s, avoid=chosen, overlap=overlap)
        if found is None:
            break
        chosen.append(found[0])
        solutions.append(found[1])
    return solutions


def _figures(table: CostTable, architecture: Architecture) -> dict[str, float]:
    total = table.predict(architecture)
    return {
        "throughput_tok_per_s": total.throughput_tok_per_s(table.scenario),
        "latency_s": total.total_s,
        "time_to_first_token_s": total.prefill_s,
        "memory_bytes": total.memory_bytes,
        "parameters": total.parameters,
        "kv_cache_bytes": total.kv_cache_bytes,
    }


def frontier(
    layers: list[list[Block]], scores: np.ndarray, table: CostTable, parent: Architecture, settings: SearchConfig
) -> list[dict[str, Any]]:
    """The best score sum for a range of throughputs, from the parent's up to what the space can reach."""
    reference = table.predict(parent).total_s
    points = []
    for speedup in np.arange(1.0, 4.01, 0.125):
        problem = build(layers, scores, table, [(KINDS["latency"], float(reference / speedup))])
        found = solve(problem, gap=settings.gap, time_limit_s=settings.time_limit_s)
        if found is None:
            break
        figures = _figures(table, Architecture.from_names(found[1].blocks))
        points.append({"objective": found[1].objective, "blocks": found[1].blocks, **figures})
    return points
