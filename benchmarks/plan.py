"""How good are the times of `puzzle plan`? Each stage's estimate against what it then took.

    python benchmarks/plan.py [--run FOLDER ...] [--json] [--quick]

By default two runs with modelled costs: the embedded parent, and a parent of 260 thousand
parameters, whose layers are so small that what surrounds their matrix products takes the time. With
`--run` finished runs are planned again as if their children were not there, for example the demo's.
Stages that took less than `LEAST_S` are not compared.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import common

from puzzle import artifacts, pipeline
from puzzle.commands import planning
from puzzle.pipeline import STAGES
from puzzle.progress import Progress
from puzzle.run import Run

LEAST_S = 2.0
SMALL = common.LlamaSizes(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
RECIPE: common.Settings = {
    "parent": "pocket",
    "deploy": ["transformers"],
    "library": {"tokens": 200_000},
    "cost": {
        "engine": "roofline",
        "scenario": {"batch_size": 64, "input_length": 64, "output_length": 64},
    },
    "search": {"parameters": "60%", "refinements": 1},
    "uptrain": {"tokens": 400_000},
}


class Row(NamedTuple):
    """A stage of a run."""

    run: str
    stage: str
    planned_s: float
    took_s: float

    @property
    def ratio(self) -> float:
        """Planned over taken."""
        return self.planned_s / self.took_s


def planned(recipe: common.Settings) -> dict[str, float]:
    """Seconds of every stage, before anything is there."""
    with tempfile.TemporaryDirectory() as empty:
        found = planning.plan(common.open_run(Path(empty), recipe))
    return {one.name: one.seconds for one in found}


def rows(name: str, run: Run, seconds: dict[str, float]) -> list[Row]:
    """Of the stages that are done."""
    found = []
    for job in run.recipe_jobs():
        for stage in STAGES:
            manifest = artifacts.read_manifest(job.folder(stage))
            if manifest is not None and stage.name in seconds:
                found.append(Row(name, stage.name, seconds[stage.name], manifest.seconds))
    return found


def main() -> None:
    """Print a line for every stage."""
    parser = common.parser(__doc__, quick="a tiny parent and few tokens")
    parser.add_argument("--run", type=Path, nargs="+", help="finished runs with one child each")
    args = common.start(parser)
    common.print_header("run", "stage", "planned, s", "took, s", "planned / took")
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, run, seconds in _runs(args.run, args.quick, Path(temporary)):
            for row in rows(name, run, seconds):
                compared = row.planned_s > 0 and (row.took_s >= LEAST_S or args.quick)
                ratio = f"{row.ratio:.2f}" if compared else ""
                times = (f"{row.planned_s:.1f}", f"{row.took_s:.1f}")
                common.print_row(row.run, row.stage, *times, ratio)
                found += [row] if compared else []
    worst = max(max(row.ratio, 1 / row.ratio) for row in found)
    print(f"worst of {len(found)}: a factor of {worst:.2f}")
    common.print_json(args, {"worst": worst, "rows": [row._asdict() for row in found]})


def _runs(
    given: list[Path] | None, quick: bool, folder: Path
) -> Iterator[tuple[str, Run, dict[str, float]]]:
    """(name, finished run, what was planned before it)."""
    if given:
        for path in given:
            run = Run.open(path, Progress(quiet=True))
            yield path.name, run, planned(run.recipe.model_dump(mode="json"))
        return
    common.make_parent(folder / "small", SMALL)
    small = RECIPE | {"parent": str(folder / "small")}
    recipes = {"embedded parent": RECIPE, "260k parameters": small}
    if quick:
        recipes = {"tiny": common.tiny_recipe(folder)}
    for name, recipe in recipes.items():
        seconds = planned(recipe)
        run = common.open_run(folder / name.replace(" ", "-"), recipe)
        pipeline.execute(run)
        yield name, run, seconds


if __name__ == "__main__":
    main()
