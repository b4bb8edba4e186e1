"""Parts of `benchmarks/gpu.py` at the widths of Llama-3.1-8B on fake CUDA, in a process of its own.

    echo '{"part": "score", "layers": 2}' | python -m fake_cuda.widths

What is alive on the device is counted, beside what `puzzle plan` says; nothing is computed.
"""

from fake_cuda import shim

shim.load()

import contextlib
import functools
import json
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu

from fake_cuda import bugs
from fake_cuda.mode import fake_cuda


def measure(part: str, layers: int, bug: str = "", uptrain: dict | None = None) -> dict:
    """The part's figures, and the operators that touched most bytes, by place.

    `bug`: planted, of `bugs.BUGS`. `uptrain`: settings beside the part's own.
    """
    began = time.perf_counter()
    recipe = functools.partialmethod(gpu.Scale.recipe, uptrain=uptrain or {})
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        device = stack.enter_context(fake_cuda())
        stack.enter_context(mock.patch.object(gpu.Scale, "recipe", recipe))
        if bug:
            stack.enter_context(bugs.BUGS[bug]())
        scale = gpu.Scale.of("cuda", quick=False, layers=layers)
        figures = gpu.PARTS[part](scale, Path(root))
    figures["largest"] = device.largest
    return figures | {"took_s": time.perf_counter() - began}


def main() -> None:
    """Read wishes, one JSON object a line of standard input; print a result for each."""
    for line in sys.stdin:
        print("RESULT " + json.dumps(measure(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
