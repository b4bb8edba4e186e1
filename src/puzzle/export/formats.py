"""The formats that `puzzle export --to` knows."""

from puzzle.errors import UserError
from puzzle.export import gguf, nemotron_nas
from puzzle.export.exporter import Exporter

EXPORTERS: dict[str, Exporter] = {
    exporter.name: exporter for exporter in (nemotron_nas.EXPORTER, gguf.EXPORTER)
}


def exporter(name: str) -> Exporter:
    """The exporter of a format. Raises `UserError` for a name that is not in `EXPORTERS`."""
    if name not in EXPORTERS:
        expected = ", ".join(sorted(EXPORTERS))
        raise UserError(f"export: got {name!r}, expected one of: {expected}")
    return EXPORTERS[name]
