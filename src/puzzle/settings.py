"""Reading settings: YAML files, `--set` assignments, one clear line for what is wrong in them."""

import difflib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, JsonValue, ValidationError

from puzzle.errors import UserError

M = TypeVar("M", bound=BaseModel)


def _expected_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys allowed beside an unknown one, found by walking the model's sections."""
    section = model
    for part in location[:-1]:
        field = section.model_fields.get(part) if isinstance(part, str) else None
        annotation = field.annotation if field is not None else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        section = annotation
    return list(section.model_fields)


def _one_line(model: type[BaseModel], error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        allowed = _expected_keys(model, first["loc"])
        close = difflib.get_close_matches(str(first["loc"][-1]), allowed, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of: {', '.join(allowed)}"
        return f"{where}: unknown key {key!r}; {hint}"
    message = first["msg"].removeprefix("Value error, ")  # one of ours
    return f"{where}: {key or 'recipe'}: got {first['input']!r}; {message}"


def validate(model: type[M], values: object, where: str) -> M:
    """Checked settings. Raises `UserError` with one line for the first thing that is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(_one_line(model, error, where)) from None


def to_yaml(section: BaseModel) -> str:
    """Settings as the YAML that gives them back."""
    return yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False)


def recipe_path(name: str) -> Path:
    """The file of a built-in recipe, or the path that was given."""
    built_in = Path(str(files("puzzle") / "recipes" / f"{name}.yaml"))
    return built_in if built_in.is_file() else Path(name)


def read_yaml(path: Path, what: str = "recipe") -> dict[str, JsonValue]:
    """The mapping in a YAML file. `what` names the file in the `UserError` of one that is none."""
    if not path.is_file():
        hint = "`puzzle run` without a recipe runs the embedded parent"
        raise UserError(f"{what} {path}: no such file; {hint}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # also of a date that is none
        raise UserError(f"{what} {path}: not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(
            f"{what} {path}: got {type(values).__name__}, expected a mapping of settings"
        )
    return values


def override(values: Mapping[str, JsonValue], assignments: list[str]) -> dict[str, JsonValue]:
    """Apply `a.b=c` assignments, whose values are YAML. Raises `UserError` for one that is none."""
    changed = dict(values)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(
                f"--set {assignment!r}: expected KEY=VALUE, for example --set search.throughput=2x"
            )
        section = changed
        *parents, last = key.strip().split(".")
        for parent in parents:
            inner = section.get(parent)
            copy: dict[str, JsonValue] = dict(inner) if isinstance(inner, dict) else {}
            section[parent] = copy
            section = copy
        try:
            section[last] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            raise UserError(f"--set {assignment!r}: the value is not YAML") from None
    return changed
