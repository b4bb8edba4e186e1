"""Who keeps more of the parent at the same measured speed? The embedded parent on vLLM.

    python benchmarks/head_to_head.py [--run runs/head-to-head] [--parts speed serve quality table]
                                      [--only METHOD ...] [--wishes X ...] [--tokens N]
                                      [--seeds N] [--rows FOLDER] [--final] [--readme]
                                      [--quick] [--json]

speed     What every method makes of the parent for each wish (benchmarks/baselines.py), served
          beside the parent in turn: half an hour for a wish, on a quiet machine. Children with the
          same halves of layers, in any order, are served once. The cost table that they are
          searched with is measured for five minutes; Puzzle's child is searched without the margin
          that keeps its promise.
serve     All of them served anew, five at a time beside one parent: the same children have shown
          2.20x and 2.06x on different days, so the speeds of a table are of one day. Only where it
          is asked for.
quality   KL, LM loss and top-1 of every child on validation text, as it is made and after
          distillation: hours. One loss (cosine and KL; the KL alone where the hidden width differs
          from the parent's), one order of the data, one learning rate, and the same total training
          FLOPs: Puzzle's children have paid for their library, what needs none trains for longer.

Most methods have a discrete knob: the children on both sides of a wish are served and trained, and
the figure at the wish is interpolated in the logarithm of the speed-up. A child that is searched is
served a little beside its wish: its figure is interpolated likewise, between the parent (1x, all is
kept) and the child. What a method cannot reach is printed as "at most". Finished rows are kept in
the folder `--rows`, one for a machine, whose speed-ups and children are its own, and are not run
again; a row that other code has made is marked, and run again. `--parts table` only prints.
`--final` reads test text, once, at the end; `--readme` writes the picture and the sentences.

Unstructured and 2:4 sparsity have no speed-up on this engine, so they have no row.
"""

import tempfile
from pathlib import Path

import common
import contest
import standings
from baselines import Evolution
from contest import METHODS, Workshop

from puzzle.score import SCORE
from puzzle.stage import Job

PARTS = ("speed", "serve", "quality", "table")
STARTS = 4  # of the engines, for a speed: 3 to 6 % to either side on 2 busy cores
RESULTS = Path(__file__).parent / "results" / "head_to_head"  # of a machine with AMX


def print_budget(shop: Workshop) -> None:
    """The formula of the budget, and what scoring takes beside it."""
    run = shop.run
    score = SCORE.work().need(Job(run)).flops
    print(
        "training FLOPs: BLD = tokens x 2 x the parent's layers + 6 x every variant x its tokens = "
        f"{standings.library_flops(run):.3g}; distillation = tokens x (6 x child + 2 x parent + "
        "Muon's of a step / a batch's tokens); "
        f"scoring, beside it: {score:.3g}"
    )


def main() -> None:
    """The command line."""
    options = common.parser(__doc__, "a tiny parent, one wish, modelled speeds")
    options.add_argument("--run", type=Path, default=Path("runs/head-to-head"))
    options.add_argument("--parts", nargs="+", choices=PARTS)
    options.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    options.add_argument("--wishes", nargs="+", type=float, default=list(contest.WISHES))
    options.add_argument("--tokens", type=int, default=500_000, help="of a Puzzle child")
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--rows", type=Path, default=RESULTS, help="where they are kept")
    options.add_argument("--final", action="store_true", help="read test text: once, at the end")
    options.add_argument("--readme", action="store_true", help="write README's part, too")
    args = common.start(options)
    parts = args.parts or [part for part in PARTS if args.quick or part != "serve"]
    evolution, wishes = Evolution(), tuple(args.wishes)
    trained = tuple(wish for wish in contest.TRAINED if wish in wishes)
    size = contest.Size(wishes, trained, args.tokens, args.seeds, STARTS, evolution, 128)
    if args.quick:
        quick = Evolution(2, 2, 1, (1, 1))
        size = contest.Size((1.02,), (1.02,), 2048, 1, 2, quick, 4)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run" if args.quick else args.run
        rows = Path(temporary) / "rows" if args.quick else args.rows
        rows.mkdir(parents=True, exist_ok=True)
        shop = Workshop(contest.open_run(folder, args), size, rows)
        methods = [method for method in METHODS if method in args.only]
        split = "test" if args.final else "validation"
        print_budget(shop)
        if "speed" in parts:
            contest.speed_part(shop, methods)
        if "serve" in parts:
            contest.serve_part(shop, methods)
        if "quality" in parts:
            standings.quality_part(shop, methods, split)
        points = standings.table_part(shop, methods, split)
        if args.readme:
            print(standings.update_readme(points, Path(__file__).parent.parent))
        common.print_json(args, [one.as_json() for one in points])


if __name__ == "__main__":
    main()
