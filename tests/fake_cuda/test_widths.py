"""At the widths of Llama-3.1-8B on fake CUDA: what is alive beside what `puzzle plan` says.

And what single operators move: at these widths a copy of the head is 3 GiB of traffic.
"""

import pytest

from fake_cuda import shim
from fake_cuda.worker import ask

UNAVAILABLE = shim.unavailable()
pytestmark = [
    pytest.mark.training,
    pytest.mark.slow,
    pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE)),
]
GIB = 1 << 30
LAYERS = 2  # and 3: what a layer adds, and so what any number of them takes
ALL_LAYERS = 32
TOLERANCE = 0.15
# Bytes of the largest operator that is no product, but for those below.
MOST_BYTES = 2.75 * GIB
# Once a shard, stage or step, not once a chunk of tokens; but for the head's gradient, which adds
# up in float32 for every chunk.
LARGER = {
    # |x| of calibration in float32, and a variant's Gram matrices in float64
    "library": {"library/initialization.py add_activation", "library/initialization.py solve"},
    "score": {"score/fisher.py _head_gradients"},  # one gradient a sample, the head in float32
    "uptrain": {
        "uptrain/trainer.py _step",
        "training/losses.py __init__",
        "training/losses.py _spread",
        "training/losses.py _product_head",  # of the child, for a batch of validation text
        "backward",
    },
    "evaluate": set(),
}
PARTS = ["library", "score", "uptrain", "evaluate"]
LOADING = {"model/child.py <dictcomp>", "model/child.py __getitem__", "model/child.py build"}


@pytest.fixture(scope="module")
def measured():
    """{part: (figures at LAYERS, figures at one more)}"""
    wishes = [{"part": part, "layers": LAYERS + more} for part in PARTS for more in (0, 1)]
    results = ask("fake_cuda.widths", wishes)
    return {part: (results[2 * i], results[2 * i + 1]) for i, part in enumerate(PARTS)}


def at(layers: int, figures: tuple[dict, dict], key: str) -> float:
    """A figure for any number of layers, of which it is a straight line."""
    fewer, more = (figure[key] for figure in figures)
    return fewer + (layers - LAYERS) * (more - fewer)


@pytest.mark.parametrize("part", PARTS)
def test_a_plan_says_what_is_alive(measured, part):
    """Of `LAYERS` layers, and of all of them where both grow in a straight line.

    Others do not: what is held, or computed twice, depends on what fits.
    """
    counts = [LAYERS, ALL_LAYERS] if part in ("library", "evaluate") else [LAYERS]
    figures = measured[part]
    ratios = [at(n, figures, "planned_bytes") / at(n, figures, "peak_bytes") for n in counts]
    shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    assert all(abs(ratio - 1) <= TOLERANCE for ratio in ratios), f"the plan is {shown} of it"


def test_a_plan_of_uptraining_says_what_other_choices_take():
    """Micro-batches that add up, and layers that are computed twice."""
    choices = [{"micro_batch_sequences": 4}, {"activation_checkpointing": True}]
    wishes = [{"part": "uptrain", "layers": LAYERS, "uptrain": choice} for choice in choices]
    ratios = [figures["planned_over_peak"] for figures in ask("fake_cuda.widths", wishes)]
    assert all(abs(ratio - 1) <= TOLERANCE for ratio in ratios), ratios


def large(part: str, figures: dict) -> set[str]:
    """Where operators move more than is allowed."""
    places = set()
    for place, size in figures["largest"].items():
        file, _, rest = place.partition(":")
        name = f"{file} {rest.split()[-1]}" if rest else place
        if size > MOST_BYTES and name not in LOADING | LARGER[part]:
            places.add(name)
    return places


@pytest.mark.parametrize("part", PARTS)
def test_no_operator_moves_more_than_is_allowed(measured, part):
    assert large(part, measured[part][0]) == set()


def test_a_planted_copy_of_the_head_and_planted_leaks_are_caught(measured):
    wishes = [
        {"part": "score", "layers": LAYERS, "bug": "a_head_that_is_cast_for_every_chunk"},
        {"part": "score", "layers": LAYERS, "bug": "outputs_that_stay"},
    ]
    cast, leak = ask("fake_cuda.widths", wishes)
    fine = measured["score"][0]
    assert any(place.startswith("training/losses.py") for place in large("score", cast))
    output_bytes = fine["tokens"] * 4096 * 2
    assert leak["peak_bytes"] > fine["peak_bytes"] + output_bytes
