"""The recipe: every setting of every stage, strictly checked. An unknown key is an error that names its neighbours.

A recipe is a YAML file with one section per stage; what it leaves out keeps the default below. `--set a.b=c`
overrides a dotted key. The resolved recipe is written to `RUN/run.yaml`.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from puzzle.errors import UserError

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceConfig(Section):
    """One place text comes from. In YAML: `stdlib`, a path, or a mapping with exactly one of these three."""

    stdlib: bool = False
    path: str | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    text_column: str = "text"
    messages_column: str = "messages"
    weight: float = Field(default=1.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"stdlib": True} if value == "stdlib" else {"path": value}
        return value

    @model_validator(mode="after")
    def _exactly_one(self) -> "SourceConfig":
        if sum((self.stdlib, self.path is not None, self.dataset is not None)) != 1:
            raise ValueError("a source is exactly one of stdlib, path, dataset")
        return self

    @property
    def label(self) -> str:
        return "stdlib" if self.stdlib else str(self.path or self.dataset)


class CorpusConfig(Section):
    sources: list[SourceConfig] = Field(default_factory=lambda: [SourceConfig(stdlib=True)], min_length=1)
    sequence_length: Positive = 256
    validation_fraction: Fraction = 0.04
    validation_tokens: Positive = 65_536
    seed: int = 0
