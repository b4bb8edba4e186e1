"""One conformance suite for every engine."""

import pytest
from children import MIXED, write_child
from conftest import DEVICE_SHEET, NEEDS_VLLM, make_parent

from puzzle import engines
from puzzle.config import CostConfig, ScenarioConfig
from puzzle.engines import roofline_engine, vllm_engine, vllm_worker
from puzzle.errors import UserError
from puzzle.model import parent
from puzzle.model.modeling_puzzle import PuzzleConfig

SCENARIO = ScenarioConfig(batch_size=4, input_length=16, output_length=8)
COST = CostConfig(device_sheet=str(DEVICE_SHEET))
ENGINES = [
    "roofline",
    pytest.param("torch", marks=pytest.mark.training),
    pytest.param("vllm", marks=[pytest.mark.training, pytest.mark.vllm, NEEDS_VLLM]),
]


@pytest.fixture(scope="module")
def servable(tmp_path_factory):
    """The folders of a parent and its child, of a head size and blocks that every engine serves."""
    root = tmp_path_factory.mktemp("servable")
    make_parent(root / "parent", hidden_size=128, num_attention_heads=4, head_dim=32)
    described = parent.describe(str(root / "parent"))
    return described.folder, write_child(described, root / "child", MIXED["reduced"])


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_serves_batches_step_by_step_with_any_layers(servable, name, tmp_path):
    engine = engines.make(name, COST, tmp_path / "logs")
    assert engine.name == engine.facts.engine == name and engines.unavailable(name) is None
    assert engine.facts.version and engine.facts.device and engine.facts.count > 0
    for folder in servable:
        with engine.probe(folder, SCENARIO) as session:
            for layers in ([], [0], [0, 2, 3], range(4)):
                session.begin(SCENARIO)
                assert min(session.advance(1, layers)) > 0
                steps = [*session.advance(3), *session.advance(SCENARIO.output_length - 4)]
                assert len(steps) == SCENARIO.output_length - 1 and min(steps) > 0
            session.begin(SCENARIO)
            session.advance(2)
            session.begin(SCENARIO)  # drops the one that runs
            assert len(session.advance(SCENARIO.output_length)) == SCENARIO.output_length
            taken = session.memory_bytes()
            weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            assert taken is None if name == "torch" else taken > 0.9 * weights
            session.restart()
            session.begin(SCENARIO)
            assert len(session.advance(2)) == 2 and len(session.pages) == 4


@pytest.mark.vllm
@pytest.mark.training
@NEEDS_VLLM
def test_vllm_has_pages_of_its_own_for_layers_that_differ_in_their_kv_heads(servable, tmp_path):
    """1, none, 2 and 2 KV heads of 32 channels, and of the parent 2 each, in bfloat16."""
    engine = engines.make("vllm", COST, tmp_path / "logs")
    shown = []
    for folder in servable:
        with engine.serve(folder, SCENARIO) as session:
            shown.append([page.bytes / page.tokens for page in session.pages])
    assert shown == [[256.0] * 4, [128.0, 0.0, 256.0, 256.0]]


def test_a_probe_serves_the_layers_it_is_told(servable, tmp_path):
    """With fewer layers a modelled step takes less, until others are named."""
    with engines.make("roofline", COST, tmp_path).probe(servable[0], SCENARIO) as session:
        session.begin(SCENARIO)
        session.advance(1)
        (every,), (one,), (same,), (again,) = (
            session.advance(1, layers) for layers in ([], [0], [], range(4))
        )
    assert one == same < every == again


def test_an_engine_that_is_not_there_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="vllm is not available: .*use cost.engine=auto"):
        engines.choose(CostConfig(engine="vllm"), ["vllm"], tmp_path)
    assert engines.choose(CostConfig(engine="auto"), ["vllm"], tmp_path).name == "torch"


def test_vllm_is_not_chosen_for_children_it_cannot_serve(tmp_path):
    assert engines.choose(CostConfig(engine="auto"), ["transformers"], tmp_path).name == "torch"
    with pytest.raises(UserError, match="add vllm to deploy"):
        engines.choose(CostConfig(engine="vllm"), ["llama.cpp"], tmp_path)


@pytest.mark.training
@pytest.mark.vllm
@NEEDS_VLLM
def test_a_worker_that_dies_is_one_clear_line_with_its_log(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with (
        pytest.raises(UserError, match=r"vllm stopped while serving: .* \(see .*log\)"),
        vllm_engine.make(tmp_path / "logs").serve(tmp_path, SCENARIO) as session,
    ):
        session.begin(SCENARIO)
        session.advance(1)


@pytest.mark.parametrize("sheet", ["H1000", "/nothing.yaml"])
def test_an_unknown_device_sheet_lists_the_known_ones(sheet):
    with pytest.raises(UserError, match="expected one of this-cpu, H100"):
        roofline_engine.sheet(sheet)


@pytest.mark.parametrize(("ranks", "heads"), [(1, 1 + 2 + 2), (2, 1 + 1 + 1), (4, 1 + 1 + 1)])
def test_each_device_holds_at_least_one_kv_head_of_every_layer(servable, ranks, heads):
    """Copies of it, where a layer has fewer heads than there are devices."""
    config = PuzzleConfig.from_pretrained(servable[1])
    groups = [b.attention.n_heads_in_group for b in config.block_configs if not b.attention.no_op]
    assert [config.num_attention_heads // group for group in groups] == [1, 2, 2]
    assert vllm_worker.kv_heads(config, ranks) == heads
