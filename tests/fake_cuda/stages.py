"""Whole runs on fake CUDA, in a process of its own: a wish a line in, what every stage did out.

echo '{"row": "llama 3"}' | python -m fake_cuda.stages
"""

from fake_cuda import shim

shim.load()

import collections
import contextlib
import json
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import conftest
import families
import torch

from fake_cuda import bugs
from fake_cuda.mode import FakeCuda, fake_cuda
from puzzle import config, pipeline
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.search import validate

LENGTH, BATCH, STEPS, LAYERS = 16, 4, 2, 2


def recipe(parent: Path, text: Path, out: Path, wish: "Wish") -> dict:
    units = wish.units
    settings = conftest.tiny_recipe(parent, text, out)
    tokens = STEPS * units * BATCH * LENGTH
    settings |= {"device": "auto", "precision": "auto"}
    settings["corpus"] |= {"sequence_length": LENGTH, "train_tokens": 4096}
    settings["library"] |= {
        "tokens": tokens,
        "batch_sequences": BATCH,
        "chunk_steps": STEPS * units,
        "calibration_sequences": BATCH,
        "validation_sequences": BATCH,
        "ffn_multiple": 16,
        "initialization": "least_squares",
        "memory": "streamed" if wish.streamed else "resident",
    }
    if wish.narrow:
        settings["library"] |= {"attention_replacements": ["no_op"], "ffn_replacements": ["linear"]}
    settings["score"] |= {
        "method": "hybrid",
        "sequences": BATCH * units,
        "shard_sequences": BATCH,
        "fisher_samples": 2,
        "tokens_per_pass": 256,
        "assembled": 4,
        "task": "held-out",
        "task_questions": 4,
    }
    settings["search"] |= {"refinements": 1}
    settings["uptrain"] |= {
        "tokens": tokens,
        "batch_sequences": BATCH,
        "checkpoint_steps": 100,
        "validate_steps": 100,
        "lm_weight": 0.5,
    }
    settings["evaluate"] |= {
        "sequences": BATCH * units,
        "batch_sequences": BATCH,
        "context": 2 * LENGTH,
        "questions": 1,
        "samples": 1,
        "sample_tokens": 2,
    }
    return settings


class Stages:
    """What the device has seen, by stage."""

    def __init__(self, device: FakeCuda, until: str) -> None:
        self.device, self.until, self.seen = device, until, {}

    @contextlib.contextmanager
    def watching(self, name: str):
        self.device.reset()
        seen, began = self.seen.setdefault(name, collections.defaultdict(dict)), time.perf_counter()
        try:
            yield
        finally:
            for kind in ("syncs", "unpinned", "unpinned_bytes", "largest"):
                for key, count in getattr(self.device, kind).items():
                    seen[kind][key] = seen[kind].get(key, 0) + count
            seen["seconds"] = time.perf_counter() - began
        if name == self.until:
            raise Enough

    def watched(self, module, name: str):
        original = getattr(module, name)

        def execute(*args, **kwargs):
            of_stage = args[0].name if name == "execute_stage" else name
            with self.watching(of_stage):
                return original(*args, **kwargs)

        return execute


@dataclass(frozen=True)
class Wish:
    """What is run."""

    row: str
    units: int = 1  # doubles the steps and sequences of every loop
    narrow: bool = False  # fewer variants
    streamed: bool = False  # the library, layer by layer
    bug: str = ""  # planted, of `bugs.BUGS`
    until: str = ""  # the last stage


class Enough(Exception):
    """The last stage that was asked for is done."""


def run_family(wish: Wish) -> dict:
    """Run everything; `failed` says where the device would have refused."""
    result: dict = {"wish": asdict(wish), "failed": None}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        root = Path(folder)
        (root / "text").mkdir()
        stack.enter_context(_fewer_layers())
        parent = families.make(wish.row, root / "parent", torch.bfloat16)
        text = conftest.make_text(root / "text")
        device = stack.enter_context(fake_cuda())
        stages = Stages(device, wish.until)
        settings = config.parse(recipe(parent, text, root / "run", wish))
        run = Run(settings, root / "run", Progress(quiet=True))
        for place, name in ((pipeline, "execute_stage"), (validate, "assemble_some")):
            stack.enter_context(mock.patch.object(place, name, stages.watched(place, name)))
        if wish.bug:
            stack.enter_context(bugs.BUGS[wish.bug]())
        try:
            pipeline.execute(run)
        except Enough:
            pass
        except Exception as error:
            result["failed"] = _described(error)
    result |= {"stages": stages.seen, "operators": device.operators}
    return result | {"seconds": time.perf_counter() - began}


def _fewer_layers():
    settings = {
        name: (
            kind,
            given | ({"layer_types": families.TYPES[:LAYERS]} if "layer_types" in given else {}),
        )
        for name, (kind, given) in families.ROWS.items()
    }
    sizes = families.SIZES | {"num_hidden_layers": LAYERS}
    return mock.patch.multiple(families, SIZES=sizes, ROWS=settings)


def _described(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/src/puzzle/" in frame.filename]
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in ours[:-5:-1])
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300]} ({places})"


def main() -> None:
    """Read wishes, one JSON object a line of standard input; print a result for each."""
    for line in sys.stdin:
        print("RESULT " + json.dumps(run_family(Wish(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
