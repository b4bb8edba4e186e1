"""The whole job on parents that are not Llamas: norms around subblocks, soft caps, windows, biases,
fused matrices.
"""

import families
import pytest
from conftest import tiny_recipe

from puzzle import config, pipeline
from puzzle.evaluate import stage as evaluate
from puzzle.model import child
from puzzle.progress import Progress
from puzzle.run import Run

pytestmark = pytest.mark.training


@pytest.mark.parametrize("row", ["qwen2", "qwen3", "phi3", "gemma2", "gemma3", "olmo2"])
def test_a_run_gives_a_child_that_keeps_its_promise_and_heals(row, text_folder, tmp_path):
    recipe = tiny_recipe(families.make(row, tmp_path / "parent"), text_folder, tmp_path / "run")
    recipe["deploy"] = ["vllm"]  # with our plugin, where the family needs it
    run = Run(config.parse(recipe), tmp_path / "run", Progress(quiet=True))
    assert pipeline.execute(run)["met"]
    results = evaluate.read(run)
    models = results["models"]
    assert (
        abs(models["parent"]["kl"]) < 1e-5
    )  # the parent against itself, through every path a child takes
    assert models["uptrained"]["kl"] < models["child"]["kl"]
    names = [b for b in results["architecture"] if b != run.parent.shape.parent_block.name]
    assert names
    written = child.PuzzleConfig.from_pretrained(tmp_path / "run" / "uptrained")
    kinds = {"qwen2": "DeciLMForCausalLM"}
    if not any("linear" in name for name in names) and row != "qwen2":
        assert written.architectures == [kinds.get(row, "PuzzleForCausalLM")]
    text = (tmp_path / "run" / "uptrained" / "README.md").read_text()
    assert f"{results['speed']['speedup']:.2f}x" in text and "modelled" in text
