"""How much of the training should go into the library? At equal total training FLOPs.

    python benchmarks/library_tokens.py [--run runs/library-tokens] [--tokens N] [--quick] [--json]

The embedded parent on vLLM. For every split of the tokens a whole run of its own: library, scores,
the child of 2.17x by the cost table (which all runs share) after the search around it, and its
distillation. What a library does not cost is spent on distillation: all have the FLOPs of the first
split and N tokens of distillation of its child (the formula is that of head_to_head.py). Quality is
on validation text. Libraries, scores and distilled weights are kept in the run directory and not
made again.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import contest
import standings
from baselines import Evolution
from contest import Candidate, Workshop

from puzzle import config
from puzzle.config import ChildConfig, SearchConfig
from puzzle.engines.intervals import Interval
from puzzle.model.architecture import Architecture
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.search import around, stage

SPEEDUP, EXCERPT = 2.17, 128


@dataclass(frozen=True)
class Split:
    """Tokens of BLD: of every variant, and of those named in `budgets`."""

    label: str
    tokens: int
    budgets: dict[str, int]
    learning_rate: float


SPLITS = (
    Split("400k", 400_000, {}, 4e-3),
    Split("100k", 100_000, {}, 2e-3),
    Split("attention 400k, FFN 40k", 40_000, {"gqa_1": 400_000}, 2e-3),
    Split("25k", 25_000, {}, 2e-3),
    Split("4k: hardly more than least squares", 4_096, {}, 2e-3),
)
QUICK = (Split("2k", 2048, {}, 2e-3), Split("1k", 1024, {"gqa_1": 2048}, 2e-3))


def open_run(root: Path, split: Split, number: int, quick: bool) -> Run:
    """A run of this split; its costs are those of the first one."""
    folder = root / f"split-{number}"
    recipe = common.embedded_recipe(root, quick)
    recipe["library"] = recipe["library"] | {
        "tokens": split.tokens,
        "budgets": split.budgets,
        "learning_rate": split.learning_rate,
    }
    run = Run(config.parse(recipe | {"out": str(folder)}), folder, Progress(quiet=quick))
    if number and not (folder / "places").exists():
        shutil.copytree(root / "split-0" / "places", folder / "places")
    contest.prepare(run)
    return run


def found_child(run: Run, wish: str) -> Candidate:
    """The child of a wish by the table, after the search around the best sum."""
    job = run.job_of("split", ChildConfig(search=SearchConfig(throughput=wish, margin=0.0)))
    choices = stage.read_choices(job)
    _, best = stage.search(job, choices)
    found = around.refine(job, choices, best.limits, [best.solutions[0].blocks], [])
    architecture, shape = Architecture.from_names(found.blocks), run.parent.shape
    return Candidate(
        method=contest.DEFAULT,
        label="",
        wish=SPEEDUP,
        blocks=found.blocks,
        weights="library",
        speedup=Interval(value=0.0, low=0.0, high=0.0),  # only predicted here
        parameters=architecture.parameters(shape),
        kv_bytes_per_token=architecture.kv_elements_per_token(shape) * run.parent.dtype.itemsize,
        code=contest.made_by(contest.DEFAULT),
    )


def figures(shop: Workshop, split: Split, child: Candidate, tokens: int) -> dict[str, Any]:
    """Before and after distillation."""
    row: dict[str, Any] = {"label": split.label, "tokens": tokens, "parameters": child.parameters}
    cells = []
    for name, budget in (("before", 0), ("after", tokens)):
        made = standings.measure_row(shop, child, budget, 1, "validation")
        kept, kl = made.model.retention(made.parent), made.model.mean("kl")
        assert kept is not None
        row[name] = {"top1": kept.as_json(), "kl": kl.as_json(), "minutes": made.minutes}
        cells += [f"{kl.value:.3f}", f"{kept.value:.1%} ({kept.low:.1%} to {kept.high:.1%})"]
    share = standings.library_flops(shop.run) / row_budget(shop, child, tokens)
    common.print_row(split.label, f"{share:.0%}", f"{tokens:,}", f"{child.parameters:,}", *cells)
    return row | {"library_share": share}


def row_budget(shop: Workshop, child: Candidate, tokens: int) -> float:
    """All training FLOPs."""
    distilled = tokens * standings.token_flops(shop.run, child.parameters)
    return standings.library_flops(shop.run) + distilled


def main() -> None:
    """A row for every split."""
    options = common.parser(__doc__, "a tiny parent, two splits, modelled speeds")
    options.add_argument("--run", type=Path, default=Path("runs/library-tokens"))
    options.add_argument("--tokens", type=int, default=800_000, help="of the first split's child")
    args = common.start(options)
    rows, budget = [], 0.0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) if args.quick else args.run
        root.mkdir(parents=True, exist_ok=True)
        asked = 2048 if args.quick else args.tokens
        size = contest.Size((SPEEDUP,), (SPEEDUP,), asked, 1, 1, Evolution(), EXCERPT)
        names = ("library", "of all FLOPs", "tokens of distillation", "parameters")
        common.print_header(*names, "KL before", "top-1 kept before", "KL after", "top-1 kept")
        for number, split in enumerate(QUICK if args.quick else SPLITS):
            run = open_run(root, split, number, args.quick)
            shop = Workshop(run, size, run.folder)
            child = found_child(run, "1.02x" if args.quick else f"{SPEEDUP}x")
            if not number:
                budget = row_budget(shop, child, asked)
            left = budget - standings.library_flops(run)
            step = run.recipe.uptrain.batch_sequences * run.recipe.corpus.sequence_length
            per_step = step * standings.token_flops(run, child.parameters)
            rows.append(figures(shop, split, child, max(1, round(left / per_step)) * step))
    common.print_json(args, rows)


if __name__ == "__main__":
    main()
