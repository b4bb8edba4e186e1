"""Stage `search`: one block per layer, the best sum of scores within the constraints (paper:
section 4.1, appendix B).

    minimise  sum_ij score_ij x_ij
    subject   sum_j x_ij = 1                          every layer i takes one block j
              sum_ij resource_ij x_ij <= limit        one row per constraint and scenario
              sum_i x_i,y_i <= (1 - diversity) L      for every earlier solution y

Solved exactly on HiGHS (`mip.py`). Every solution carries its objective, proven bound, gap and
seconds. No solution is an answer too: `Infeasible` says what binds, the best attainable value of
each and the nearest possible relaxation. With `cost.batch_sizes` there is one program per batch
size of the main scenario, and the best sum of scores wins.

Reads: scores and costs. Writes: `search/solutions.json`, `frontier.json` and `baselines.json`.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from puzzle import artifacts
from puzzle.config import SearchConfig
from puzzle.cost import stage as cost
from puzzle.cost.stage import Cost, CostTable
from puzzle.errors import Infeasible, UserError
from puzzle.model.architecture import FFN, Architecture, Attention, Block
from puzzle.run import Run
from puzzle.score import stage as score
from puzzle.search import baselines, mip

UNITS = {
    "bytes": {
        "B": 1,
        "KB": 1e3,
        "MB": 1e6,
        "GB": 1e9,
        "TB": 1e12,
        "KiB": 2**10,
        "MiB": 2**20,
        "GiB": 2**30,
    },
    "seconds": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0},
    "tokens per second": {"tok/s": 1.0, "ktok/s": 1e3},
    "parameters": {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9},
}


FARTHEST = 10.0  # times the parent: where a frontier ends; costs are fitted nearer to it
NO_ATTENTION, NO_FFN = Attention("no_op"), FFN("no_op")


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
    """`limit` bounds the model's resource from above; `value` is what was asked, in the
    constraint's own unit.
    """

    name: str
    text: str
    value: float
    relative: float | None
    limit: float
    scenario: str = "main"

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def label(self) -> str:
        return self.name if self.scenario == "main" else f"{self.scenario} {self.name}"


Tables = dict[str, CostTable]  # by scenario; `main` at the batch size that is looked at


def parse_quantity(name: str, text: str) -> tuple[float, bool]:
    """(number in base units, whether it is relative to the parent). Raises `UserError` for anything
    unclear.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z/%]*)\s*", str(text))
    units = UNITS[KINDS[name].unit]
    expected = f"expected a number with a unit ({', '.join(u or 'none' for u in units)}) or relative to the parent (2x, 50%)"
    if not match or float(match[1]) <= 0:
        raise UserError(f"search.{name}: got {text!r}; {expected}")
    number, unit = float(match[1]), match[2]
    if unit in ("x", "%"):
        return number / (100 if unit == "%" else 1), True
    if unit not in units:
        raise UserError(f"search.{name}: got {text!r}; {expected}")
    return number * units[unit], False


def check(settings: SearchConfig, scenarios: Sequence[str]) -> None:
    """Raise `UserError` where nothing is asked for or a quantity is unclear; needs no costs."""
    found = list(_asked(settings, scenarios))
    if not found:
        names = ", ".join(KINDS)
        raise UserError(
            f"search: no constraint is set; set at least one of {names}, for example throughput: 2x"
        )
    for name, scenario, text in found:
        if scenario not in scenarios:
            raise UserError(
                f"search.{name}: no scenario {scenario!r}; expected one of {', '.join(scenarios)}"
            )
        parse_quantity(name, text)


def _asked(settings: SearchConfig, scenarios: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(constraint, scenario, text). One text holds in every scenario; the number of parameters
    knows none.
    """
    for name in KINDS:
        given = getattr(settings, name)
        if isinstance(given, str):
            given = dict.fromkeys(scenarios[:1] if name == "parameters" else scenarios, given)
        for scenario, text in (given or {}).items():
            yield name, scenario, str(text)


def constraints(
    settings: SearchConfig, tables: Tables, reference: CostTable, parent: Architecture
) -> list[Constraint]:
    """What was asked, as limits on resources of the whole model. `reference`: `main` at its own
    batch size, where the parent is served that "2x" compares with."""
    found = []
    for name, scenario, text in _asked(settings, list(tables)):
        kind, table = KINDS[name], tables[scenario]
        compared = reference if scenario == "main" else table
        number, relative = parse_quantity(name, text)
        resource = kind.resource(compared.predict(parent))
        of_parent = compared.tokens / resource if kind.at_least else resource
        value = number * of_parent if relative else number
        limit = table.tokens / value if kind.at_least else value
        found.append(Constraint(name, text, value, number if relative else None, limit, scenario))
    return found


# -------------------------------------------------------------------------------------- the program


Layers = list[list[Block]]
Limit = tuple[Kind, CostTable, float]  # of the whole model


@dataclass(frozen=True)
class Solution:
    blocks: tuple[str, ...]
    objective: float
    bound: float
    gap: float
    seconds: float

    @classmethod
    def of(cls, found: mip.Optimum, layers: Layers) -> "Solution":
        return cls(
            names(found.chosen, layers), found.objective, found.bound, found.gap, found.seconds
        )


def names(chosen: np.ndarray, layers: Layers) -> tuple[str, ...]:
    flat = [block.name for options in layers for block in options]
    return tuple(flat[column] for column in chosen)


def build(
    layers: Layers,
    scores: np.ndarray,
    limits: Sequence[Limit],
    settings: SearchConfig | None = None,
) -> mip.Program:
    """The program of a space. The model's constant part is taken off every limit."""
    flat = [block for options in layers for block in options]
    rows, rights = [], []
    for kind, table, limit in limits:
        costs = {block: kind.resource(table.block(block)) for block in dict.fromkeys(flat)}
        rows.append([costs[block] for block in flat])
        rights.append(limit - kind.resource(table.constant))
    extra: tuple[mip.Row, ...] = ()
    if settings is not None and settings.changed_layers is not None:
        rows.append([float(block != options[0]) for options in layers for block in options])
        rights.append(float(settings.changed_layers))
    starts = mip.starts_of([len(options) for options in layers])
    if settings is not None and settings.monotone:
        widths = np.array([float(block.ffn.intermediate_size) for block in flat])
        extra = tuple(_never_wider(starts, widths, layer) for layer in range(len(layers) - 1))
    resources = np.array(rows, dtype=float).reshape(len(rows), len(flat))
    return mip.Program(starts, scores, resources, np.array(rights, dtype=float), extra)


def _never_wider(starts: np.ndarray, widths: np.ndarray, layer: int) -> mip.Row:
    """width(layer + 1) - width(layer) <= 0, in units of the widest."""
    columns = np.arange(starts[layer], starts[layer + 2])
    sign = np.where(columns >= starts[layer + 1], 1.0, -1.0)
    return mip.Row(columns, sign * widths[columns] / max(widths.max(), 1.0), 0.0)


def homogeneous(program: mip.Program, layers: Layers) -> np.ndarray | None:
    """The best choice of one and the same block in every layer (the Minitron way), or None."""
    best, choice = np.inf, None
    for block in layers[0]:
        if all(block in options for options in layers):
            chosen = np.array(
                [
                    start + options.index(block)
                    for start, options in zip(program.starts, layers, strict=False)
                ]
            )
            if program.feasible(chosen) and program.costs[chosen].sum() < best:
                best, choice = program.costs[chosen].sum(), chosen
    return choice


def explain_infeasible(
    program: mip.Program, asked: Sequence[Constraint], tables: Tables, settings: SearchConfig
) -> str:
    """One line: which constraint cannot be met, the best attainable of each alone, the nearest
    relaxation of all.
    """
    lines = []

    def value(constraint: Constraint, used: float) -> float:
        table = tables[constraint.scenario]
        used += constraint.kind.resource(table.constant)
        return table.tokens / used if constraint.kind.at_least else used

    for row, constraint in enumerate(asked):
        least = program.least[row]
        reachable = "reachable alone" if least <= program.limits[row] else "out of reach"
        lines.append(
            f"{constraint.label} {constraint.text} is {reachable} "
            f"(best attainable: {value(constraint, least):.6g} {constraint.kind.unit})"
        )
    if (chosen := mip.nearest(program, settings.time_limit_s)) is not None:
        totals = [
            f"{c.label} {value(c, program.resources[row][chosen].sum()):.6g}"
            for row, c in enumerate(asked)
        ]
        lines.append(f"the nearest that is possible: {', '.join(totals)}")
    return "search: no architecture meets the constraints: " + "; ".join(lines)


# ---------------------------------------------------------------------------------------- the stage


def corrections(run: Run) -> list[dict[str, Any]]:
    """What measuring earlier children has taught about the cost model, one record per missed
    promise.
    """
    return artifacts.read_jsonl(run.stage_folder("cost") / "corrections.jsonl")


def inputs(run: Run) -> dict[str, Any]:
    return {
        "score": run.fingerprint_of("score"),
        "cost": run.fingerprint_of("cost"),
        "search": run.recipe.search.model_dump(mode="json"),
        "metric": [run.recipe.score.metric, run.recipe.score.granularity],
        "batch_sizes": run.recipe.cost.batch_sizes,
        "corrections": corrections(run),
    }


@dataclass(frozen=True)
class Searched:
    """One batch size of the main scenario, searched."""

    tables: Tables
    asked: list[Constraint]
    limits: list[Limit]
    program: mip.Program
    solutions: list[Solution]


def run(run: Run, folder: Path) -> dict[str, Any]:
    settings, configured = run.recipe.search, run.recipe.cost
    check(settings, ["main", *configured.scenarios])
    losses = score.losses(run)
    layers = score.scored_layers(run, losses)
    scores = np.array(
        [losses[i, block.name] for i, options in enumerate(layers) for block in options]
    )
    factor = max([1.0, *(c["time_factor"] for c in corrections(run))])
    costs = {name: cost.read(run, name) for name in configured.measured}
    swept = [_search_one(run, name, costs, layers, scores, factor) for name in configured.sweep]
    solved = [one for one in swept if one.solutions]
    if not solved:
        first = swept[0]
        raise Infeasible(explain_infeasible(first.program, first.asked, first.tables, settings))
    best = min(solved, key=lambda one: one.solutions[0].objective)
    parent = Architecture.of_parent(run.parent.shape)
    reference = best.tables | {"main": costs["main"]}
    records = [
        asdict(s) | {"predicted": _every(best.tables, Architecture.from_names(s.blocks))}
        for s in best.solutions
    ]
    answer = {
        "constraints": [asdict(c) for c in best.asked],
        "time_factor": factor,
        "margin": settings.margin,
        "batch_size": best.tables["main"].scenario.batch_size,
        "sweep": [_swept(one) for one in swept],
        "parent": _every(reference, parent),
        "solutions": records,
    }
    artifacts.write_json(folder / "solutions.json", answer)
    points = frontier(layers, scores, best.tables["main"], parent, settings, best.limits)
    artifacts.write_json(folder / "frontier.json", points)
    artifacts.write_json(
        folder / "baselines.json", _baselines(run, best.program, layers, best.tables["main"])
    )
    _say(run, answer)
    return {"blocks": records[0]["blocks"]}


def _say(run: Run, answer: dict[str, Any]) -> None:
    best = answer["solutions"][0]
    speeds = [
        f"{side['main']['throughput_tok_per_s']:,.0f} tok/s"
        for side in (best["predicted"], answer["parent"])
    ]
    proof = (
        f"score sum {best['objective']:.4f}, proven gap {best['gap']:.2%}, {best['seconds']:.2f} s"
    )
    batch = f" at batch {answer['batch_size']}" if len(answer["sweep"]) > 1 else ""
    run.progress.say(f"  {proof}; predicted {speeds[0]}{batch} (parent {speeds[1]})")


def _search_one(
    run: Run, name: str, costs: Tables, layers: Layers, scores: np.ndarray, factor: float
) -> Searched:
    """`costs`: every table by its own name; `name`: the one that is `main` here."""
    settings = run.recipe.search
    tables = {"main": costs[name]} | {other: costs[other] for other in run.recipe.cost.scenarios}
    asked = constraints(settings, tables, costs["main"], Architecture.of_parent(run.parent.shape))
    limits = [(c.kind, tables[c.scenario], _aimed(c, settings, factor)) for c in asked]
    program = build(layers, scores, limits, settings)
    return Searched(tables, asked, limits, program, _solutions(program, layers, settings))


def _swept(one: Searched) -> dict[str, Any]:
    objective = one.solutions[0].objective if one.solutions else None
    return {"batch_size": one.tables["main"].scenario.batch_size, "objective": objective}


def _every(tables: Tables, architecture: Architecture) -> dict[str, dict[str, float]]:
    return {name: _figures(table, architecture) for name, table in tables.items()}


def _aimed(constraint: Constraint, settings: SearchConfig, factor: float) -> float:
    return (
        constraint.limit * (1 - settings.margin) / factor
        if constraint.kind.timed
        else constraint.limit
    )


def _solutions(program: mip.Program, layers: Layers, settings: SearchConfig) -> list[Solution]:
    if settings.homogeneous:
        began = time.perf_counter()
        chosen = homogeneous(program, layers)
        if chosen is None:
            return []
        value = float(program.costs[chosen].sum())  # all of them were tried
        return [Solution(names(chosen, layers), value, value, 0.0, time.perf_counter() - began)]
    differ = settings.diversity if settings.diversity >= 1 else settings.diversity * len(layers)
    overlap = int(np.floor(len(layers) - differ + 1e-9))
    found = mip.diverse(
        program,
        solutions=settings.solutions,
        overlap=overlap,
        gap=settings.gap,
        time_limit_s=settings.time_limit_s,
    )
    return [Solution.of(one, layers) for one in found]


def _baselines(
    run: Run, program: mip.Program, layers: Layers, table: CostTable
) -> list[dict[str, Any]]:
    """What other ways of choosing reach within the same limits."""
    shape, flat = run.parent.shape, [block for options in layers for block in options]
    parameters = np.array(
        [float(shape.parameters(b.attention) + shape.parameters(b.ffn)) for b in flat]
    )
    parent = shape.parent_block
    plain = np.array(
        [
            b.attention in (parent.attention, NO_ATTENTION) and b.ffn in (parent.ffn, NO_FFN)
            for b in flat
        ]
    )
    choices = baselines.choices(program, parameters, plain) | {
        "homogeneous": homogeneous(program, layers)
    }
    records = []
    for name, chosen in choices.items():
        record: dict[str, Any] = {"name": name, "objective": None}
        if chosen is not None:
            blocks = names(chosen, layers)
            record |= {"objective": float(program.costs[chosen].sum()), "blocks": blocks}
            record |= _figures(table, Architecture.from_names(blocks))
        records.append(record)
    return records


def _figures(table: CostTable, architecture: Architecture) -> dict[str, float]:
    total = table.predict(architecture)
    return {
        "throughput_tok_per_s": table.tokens / total.total_s,
        "latency_s": total.total_s,
        "time_to_first_token_s": total.prefill_s,
        "memory_bytes": total.memory_bytes,
        "parameters": total.parameters,
        "kv_cache_bytes": total.kv_cache_bytes,
    }


def frontier(
    layers: Layers,
    scores: np.ndarray,
    table: CostTable,
    parent: Architecture,
    settings: SearchConfig,
    held: Sequence[Limit] = (),
) -> list[dict[str, Any]]:
    """The best score sum for a range of `settings.frontier`, from the parent's to the best
    attainable.

    Other constraints hold, except timed ones while a timed one is swept (they limit the same
    seconds). Points that another one dominates are left out.
    """
    kind = KINDS[settings.frontier]
    held = [(k, t, limit) for k, t, limit in held if k is not kind and not (k.timed and kind.timed)]
    costs = [[kind.resource(table.block(block)) for block in options] for options in layers]
    constant = kind.resource(table.constant)
    most, least = kind.resource(table.predict(parent)), constant + sum(map(min, costs))
    least = max(least, most / FARTHEST)
    if kind.at_least:  # equal steps of throughput, not of seconds
        limits = 1 / np.linspace(1 / most, 1 / least, settings.points)
    else:
        limits = np.linspace(most, least, settings.points)
    points: list[tuple[float, dict[str, Any]]] = []
    for limit in limits * (1 + 1e-12):
        program = build(layers, scores, [(kind, table, float(limit)), *held], settings)
        found = mip.solve(program, gap=settings.gap, time_limit_s=settings.time_limit_s)
        if found is None:
            continue
        architecture = Architecture.from_names(names(found.chosen, layers))
        record = {"objective": found.objective, "gap": found.gap, "blocks": architecture.names}
        used = kind.resource(table.predict(architecture))
        if used <= 0:  # a straight line through measured costs may cross zero far from them
            continue
        points.append((used, record | _figures(table, architecture)))
    return _undominated(points)


def _undominated(points: list[tuple[float, dict[str, Any]]]) -> list[dict[str, Any]]:
    """By falling use of the resource; a point stays only where nothing that uses as little has as
    good an objective.
    """
    kept: list[dict[str, Any]] = []
    for _, point in sorted(points, key=lambda pair: (pair[0], pair[1]["objective"])):
        if not kept or point["objective"] < kept[-1]["objective"]:
            kept.append(point)
    return kept[::-1]
