"""What every section of a recipe has in common: strictness, paths, names."""

import re
from pathlib import Path
from typing import Annotated, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from puzzle import settings
from puzzle.errors import UserError


def expanded(path: Path) -> Path:
    """A path with its `~` expanded. Raises `UserError` for an unknown user's."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise UserError(f"{path}: no user of that name has a home folder here") from None


def _path(text: str) -> str:
    """A path with its `~` expanded; other texts stay as they are."""
    if not text.strip() or "\0" in text:
        raise ValueError("expected a path, or a name")
    try:
        return str(expanded(Path(text))) if text.startswith("~") else text
    except UserError:
        raise ValueError("expected a path; no user of that name has a home folder here") from None


Positive = Annotated[int, Field(gt=0, le=10**15)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
PathOrName = Annotated[str, AfterValidator(_path)]


class Section(BaseModel):
    """A part of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: object, info: ValidationInfo) -> object:
        """Pydantic would take true for 1."""
        kind = cls.model_fields[info.field_name or ""].annotation
        values = value if isinstance(value, list) else [value]
        if bool not in (kind, *get_args(kind)) and any(isinstance(v, bool) for v in values):
            raise ValueError(
                "expected no truth value; YAML reads yes, no, on and off as true and false: "
                "write it in quotes if it is meant as text"
            )
        return value


NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
Name = Annotated[str, Field(pattern=rf"^{NAME}$")]  # also a folder's name


def is_name(text: str) -> bool:
    """Whether a child or a place, and so a folder, can have this name."""
    return re.fullmatch(NAME, text) is not None


def check_name(what: str, name: str) -> None:
    """Raise `UserError` for what can be no name of a child or place."""
    if not is_name(name):
        raise UserError(f"{what} {name!r:.100}: expected {settings.NAME}")
