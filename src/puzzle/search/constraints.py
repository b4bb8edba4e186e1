"""What users ask for: quantities with units, as limits on the resources of a whole model.

A constraint is absolute with a unit ("40GiB", "3s", "1500 tok/s") or relative to the parent ("2x",
"50%"), and holds in every scenario or in a named one.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from puzzle.artifacts import Record
from puzzle.config import ScenarioConfig, SearchConfig
from puzzle.cost.table import Cost, CostTable
from puzzle.engines.intervals import PERCENTILES
from puzzle.errors import UserError
from puzzle.model.architecture import Architecture

UNITS = {
    "bytes": {
        "B": 1.0,
        "KB": 1e3,
        "MB": 1e6,
        "GB": 1e9,
        "TB": 1e12,
        "KiB": 2.0**10,
        "MiB": 2.0**20,
        "GiB": 2.0**30,
        "TiB": 2.0**40,
    },
    "seconds": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0},
    "tokens per second": {"tok/s": 1.0, "ktok/s": 1e3},
    "parameters": {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9},
}
QUANTITY = re.compile(
    r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z/%]*)(?:\s+p([0-9]+))?\s*"
)
Tables = dict[str, CostTable]  # by scenario; `main` at the batch size that is looked at


def _once(scenario: ScenarioConfig) -> float:
    return 1.0


def _tokens(scenario: ScenarioConfig) -> float:
    return float(scenario.batch_size * scenario.output_length)


def _steps(scenario: ScenarioConfig) -> float:
    return float(scenario.output_length - 1)


@dataclass(frozen=True)
class Kind:
    """A constraint people can ask for: its unit and which resource of a `Cost` it limits.

    The figure that is asked for is the resource per `amount` (seconds per step), or where more is
    better the amount per resource (tokens per second).
    """

    unit: str
    resource: Callable[[Cost], float]
    at_least: bool = False  # more is better; it becomes a limit on seconds
    timed: bool = False  # measured on the engine, so corrections and the margin apply
    amount: Callable[[ScenarioConfig], float] = _once
    percentiles: Literal["first_token", "inter_token"] | None = None  # those of a table, if any

    def figure(self, table: CostTable, resource: float, stretch: float = 1.0) -> float:
        """What is asked for, of a whole model that uses so much.

        `stretch`: of the seconds at a percentile, over those of the resource.
        """
        amount = self.amount(table.scenario)
        return amount / (resource * stretch) if self.at_least else resource * stretch / amount

    def limit(self, table: CostTable, figure: float, stretch: float = 1.0) -> float:
        """The resource at which a whole model has this figure."""
        amount = self.amount(table.scenario)
        return (amount / figure if self.at_least else figure * amount) / stretch

    def stretch(self, table: CostTable, percentile: int | None) -> float:
        """A percentile of the seconds, over the seconds without one."""
        return 1.0 if self.percentiles is None else getattr(table, self.percentiles).at(percentile)


KINDS = {
    "throughput": Kind(
        "tokens per second",
        lambda cost: cost.total_s,
        at_least=True,
        timed=True,
        amount=_tokens,
    ),
    "user_throughput": Kind(
        "tokens per second",
        lambda cost: cost.decode_s,
        at_least=True,
        timed=True,
        amount=_steps,
        percentiles="inter_token",
    ),
    "latency": Kind("seconds", lambda cost: cost.total_s, timed=True),
    "time_to_first_token": Kind(
        "seconds", lambda cost: cost.prefill_s, timed=True, percentiles="first_token"
    ),
    "inter_token_latency": Kind(
        "seconds",
        lambda cost: cost.decode_s,
        timed=True,
        amount=_steps,
        percentiles="inter_token",
    ),
    "memory": Kind("bytes", lambda cost: cost.memory_bytes),
    "parameters": Kind("parameters", lambda cost: cost.parameters),
    "kv_cache": Kind("bytes", lambda cost: cost.kv_cache_bytes),
}


class Constraint(Record):
    """What was asked, in one scenario."""

    name: str
    text: str  # as it was asked
    value: float  # in the constraint's own unit
    relative: float | None  # to the parent; None where it was asked in units
    limit: float  # bounds the model's resource from above
    scenario: str = "main"
    percentile: int | None = None  # that was asked for
    stretch: float = 1.0  # of the seconds at the percentile, over those that are predicted

    @property
    def kind(self) -> Kind:
        """Its unit and resource."""
        return KINDS[self.name]

    @property
    def label(self) -> str:
        """`throughput`, or `chat throughput` for another scenario than main."""
        return self.name if self.scenario == "main" else f"{self.scenario} {self.name}"

    def in_unit(self, value: float) -> str:
        """A value of the constraint's figure in the unit that was asked: `13.4x`, `38.2GiB`."""
        unit = QUANTITY.fullmatch(self.text)[2]  # type: ignore[index]
        if self.relative is not None:
            share = value / self.value * self.relative
            return f"{share * 100:.3g}%" if unit == "%" else f"{share:.3g}x"
        return f"{value / UNITS[self.kind.unit][unit]:.6g}{unit}"


class Quantity(NamedTuple):
    """What was asked: in base units, or relative to the parent; at a percentile or without."""

    number: float
    is_relative: bool
    percentile: int | None


def parse_quantity(name: str, text: str) -> Quantity:
    """From a text such as `2x`, `40GiB` or `30ms p95`. Raises `UserError` where it is unclear."""
    match = QUANTITY.fullmatch(str(text))
    units = UNITS[KINDS[name].unit]
    known = ", ".join(unit or "none" for unit in units)
    expected = f"expected a number with a unit ({known}) or relative to the parent (2x, 50%)"
    scales = units | {"x": 1.0, "%": 0.01}
    number = float(match[1]) * scales.get(match[2], 1.0) if match else 0.0
    if not match or number <= 0 or not math.isfinite(number):
        raise UserError(f"search.{name}: got {text!r:.80}; {expected}")
    if match[2] not in scales:
        similar = [unit for unit in scales if unit.lower() == match[2].lower()]
        hint = f"; did you mean {match[1]}{similar[0]}?" if similar else ""
        raise UserError(f"search.{name}: got {text!r:.80}; {expected}{hint}")
    return Quantity(number, match[2] not in units, _percentile(name, str(text), match[3]))


def _percentile(name: str, text: str, digits: str | None) -> int | None:
    if digits is None:
        return None
    if KINDS[name].percentiles is None:
        takes = ", ".join(other for other, kind in KINDS.items() if kind.percentiles)
        raise UserError(
            f"search.{name}: got {text!r:.80}; it has no percentiles, which {takes} have"
        )
    if digits not in map(str, PERCENTILES):
        known = ", ".join(f"p{percentile}" for percentile in PERCENTILES)
        raise UserError(f"search.{name}: got {text!r:.80}; expected a percentile of {known}")
    return int(digits)


def check(settings: SearchConfig, scenarios: Mapping[str, ScenarioConfig]) -> None:
    """Raise `UserError` where nothing is asked for or a quantity is unclear; needs no costs."""
    requests = list(_requests(settings, list(scenarios)))
    if not requests and settings.target is None and settings.architecture is None:
        names = ", ".join(KINDS)
        raise UserError(
            f"search: no constraint is set; set at least one of {names}, for example throughput: 2x"
        )
    requests += [(name, "main", "1x") for name in (settings.frontier, settings.target) if name]
    for name, scenario, text in requests:
        if scenario not in scenarios:
            known = ", ".join(scenarios)
            raise UserError(f"search.{name}: no scenario {scenario!r}; expected one of {known}")
        parse_quantity(name, text)
        if KINDS[name].amount(scenarios[scenario]) == 0:
            raise UserError(
                f"search.{name}: scenario {scenario} puts out one token, so there is none after "
                "the first; raise its output_length"
            )


def _requests(settings: SearchConfig, scenarios: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(constraint, scenario, text). One text holds in every scenario.

    The number of parameters is the same in all of them, so it is asked once.
    """
    for name in KINDS:
        quantity = getattr(settings, name)
        if isinstance(quantity, str):
            asked_in = scenarios[:1] if name == "parameters" else scenarios
            quantity = dict.fromkeys(asked_in, quantity)
        for scenario, text in (quantity or {}).items():
            yield name, scenario, str(text)


def asked_in_words(settings: SearchConfig, scenarios: Sequence[str]) -> list[str]:
    """What is asked, in words: `throughput 2x`, `chat latency 3s`. Needs no costs."""
    words = [
        f"{name} {text}" if scenario == "main" else f"{scenario} {name} {text}"
        for name, scenario, text in _requests(settings, scenarios)
    ]
    return words + target_in_words(settings)


def target_in_words(settings: SearchConfig) -> list[str]:
    """`maximize throughput` and `kl 0.15`, where the search goes in that direction."""
    if settings.target is None:
        return []
    direction = "maximize" if settings.maximize else "minimize"
    return [f"{direction} {settings.target}", f"kl {settings.kl:g}"]


def constraints(
    settings: SearchConfig, tables: Tables, reference: CostTable, parent: Architecture
) -> list[Constraint]:
    """What was asked, as limits on resources of the whole model.

    Args:
        settings: what was asked.
        tables: costs by scenario.
        reference: of `main` at the batch size, of those swept, where the parent is fastest: that
            is how the parent would be served that "2x" compares with.
        parent: the parent's architecture.
    """
    limits = []
    for name, scenario, text in _requests(settings, list(tables)):
        kind, table = KINDS[name], tables[scenario]
        compared = reference if scenario == "main" else table
        number, is_relative, percentile = parse_quantity(name, text)
        of_parent = kind.figure(
            compared,
            kind.resource(compared.predict(parent)),
            kind.stretch(compared, percentile),
        )
        stretch = kind.stretch(table, percentile)
        value = number * of_parent if is_relative else number
        limits.append(
            Constraint(
                name=name,
                text=text,
                value=value,
                relative=number if is_relative else None,
                limit=kind.limit(table, value, stretch),
                scenario=scenario,
                percentile=percentile,
                stretch=stretch,
            )
        )
    return limits
