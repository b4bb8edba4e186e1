"""Reading settings: YAML files, `--set` assignments, one clear line for what is wrong in them.

A stranger's file costs neither memory nor time: its size and what its aliases expand to are
bounded, a key that stands twice is an error, and YAML's tags make plain values only.
"""

import datetime
import difflib
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, JsonValue, ValidationError
from pydantic_core import ErrorDetails

from puzzle.errors import UserError

M = TypeVar("M", bound=BaseModel)
LARGEST_FILE_BYTES = 1 << 20
MOST_VALUES = 100_000  # in a file, with what its aliases stand for
NAME = "a name of letters, digits, - and _, with a letter or digit first, of at most 64 characters"
EXPECTED = {  # pydantic's types of errors, in words; {} are the figures of the error
    "string_type": "expected text",
    "string_too_short": "expected some text",
    "string_pattern_mismatch": f"expected {NAME}",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "int_parsing_size": "expected a smaller number",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "greater_than": "expected more than {gt}",
    "greater_than_equal": "expected at least {ge}",
    "less_than": "expected less than {lt}",
    "less_than_equal": "expected at most {le}",
    "list_type": "expected a list",
    "dict_type": "expected a mapping",
    "model_type": "expected a mapping of settings",
    "model_attributes_type": "expected a mapping of settings",
    "too_short": "expected at least one entry",
}


# ------------------------------------------------------------------------------------ what is wrong


def validate(model: type[M], values: object, where: str) -> M:
    """Checked settings. Raises `UserError` with one line for the first thing that is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(_one_line(model, values, error, where)) from None


def validate_changed(
    model: type[M], values: Mapping[str, JsonValue], assignments: Sequence[str], where: str
) -> M:
    """Checked settings with changes by `--set`, which is blamed for what only they make wrong."""
    changed = override(values, assignments)
    try:
        return model.model_validate(changed)
    except ValidationError as error:
        if assignments:
            validate(model, values, where)
            where = _assignment_of(changed, error, assignments)
        raise UserError(_one_line(model, changed, error, where)) from None


def _assignment_of(values: object, error: ValidationError, assignments: Sequence[str]) -> str:
    """The assignment that an error is about, or all of them."""
    wrong = _key_of(values, _first(values, error)[0])
    for assignment in reversed(assignments):
        key = assignment.partition("=")[0].strip()
        if f"{wrong}.".startswith(f"{key}.") or f"{key}.".startswith(f"{wrong}."):
            return _named(assignment)
    return " ".join(map(_named, assignments))


def _named(assignment: str) -> str:
    text = repr(assignment)
    return f"--set {text}" if len(text) <= 200 else f"--set {text[:197]}..."


def _key_of(values: object, error: ErrorDetails) -> str:
    return ".".join(map(str, _path(values, error)))


def _path(values: object, error: ErrorDetails) -> list[int | str]:
    """Where an error is, without pydantic's own marks (of unions, of keys)."""
    path: list[int | str] = []
    for part in error["loc"]:
        if isinstance(values, Mapping) and part in values:
            values = values[part]
        elif isinstance(values, list) and isinstance(part, int):
            values = values[part] if part < len(values) else None
        elif part == "[key]":  # what is wrong is the key itself
            return path[:-1]
        elif error["type"] != "missing" or part != error["loc"][-1]:
            continue
        path.append(part)
    return path


def _first(values: object, error: ValidationError) -> list[ErrorDetails]:
    """The first thing that is wrong: the errors of one value, of which a union has several."""
    errors = error.errors(include_url=False)
    first = _path(values, errors[0])
    within = [e for e in errors if _path(values, e)[: len(first)] == first]
    deepest = max(within, key=lambda e: len(_path(values, e)))
    path = _path(values, deepest)
    return [e for e in within if _path(values, e) == path]


def _one_line(model: type[BaseModel], values: object, error: ValidationError, where: str) -> str:
    errors = _first(values, error)
    first, key = errors[0], _key_of(values, errors[0])
    if first["type"] == "extra_forbidden":
        allowed = _expected_keys(model, _path(values, first))
        close = difflib.get_close_matches(str(first["loc"][-1]), allowed, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of: {', '.join(allowed)}"
        return f"{where}: unknown key {key!r:.200}; {hint}"
    if first["type"] == "missing":
        return f"{where}: {key} is missing; give it a value"
    if first["type"] == "invalid_key":
        return f"{where}: got the key {_shown(first['input'])}; expected text, in quotes"
    expected = list(dict.fromkeys(_expected(e) for e in errors))
    if len(expected) > 1:
        expected = [text.partition(", such as")[0] for text in expected]
    words = [expected[0], *(text.removeprefix("expected ") for text in expected[1:])]
    is_of_section = first["type"] == "value_error" and isinstance(first["input"], dict)
    got = "" if is_of_section else f"got {_shown(first['input'])}; "
    at = f"{key:.200}: " if key else ""
    return f"{where}: {at}{got}{' or '.join(words)}"


def _shown(value: object) -> str:
    """A value as its user wrote it, about."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, list | dict) and len(value) > 20:
        return f"a {type(value).__name__} of {len(value)} entries"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _expected(error: ErrorDetails) -> str:
    kind, figures, value = error["type"], error.get("ctx", {}), error["input"]
    if kind == "value_error":  # one of ours
        return error["msg"].removeprefix("Value error, ")
    if kind == "literal_error":
        allowed = str(figures["expected"])
        names = [name.strip("'") for name in allowed.replace(" or ", ", ").split(", ")]
        close = difflib.get_close_matches(str(value), names, n=1)
        return f"expected {allowed}" + (f"; did you mean {close[0]!r}?" if close else "")
    if kind == "int_parsing":
        return f"expected a whole number{_as_whole_number(value)}"
    if kind == "list_type" and isinstance(value, str | int | float):
        return (
            f"expected a list, such as [{value:.40}]"
            if isinstance(value, str)
            else (f"expected a list, such as [{value}]")
        )
    if kind == "string_type" and isinstance(value, int | float | datetime.date):
        return f"expected text, in quotes: {str(value)!r}"
    if kind in EXPECTED:
        return EXPECTED[kind].format(**{name: _figure(limit) for name, limit in figures.items()})
    return error["msg"]


def _figure(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _as_whole_number(value: object) -> str:
    """How to write a number such as 1e6 or 10M, which YAML reads as text."""
    text = str(value).strip()
    scale = {"K": 1e3, "M": 1e6, "B": 1e9}.get(text[-1:].upper())
    try:
        number = float(text) if scale is None else scale * float(text[:-1])
    except ValueError:
        return ""
    is_whole = math.isfinite(number) and number == int(number) and abs(number) < 1e15
    return f", written {int(number)}" if is_whole else ""


def _expected_keys(model: type[BaseModel], path: list[int | str]) -> list[str]:
    """The keys allowed beside an unknown one, found by walking the model's sections."""
    section = model
    for part in path[:-1]:
        field = section.model_fields.get(part) if isinstance(part, str) else None
        annotation = field.annotation if field is not None else None
        inner = [annotation, *getattr(annotation, "__args__", ())]
        sections = [s for s in inner if isinstance(s, type) and issubclass(s, BaseModel)]
        if sections:
            section = sections[0]
    return list(section.model_fields)


# --------------------------------------------------------------------------------------------- YAML


def to_yaml(section: BaseModel) -> str:
    """Settings as the YAML that gives them back."""
    return yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False)


def recipe_path(name: str) -> Path:
    """The file of a built-in recipe, or the path that was given. Raises `UserError` for none."""
    folder = Path(str(files("puzzle") / "recipes"))
    built_in = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    path = Path(name).expanduser()
    if name not in built_in and not path.exists():
        close = difflib.get_close_matches(name, built_in, n=1)
        hint = (
            f"did you mean the built-in {close[0]!r}?"
            if close
            else (f"expected a YAML file or a built-in recipe ({', '.join(built_in)})")
        )
        raise UserError(f"recipe {name}: no such file; {hint}")
    return built_in.get(name, path)


def read_yaml(path: Path, what: str = "recipe") -> dict[str, JsonValue]:
    """The mapping in a YAML file. `what` names the file in the `UserError` of one that is none."""
    if path.is_dir():
        raise UserError(f"{what} {path}: is a folder; expected a YAML file")
    if not path.is_file():
        raise UserError(f"{what} {path}: no such file; expected a YAML file")
    if (size := path.stat().st_size) > LARGEST_FILE_BYTES:
        raise UserError(
            f"{what} {path}: got {size:,} bytes, expected at most {LARGEST_FILE_BYTES:,}; "
            "is it a file of settings?"
        )
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{what} {path}: not UTF-8 text; expected a YAML file") from None
    except ValueError as error:
        raise UserError(f"{what} {path}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(
            f"{what} {path}: got {type(values).__name__}, expected a mapping of settings such as "
            "`parent: org/model`"
        )
    return values


def parse_yaml(text: str) -> JsonValue:
    """The value of a YAML text. Raises `ValueError` with one line for a text that has none."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_node(node, {})
        return _constructed(loader, node)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {_reason(error)}") from None
    except RecursionError:
        raise ValueError("nested too deeply; expected settings") from None


def _constructed(loader: yaml.SafeLoader, node: yaml.Node) -> JsonValue:
    try:
        value: JsonValue = loader.construct_document(node)
    except ValueError as error:  # of a date that is none
        raise ValueError(f"not YAML: {error}") from None
    return value


def _reason(error: yaml.YAMLError) -> str:
    problem = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
    problem = " ".join(problem.split())
    if "'\\t'" in problem:
        problem = "a tab; indent with spaces"
    mark = getattr(error, "problem_mark", None)
    return problem if mark is None else f"line {mark.line + 1}: {problem}"


def _check_node(node: yaml.Node, counts: dict[int, int]) -> int:
    """How many values a node stands for; `counts` are of the nodes that were seen before.

    Raises `ValueError` for too many, for a node within itself, and for a key that stands twice.
    """
    if id(node) in counts:
        if not counts[id(node)]:
            raise ValueError(f"line {node.start_mark.line + 1}: an alias of what it is within")
        return counts[id(node)]
    counts[id(node)] = 0  # not known yet
    total = 1
    if isinstance(node, yaml.MappingNode):
        keys: set[tuple[str, str]] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    raise ValueError(
                        f"line {key.start_mark.line + 1}: key {key.value!r:.80} stands twice; "
                        "remove one"
                    )
                keys.add((key.tag, key.value))
            total += _check_node(key, counts) + _check_node(value, counts)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_check_node(item, counts) for item in node.value)
    if total > MOST_VALUES:
        raise ValueError(f"its aliases stand for more than {MOST_VALUES:,} values; write less")
    counts[id(node)] = total
    return total


def override(values: Mapping[str, JsonValue], assignments: Sequence[str]) -> dict[str, JsonValue]:
    """Apply `a.b=c` assignments, whose values are YAML. Raises `UserError` for one that is none."""
    changed = dict(values)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise UserError(
                f"{_named(assignment)}: expected KEY=VALUE, for example --set search.throughput=2x"
            )
        section = changed
        *parents, last = key.strip().split(".")
        for parent in parents:
            inner = section.get(parent)
            copy: dict[str, JsonValue] = dict(inner) if isinstance(inner, dict) else {}
            section[parent] = copy
            section = copy
        try:
            section[last] = parse_yaml(text)
        except ValueError as error:
            raise UserError(f"{_named(assignment)}: {error}") from None
    return changed
