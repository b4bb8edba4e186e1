"""Every family through every stage as on a GPU: devices, waits for the device, copies to it.

The ordinary suite runs three families in a narrow space; `make test-fake-cuda` all of them in full.
"""

import collections

import families
import pytest

from fake_cuda import shim
from fake_cuda.worker import ask

UNAVAILABLE = shim.unavailable()
pytestmark = [
    pytest.mark.training,
    pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE)),
]
SHORT = ["llama 3", "qwen3", "gemma3"]
STAGES = ["library", "score", "assemble_some", "cost", "search", "assemble", "uptrain", "evaluate"]
STEPS, LAYERS = 2, 2  # of stages.py: what `units: 2` adds once more
# In the narrow space a layer has gqa_1 and no_op beside the parent's gqa_2, and gated_48 and linear
# beside gated_96.
TRAINED, BLOCKS = 3 * LAYERS, 9 * LAYERS
# Waits for the device that as much work again adds, by the function that waits. A new one belongs
# here only with its reason.
WAITS = {
    # one look at the gradient's norm: a step that is not finite must do no harm
    "library": {"library/bld.py train_step": STEPS * TRAINED},
    # one result of a block and shard
    "score": {"score/exact.py text_sums": BLOCKS, "score/fisher.py _sums": BLOCKS},
    "uptrain": {"uptrain/trainer.py _step": 2 * STEPS},  # the norm, and the loss for the bar
    # one a batch, of three models; by position two rows are as many tokens as the batch
    "evaluate": {"evaluate/quality.py group_sums": 3 * (1 + 2)},
}
PER_CHILD = "training/losses.py sums"  # one of a child and shard; how many depends on a search


def by_function(counts: dict[str, int]) -> dict[str, int]:
    """`{"file.py function": count}` from `{"file.py:line function": count}`."""
    sums: collections.Counter[str] = collections.Counter()
    for place, count in counts.items():
        file, _, rest = place.partition(":")
        sums[f"{file} {rest.split()[-1]}"] += count
    return dict(sums)


def added(once: dict, twice: dict, kind: str) -> dict[str, dict[str, int]]:
    """By stage and function, what a run with twice the work counts more."""
    more: dict[str, dict[str, int]] = {}
    for stage, seen in twice["stages"].items():
        before = by_function(once["stages"][stage].get(kind, {}))
        after = by_function(seen.get(kind, {}))
        grown = {name: n - before.get(name, 0) for name, n in after.items()}
        if grown := {name: n for name, n in grown.items() if n and name != PER_CHILD}:
            more[stage] = grown
    return more


@pytest.fixture(scope="module")
def short():
    """Runs of three families, one of them with twice the work, and runs with planted bugs."""
    wishes = [{"row": row, "narrow": True} for row in SHORT]
    wishes.append({"row": SHORT[0], "narrow": True, "units": 2})
    *runs, twice = ask("fake_cuda.stages", wishes)
    return dict(zip(SHORT, runs, strict=True)), twice


@pytest.fixture(scope="module")
def planted():
    """{bug: run of the first family, until the stage that it is in}"""
    until = {
        "sums_on_the_host": "score",
        "a_look_at_every_step": "library",
        "unpinned_states": "score",
    }
    wishes = [
        {"row": SHORT[0], "narrow": True, "bug": bug, "until": stage}
        for bug, stage in until.items()
    ]
    return dict(zip(until, ask("fake_cuda.stages", wishes), strict=True))


@pytest.mark.parametrize("row", SHORT)
def test_a_run_never_mixes_devices(short, row):
    run = short[0][row]
    assert run["failed"] is None
    assert set(STAGES) <= set(run["stages"])
    assert run["operators"] > 10_000  # it did run on the device


def test_more_work_waits_for_the_device_no_more_often_than_stated(short):
    runs, twice = short
    assert added(runs[SHORT[0]], twice, "syncs") == WAITS


def test_loops_copy_to_the_device_from_pinned_memory_only(short):
    runs, twice = short
    assert added(runs[SHORT[0]], twice, "unpinned") == {}


def test_a_planted_sum_on_the_host_is_caught(planted):
    assert "DeviceMismatch" in planted["sums_on_the_host"]["failed"]
    assert "exact.py" in planted["sums_on_the_host"]["failed"]


def test_a_planted_look_at_every_step_is_caught(short, planted):
    place = "library/training.py _train_group"
    fine = by_function(short[0][SHORT[0]]["stages"]["library"]["syncs"])
    wrong = by_function(planted["a_look_at_every_step"]["stages"]["library"]["syncs"])
    assert wrong[place] - fine[place] == STEPS * TRAINED


def test_planted_copies_from_ordinary_memory_are_caught(short, planted):
    fine = by_function(short[0][SHORT[0]]["stages"]["score"]["unpinned"])
    wrong = by_function(planted["unpinned_states"]["stages"]["score"]["unpinned"])
    assert "score/exact.py score" not in fine
    assert wrong["score/exact.py score"] >= 2 * LAYERS


@pytest.fixture(scope="module")
def full():
    """Every family in the full space."""
    runs = ask("fake_cuda.stages", [{"row": row} for row in families.ROWS])
    return dict(zip(families.ROWS, runs, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("row", families.ROWS)
def test_every_family_never_mixes_devices(full, row):
    assert full[row]["failed"] is None
    assert set(STAGES) <= set(full[row]["stages"])


@pytest.mark.slow
@pytest.mark.parametrize("row", families.ROWS)
def test_all_families_wait_for_the_device_in_the_same_places(full, row):
    """But for the rope that looks at the longest position (transformers' own), and for answers
    that are written: a tokenizer may leave no cloze question in such short texts.
    """
    apart = {"data/tasks.py said"}
    if row == "phi4":
        apart.add("model/modeling_puzzle.py embed")

    def places(run: dict) -> dict[str, set[str]]:
        return {name: set(by_function(seen.get("syncs", {}))) - apart for name, seen in run.items()}

    assert places(full[row]["stages"]) == places(full[SHORT[0]]["stages"])


@pytest.mark.slow
def test_planted_waits_of_every_layer_and_tokens_on_the_host_are_caught():
    wishes = [
        {"row": SHORT[0], "narrow": True, "bug": "a_look_at_every_layer", "until": "uptrain"},
        {"row": SHORT[0], "narrow": True, "bug": "tokens_on_the_host"},
    ]
    layers, tokens = ask("fake_cuda.stages", wishes)
    assert by_function(layers["stages"]["uptrain"]["syncs"])["uptrain/gkd.py _walk"] > LAYERS
    assert "DeviceMismatch" in tokens["failed"] and "gkd.py" in tokens["failed"]


@pytest.mark.slow
def test_a_streamed_library_never_mixes_devices():
    (run,) = ask("fake_cuda.stages", [{"row": SHORT[0], "streamed": True, "until": "library"}])
    assert run["failed"] is None


@pytest.mark.slow
def test_a_streamed_library_copies_to_the_device_from_pinned_memory_only():
    wish = {"row": SHORT[0], "narrow": True, "streamed": True, "until": "library"}
    once, twice = ask("fake_cuda.stages", [wish, wish | {"units": 2}])
    assert added(once, twice, "unpinned") == {}


def test_the_shim_steps_aside_where_torch_is_built_for_gpus(monkeypatch):
    monkeypatch.setattr("torch.version.cuda", "13.0")
    assert "make test-gpu" in str(shim.unavailable())


def test_without_a_compiler_there_is_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "C++ compiler" in str(shim.unavailable())
