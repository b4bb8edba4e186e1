"""Engines: ways to serve a checkpoint and measure it. One module per engine, one small interface.

An engine opens a *session* on a checkpoint folder; a session runs one batch of a scenario and says
how long the prefill and every decode step took. It can be told to run only some of the checkpoint's
layers, others in every step: so one engine start measures any architecture whose subblocks the
checkpoint holds. Everything else (probe, random architectures, regression) is `cost.py`'s and the
same for all engines.

An engine module has: `NAME`, `MEASURED` (False where figures are modelled), `available() -> str |
None` (None, or why not), `describe(device_sheet) -> dict` (what a cost table must name to be
reusable) and `open_session(folder, scenario, log, device_sheet, probe) -> Session`. A probe changes
its layers while it serves, so it runs without CUDA graphs; promises are judged by sessions that are
no probes.
"""

import os
import platform
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from puzzle.config import CostConfig, ScenarioConfig
from puzzle.errors import UserError

ENGINES = {name: f"puzzle.engines.{name}_engine" for name in ("vllm", "torch", "roofline")}


@dataclass(frozen=True)
class Timing:
    """Seconds of one batch: until every sequence has its first token, and of every step after that."""

    prefill_s: float
    steps_s: tuple[float, ...]

    @property
    def decode_s(self) -> float:
        return sum(self.steps_s)

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.decode_s


class Session(AbstractContextManager["Session"], Protocol):
    """A checkpoint being served."""

    pages: Sequence[
        tuple[int, int]
    ]  # of every layer's KV cache, per sequence: (tokens, bytes) of a page

    def time_batch(self, scenario: ScenarioConfig, layers: Sequence[Sequence[int]] = ()) -> Timing:
        """Serve `batch_size` prompts of `input_length` tokens and generate `output_length` tokens
        for each.

        `layers[0]` are the layers of the checkpoint to run in the prefill, `layers[i]` in decode
        step i (the last entry from there on); empty: all of them. Layer 0 must be among them.
        """


def random_prompts(scenario: ScenarioConfig, vocab_size: int, seed: int) -> list[list[int]]:
    """Token ids, [batch_size][input_length]: speed does not depend on what is said."""
    rng = random.Random(seed)
    length = scenario.input_length
    return [
        [rng.randrange(1, vocab_size) for _ in range(length)] for _ in range(scenario.batch_size)
    ]


def load(config: CostConfig, deploy: Sequence[str]) -> ModuleType:
    """The engine module a recipe asks for; `auto` is vllm where it runs and will serve, otherwise
    torch.
    """
    served = "vllm" in deploy or "vllm-plugin" in deploy
    if config.engine == "auto":
        vllm = import_module(ENGINES["vllm"])
        fits = served and vllm.available() is None
        return vllm if fits else import_module(ENGINES["torch"])
    if config.engine == "vllm" and not served:
        raise UserError(
            f"cost.engine: vllm cannot serve the whole space of deploy={list(deploy)}; add vllm to deploy"
        )
    engine = import_module(ENGINES[config.engine])
    if (reason := engine.available()) is not None:
        raise UserError(
            f"cost.engine: {config.engine} is not available: {reason}; use cost.engine=auto"
        )
    return engine


def machine() -> dict[str, Any]:
    """What a measured figure depends on besides the engine."""
    import torch

    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "count": torch.cuda.device_count()}
    model = platform.processor() or platform.machine()
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            model = next(
                (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
                model,
            )
    except OSError:
        pass
    return {"device": model, "count": os.cpu_count()}
