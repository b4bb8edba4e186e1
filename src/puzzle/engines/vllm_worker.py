"""The worker of a vLLM session: one in-process engine that is driven step by step.

    python -m puzzle.engines.vllm_worker FOLDER SCENARIO [--probe] [--forks]

Driving the engine step by step makes prefill and decode times of one and the same batch. A probe
exchanges the model's list of layers between steps; on GPUs the graph of its decode step is captured
anew for every list, because without graphs the time of launching kernels hides that of layers.
Checkpoints without weights get random ones on the device.

On GPUs vLLM schedules a step while the one before it runs, and hands tokens out one call late.
Steps are therefore timed from token to token, and the one that runs ahead ends before another
session has its turn.
"""

import argparse
import contextlib
import gc
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from puzzle.artifacts import Record
from puzzle.config import ScenarioConfig
from puzzle.engines import Page, cache_bytes, random_prompts
from puzzle.engines.vllm_engine import register
from puzzle.engines.vllm_messages import REPLY, Ready, StepsReply, StepsRequest

RESTART = 64  # exit status of an engine that is to be started anew
LARGEST_PAGE = 128  # tokens; on CPUs, and a multiple of those on GPUs
SPARE_TOKENS = 4 * LARGEST_PAGE  # of the whole batch: the engine keeps a page for itself
LEAST_CACHE_BYTES = 16 << 20
# The share of a GPU's memory that must be free when vLLM starts. It decides nothing else, as the
# size of the KV cache is given; what is free changes while parent and child start side by side.
FREE_AT_START = 0.01


def attention_names(model: Any) -> list[str | None]:
    """Of every layer, what the engine calls its attention; None where it has none."""
    attentions = [getattr(layer, "self_attn", None) for layer in model.model.layers]
    attentions = [getattr(attention, "attn", None) for attention in attentions]
    return [getattr(attention, "layer_name", None) for attention in attentions]


def list_pages(llm: Any, devices: int) -> list[Page]:
    """The page of every layer's KV cache, as the engine allocates it on all devices together."""
    of_device, none = llm.collective_rpc(device_pages)[0], Page(1, 0)
    pages = [of_device.get(name, none) for name in llm.apply_model(attention_names)[0]]
    return [page._replace(bytes=page.bytes * devices) for page in pages]


def device_pages(worker: Any) -> dict[str, Page]:
    """By attention: its pages on one device, as a worker of the engine has allocated them.

    The scheduler's account of them is no use: of layers that differ in their KV heads it keeps the
    first one's. Where some layers have windows, vLLM makes the pages of all equally large by
    holding more tokens in those of narrow ones. Of a window it holds the pages that it touches.
    """
    pages = {}
    for group in worker.model_runner.kv_cache_config.kv_cache_groups:
        of_layers = getattr(group.kv_cache_spec, "kv_cache_specs", {})
        for name in group.layer_names:
            spec = of_layers.get(name, group.kv_cache_spec)
            is_window = type(spec).__name__ == "SlidingWindowSpec"
            most = spec.sliding_window + spec.block_size if is_window else None
            pages[name] = Page(spec.block_size, spec.page_size_bytes, most)
    return pages


def capture_graphs(worker: Any) -> None:
    """Capture the decode step of the layers that now run; for every worker of a GPU engine."""
    import torch
    from vllm.compilation.cuda_graph import CUDAGraphWrapper

    torch.cuda.synchronize()
    runner = worker.model_runner
    if (manager := getattr(runner, "cudagraph_manager", None)) is not None:  # model runner V2
        manager.release_graphs()
    else:
        CUDAGraphWrapper.clear_all_graphs()
    with no_collections():
        runner.capture_model()


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Python's garbage is not collected inside, even where that is asked for.

    vLLM asks for it before and after every capture, and a probe captures for every architecture.
    """
    names = ("collect", "freeze", "unfreeze")
    own = {name: getattr(gc, name) for name in names}
    try:
        for name in names:
            setattr(gc, name, lambda *generation: 0)
        yield
    finally:
        for name, function in own.items():
            setattr(gc, name, function)


def finish_kernels(worker: Any) -> None:
    """Wait until nothing runs on a worker's device."""
    import torch

    torch.cuda.synchronize()


def choose_layers(layers: list[int], model: Any) -> None:
    """Let a model run just these of the layers it was loaded with, in this order."""
    import torch

    decoder = model.model
    if "all_layers" not in decoder.__dict__:  # beside the module's own registry of submodules
        decoder.__dict__["all_layers"] = list(decoder.layers)
    decoder.layers = torch.nn.ModuleList([decoder.all_layers[index] for index in layers])
    decoder.start_layer, decoder.end_layer = 0, len(layers)


def kv_heads(config: Any, ranks: int) -> int:
    """KV heads that one of so many devices holds, of all layers together.

    A layer with fewer heads than devices has copies of them.
    """
    if not getattr(config, "block_configs", None):
        return int(config.num_hidden_layers * max(1, config.num_key_value_heads // ranks))
    attentions = [block.attention for block in config.block_configs]
    groups = [a.n_heads_in_group for a in attentions if not (a.no_op or a.replace_with_linear)]
    return sum(max(1, config.num_attention_heads // group // ranks) for group in groups)


def pool_bytes(config: Any, scenario: ScenarioConfig) -> int:
    """The KV cache that one device allocates: the batch at full length, and some spare."""
    pages = -(-(scenario.input_length + scenario.output_length + 1) // LARGEST_PAGE)
    tokens = scenario.batch_size * pages * LARGEST_PAGE + SPARE_TOKENS
    element_bytes = 4 if scenario.dtype == "float32" else 2
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * element_bytes * kv_heads(config, scenario.tensor_parallel) * head
    return max(LEAST_CACHE_BYTES, int(tokens * per_token))


def engine_arguments(
    folder: Path, scenario: ScenarioConfig, kv_cache_bytes: int, probe: bool
) -> dict[str, Any]:
    """What vLLM's engine is started with.

    Args:
        folder: the checkpoint's; without weights they are made on the device.
        scenario: how it serves.
        kv_cache_bytes: that every device allocates.
        probe: whether its layers will be exchanged.
    """
    import torch

    arguments: dict[str, Any] = {
        "model": str(folder),
        "dtype": scenario.dtype,
        "skip_tokenizer_init": True,
        "max_model_len": scenario.input_length + scenario.output_length,
        "max_num_seqs": scenario.batch_size,
        "seed": 0,
        "kv_cache_memory_bytes": kv_cache_bytes,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "tensor_parallel_size": scenario.tensor_parallel,
        # on CPUs compiling takes longer than what is measured
        "enforce_eager": not torch.cuda.is_available(),
    }
    if not any(folder.glob("*.safetensors")):
        arguments["load_format"] = "dummy"
    if not torch.cuda.is_available():
        return arguments
    arguments["gpu_memory_utilization"] = FREE_AT_START
    if probe:
        arguments["compilation_config"] = {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [scenario.batch_size],
        }
    if scenario.output_length == 2:  # its only decode step would run ahead, in nobody's time
        arguments["async_scheduling"] = False
    return arguments


def serve(folder: Path, scenario: ScenarioConfig, probe: bool) -> None:
    """Start the engine, print its cache pages, then one timing per request line."""
    import torch
    from transformers import AutoConfig
    from vllm import LLM

    register()
    idle = resident_bytes()
    config = AutoConfig.from_pretrained(folder)
    on_gpu = torch.cuda.is_available()
    pool = pool_bytes(config, scenario)
    llm = LLM(**engine_arguments(folder, scenario, pool, probe))
    pages = list_pages(llm, scenario.tensor_parallel)
    reply(Ready(pages=pages))
    # of the cache that is allocated; on CPUs it is not resident
    spare = pool * scenario.tensor_parallel - cache_bytes(pages, scenario)
    batch, captured = Batch(llm, config.vocab_size), list[int]()
    for line in sys.stdin:
        request = StepsRequest.parse(line, "request")
        if request.restart:
            os._exit(RESTART)
        if request.layers and request.layers != batch.layers:
            llm.apply_model(partial(choose_layers, request.layers))
            batch.layers = request.layers
        decodes = request.begin is None or request.steps > 1
        if on_gpu and decodes and captured != batch.layers:
            llm.collective_rpc(capture_graphs)
            captured = batch.layers
        if request.begin is not None:
            batch.begin(request.begin)
        seconds = [batch.step() for _ in range(request.steps)]
        if on_gpu:
            llm.collective_rpc(finish_kernels)
        used = device_bytes(llm) - spare if on_gpu else resident_bytes() - idle
        shown = StepsReply(
            seconds=seconds,
            first_tokens=batch.first_tokens,
            memory_bytes=used,
            preemptions=batch.preemptions(),
        )
        reply(shown)


def resident_bytes() -> int:
    """This process's own memory: without what it maps of files, which the system can drop."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        kept = (line.split()[1] for line in lines if line.startswith(("RssAnon", "RssShmem")))
        return sum(int(kib) << 10 for kib in kept)
    return 0


def device_bytes(llm: Any) -> int:
    """What torch has reserved on the GPUs of an engine at its peak, all together."""
    return sum(llm.apply_model(_reserved))


def _reserved(model: Any) -> int:
    import torch

    return int(torch.cuda.max_memory_reserved())


def serve_in_forks(folder: Path, scenario: ScenarioConfig, probe: bool) -> None:
    """Serve in a child process, and in another whenever the engine is to be started anew.

    What is imported is shared, so that a start takes two seconds instead of ten; all that an engine
    allocates is new.
    """
    import vllm.entrypoints.llm  # noqa: F401

    while (pid := os.fork()) != 0:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status != RESTART:
            sys.exit(abs(status))
    serve(folder, scenario, probe)


def reply(message: Record) -> None:
    """Print one reply."""
    print(REPLY + message.model_dump_json(), flush=True)


class Batch:
    """One batch at a time, advanced step by step."""

    def __init__(self, llm: Any, vocab_size: int) -> None:
        self.engine, self.vocab_size = llm.llm_engine, vocab_size
        self.layers: list[int] = []  # that run; empty: all
        self.number, self.ids = 0, list[str]()
        self.prompts: list[list[int]] = []  # not yet given to the engine
        self.first_tokens: list[float] = []  # of the last prefill, as shares of its time

    def preemptions(self) -> int:
        """How often a sequence of the batch that runs lost its KV cache to others."""
        scheduler = self.engine.engine_core.engine_core.scheduler  # in this process, always
        requests = scheduler.requests.values()
        return sum(request.num_preemptions for request in requests)

    def begin(self, scenario: ScenarioConfig) -> None:
        """Drop the batch that runs, and let the next step be the prefill of another."""
        self.engine.abort_request(self.ids)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        self.number += 1
        self.parameters = sampling(scenario.output_length)
        self.prompts = random_prompts(scenario, self.vocab_size, self.number)
        self.ids = [f"{self.number}.{index}" for index in range(len(self.prompts))]

    def step(self) -> float:
        """Seconds of one more token of every sequence; of a new batch, until all have their first.

        Sequences that wait for others in a prefill of several engine steps may be a token ahead.
        """
        began = time.perf_counter()
        if not self.prompts:
            # a call that only schedules hands out nothing
            while not self.engine.step() and self.engine.has_unfinished_requests():
                pass
            return time.perf_counter() - began
        for name, prompt in zip(self.ids, self.prompts, strict=True):
            self.engine.add_request(name, {"prompt_token_ids": prompt}, self.parameters)
        self.prompts, waiting, at = [], set(self.ids), list[float]()
        while waiting:
            outputs = self.engine.step()
            ready = {o.request_id for o in outputs if o.outputs and o.outputs[0].token_ids}
            at += [time.perf_counter() - began] * len(waiting & ready)
            waiting -= ready
        self.first_tokens = [seconds / at[-1] for seconds in at]
        return at[-1]


def sampling(output_length: int) -> Any:
    """Greedy decoding to exactly this many tokens, without detokenising."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=output_length,
        min_tokens=output_length,
        ignore_eos=True,
        temperature=0.0,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("scenario", type=ScenarioConfig.model_validate_json)
    parser.add_argument("--probe", action="store_true")
    parser.add_argument("--forks", action="store_true")
    arguments = parser.parse_args()
    run = serve_in_forks if arguments.forks else serve
    run(arguments.folder, arguments.scenario, arguments.probe)
