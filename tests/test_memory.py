"""What streamed stages hold, measured: the peaks of processes on a parent of half a gigabyte."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import common
import memory

pytestmark = [pytest.mark.training, pytest.mark.slow]
# Tokenizer, corpus, and what libraries of products keep: about the same for every parent
BESIDE_BYTES = 0.3e9


def test_a_streamed_parent_is_never_held(tmp_path):
    sizes = replace(memory.LARGE, num_hidden_layers=6)
    parent_bytes = common.make_parent(tmp_path / "parent", sizes)
    benchmark = memory.Benchmark(tmp_path, memory.CORPUS, ("streamed", "resident"))
    shown = benchmark.measure(parent_bytes)
    assert shown["scores_equal"] and shown["evaluations_equal"]
    rows = {(row["stage"], row["way"]): row for row in shown["stages"]}
    for stage in memory.STAGES:
        streamed, resident = rows[stage, "streamed"], rows[stage, "resident"]
        assert streamed["peak_bytes"] < streamed["formula_bytes"] + BESIDE_BYTES
        assert streamed["peak_bytes"] < resident["peak_bytes"] - 0.5 * parent_bytes
