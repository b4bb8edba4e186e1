"""Exporters: other forms of a child, for engines that do not load its folder. One module per
format.

An exporter module has:

- `NAME`, the word of the command line and of the folder `RUN/export/NAME`;
- `refuse(config, architecture) -> None`, which raises `UserError` where the format, or the engine
  that reads it, would lose or change something of the child. The message names the layer, what it
  holds, what would do, and the way out;
- `export(source, target, *, name, dtype) -> dict`, which refuses first, then writes the child in
  folder `source` into folder `target` and returns a small JSON object: at least `file`, `bytes` and
  `notes` (what its reader should know);
- `verify(source, target) -> dict`, which reads the export again, raises `UserError` where it is not
  the child, and returns what was compared.

Export never changes the child, needs memory for one tensor at a time, and leaves either a whole
file or none.
"""

from importlib import import_module
from types import ModuleType

from puzzle.errors import UserError

EXPORTERS = {
    "nemotron-nas": "puzzle.export.nemotron_nas",
    "gguf": "puzzle.export.gguf",
}  # name -> module


def exporter(name: str) -> ModuleType:
    if name not in EXPORTERS:
        raise UserError(f"export: got {name!r}, expected one of: {', '.join(sorted(EXPORTERS))}")
    return import_module(EXPORTERS[name])
