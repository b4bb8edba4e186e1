"""What does it cost to have only text that the parent itself has written?

    python benchmarks/parent_text.py [--out FOLDER] [--json] [--quick]

Three children of the embedded parent, each made from beginning to end (library, scores, search,
uptraining) with the same settings and on as many tokens: from ordinary text (the standard library,
on which the parent was trained), from text that the parent has written (corpus source `parent`),
and from half of each. All are judged on the same ordinary test text, which no stage of any of the
three has read: a child's own held-out text would flatter the child that was made from the parent's.
Costs are modelled, so the three differ in text alone. With `--out`, what is done is not done again.
"""

import argparse
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common

from puzzle import api, pipeline
from puzzle.data import written
from puzzle.evaluate.bootstrap import UnitSums
from puzzle.evaluate.quality import Text, unit_sums
from puzzle.run import Run

TEXTS: dict[str, list[str]] = {
    "ordinary": ["ordinary"],
    "written by the parent": ["parent"],
    "half of each": ["ordinary", "parent"],
}
RECIPE: common.Settings = {
    "parent": "pocket",
    "deploy": ["transformers"],
    "corpus": {"train_tokens": 400_000},
    "library": {"ffn_percent": [75, 50, 25, 10], "tokens": 150_000, "learning_rate": 4e-3},
    "cost": {
        "engine": "roofline",
        "scenario": {"batch_size": 64, "input_length": 64, "output_length": 64},
    },
    "search": {"throughput": "1.5x", "refinements": 0},
    "uptrain": {"tokens": 400_000},
    "evaluate": {"sequences": 256, "questions": 0, "samples": 0},
}
VLLM: common.Settings = {"deploy": ["vllm"], "cost": {"engine": "vllm"}}


def make(folder: Path, recipe: common.Settings, names: list[str], ordinary: Any) -> Run:
    """The finished run on one text."""
    sources = [ordinary if name == "ordinary" else {"parent": True} for name in names]
    run = common.open_run(folder, recipe, corpus={"sources": sources})
    if "parent" in names and find_spec("vllm") and recipe["parent"] == "pocket":
        # costs are modelled, but vLLM writes many times as fast as this process (docs/log.md)
        beside = folder.with_name(f"{folder.name}.writer")
        by_vllm = common.open_run(beside, recipe | VLLM, corpus={"sources": sources})
        written.with_files(by_vllm, run.recipe.corpus)
        run.write()
        shutil.copytree(beside / written.FOLDER, folder / written.FOLDER, dirs_exist_ok=True)
    pipeline.execute(run)
    return run


def on_ordinary_text(run: Run, folder: Path | None, text: Text) -> UnitSums:
    """A checkpoint of another run (None: the parent) on the text of this one."""
    place = run.device.torch_device
    model = run.parent_model if folder is None else api.load_child(folder, device=place).float()
    return unit_sums(run, model, text, run.recipe.evaluate.batch_sequences)


def main() -> None:
    """Print a line for every text."""
    parser = common.parser(__doc__, quick="a tiny parent and few tokens")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: a temporary one)")
    args = common.start(parser)
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        recipe, ordinary = RECIPE, {"stdlib": True}
        if args.quick:
            recipe, ordinary = common.tiny_recipe(Path(temporary)), {"path": argparse.__file__}
            recipe["corpus"] |= {"train_tokens": 1024, "held_out_tokens": 2048}  # are written soon
        common.print_header("text", "KL, nats per token", "top-1 kept", "KL minus ordinary's")
        figures, first = {}, None
        for name, sources in TEXTS.items():
            run = make(out / name.replace(" ", "-"), recipe, sources, ordinary)
            if first is None:
                judge, text = run, Text.of(run, "test", run.recipe.evaluate.sequences)
                parent = on_ordinary_text(judge, None, text)
            sums = on_ordinary_text(judge, api.child_folder(run), text)
            first = first or sums
            kept, difference = sums.retention(parent), sums.difference(first, "kl")
            kl, more = (one.with_unit(".4f", "") for one in (sums.mean("kl"), difference))
            common.print_row(name, kl, kept.with_unit(".1%", "") if kept else "", more)
            figures[name] = {
                "kl": sums.mean("kl").model_dump(),
                "top1_kept": kept and kept.model_dump(),
                "kl_minus_ordinary": difference.model_dump(),
            }
    common.print_json(args, figures)


if __name__ == "__main__":
    main()
