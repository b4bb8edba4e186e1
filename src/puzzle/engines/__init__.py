"""Engines: ways to serve a checkpoint and measure it. One module per engine, one small contract.

An engine opens a *session* on a checkpoint folder; a session serves a batch of a scenario step by
step and says how long every step took, so that several sessions can take turns (`turns.py`). A
*probe* session can be told to run only some of the checkpoint's layers, others in every step: so
one engine start measures any architecture whose subblocks the checkpoint holds. Everything else
(the probe's model, random architectures, the regression) is in `cost` and the same for all engines.

An engine module has `make(...) -> Engine`, from the configuration it needs, and `unavailable()`,
None or the reason why it cannot run here.
"""

import contextlib
import os
import platform
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from puzzle.artifacts import Record
from puzzle.config import CostConfig, ScenarioConfig
from puzzle.errors import UserError

ENGINE_OVERHEAD_BYTES = 1 << 30  # of a served model, beside its weights and KV cache
GPU_OVERHEAD_BYTES = 4 << 30  # the same on a GPU: context, graphs, a chunk of 8192 tokens' logits


class Page(NamedTuple):
    """A page of a layer's KV cache: so many tokens of one sequence take so many bytes."""

    tokens: int
    bytes: int
    most: int | None = None  # tokens of a sequence that are held, where the layer has a window


class Session(AbstractContextManager["Session"], Protocol):
    """A checkpoint being served, one batch at a time, step by step."""

    @property
    def pages(self) -> Sequence[Page]:
        """The page of every layer's KV cache, as allocated; a layer without a cache has 0 bytes."""

    @property
    def first_tokens(self) -> Sequence[float]:
        """Of the last prefill: when each sequence had its first token, as shares of its time."""

    def memory_bytes(self) -> int | None:
        """The most memory it has taken while it served, above an idle engine of no model.

        Weights, KV cache, activations, graphs and workspace, of all its devices together; None
        where this engine cannot tell.
        """

    def restart(self) -> None:
        """Start the engine anew, with all that it allocates: speed differs from start to start."""

    def begin(self, scenario: ScenarioConfig) -> None:
        """Drop the batch that runs; the next step is the prefill of another.

        A batch has random prompts and is decoded greedily to its full output length.
        """

    def advance(self, steps: int, layers: Sequence[int] = ()) -> list[float]:
        """Take the batch's next steps: seconds of each.

        The first step of a batch lasts until every sequence has its first token; every later one
        gives each sequence one token. `layers` are those of the checkpoint to run from here on,
        layer 0 among them; empty: as before, and all of them at first. Only a probe can choose.
        """


class Sampling(Record):
    """How text is written: at most so many new tokens, at a temperature."""

    tokens: int
    temperature: float


class Writer(Protocol):
    """A checkpoint that writes text."""

    def write(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        """New token ids for every prompt, sampled with its seed, until the end of the text."""


class EngineFacts(Record):
    """What a measured figure depends on: engine, version, device."""

    engine: str
    version: str
    device: str
    count: int  # of GPUs, or of CPU cores
    sheet: dict[str, float] | None = None  # of a modelled device


@dataclass(frozen=True)
class Engine:
    """An engine, made from its configuration."""

    name: str
    measured: bool  # False where seconds are modelled
    facts: EngineFacts
    serve: Callable[[Path, ScenarioConfig], Session]  # as it will serve
    probe: Callable[[Path, ScenarioConfig], Session]  # layers can change from step to step
    # Writes text with a checkpoint, where the engine is faster at it than plain PyTorch.
    write: Callable[[Path, Sampling], AbstractContextManager[Writer]] | None = None
    # Where a probe has to run otherwise than what is served (on GPUs with vLLM: nothing is compiled
    # and graphs are captured for every architecture), the parent is served as well, to scale by.
    probes_as_served: bool = True
    # A session of a checkpoint without weights makes random ones on its device.
    makes_weights: bool = False
    gpu: int = 0  # the number of its first GPU, where there are any


def make(name: str, cost: CostConfig, logs: Path, device: str = "auto") -> Engine:
    """An engine by its name.

    Args:
        name: of the engine.
        cost: the place's settings.
        logs: the folder for the output of its processes.
        device: the recipe's, such as `auto` or `cuda:1`; the first of several for tensor parallel.
    """
    if name == "vllm":
        from puzzle.engines import vllm_engine

        return vllm_engine.make(logs, gpu_index(device))
    if name == "torch":
        from puzzle.engines import torch_engine

        return torch_engine.make(device)
    from puzzle.engines import roofline_engine

    return roofline_engine.make(cost.device_sheet)


def unavailable(name: str) -> str | None:
    """Why an engine cannot run here, or None."""
    if name == "vllm":
        from puzzle.engines import vllm_engine

        return vllm_engine.unavailable()
    return None


def choose(cost: CostConfig, deploy: Sequence[str], logs: Path, device: str = "auto") -> Engine:
    """The engine that a place asks for; `auto` is vllm where it runs and will serve, else torch.

    Raises `UserError` for an engine that is not available or cannot serve the whole space.
    """
    serves = "vllm" in deploy or "vllm-plugin" in deploy
    if cost.engine == "auto":
        return make(
            "vllm" if serves and unavailable("vllm") is None else "torch", cost, logs, device
        )
    if cost.engine == "vllm" and not serves:
        raise UserError(
            f"cost.engine: vllm cannot serve the whole space of deploy={list(deploy)}; "
            "add vllm to deploy"
        )
    if (reason := unavailable(cost.engine)) is not None:
        raise UserError(
            f"cost.engine: {cost.engine} is not available: {reason}; use cost.engine=auto"
        )
    return make(cost.engine, cost, logs, device)


def random_prompts(scenario: ScenarioConfig, vocab_size: int, seed: int) -> list[list[int]]:
    """Random token ids, [batch_size][input_length]: speed does not depend on the text."""
    rng = random.Random(seed)
    length = scenario.input_length
    return [
        [rng.randrange(1, vocab_size) for _ in range(length)] for _ in range(scenario.batch_size)
    ]


def cache_bytes(pages: Sequence[Page], scenario: ScenarioConfig) -> int:
    """The KV cache of a batch at full length, in whole pages."""
    length, per_sequence = scenario.input_length + scenario.output_length, 0
    for page in pages:
        held = length if page.most is None else min(length, page.most)
        per_sequence += -(-held // page.tokens) * page.bytes
    return scenario.batch_size * per_sequence


def gpu_index(device: str) -> int:
    """The number of the GPU that a recipe's `device` names: 1 of `cuda:1`, otherwise 0."""
    number = device.removeprefix("cuda:")
    return int(number) if number.isdigit() else 0


def available_bytes(gpu: int = 0) -> int:
    """The memory that engines can still take: of a GPU, or of this machine."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(gpu)[0])
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def overhead_bytes() -> int:
    """What an engine on this machine takes beside weights and KV cache, about."""
    import torch

    return GPU_OVERHEAD_BYTES if torch.cuda.is_available() else ENGINE_OVERHEAD_BYTES


def machine(device: str = "auto") -> tuple[str, int]:
    """(name of the GPU or CPU, number of GPUs or cores): what measured figures depend on."""
    import torch

    if torch.cuda.is_available() and device != "cpu":
        return torch.cuda.get_device_name(gpu_index(device)), torch.cuda.device_count()
    model = platform.processor() or platform.machine()
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            names = (line for line in lines if line.startswith("model name"))
            model = next(names, f":{model}").split(":")[1].strip()
    except OSError:
        pass
    return model, os.cpu_count() or 1
