"""Run pytest many times and import torch and transformers once. Not a benchmark itself.

    python benchmarks/pytest_forks.py

Every line of standard input is a job in JSON: `source` (a folder with a package `puzzle`), `tests`,
`output` (a file), `timeout` (seconds). A process that has the heavy libraries loaded already, but
nothing of puzzle, is forked for it. Its exit code is a line of standard output: negative where a
signal ended it, as one does when the time is up.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import datasets  # noqa: F401
import highspy  # noqa: F401
import hypothesis
import pydantic  # noqa: F401
import pytest
import torch  # noqa: F401
from transformers import (  # noqa: F401
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

# The first example that fails is enough: none is made smaller, none is kept for the next run.
hypothesis.settings.register_profile(
    "forks", phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate], database=None
)
hypothesis.settings.load_profile("forks")


class CheapFirst:
    """Tests that need few fixtures before those that need a run: most mutants never see the run."""

    @staticmethod
    def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
        """Sort them."""
        items.sort(key=lambda item: len(item.fixturenames))


OPTIONS = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]


def run(source: str, tests: Sequence[str], output: str) -> None:
    """In the forked process: pytest with the package of that folder. Does not return."""
    os.setsid()
    with Path(output).open("w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ["PYTHONPATH"] = source
    sys.path.insert(0, source)
    code = pytest.main([*OPTIONS, *tests], plugins=[CheapFirst()])
    sys.stdout.flush()
    os._exit(int(code))


def main() -> None:
    """Fork a process for every job, one after the other."""
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(job["source"], job["tests"], job["output"])
        alarm = threading.Timer(job["timeout"], os.killpg, (pid, signal.SIGKILL))
        alarm.start()
        _, status = os.waitpid(pid, 0)
        alarm.cancel()
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
