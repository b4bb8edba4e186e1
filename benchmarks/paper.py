"""Which findings of the paper reproduce on the embedded parent? Its ablations, before uptraining.

    python benchmarks/paper.py [--run runs/paper] [--seeds N] [--only FINDING ...]
                               [--quick] [--json]

Every row is a child of a wish at equal predicted cost (one cost table, measured once), assembled
from a library and measured on validation text, which chose nothing. A finding is a pair of rows;
what it says is the difference of their KLs, seed by seed (another order of the text, another
library, other scores), with the standard error of the mean over seeds. Finished rows are kept in
RUN/rows.jsonl.

The choices (from one library and its scores): the program's best sum, the search around it, the
paper's greedy, most parameters, random scores, one block in all layers, the space of no-ops only,
and the program with LM losses in the place of KLs. The libraries (the program's best sum of each):
all tokens, a half, a quarter, hardly any after least squares, hardly any after the paper's own
initialisation, and pairs trained together after the decoupled library (coupled).

What distillation recovers, and random weights in the same shape, is in head_to_head.py; losses of
distillation are compared by uptrain.py.
"""

import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
import contest
import numpy as np
import standings
import torch
from baselines import Evolution
from contest import Workshop

from puzzle import artifacts, config, pipeline
from puzzle.artifacts import Record
from puzzle.assemble.stage import ChildState
from puzzle.config import ChildConfig, SearchConfig
from puzzle.evaluate.bootstrap import UnitSums
from puzzle.model import child
from puzzle.model.architecture import Architecture
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.score import results
from puzzle.search import around, stage
from puzzle.search.frontier import baseline_choices

WISHES, EXCERPT = (1.5, 2.17), 128
HARDLY = 4096  # tokens: one step
ALL, PROGRAM, AROUND = "all tokens", "program", "around it"
LIBRARIES: dict[str, Callable[[int], common.Settings]] = {  # of the tokens of the whole library
    ALL: lambda tokens: {},
    "half the tokens": lambda tokens: {"tokens": tokens // 2},
    "a quarter": lambda tokens: {"tokens": tokens // 4},
    "least squares": lambda tokens: {"tokens": HARDLY},
    "training-free": lambda tokens: {"tokens": HARDLY, "initialization": "training_free"},
    "coupled": lambda tokens: {"coupled": 6},
}
FINDINGS = {  # what the paper says: (better, worse), as (library, choice)
    "the program beats greedy": ((ALL, PROGRAM), (ALL, "greedy")),
    "the program beats most parameters": ((ALL, PROGRAM), (ALL, "most parameters")),
    "the program beats random scores": ((ALL, PROGRAM), (ALL, "random")),
    "different layers beat one block": ((ALL, PROGRAM), (ALL, "homogeneous")),
    "the space beats no-ops only": ((ALL, PROGRAM), (ALL, "no-op only")),
    "KL scores beat LM-loss scores": ((ALL, PROGRAM), (ALL, "LM-loss scores")),
    "a trained library beats training-free": ((ALL, PROGRAM), ("training-free", PROGRAM)),
    "all tokens beat half": ((ALL, PROGRAM), ("half the tokens", PROGRAM)),
    "half the tokens beat a quarter": (("half the tokens", PROGRAM), ("a quarter", PROGRAM)),
    "coupled after decoupled helps": (("coupled", PROGRAM), (ALL, PROGRAM)),
    "ours: the search around beats the program": ((ALL, AROUND), (ALL, PROGRAM)),
    "ours: least squares beat training-free": (
        ("least squares", PROGRAM),
        ("training-free", PROGRAM),
    ),
}
Key = tuple[str, str]


class Row(Record):
    """One line of `rows.jsonl`: a child before uptraining."""

    seed: int
    library: str
    choice: str
    wish: float
    blocks: list[str] | None  # None: nothing fits
    model: UnitSums | None
    parent: UnitSums | None
    code: str


def _code() -> str:
    """Digest of what decides a row: which child it is, and its weights."""
    return f"{contest.made_by(contest.DEFAULT)}-{contest.code_of('library')}"


@dataclass(frozen=True)
class Table:
    """Where rows are kept, and what is made."""

    root: Path
    quick: bool

    def rows(self) -> list[Row]:
        """Those of the code of now."""
        found = artifacts.read_records(self.root / "rows.jsonl", Row)
        return [row for row in found if row.code == _code()]

    def of(self, seed: int, key: Key, wish: float) -> Row | None:
        """One row, if it is there."""
        mine = [
            r for r in self.rows() if (r.seed, r.library, r.choice, r.wish) == (seed, *key, wish)
        ]
        return mine[-1] if mine else None

    def run(self, seed: int, library: str) -> Run:
        """With library and scores; costs are those of the first run."""
        recipe = common.embedded_recipe(self.root, self.quick)
        tokens = recipe["library"]["tokens"]
        recipe["library"] = recipe["library"] | LIBRARIES[library](tokens)
        recipe["corpus"] = recipe.get("corpus", {}) | {"seed": seed}
        folder = self.root / f"{seed}-{library.replace(' ', '-')}"
        run = Run(config.parse(recipe | {"out": str(folder)}), folder, Progress(quiet=self.quick))
        first = next(iter(sorted(self.root.glob("*/places"))), None)
        if first is not None and not (folder / "places").exists():
            shutil.copytree(first, folder / "places")
        if run.first is not None:
            decoupled = self.root / f"{seed}-{ALL.replace(' ', '-')}"
            if not run.first.folder.exists():
                shutil.copytree(decoupled, run.first.folder)
            run.write()
            pipeline.narrow(run, run.first)
        contest.prepare(run)
        return run


def chosen(run: Run, choice: str, wish: float) -> Architecture | None:
    """The child that a way of choosing takes for a speed-up, by the table."""
    job = run.job_of("paper", ChildConfig(search=SearchConfig(throughput=f"{wish}x", margin=0.0)))
    choices = stage.read_choices(job)
    if choice == "LM-loss scores":
        means = results.read(run)
        pairs = [(i, b.name) for i, layer in enumerate(choices.layers) for b in layer]
        losses = [means[pair].means["lm_loss"] for pair in pairs]
        parents = [losses[int(choices.starts[index])] for index, _ in pairs]
        choices = replace(choices, losses=np.array(losses) - np.array(parents))
    _, best = stage.search(job, choices)
    if choice == AROUND:
        found = around.refine(job, choices, best.limits, [best.solutions[0].blocks], [])
        return Architecture.from_names(found.blocks)
    if choice in (PROGRAM, "LM-loss scores"):
        return best.solutions[0].architecture
    others = baseline_choices(best.program, choices, run.parent.shape, best.tables["main"])
    blocks = next(one.blocks for one in others if one.name == choice)
    return None if blocks is None else Architecture.from_names(blocks)


def measure(run: Run, shop: Workshop, architecture: Architecture) -> tuple[UnitSums, UnitSums]:
    """(of the assembled child, of the parent) on validation text."""
    made = run.parent.child_config(architecture)
    device, attention = run.device.torch_device, run.placement.attention
    state = dict(ChildState(run, architecture))
    model = child.build(made, state, torch.float32, device, attention)
    return standings.quality_of(shop, model.eval(), "validation")


def fill(table: Table, seed: int, wanted: list[tuple[Key, float]]) -> None:
    """Make the rows that are missing, library by library."""
    for library in LIBRARIES:
        missing = [
            (choice, wish)
            for (name, choice), wish in wanted
            if name == library and table.of(seed, (name, choice), wish) is None
        ]
        if not missing:
            continue
        began, run = time.perf_counter(), table.run(seed, library)
        size = contest.Size((), (), 0, 1, 1, Evolution(), 4 if table.quick else EXCERPT)
        shop = Workshop(run, size, table.root)
        for choice, wish in missing:
            architecture = chosen(run, choice, wish)
            quality = None if architecture is None else measure(run, shop, architecture)
            row = Row(
                seed=seed,
                library=library,
                choice=choice,
                wish=wish,
                blocks=None if architecture is None else architecture.names,
                model=None if quality is None else quality[0],
                parent=None if quality is None else quality[1],
                code=_code(),
            )
            artifacts.append_record(table.root / "rows.jsonl", row)
            kl = "nothing fits" if row.model is None else f"KL {row.model.mean('kl').value:.4f}"
            print(f"seed {seed}, {library}, {choice}, {wish}x: {kl}", flush=True)
        print(f"seed {seed}, {library}: {time.perf_counter() - began:.0f} s", flush=True)


def finding(table: Table, name: str, wish: float, seeds: int) -> dict[str, Any]:
    """Both KLs, their difference and its standard error over the seeds that are there."""
    pairs, fits = [], True
    for seed in range(seeds):
        better, worse = (table.of(seed, key, wish) for key in FINDINGS[name])
        if better is None or worse is None:
            continue
        if better.model is None or worse.model is None:
            fits = False
            continue
        pairs.append([one.model.mean("kl").value for one in (better, worse) if one.model])
    figures: dict[str, Any] = {"finding": name, "wish": wish, "seeds": len(pairs), "fits": fits}
    if pairs:
        gains = [worse - better for better, worse in pairs]
        figures["kl"] = [statistics.fmean(column) for column in zip(*pairs, strict=True)]
        figures["gain"] = statistics.fmean(gains)
        if len(gains) > 1:
            figures["error"] = statistics.stdev(gains) / math.sqrt(len(gains))
    return figures


def print_findings(table: Table, names: list[str], wishes: list[float], seeds: int) -> list[Any]:
    """The table; what a wish does not allow is said."""
    common.print_header("finding", "wish", "KL", "against", "gain", "standard error", "seeds", "")
    found = []
    for name in names:
        for wish in wishes:
            one = finding(table, name, wish, seeds)
            found.append(one)
            common.print_row(name, f"{wish}x", *_cells(one))
    return found


def _cells(one: dict[str, Any]) -> list[object]:
    """Undecided is what is within two standard errors of nothing."""
    if "kl" not in one:
        return [""] * 5 + ["not run" if one["fits"] else "nothing fits"]
    error = one.get("error")
    verdict = "undecided"
    if error is not None and abs(one["gain"]) > 2 * error:
        verdict = "reproduces" if one["gain"] > 0 else "does not"
    shown = "" if error is None else f"{error:.3f}"
    return [*(f"{kl:.3f}" for kl in one["kl"]), f"{one['gain']:+.3f}", shown, one["seeds"], verdict]


def main() -> None:
    """Fill the rows, print the findings."""
    options = common.parser(__doc__, "a tiny parent, one wish, modelled speeds")
    options.add_argument("--run", type=Path, default=Path("runs/paper"))
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--only", nargs="+", choices=FINDINGS, default=list(FINDINGS))
    args = common.start(options)
    wishes = [1.02] if args.quick else list(WISHES)
    seeds = 1 if args.quick else args.seeds
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) if args.quick else args.run
        root.mkdir(parents=True, exist_ok=True)
        table = Table(root, args.quick)
        keys = dict.fromkeys(key for name in args.only for key in FINDINGS[name])
        for seed in range(seeds):
            fill(table, seed, [(key, wish) for key in keys for wish in wishes])
        print()
        common.print_json(args, print_findings(table, args.only, wishes, seeds))


if __name__ == "__main__":
    main()
