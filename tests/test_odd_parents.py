"""Complete runs on parents with odd numbers: few layers, few heads, dead and massive channels."""

import math

import pytest
from conftest import make_parent, tiny_recipe
from safetensors.torch import load_file, save_file

from puzzle import config, pipeline
from puzzle.errors import UserError
from puzzle.evaluate import results
from puzzle.library import records
from puzzle.progress import Progress
from puzzle.run import Run

pytestmark = pytest.mark.training
ODD = {
    "one layer": {"num_hidden_layers": 1},
    "one KV head": {"num_key_value_heads": 1},
    "a KV head for every head": {"num_key_value_heads": 4},
    "an odd vocabulary": {"vocab_size": 337, "tie_word_embeddings": False},
}


def run_of(folder, text_folder, out, **search) -> Run:
    recipe = tiny_recipe(folder, text_folder, out)
    recipe["library"]["initialization"] = "least_squares"
    recipe["search"] = search or {"parameters": "90%", "refinements": 0}
    return Run(config.parse(recipe), out, Progress(quiet=True))


def check(run) -> None:
    pipeline.execute(run)
    job = run.child_job("main")
    figures = results.read(job)
    assert figures.verdict == "met"
    for quality in (figures.parent.quality, figures.child.quality, figures.uptrained.quality):
        assert math.isfinite(quality.kl.value) and math.isfinite(quality.lm_loss.value)
    assert all(math.isfinite(record.nmse_after) for record in records.read_index(job))


@pytest.mark.parametrize("odd", ODD)
def test_a_run_on_an_odd_parent(odd, text_folder, tmp_path):
    check(run_of(make_parent(tmp_path / "parent", **ODD[odd]), text_folder, tmp_path / "run"))


def changed_parent(folder, change):
    """A parent whose weights are changed in place by a function of them."""
    path = make_parent(folder) / "model.safetensors"
    state = load_file(path)
    change({name.removeprefix("model."): tensor for name, tensor in state.items()})
    save_file(state, path, metadata={"format": "pt"})
    return folder


def dead(weights) -> None:
    """Half of the FFN's channels give nothing, one layer's value projection neither."""
    for layer in range(4):
        weights[f"layers.{layer}.mlp.gate_proj.weight"][48:] = 0
    weights["layers.1.self_attn.v_proj.weight"].zero_()


def massive(weights) -> None:
    """One channel of the residual stream is a thousand times the rest."""
    weights["embed_tokens.weight"][:, 5] = 1000 * weights["embed_tokens.weight"].std()


def constant(weights) -> None:
    """Every token looks the same."""
    weights["embed_tokens.weight"][:] = weights["embed_tokens.weight"][:1].clone()


@pytest.mark.parametrize("change", [dead, massive, constant])
def test_a_run_on_a_parent_with_odd_weights(change, text_folder, tmp_path):
    check(run_of(changed_parent(tmp_path / "parent", change), text_folder, tmp_path / "run"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_parent_whose_activations_are_not_finite_is_one_line(value, text_folder, tmp_path):
    def change(weights) -> None:
        weights["layers.2.mlp.down_proj.weight"][3, 3] = value

    run = run_of(changed_parent(tmp_path / "parent", change), text_folder, tmp_path / "run")
    with pytest.raises(UserError, match="not finite|is nan|expected a number") as error:
        pipeline.execute(run)
    assert "\n" not in str(error.value)
