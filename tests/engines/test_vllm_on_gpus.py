"""What Puzzle asks of vLLM on GPUs and makes of its answers, on a stub (`vllm_stub.py`)."""

import ast
import gc
import io
import itertools
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import vllm_stub
from children import MIXED, write_child
from conftest import NEEDS_VLLM, make_parent
from vllm_stub import CALL_S, DECODE_S, PREFILL_S, Clock, StubLLM

from puzzle.config import ScenarioConfig
from puzzle.engines import cache_bytes, vllm_engine, vllm_worker
from puzzle.engines.turns import SETTLING_STEPS, TURN_STEPS, settled
from puzzle.engines.vllm_messages import REPLY, Ready, StepsReply, StepsRequest
from puzzle.model import parent

SCENARIO = ScenarioConfig(batch_size=4, input_length=16, output_length=33, dtype="bfloat16")
GIB = 1 << 30


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    described = parent.describe(str(make_parent(root / "parent", hidden_size=128, head_dim=32)))
    return write_child(described, root / "child", MIXED["reduced"])


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of 80 GiB, half of which is taken, and the stub."""
    clock = Clock()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=0: (40 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: clock.wait(clock.device))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 5 * GIB)
    monkeypatch.setattr(torch.nn, "ModuleList", list)
    monkeypatch.setattr(vllm_worker, "register", lambda: None)
    monkeypatch.setattr(vllm_worker.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(StubLLM, "clock", clock, raising=False)
    monkeypatch.setattr(StubLLM, "kv_heads", [1, 2, 0, 2], raising=False)
    monkeypatch.setattr(StubLLM, "late", True)
    vllm_stub.install(monkeypatch)
    return monkeypatch


def talk(gpu, checkpoint, scenario, requests, probe=False):
    """(ready, replies) of a worker that is sent these requests."""
    lines = "".join(request.model_dump_json() + "\n" for request in requests)
    out = io.StringIO()
    gpu.setattr(sys, "stdin", io.StringIO(lines))
    gpu.setattr(sys, "stdout", out)
    vllm_worker.serve(checkpoint, scenario, probe)
    replies = [line.removeprefix(REPLY) for line in out.getvalue().splitlines()]
    ready, *steps = replies
    return Ready.parse(ready, "stub"), [StepsReply.parse(reply, "stub") for reply in steps]


def request(steps, layers=(), begin=None):
    return StepsRequest(begin=begin, steps=steps, layers=list(layers))


@pytest.mark.parametrize("late", [False, True], ids=["in time", "late"])
def test_every_step_has_its_own_time(gpu, checkpoint, late):
    """Also where a call returns what the one before it has scheduled."""
    gpu.setattr(StubLLM, "late", late)
    first = request(1, begin=SCENARIO)
    turns = [request(TURN_STEPS) for _ in range((SCENARIO.output_length - 1) // TURN_STEPS)]
    _, (prefill, *decodes) = talk(gpu, checkpoint, SCENARIO, [first, *turns])
    assert prefill.seconds == pytest.approx([PREFILL_S], abs=2 * CALL_S)
    for decode in decodes:
        assert settled(decode.seconds) == pytest.approx(DECODE_S + (0 if late else CALL_S))
    engine = StubLLM.made.llm_engine
    assert not engine.requests and not engine.queue
    assert [r.tokens for r in engine.finished] == [SCENARIO.output_length] * SCENARIO.batch_size


def test_a_step_that_runs_ahead_ends_before_another_session_has_its_turn(gpu, checkpoint):
    requests = [request(1, begin=SCENARIO), request(TURN_STEPS)]
    talk(gpu, checkpoint, SCENARIO, requests)
    clock = StubLLM.clock
    assert StubLLM.made.llm_engine.queue, "nothing ran ahead"
    assert clock.device <= clock.now


def test_a_turn_settles_before_its_steps_count(gpu, checkpoint):
    """What ran ahead is there at once; that is why the first steps of a turn do not count."""
    requests = [request(1, begin=SCENARIO), request(TURN_STEPS), request(TURN_STEPS)]
    _, (_, _, second) = talk(gpu, checkpoint, SCENARIO, requests)
    assert second.seconds[0] < DECODE_S / 2
    assert second.seconds[SETTLING_STEPS:] == pytest.approx([DECODE_S] * 4)


def test_a_probe_captures_the_decode_step_of_every_architecture(gpu, checkpoint):
    """And nothing for a prefill, which runs without graphs."""
    requests = [
        request(1, [0, 1], begin=SCENARIO),
        request(4, [0, 2]),
        request(4),
        request(1, [0, 1], begin=SCENARIO),
        request(4, [0, 2]),
        request(4, [0, 1, 3]),
    ]
    talk(gpu, checkpoint, SCENARIO, requests, probe=True)
    every = StubLLM.made.model.model.all_layers
    wanted = [[every[0], every[2]], [every[0], every[1], every[3]]]
    assert StubLLM.made.captured == wanted


def test_a_probe_runs_with_graphs_of_its_batch_alone(gpu, checkpoint):
    arguments = vllm_worker.engine_arguments(checkpoint, SCENARIO, 123, probe=True)
    assert arguments["compilation_config"] == {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [SCENARIO.batch_size],
    }
    assert arguments["enforce_eager"] is False
    assert arguments["kv_cache_memory_bytes"] == 123


def test_a_child_is_served_as_vllm_serves_by_itself(gpu, checkpoint):
    arguments = vllm_worker.engine_arguments(checkpoint, SCENARIO, 123, probe=False)
    assert "compilation_config" not in arguments and "async_scheduling" not in arguments
    assert arguments["enforce_eager"] is False and "load_format" not in arguments


def test_vllm_asks_for_no_more_than_is_free_while_another_engine_starts(gpu, checkpoint):
    """It ends where less is free than the share it was given, however much it would use."""
    arguments = vllm_worker.engine_arguments(checkpoint, SCENARIO, 123, probe=False)
    assert arguments["gpu_memory_utilization"] <= 0.01


def test_no_garbage_is_collected_around_a_capture(gpu, checkpoint):
    """vLLM asks for it before and after each, and a probe has hundreds."""
    asked = []
    own = {name: lambda *generation, n=name: asked.append(n) for name in ("collect", "unfreeze")}
    for name, function in own.items():
        gpu.setattr(gc, name, function)
    talk(gpu, checkpoint, SCENARIO, [request(4, [0, 2], begin=SCENARIO)], probe=True)
    assert StubLLM.made.captured and not asked
    assert {name: getattr(gc, name) for name in own} == own


def test_a_checkpoint_without_weights_gets_them_on_the_device(gpu, tmp_path):
    arguments = vllm_worker.engine_arguments(tmp_path, SCENARIO, 123, probe=True)
    assert arguments["load_format"] == "dummy"


def test_an_only_decode_step_does_not_run_ahead(gpu, checkpoint):
    two = SCENARIO.model_copy(update={"output_length": 2})
    assert vllm_worker.engine_arguments(checkpoint, two, 1, False)["async_scheduling"] is False


def names_in(source: Path, class_name: str) -> set[str]:
    """Fields, methods and values of a class, and the arguments of its `__init__`."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    (found,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name)
    names = set()
    for node in found.body:
        if isinstance(node, ast.AnnAssign):
            names.add(node.target.id)
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets}
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
            if node.name == "__init__":
                names |= {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}
                attributes = [n for n in ast.walk(node) if isinstance(n, ast.Attribute)]
                names |= {n.attr for n in attributes if isinstance(n.ctx, ast.Store)}
    return names


@NEEDS_VLLM
def test_all_names_are_vllms_own(checkpoint, monkeypatch):
    """Against the source of the vLLM that is installed, which needs no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=0: (40 * GIB, 80 * GIB))
    two = SCENARIO.model_copy(update={"output_length": 2})
    arguments = vllm_worker.engine_arguments(checkpoint, two, 1, probe=True)
    root = Path(find_spec("vllm").origin).parent
    takes = names_in(root / "entrypoints/llm.py", "LLM")
    takes |= names_in(root / "engine/arg_utils.py", "EngineArgs")
    assert set(arguments) <= takes
    compilation = root / "config/compilation.py"
    assert set(arguments["compilation_config"]) <= names_in(compilation, "CompilationConfig")
    assert "FULL_DECODE_ONLY" in names_in(compilation, "CUDAGraphMode")
    second = root / "v1/worker/gpu/model_runner.py"
    assert {"cudagraph_manager", "capture_model"} <= names_in(second, "GPUModelRunner")
    managers = root / "v1/worker/gpu/cudagraph_utils.py"
    assert "release_graphs" in names_in(managers, "CudaGraphManager")
    first = names_in(root / "v1/worker/gpu_model_runner.py", "GPUModelRunner")
    assert "capture_model" in first and "cudagraph_manager" not in first
    assert "clear_all_graphs" in names_in(root / "compilation/cuda_graph.py", "CUDAGraphWrapper")


@pytest.mark.parametrize(("ranks", "heads"), itertools.product((1, 2, 4, 8), (1, 2, 4, 8)), ids=str)
def test_the_cache_is_as_large_as_what_all_devices_hold(gpu, checkpoint, ranks, heads):
    """Every device holds max(1, heads / devices) KV heads of a layer."""
    scenario = SCENARIO.model_copy(update={"tensor_parallel": ranks})
    config = types.SimpleNamespace(
        block_configs=None,
        num_hidden_layers=2,
        num_key_value_heads=heads,
        num_attention_heads=8,
        head_dim=StubLLM.head_dim,
        hidden_size=128,
        vocab_size=320,
    )
    gpu.setattr("transformers.AutoConfig.from_pretrained", lambda folder: config)
    gpu.setattr(StubLLM, "kv_heads", [heads, heads])
    ready, _ = talk(gpu, checkpoint, scenario, [])
    pages = ready.pages
    own = max(1, heads // ranks)
    of_a_token = 2 * 2 * StubLLM.head_dim * own * ranks  # bf16 keys and values, all devices
    assert [page.bytes / page.tokens for page in pages] == [of_a_token] * 2
    needed = cache_bytes(pages, scenario)
    assert StubLLM.made.arguments["kv_cache_memory_bytes"] * ranks >= needed


def test_a_session_of_another_gpu_sees_that_one_first(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert vllm_engine.visible_from(1) == "1,2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert vllm_engine.visible_from(1) == "7"
