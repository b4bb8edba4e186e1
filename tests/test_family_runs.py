"""Complete runs on parents that are not Llamas.

They bring norms around subblocks, soft caps, windows, biases and fused matrices.
"""

import families
import pytest
from conftest import tiny_recipe

from puzzle import config, pipeline
from puzzle.evaluate import results
from puzzle.model.modeling_puzzle import PuzzleConfig
from puzzle.progress import Progress
from puzzle.report import REPORT
from puzzle.run import Run
from puzzle.uptrain import UPTRAIN

pytestmark = pytest.mark.training


@pytest.mark.parametrize("row", ["qwen2", "qwen3", "phi3", "gemma2", "gemma3", "olmo2"])
def test_a_run_gives_a_child_that_keeps_its_promise_and_heals(row, text_folder, tmp_path):
    recipe = tiny_recipe(families.make(row, tmp_path / "parent"), text_folder, tmp_path / "run")
    recipe["deploy"] = ["vllm"]  # with our plugin, where the family needs it
    # A child that loses enough for the few steps of this training to heal, whatever the family
    recipe["search"] |= {"throughput": "1.37x"}
    run = Run(config.parse(recipe), tmp_path / "run", Progress(quiet=True))
    pipeline.execute(run)
    job = run.child_job("main")
    figures = results.read(job)
    assert figures.verdict == "met"
    # the parent against itself, through every path a child takes
    assert abs(figures.parent.quality.kl.value) < 1e-5
    assert figures.uptrained.quality.kl.value < figures.child.quality.kl.value
    changed = [b for b in figures.architecture if b != run.parent.shape.widest_block.name]
    assert changed
    if not any("linear" in name for name in changed) and row != "qwen2":
        written = PuzzleConfig.from_pretrained(job.folder(UPTRAIN))
        assert written.architectures == ["PuzzleForCausalLM"]
    assert "vLLM" in (job.folder(UPTRAIN) / "README.md").read_text()
    card = (job.folder(REPORT) / "README.md").read_text()
    assert f"{figures.speedup:.2f}x" in card and "modelled" in card
