"""`puzzle search --table`: search a published block-library table, without a run.

The format is that of NVlabs/puzzle: a JSON object of layers, each an object of variants, each an
object of numbers, possibly nested (`stats.runtime_ms`, `metrics.kl_div`). One variant is chosen per
layer; any dotted key can be minimised or maximised, and bounded from above and below in its sum
over layers.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from puzzle.errors import Infeasible, UserError
from puzzle.search import mip


@dataclass(frozen=True)
class Table:
    """`names[layer]` are the variants of a layer, `variants[layer]` their records, in the file's
    order.
    """

    layers: list[str]
    names: list[list[str]]
    variants: list[list[dict[str, Any]]]

    def column(self, key: str) -> np.ndarray:
        """The figure `key` of every variant of every layer, in a row. `UserError` where one is
        missing or no number.
        """
        values = []
        for layer, names, variants in zip(self.layers, self.names, self.variants, strict=True):
            for name, variant in zip(names, variants, strict=True):
                value = _dig(variant, key)
                if value is None:
                    raise UserError(
                        f"table, {layer}, {_short(name)}: has no {key!r}; {_known(variant)}"
                    )
                if (
                    isinstance(value, bool)
                    or not isinstance(value, int | float)
                    or not math.isfinite(value)
                ):
                    raise UserError(
                        f"table, {layer}, {_short(name)}: {key} is {value!r}; expected a finite number"
                    )
                values.append(float(value))
        return np.array(values)


def _dig(record: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(record, dict) or part not in record:
            return None
        record = record[part]
    return record


def _flat(record: dict[str, Any], prefix: str = "") -> list[str]:
    return [
        name
        for key, value in record.items()
        for name in (_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key])
    ]


def _known(variant: dict[str, Any]) -> str:
    return f"expected one of: {', '.join(_flat(variant))}"


def _short(name: str) -> str:
    return repr(" ".join(name.split()))


def read(path: Path) -> Table:
    """Read and check a table. `UserError` names the layer and the variant that is wrong."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if twice:
            raise UserError(
                f"table {path}: {_short(twice[0])} stands there twice; every name must be unique"
            )
        return dict(pairs)

    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise UserError(f"table {path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"table {path}: not a JSON file ({error})") from None
    if not isinstance(found, dict) or not found:
        raise UserError(f"table {path}: got {type(found).__name__}, expected an object of layers")
    numbers = sorted(
        int(name[6:]) for name in found if name.startswith("layer_") and name[6:].isdigit()
    )
    if numbers and numbers != list(range(len(numbers))):
        missing = min(set(range(numbers[-1] + 1)) - set(numbers), default=numbers[-1])
        raise UserError(
            f"table {path}: layer_{missing} is missing; expected every layer from 0 to {numbers[-1]}"
        )
    for layer, variants in found.items():
        if not isinstance(variants, dict) or not variants:
            raise UserError(
                f"table {path}, {layer}: expected an object of variants, got {json.dumps(variants)[:60]}"
            )
        for name, variant in variants.items():
            if not isinstance(variant, dict):
                raise UserError(
                    f"table {path}, {layer}, {_short(name)}: expected an object of figures"
                )
    return Table(
        list(found), [list(v) for v in found.values()], [list(v.values()) for v in found.values()]
    )


def bounds(texts: list[str], option: str) -> list[tuple[str, float]]:
    """`KEY=VALUE` texts as pairs."""
    pairs = []
    for text in texts:
        key, equals, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not equals or not key or not math.isfinite(number):
            raise UserError(
                f"{option} {text!r}: expected KEY=NUMBER, for example {option} stats.runtime_ms=32679"
            )
        pairs.append((key, number))
    return pairs


def search(
    table: Table,
    *,
    target: str,
    maximize: bool = False,
    most: list[tuple[str, float]],
    least: list[tuple[str, float]],
    gap: float = 1e-4,
    solutions: int = 1,
    differ: int = 1,
    time_limit_s: float = 60.0,
) -> list[dict[str, Any]]:
    """Solutions, best first, each different from those before it in `differ` layers. `Infeasible`
    says why none.
    """
    sign = -1.0 if maximize else 1.0
    starts = mip.starts_of([len(names) for names in table.names])
    limits = [(key, 1.0, value) for key, value in most] + [
        (key, -1.0, value) for key, value in least
    ]
    columns = {
        key: table.column(key) for key in dict.fromkeys([target, *(key for key, _, _ in limits)])
    }
    for key, column in columns.items():
        if key.startswith("stats.") and (column < 0).any():
            raise UserError(
                f"table: {key} is {column.min():g} somewhere; expected resources of at least 0"
            )
    rows = [side * columns[key] for key, side, _ in limits]
    resources = np.array(rows).reshape(len(rows), starts[-1])
    rights = np.array([side * value for _, side, value in limits])
    program = mip.Program(starts, sign * columns[target], resources, rights)
    found = mip.diverse(
        program,
        solutions=solutions,
        overlap=len(table.layers) - differ,
        gap=gap,
        time_limit_s=time_limit_s,
    )
    if not found:
        raise Infeasible(_explain(program, limits, time_limit_s))
    flat = [name for names in table.names for name in names]
    return [
        {
            "objective": sign * one.objective,
            "bound": sign * one.bound,
            "gap": one.gap,
            "seconds": round(one.seconds, 4),
            "totals": {key: float(column[one.chosen].sum()) for key, column in columns.items()},
            "choices": dict(zip(table.layers, (flat[i] for i in one.chosen), strict=True)),
        }
        for one in found
    ]


def _explain(
    program: mip.Program, limits: list[tuple[str, float, float]], time_limit_s: float
) -> str:
    lines = []
    for row, (key, side, value) in enumerate(limits):
        best = program.least[row]
        alone = "reachable alone" if best <= program.limits[row] else "out of reach"
        word = "at most" if side > 0 else "at least"
        lines.append(f"{key} {word} {value:g} is {alone} (best attainable: {side * best:.8g})")
    nearest = mip.nearest(program, time_limit_s)
    if nearest is not None:
        totals = (
            f"{key}={side * program.resources[r][nearest].sum():.8g}"
            for r, (key, side, _) in enumerate(limits)
        )
        lines.append(f"the nearest that is possible: {', '.join(totals)}")
    return "search: no choice meets the bounds: " + "; ".join(lines)
