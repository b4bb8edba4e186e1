"""One conformance suite for every engine."""

from importlib import import_module

import pytest
from children import MIXED, write_child
from conftest import DEVICE_SHEET, NEEDS_VLLM, make_parent

from puzzle import engines
from puzzle.config import CostConfig, ScenarioConfig
from puzzle.errors import UserError
from puzzle.model import parent

SCENARIO = ScenarioConfig(batch_size=4, input_length=16, output_length=8)
SHEET = str(DEVICE_SHEET)
ENGINES = [
    "roofline",
    pytest.param("torch", marks=pytest.mark.training),
    pytest.param("vllm", marks=[pytest.mark.training, pytest.mark.vllm, NEEDS_VLLM]),
]


@pytest.fixture(scope="module")
def servable(tmp_path_factory):
    """A parent of a head size that every engine serves, and a child stock engines load."""
    folder = make_parent(
        tmp_path_factory.mktemp("servable"), hidden_size=128, num_attention_heads=4, head_dim=32
    )
    described = parent.describe(str(folder))
    return described, write_child(
        described, tmp_path_factory.mktemp("children") / "child", MIXED["reduced"]
    )


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_times_prefill_and_steps_of_any_layers(servable, name, tmp_path):
    engine = import_module(engines.ENGINES[name])
    assert name == engine.NAME and engine.available() is None
    assert {"engine", "version", "device"} <= set(engine.describe(SHEET))
    for folder in (servable[0].folder, servable[1]):
        with engine.open_session(folder, SCENARIO, tmp_path / "log", SHEET, True) as session:
            whole = session.time_batch(SCENARIO)
            part = session.time_batch(SCENARIO, [[0], [0, 1], [0, 2, 3]])
            again = session.time_batch(SCENARIO, [range(4)])
            assert len(session.pages) == 4
        for timing in (whole, part, again):
            assert timing.prefill_s > 0 and len(timing.steps_s) == SCENARIO.output_length - 1
            assert min(timing.steps_s) > 0


def test_an_engine_that_is_not_there_is_one_clear_line(monkeypatch):
    vllm = import_module(engines.ENGINES["vllm"])
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="vllm is not available: .*use cost.engine=auto"):
        engines.load(CostConfig(engine="vllm"), ["vllm"])
    assert engines.load(CostConfig(engine="auto"), ["vllm"]).NAME == "torch"


def test_vllm_is_not_chosen_for_children_it_cannot_serve():
    assert engines.load(CostConfig(engine="auto"), ["transformers"]).NAME == "torch"
    with pytest.raises(UserError, match="add vllm to deploy"):
        engines.load(CostConfig(engine="vllm"), ["llama.cpp"])


@pytest.mark.training
@pytest.mark.vllm
@NEEDS_VLLM
def test_a_worker_that_dies_is_one_clear_line_with_its_log(tmp_path):
    vllm = import_module(engines.ENGINES["vllm"])
    (tmp_path / "config.json").write_text("{}")
    with (
        pytest.raises(UserError, match=r"vllm stopped while serving: .* \(see .*log\)"),
        vllm.open_session(tmp_path, SCENARIO, tmp_path / "log", SHEET, False) as session,
    ):
        session.time_batch(SCENARIO)


@pytest.mark.parametrize("sheet", ["H1000", "/nothing.yaml"])
def test_an_unknown_device_sheet_lists_the_known_ones(sheet):
    with pytest.raises(UserError, match="expected one of this-cpu, H100"):
        import_module(engines.ENGINES["roofline"]).sheet(sheet)
