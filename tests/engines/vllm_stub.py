"""vLLM's engine as its worker sees it, without vLLM: tokens come out on a clock of its own.

`late`: as with async scheduling a call schedules the next step and returns what the one before it
has made, so that a step always runs ahead.
"""

import gc
import sys
import types
from dataclasses import dataclass, field

PREFILL_S, DECODE_S, CALL_S = 5.0, 1.0, 0.125


@dataclass
class Clock:
    """The host's time, and until when the device is busy."""

    now: float = 0.0
    device: float = 0.0

    def launch(self, seconds: float) -> float:
        """Start a kernel; when it will have ended."""
        self.device = max(self.now, self.device) + seconds
        return self.device

    def wait(self, until: float) -> None:
        self.now = max(self.now, until)


@dataclass
class Request:
    name: str
    left: int  # tokens to be scheduled
    num_preemptions: int = 0
    tokens: int = 0  # handed out


@dataclass
class StubEngine:
    clock: Clock
    late: bool
    requests: dict[str, Request] = field(default_factory=dict)
    queue: list = field(default_factory=list)  # (when it ends, names of its requests)
    prefilled: bool = False
    finished: list[Request] = field(default_factory=list)

    @property
    def engine_core(self):
        scheduler = types.SimpleNamespace(requests=self.requests)
        return types.SimpleNamespace(engine_core=types.SimpleNamespace(scheduler=scheduler))

    vllm_config = types.SimpleNamespace()

    def add_request(self, name: str, prompt: dict, parameters) -> None:
        self.requests[name] = Request(name, parameters.max_tokens)
        self.prefilled = False

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            self.requests.pop(name, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests) or bool(self.queue)

    def step(self) -> list:
        self.clock.now += CALL_S
        ready = [request for request in self.requests.values() if request.left > 0]
        if ready:
            end = self.clock.launch(DECODE_S if self.prefilled else PREFILL_S)
            self.prefilled = True
            for request in ready:
                request.left -= 1
            self.queue.append((end, [request.name for request in ready]))
            if self.late and len(self.queue) < 2:
                return []
        if not self.queue:
            return []
        end, names = self.queue.pop(0)
        self.clock.wait(end)
        return [self._output(name) for name in names if name in self.requests]

    def _output(self, name: str):
        request = self.requests[name]
        request.tokens += 1
        if request.left == 0 and not any(name in names for _, names in self.queue):
            self.finished.append(self.requests.pop(name))
        completion = types.SimpleNamespace(token_ids=[7])
        return types.SimpleNamespace(request_id=name, outputs=[completion])


class Attention:
    """A layer's attention on one of `ranks` devices: vLLM's own rule for its KV heads."""

    def __init__(self, name: str, kv_heads: int, head_dim: int, ranks: int) -> None:
        self.layer_name = name
        page_bytes = 2 * 2 * max(1, kv_heads // ranks) * head_dim * 16
        self.spec = types.SimpleNamespace(block_size=16, page_size_bytes=page_bytes)


def layer(name: str, kv_heads: int, head_dim: int, ranks: int):
    if not kv_heads:
        return types.SimpleNamespace(self_attn=None)
    attention = types.SimpleNamespace(attn=Attention(name, kv_heads, head_dim, ranks))
    return types.SimpleNamespace(self_attn=attention)


def cache_group(layers: list):
    """Full attention with any KV heads is one group, in which every layer has its own pages."""
    attentions = [layer.self_attn.attn for layer in layers if layer.self_attn is not None]
    specs = {attention.layer_name: attention.spec for attention in attentions}
    uniform = types.SimpleNamespace(kv_cache_specs=specs)
    return types.SimpleNamespace(layer_names=list(specs), kv_cache_spec=uniform)


class StubLLM:
    """`vllm.LLM`; `made` is the last one, with everything that was asked of it."""

    made: "StubLLM"
    late = False
    clock: Clock
    kv_heads: list[int]
    head_dim = 16

    def __init__(self, **arguments) -> None:
        StubLLM.made, self.arguments = self, arguments
        self.captured: list[list[int]] = []  # layers, whenever graphs were captured
        self.llm_engine = StubEngine(StubLLM.clock, StubLLM.late)
        ranks = arguments["tensor_parallel_size"]
        layers = [
            layer(f"model.layers.{index}.self_attn.attn", heads, self.head_dim, ranks)
            for index, heads in enumerate(self.kv_heads)
        ]
        self.model = types.SimpleNamespace(model=types.SimpleNamespace(layers=layers))
        cache = types.SimpleNamespace(kv_cache_groups=[cache_group(layers)])
        self.worker = types.SimpleNamespace(model_runner=Runner(self, cache))

    def apply_model(self, function) -> list:
        return [function(self.model)] * self.arguments["tensor_parallel_size"]

    def collective_rpc(self, function) -> list:
        return [function(self.worker)] * self.arguments["tensor_parallel_size"]


class Runner:
    """A model runner of version 2."""

    def __init__(self, llm: StubLLM, cache: types.SimpleNamespace) -> None:
        self.llm, self.kv_cache_config, self.released = llm, cache, True
        self.cudagraph_manager = types.SimpleNamespace(release_graphs=self._release)

    def _release(self) -> None:
        self.released = True

    def capture_model(self) -> None:
        assert self.released, "graphs of other layers are still there"
        self.released = False
        for collect in (gc.collect, gc.freeze, gc.unfreeze, gc.collect):  # as vLLM does
            collect()
        self.llm.captured.append(list(self.llm.model.model.layers))


def modules() -> dict[str, types.ModuleType]:
    """What the worker imports of vLLM."""

    def sampling_parameters(**settings):
        return types.SimpleNamespace(**settings)

    wrapper = types.SimpleNamespace(clear_all_graphs=lambda: None)
    kind = types.SimpleNamespace(DELTA="delta")
    content = {
        "vllm": {"LLM": StubLLM, "SamplingParams": sampling_parameters},
        "vllm.sampling_params": {"RequestOutputKind": kind},
        "vllm.compilation": {},
        "vllm.compilation.cuda_graph": {"CUDAGraphWrapper": wrapper},
    }
    made = {}
    for name, names in content.items():
        made[name] = types.ModuleType(name)
        made[name].__dict__.update(names)
    return made


def install(monkeypatch) -> None:
    """Put the stub in vLLM's place for one test."""
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
