"""What a notebook needs: the whole job, runs, plans, questions, children.

    from puzzle import api

    run = api.run("mine.yaml", search={"throughput": "2x"})
    api.search(run, throughput="3x").best.blocks
    model = api.load_child(api.child_folder(run, "main"))

Importing this module does not import torch; the functions do, where they need it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from puzzle import config, pipeline, settings
from puzzle.commands import questions
from puzzle.progress import Progress
from puzzle.run import Run

if TYPE_CHECKING:
    import torch

    from puzzle.commands.planning import PlannedStage
    from puzzle.model.modeling_puzzle import PuzzleForCausalLM
    from puzzle.search.answers import Answer
    from puzzle.search.published import Question, TableSolution

Recipe = str | Path | Mapping[str, JsonValue]


def _make_run(recipe: Recipe, sections: Mapping[str, JsonValue], quiet: bool) -> Run:
    """A run from a recipe: a built-in one's name, a file, or the settings themselves."""
    place = "recipe"
    if isinstance(recipe, Mapping):
        values = dict(recipe)
    else:
        path = settings.recipe_path(str(recipe))
        values, place = settings.read_yaml(path), str(path)
        values.setdefault("out", f"runs/{path.stem}")
    for name, changes in sections.items():
        earlier = values.get(name)
        if isinstance(earlier, dict) and isinstance(changes, dict):
            values[name] = {**earlier, **changes}
        else:
            values[name] = changes
    parsed = config.parse(values, place)
    return Run(parsed, Path(parsed.out), Progress(quiet))


def run(recipe: Recipe = "pocket", *, quiet: bool = False, **sections: JsonValue) -> Run:
    """The whole job: from a parent to its measured, uptrained, evaluated children.

    Goes on from what is there. Raises `UserError` for a wrong recipe and `Infeasible` for a wish
    that cannot be met.

    Args:
        recipe: the name of a built-in recipe, the path of a YAML file, or a mapping of settings.
        quiet: no progress on standard error.
        **sections: settings that replace the recipe's, e.g. `search={"throughput": "2x"}`.

    Returns:
        The finished run.
    """
    made = _make_run(recipe, sections, quiet)
    pipeline.execute(made)
    return made


def open_run(folder: str | Path, *, quiet: bool = True) -> Run:
    """An existing run directory. Raises `UserError` where there is none."""
    return Run.open(Path(folder), Progress(quiet))


def plan(recipe: Recipe = "pocket", **sections: JsonValue) -> "list[PlannedStage]":
    """What every stage of a recipe will need (tokens, FLOPs, bytes, seconds); nothing is spent."""
    from puzzle.commands import planning

    made = _make_run(recipe, sections, quiet=True)
    pipeline.preflight(made)
    return planning.plan(made)


def search(run: Run, child: str = "main", **constraints: JsonValue) -> "Answer":
    """The best architectures for other constraints, from a run's tables; nothing is changed.

    Raises `Infeasible`, with the best attainable value, where no architecture meets them.

    Args:
        run: with scores, and costs of the child's place.
        child: whose other settings hold.
        **constraints: settings of the search, e.g. `throughput="3x", solutions=5`.
    """
    from puzzle.search import stage

    job = questions.question(run, child, dict(constraints), [])
    answer, _ = stage.search(job, stage.read_choices(job))
    return answer


def search_table(path: str | Path, question: "Question") -> "list[TableSolution]":
    """Search a published block-library table (the format of NVlabs/puzzle), best solution first."""
    from puzzle.search import published
    from puzzle.search.table import Table

    return published.search(Table.read(Path(path)), question)


def child_folder(run: Run, child: str = "main") -> Path:
    """The checkpoint of a child: uptrained, or as assembled where that is all there is."""
    from puzzle.export import stage

    return stage.source(run.child_job(child))


def load_child(
    folder: str | Path,
    dtype: "torch.dtype | None" = None,
    device: "str | torch.device" = "cpu",
) -> "PuzzleForCausalLM":
    """A child as a transformers model. `dtype`: the checkpoint's own if None."""
    import torch

    from puzzle.model import child

    return child.load(Path(folder), dtype, torch.device(device))
