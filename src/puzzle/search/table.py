"""A published block-library table, read and checked.

The format is that of NVlabs/puzzle: a JSON object of layers, each an object of variants, each an
object of numbers, possibly nested (`stats.runtime_ms`, `metrics.kl_div`).
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from puzzle.errors import UserError, reason
from puzzle.search.program import starts_of

LARGEST = 1e300  # above it sums of figures are infinite
Record = dict[str, JsonValue]  # the figures of one variant


@dataclass(frozen=True)
class Table:
    """`layers[layer][variant]` is the record of a variant, in the file's order."""

    layers: Mapping[str, Mapping[str, Record]]

    @classmethod
    def read(cls, path: Path) -> "Table":
        """Read and check a table. `UserError` names the layer and the variant that is wrong."""
        content = _parse(path)
        if not isinstance(content, dict) or not content:
            got = "no layers" if content == {} else type(content).__name__
            raise UserError(f"table {path}: got {got}, expected an object of layers")
        _check_layer_numbers(path, content)
        return cls({layer: _variants(path, layer, value) for layer, value in content.items()})

    @property
    def starts(self) -> np.ndarray:
        """Where every layer's variants start in `names` and `column`, and where the last ends."""
        return starts_of([len(variants) for variants in self.layers.values()])

    @property
    def names(self) -> list[str]:
        """The name of every variant of every layer, in a row."""
        return [name for variants in self.layers.values() for name in variants]

    def column(self, key: str) -> np.ndarray:
        """The figure `key` of every variant of every layer, in a row.

        `UserError` where one is missing or is not a finite number.
        """
        figures = [
            _figure(variant, key, f"table, {layer:.80}, {_short(name)}")
            for layer, variants in self.layers.items()
            for name, variant in variants.items()
        ]
        return np.array(figures)


def _figure(variant: Record, key: str, place: str) -> float:
    """The number under a dotted key; `place` begins the message of the `UserError`."""
    value = _nested(variant, key)
    if value is None:
        known = ", ".join(f"{known:.80}" for known in itertools.islice(_keys(variant), 20))
        hint = f"expected one of: {known}" if known else "it has no figures"
        raise UserError(f"{place}: has no {key!r}; {hint}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        raise UserError(f"{place}: {key} is {value!r:.80}; expected a finite number")
    return float(value)


def _nested(record: Record, key: str) -> JsonValue:
    """What stands under a dotted key, or None."""
    value: JsonValue = record
    for part in key.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


def _keys(record: Record, prefix: str = "") -> Iterator[str]:
    """The dotted keys of everything in a record."""
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _short(name: str) -> str:
    text = " ".join(name.split())
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _parse(path: Path) -> JsonValue:
    """The JSON of a file in which no object has a name twice."""

    def unique(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                raise UserError(
                    f"table {path}: {_short(key)} appears more than once; every name must be unique"
                )
        return dict(pairs)

    try:
        content: JsonValue = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise UserError(f"table {path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"table {path}: is a folder; expected a JSON file") from None
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"table {path}: not a JSON file ({reason(error)})") from None
    return content


def _check_layer_numbers(path: Path, names: Iterable[str]) -> None:
    """Where layers are called layer_0, layer_1, ... none may be missing."""
    digits = [name.removeprefix("layer_") for name in names if name.startswith("layer_")]
    numbers = sorted(int(text) for text in digits if text.isdecimal() and len(text) < 10)
    missing = next((i for i, number in enumerate(numbers) if i != number), None)
    if missing is not None:
        raise UserError(
            f"table {path}: layer_{missing} is missing; "
            f"expected every layer from 0 to {numbers[-1]}"
        )


def _variants(path: Path, layer: str, value: JsonValue) -> dict[str, Record]:
    """The records of a layer's variants by name."""
    if not isinstance(value, dict) or not value:
        raise UserError(
            f"table {path}, {layer}: expected an object of variants, got {json.dumps(value)[:60]}"
        )
    variants: dict[str, Record] = {}
    for name, variant in value.items():
        if not isinstance(variant, dict):
            raise UserError(f"table {path}, {layer}, {_short(name)}: expected an object of figures")
        variants[name] = variant
    return variants
