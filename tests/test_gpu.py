"""What only a GPU can show; `make test-gpu` runs it, without one every test is skipped.

What needs none is checked on fake CUDA (`tests/fake_cuda`), and docs/gpu.md says what is left.
"""

import importlib
import math
import time
from pathlib import Path

import pytest
import torch
from conftest import NEEDS_VLLM, make_parent, tiny_recipe

from puzzle import config, engines, pipeline
from puzzle.config import CostConfig, ScenarioConfig
from puzzle.device import Device
from puzzle.evaluate import results
from puzzle.model import parent
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.score import SCORE
from puzzle.score.results import SCORES, BlockScore, summarise
from puzzle.stage import Job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.training,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.fixture(scope="module")
def half_parent(tmp_path_factory):
    """A parent in bfloat16, as those of GPUs are."""
    return make_parent(tmp_path_factory.mktemp("half"), dtype=torch.bfloat16)


def run_on(device: str, folder: Path, parent_folder: Path, text: Path, **sections) -> Run:
    recipe = tiny_recipe(parent_folder, text, folder) | {"device": device, **sections}
    return Run(config.parse(recipe), folder, Progress(quiet=True))


def test_a_whole_run_in_bfloat16_ends_with_a_child(half_parent, text_folder, tmp_path):
    run = run_on("cuda", tmp_path / "run", half_parent, text_folder, precision="auto")
    pipeline.execute(run)
    shown = results.read(run.child_job("main"))
    assert shown.served.verdict == "met"
    assert math.isfinite(shown.uptrained.quality.kl.value)


def test_scores_are_those_of_a_cpu(tiny_folder, text_folder, tmp_path):
    """In float32: the same library, trained on either."""
    found = {}
    for device in ("cpu", "cuda"):
        run = run_on(device, tmp_path / device, tiny_folder, text_folder)
        for stage in (pipeline.LIBRARY, SCORE):
            pipeline.execute_stage(stage, Job(run))
        records = artifacts_of(run)
        found[device] = {key: score.kl for key, score in summarise(records, "exact").items()}
    for key, kl in found["cpu"].items():
        assert found["cuda"][key] == pytest.approx(kl, rel=0.02, abs=1e-4), key


def artifacts_of(run: Run) -> list[BlockScore]:
    from puzzle import artifacts

    return artifacts.read_records(Job(run).folder(SCORE) / SCORES, BlockScore)


@pytest.mark.parametrize("part", ["library", "score", "uptrain", "evaluate"])
def test_the_shapes_of_an_8b_model_take_what_a_plan_says(part, tmp_path, monkeypatch):
    """As `tests/fake_cuda/test_widths.py` has it of fakes."""
    from fake_cuda.test_widths import TOLERANCE

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    gpu = importlib.import_module("gpu")
    figures = gpu.PARTS[part](gpu.Scale.of("cuda", quick=False, layers=2), tmp_path)
    assert abs(figures["planned_over_peak"] - 1) <= TOLERANCE


def test_batches_come_from_the_host_while_the_device_computes():
    """As those of a library that is read layer by layer; all but the first, which is waited for."""
    device, rows, width = Device.choose("cuda", "auto"), 32_768, 4096
    weight = torch.randn(width, 4 * width, device="cuda", dtype=torch.bfloat16)
    here = [torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    host = [device.to_host(x_TD) for x_TD in here]

    def seconds(batches: list[torch.Tensor], products: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for x_TD in device.fetched(batches):
            for _ in range(products):
                x_TD @ weight
        torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(host, 4)
    computing, copying, both = seconds(here, 4), seconds(host, 0), seconds(host, 4)
    print(f"products {computing:.3f} s, copies {copying:.3f} s, both {both:.3f} s")
    assert both < computing + copying / 2


@NEEDS_VLLM
@pytest.mark.vllm
def test_a_probe_with_graphs_tells_numbers_of_layers_apart(tmp_path):
    """Without graphs all architectures take the time that launching their kernels takes.

    Most of a step of this small model is the engine's own: 2.9 of 3.7 ms on an H100 (docs/gpu.md).
    """
    folder = make_parent(
        tmp_path / "parent", dtype=torch.bfloat16, hidden_size=1024, intermediate_size=4096,
        num_hidden_layers=16, num_attention_heads=8, num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    assert parent.describe(str(folder)).shape.num_hidden_layers == 16
    scenario = ScenarioConfig(batch_size=16, input_length=16, output_length=65, dtype="bfloat16")
    engine = engines.make("vllm", CostConfig(), tmp_path / "logs")
    with engine.probe(folder, scenario) as session:
        quartiles = []
        for layers in (range(16), range(4)):
            session.begin(scenario)
            session.advance(1, list(layers))
            steps = sorted(session.advance(32, list(layers)))
            quartiles.append((steps[8], steps[24]))
    assert quartiles[0][0] > quartiles[1][1]


@NEEDS_VLLM
@pytest.mark.vllm
def test_steps_that_come_late_are_each_timed_once(tmp_path):
    """As many as were asked for, and none in no time but those that ran ahead."""
    folder = make_parent(tmp_path / "parent", dtype=torch.bfloat16, hidden_size=128, head_dim=32)
    scenario = ScenarioConfig(batch_size=4, input_length=16, output_length=33, dtype="bfloat16")
    with engines.make("vllm", CostConfig(), tmp_path / "logs").serve(folder, scenario) as session:
        session.begin(scenario)
        assert len(session.advance(1)) == 1
        steps = session.advance(32)
        assert len(steps) == 32 and min(steps[4:]) > 0.2 * sorted(steps)[16]
