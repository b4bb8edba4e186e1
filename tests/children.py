"""Children made by hand from a parent's own weights, for tests of everything that reads a child."""

from pathlib import Path

import torch
from conftest import make_parent

from puzzle import artifacts, config
from puzzle.assemble import ASSEMBLE
from puzzle.library import initialization
from puzzle.model import child
from puzzle.model.architecture import Architecture
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.stage import Job

MIXED = {
    "reduced": ["gqa_1+gated_96", "no_op+gated_32", "gqa_2+no_op", "gqa_2+gated_64"],
    "no-op in layer 0": ["no_op+gated_32", "gqa_1+no_op", "no_op+no_op", "gqa_2+gated_96"],
    "linear": ["linear+gated_96", "gqa_2+linear", "linear+linear", "gqa_1+no_op"],
    "no attention at all": ["no_op+gated_96", "linear+linear", "no_op+gated_32", "no_op+no_op"],
}


def write_child(tiny, folder, names):
    architecture = Architecture.from_names(names)
    weights = tiny.weights()
    state = {name: weights[name] for name in weights if not name.startswith("model.layers.")}
    contribution = torch.arange(tiny.shape.intermediate_size, dtype=torch.float32)
    for index, block in enumerate(architecture):
        prefix = f"model.layers.{index}."
        layer_state = {n.removeprefix(prefix): weights[n] for n in weights if n.startswith(prefix)}
        for variant in (block.attention, block.ffn):
            made = initialization.initial_state(
                layer_state, variant, tiny.shape, initialization.Calibration(contribution)
            )
            state |= {prefix + name: tensor for name, tensor in made.items()}
    child.save(folder, tiny.child_config(architecture), architecture, state, tiny.folder, "card\n")
    return folder


def generate(model, prompt, use_cache):
    return model.generate(
        prompt, max_new_tokens=24, do_sample=False, use_cache=use_cache, eos_token_id=-1
    )


def job_with_child(folder: Path, blocks: list[str]) -> Job:
    """The job of a run whose child `main` is as `assemble` leaves it, all else undone."""
    made = make_parent(folder / "parent", hidden_size=128, num_attention_heads=4, head_dim=32)
    recipe = {"parent": str(made), "cost": {"scenario": {"dtype": "float32"}}}
    Run(config.parse(recipe), folder / "run", Progress(quiet=True)).write()
    job = Run.open(folder / "run", Progress(quiet=True)).child_job("main")
    child_folder = job.folder(ASSEMBLE)
    artifacts.begin(child_folder, {})
    write_child(job.run.parent, child_folder, blocks)
    artifacts.write_manifest(child_folder, {}, seconds=0.0)
    return job
