"""Asks a process of its own, whose torch has the guard loaded, for results."""

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
TIMEOUT_S = 1500


def ask(module: str, wishes: list[dict]) -> list[dict]:
    """A result of `python -m module` for every wish. Fails with what it has said where it ends."""
    source = str(TESTS.parent / "src")
    paths = [source, str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", module],
        input="\n".join(map(json.dumps, wishes)),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == len(wishes), done.stderr[-3000:]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]
