"""What an exporter is: another form of a child, for engines that do not load its folder.

A format is one module that ends with `EXPORTER = Exporter(...)`; `formats.py` lists them. An export
never changes the child, needs memory for one tensor at a time, and leaves either a complete file
or none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue

from puzzle.model.architecture import Architecture
from puzzle.model.modeling_puzzle import PuzzleConfig


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked of an export beside its format.

    `name` is the child's, for formats that store one. `dtype` is that of the weights, as the format
    spells it (f32, f16, bf16, ...); None stands for the format's default.
    """

    name: str = "child"
    dtype: str | None = None


class ExportRecord(BaseModel):
    """A result that is kept in the manifest of an export."""

    model_config = ConfigDict(frozen=True)

    def as_json(self) -> dict[str, JsonValue]:
        """The JSON object of the manifest, without the fields that are None."""
        return self.model_dump(mode="json", exclude_none=True)


class Written(ExportRecord):
    """What `export` wrote. A format adds fields of its own in a subclass.

    `file` is a name in the export's folder, empty where the folder itself is the export; `bytes`
    is the size of its weights; `notes` are for the person who will use it.
    """

    file: str
    bytes: int
    notes: list[str]


class Comparison(ExportRecord):
    """What `verify` compared and how close it was; each format has a subclass with its figures."""


@dataclass(frozen=True, kw_only=True)
class Exporter:
    """One format.

    Attributes:
        name: the word of the command line and of the child's folder `export/NAME`.
        summary: one line on what the format is and who reads it.
        refuse: raises `UserError` where the format, or the engine that reads it, would lose or
            change something of the child. The message names the layer, what it holds, what would
            do, and the way out.
        export: refuses first, then writes the child in the first folder into the second.
        verify: reads the export in the second folder again, compares it with the child in the
            first, and raises where they are not the same model.
    """

    name: str
    summary: str
    refuse: Callable[[PuzzleConfig, Architecture], None]
    export: Callable[[Path, Path, Options], Written]
    verify: Callable[[Path, Path], Comparison]
