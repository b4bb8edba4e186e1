"""Counts of what was tried to break the tool, for the table of `make test-faults`."""

import json
import os
from pathlib import Path


def tally(kind: str, tried: int, survived: int | None = None) -> None:
    """Append a count to the JSON Lines file that `PUZZLE_FAULTS_TALLY` names, if it names one."""
    path = os.environ.get("PUZZLE_FAULTS_TALLY")
    if path:
        count = {"kind": kind, "tried": tried, "survived": tried if survived is None else survived}
        with Path(path).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(count) + "\n")
