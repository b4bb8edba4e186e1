"""What replacements do to each other: does the search around a child find better ones?

    python benchmarks/interactions.py [--run runs/interactions] [--tokens N] [--quick] [--json]
                                      [--parts prediction gains drops trained blind]

The library, scores and costs are the demo's, made in the run directory if they are not there. Every
KL is of a child assembled in memory, before uptraining, but for `trained`.

prediction  Children of 1.25x to 4x, the best sums and sums that random scores have led astray: how
        far the sum of scores is from the KL of the assembled child, and how far the curve through
        the 16 children that `puzzle run` assembles is (search/curve.py).
gains   For every speed-up, at equal predicted cost: the best sum of scores, and the child that
        `puzzle child` makes from it (search/around.py). On the text that scored the blocks, and on
        validation text, which chose nothing.
drops   Only whole layers are removed, 3, 4 and 6 of them (not the first, whose attention stock vLLM
        needs): how far the sum of scores, greedy removal, block influence and the search around the
        best sum are from the best of all choices, on the text that scored the blocks.
trained The two children of `gains` after equal tokens of uptraining, three seeds, on validation
        text: what each keeps of the parent's top-1 accuracy, and the difference, paired by
        documents. Finished children are kept in the run directory and not trained again.
blind   What a random local search with the KL of assembled children finds in `--seconds` from
        the best sum, and from the child of `gains`: blocks of one to four layers exchanged at
        random within the speed-up by the cost table, taken where the KL falls on all of the text.
        On a CPU that needs hours to say something; it is not among the parts that run by default.
"""

import argparse
import itertools
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import baselines
import common
import contest
import numpy as np
import standings
from contest import Row, Workshop
from standings import Vector

from puzzle import config, pipeline, settings
from puzzle.config import ChildConfig, SearchConfig
from puzzle.cost import COST, table
from puzzle.engines.intervals import Interval
from puzzle.errors import Infeasible
from puzzle.library import LIBRARY
from puzzle.model.architecture import Architecture, Block
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.score import SCORE
from puzzle.score.assembled import AssembledKL
from puzzle.score.exact import Shard
from puzzle.search import around, stage, validate
from puzzle.search.constraints import KINDS
from puzzle.search.space_program import Choices, Limit
from puzzle.stage import Job

PARTS = ("prediction", "gains", "drops", "trained", "blind")
PREDICTED = tuple(np.round(np.geomspace(1.25, 4.0, 20), 3))
SPEEDUPS, DROPPED = (1.25, 1.5, 1.75, 2.17, 2.5, 3.0), (3, 4, 6)
TRAINED, SEEDS, BLIND = (2.17, 3.0), (1, 2, 3), (1.5, 2.17, 3.0)


def open_run(folder: Path, args: argparse.Namespace) -> Run:
    """A run with library, scores and costs, made where they are not there."""
    if args.quick:
        recipe = common.tiny_recipe(folder.parent)
        recipe["score"] |= {"assembled": 8}
        run = Run(config.parse(recipe | {"out": str(folder)}), folder, Progress(quiet=True))
    elif (folder / "run.yaml").exists():
        run = Run.open(folder, Progress())
    else:
        recipe = settings.read_yaml(settings.recipe_path("pocket"))
        run = Run(config.parse(recipe | {"out": str(folder)}), folder, Progress())
    run.write()
    for each in (LIBRARY, SCORE):
        pipeline.execute_stage(each, Job(run))
    pipeline.execute_stage(COST, run.place_job())
    return run


def job_of(run: Run, name: str, **search: object) -> Job:
    """A child of this benchmark; what it measures is remembered in its folder."""
    return run.job_of(name, ChildConfig(search=SearchConfig.model_validate(search)))


def validation_kl(run: Run) -> AssembledKL:
    """On text that chose nothing."""
    size = run.recipe.score.shard_sequences
    parts = run.corpus["validation"].head(2 * run.recipe.score.sequences).split(size)
    return AssembledKL(run, [Shard(str(index), tokens) for index, tokens in enumerate(parts)])


def the_two(run: Run, speedup: float) -> tuple[float, list[str], around.Refined]:
    """(the best sum, its blocks, what the search around it finds), with the same limit."""
    name = f"interactions-{speedup}".replace(".", "_")
    job = job_of(run, name, throughput=f"{speedup}x", margin=0.0)
    choices = stage.read_choices(job)
    _, best = stage.search(job, choices)
    first = best.solutions[0]
    found = around.refine(job, choices, best.limits, [first.blocks], [])
    return first.objective, first.blocks, found


def gains(run: Run, speedups: Sequence[float]) -> list[dict[str, Any]]:
    """The best sum against the child around it."""
    unseen, rows = validation_kl(run), []
    names = ("speed-up", "KL of the best sum", "around it", "", "validation", "around it", "")
    common.print_header(*names, "steps", "seconds")
    for speedup in speedups:
        began = time.perf_counter()
        objective, first, found = the_two(run, speedup)
        seconds = time.perf_counter() - began
        before, after = (unseen.kl(Architecture.from_names(b)) for b in (first, found.blocks))
        row = {
            "speedup": speedup,
            "sum": objective,
            "kl_before": found.first_kl,
            "kl_after": found.kl,
            "validation_before": before,
            "validation_after": after,
            "steps": found.steps,
            "seconds": seconds,
        }
        rows.append(row)
        common.print_row(
            f"{speedup}x",
            f"{found.first_kl:.3f}",
            f"{found.kl:.3f}",
            f"{found.kl / found.first_kl - 1:+.1%}",
            f"{before:.3f}",
            f"{after:.3f}",
            f"{after / before - 1:+.1%}",
            found.steps,
            f"{seconds:.0f}",
        )
    return rows


def trained(
    run: Run, speedups: Sequence[float], seeds: Sequence[int], tokens: int, sequences: int
) -> list[dict[str, Any]]:
    """What the children of `gains` keep after uptraining, and the difference of the two."""
    size = contest.Size((), (), tokens, len(seeds), 0, baselines.Evolution(), sequences)
    shop, rows = Workshop(run, size, run.folder), []
    names = ("speed-up", "child", "predicted", "parameters", "seeds", "KL", "top-1 kept")
    common.print_header(*names, "minutes")
    for speedup in speedups:
        _, first, found = the_two(run, speedup)
        children = {
            "the best sum": Architecture.from_names(first),
            "around it": Architecture.from_names(found.blocks),
        }
        rows_of: dict[str, list[Row]] = {}
        for name, architecture in children.items():
            made = shop.made(name, speedup, architecture, "", "library")
            of_seeds = [standings.measure_row(shop, made, tokens, n, "validation") for n in seeds]
            parents_right = np.array(of_seeds[0].parent.metrics["top1"])
            rows_of[name] = of_seeds
            kept = standings.kept(parents_right, standings.right_of(of_seeds))
            predicted = shop.predicted(architecture)
            kls = [row.model.mean("kl").value for row in of_seeds]
            rows.append(
                {
                    "speedup": speedup,
                    "child": name,
                    "predicted": predicted,
                    "parameters": made.parameters,
                    "kl": kls,
                    "kept": kept.as_json(),
                }
            )
            common.print_row(
                f"{speedup}x",
                name,
                f"{predicted:.3f}x",
                f"{made.parameters / 1e6:.2f}M",
                len(seeds),
                " ".join(f"{kl:.4f}" for kl in kls),
                kept.with_unit(".2%", ""),
                f"{sum(row.minutes for row in of_seeds):.1f}",
            )
        ours, theirs = rows_of["around it"], rows_of["the best sum"]
        lead = _lead(parents_right, ours, theirs)
        pairs = zip(ours, theirs, strict=True)
        by_seed = [_lead(parents_right, [one], [other]).value for one, other in pairs]
        rows.append({"speedup": speedup, "lead": lead.as_json(), "by_seed": by_seed})
        shown = ", ".join(f"{100 * value:+.2f}" for value in by_seed)
        print(
            f"{speedup}x: {100 * lead.value:+.2f} points of top-1 kept "
            f"({100 * lead.low:+.2f} to {100 * lead.high:+.2f}, 95 %, paired by documents); "
            f"by seed {shown}",
            flush=True,
        )
    return rows


def _lead(parents_right: Vector, ours: Sequence[Row], theirs: Sequence[Row]) -> Interval:
    """How much more of the parent's top-1 accuracy one child keeps, on the mean of its seeds."""
    return standings.lead(parents_right, standings.right_of(ours), standings.right_of(theirs))


def blind(run: Run, speedups: Sequence[float], seconds: float) -> list[dict[str, Any]]:
    """A random local search from the best sum, and from the child that we find."""
    rows, whole = [], AssembledKL(run, baselines.text_shards(run))
    common.print_header("speed-up", "from", "KL there", "found", "", "tried on a part", "on all")
    for speedup in speedups:
        _, first, found = the_two(run, speedup)
        for name, start in (("the best sum", first), ("around it", found.blocks)):
            kl, *tried = _Blind(run, whole, speedup).climb(start, time.monotonic() + seconds)
            before = found.first_kl if start is first else found.kl
            rows.append({"speedup": speedup, "from": name, "kl_before": before, "kl": kl})
            change = f"{kl / before - 1:+.1%}"
            common.print_row(f"{speedup}x", name, f"{before:.4f}", f"{kl:.4f}", change, *tried)
    return rows


class _Blind:
    """Random exchanges of blocks that keep a speed-up by the cost table."""

    def __init__(self, run: Run, whole: AssembledKL, speedup: float) -> None:
        self.speedup, self.rng = speedup, random.Random(0)
        self.whole, self.part = whole, whole.on_first(1)
        self.costs = table.read(run.place_job())
        self.parent_s = self.costs.predict(Architecture.of_parent(run.parent.shape)).total_s
        self.layers = [[block.name for block in layer.blocks] for layer in run.space.layers]

    def climb(self, start: Sequence[str], until: float) -> tuple[float, int, int]:
        """(the least KL that was found, children tried on a part of the text, on all of it)."""
        now, seen, tried = list(start), {tuple(start)}, 0
        kl, kl_of_part = self._kl(self.whole, now), self._kl(self.part, now)
        while time.monotonic() < until:
            other = self._exchanged(now)
            if tuple(other) in seen or self._speedup(other) < self.speedup:
                continue
            seen.add(tuple(other))
            of_part = self._kl(self.part, other)
            if of_part > 1.01 * kl_of_part:  # no better on all of it, most likely
                continue
            tried, of_all = tried + 1, self._kl(self.whole, other)
            if of_all < kl:
                now, kl, kl_of_part = other, of_all, of_part
        return kl, len(seen) - 1, tried

    def _exchanged(self, blocks: list[str]) -> list[str]:
        """With others in one to four layers; mostly only one half of a block changes."""
        other = list(blocks)
        changes = min(self.rng.choice((1, 2, 2, 2, 3, 3, 4)), len(blocks))
        for layer in self.rng.sample(range(len(blocks)), changes):
            own = blocks[layer].split("+")
            choices = [name for name in self.layers[layer] if name != blocks[layer]]
            near = [name for name in choices if any(map(str.__eq__, name.split("+"), own))]
            other[layer] = self.rng.choice(near if near and self.rng.random() < 0.6 else choices)
        return other

    def _speedup(self, blocks: list[str]) -> float:
        return self.parent_s / self.costs.predict(Architecture.from_names(blocks)).total_s

    @staticmethod
    def _kl(measured: AssembledKL, blocks: Sequence[str]) -> float:
        return measured.kl(Architecture.from_names(blocks))


def prediction(run: Run, speedups: Sequence[float]) -> dict[str, Any]:
    """Relative errors of the sum and of the curve, below 2x and from 2x on."""
    validate.assemble_some(run)
    kl, rng = AssembledKL(run, baselines.text_shards(run)), np.random.default_rng(0)
    rows: list[dict[str, float]] = []
    for speedup in speedups:
        job = job_of(run, "prediction", throughput=f"{speedup}x", margin=0.0)
        choices = stage.read_choices(job)
        for astray in (0.0, 0.3, 0.6):
            factors = rng.lognormal(0, astray, len(choices.losses)) if astray else 1.0
            led = replace(choices, losses=choices.losses * factors)
            try:
                _, best = stage.search(job, led)
            except Infeasible:
                continue
            columns = choices.columns(best.solutions[0].blocks)
            total = float(choices.losses[columns].sum())
            assert choices.curve is not None
            rows.append(
                {
                    "speedup": float(speedup),
                    "astray": astray,
                    "sum": total,
                    "curve": choices.curve.kl(total),
                    "kl": kl.kl(best.solutions[0].architecture),
                }
            )
    common.print_header("children", "number", "median error of the sum", "of the curve", "worst")
    figures: dict[str, Any] = {"rows": rows}
    for name, low, high in (("below 2x", 0.0, 2.0), ("2x and beyond", 2.0, np.inf)):
        part = [row for row in rows if low <= row["speedup"] < high]
        if not part:
            continue
        errors = {
            how: np.array([abs(row[how] / row["kl"] - 1) for row in part])
            for how in ("sum", "curve")
        }
        medians = {how: float(np.median(values)) for how, values in errors.items()}
        figures[name] = medians
        worst = float(errors["curve"].max())
        cells = (f"{medians['sum']:.1%}", f"{medians['curve']:.1%}", f"{worst:.1%}")
        common.print_row(name, len(part), *cells)
    return figures


def drop_choices(run: Run, choices: Choices) -> Choices:
    """Every layer's own block, or nothing at all; the first layer stays."""
    layers: list[list[Block]] = []
    losses: list[float] = []
    for index, layer in enumerate(choices.layers):
        kept = [block for block in layer if block == layer[0] or block.is_no_op]
        kept = kept[:1] if index == 0 else kept
        layers.append(kept)
        first = int(choices.starts[index])
        losses += [float(choices.losses[first + layer.index(block)]) for block in kept]
    return Choices(layers, np.array(losses))


def drops(run: Run, counts: Sequence[int]) -> list[dict[str, Any]]:
    """How far each way of choosing layers is from the best of all choices."""
    shape, rows = run.parent.shape, []
    parent = Architecture.of_parent(shape)
    seen, kl = baselines.activations(run), AssembledKL(run, baselines.text_shards(run))
    common.print_header("removed", "way", "KL", "above the best")
    for count in counts:
        job = job_of(run, f"drops-{count}", parameters="100%")
        choices = drop_choices(run, stage.read_choices(job))
        layer = shape.parameters(parent.blocks[0])
        least = Limit(
            KINDS["parameters"],
            table.read(job),
            float(parent.parameters(shape) - count * layer),
        )
        by_score = np.argsort(choices.losses[[int(s) + 1 for s in choices.starts[1:-1]]])
        additive = [int(index) + 1 for index in by_score[:count]]
        removed = {
            "sum of scores": baselines.without(parent, additive),
            "greedy by KL": _greedy(kl, parent, count),
            "block influence": _influence(seen, parent, count),
        }
        start = removed["sum of scores"].names
        found = around.refine(job, choices, [least], [start], [])
        removed["around the sum"] = Architecture.from_names(found.blocks)
        kls = {way: kl.kl(architecture) for way, architecture in removed.items()}
        combinations = itertools.combinations(range(1, len(parent)), count)
        best = min(kl.kl(baselines.without(parent, layers)) for layers in combinations)
        for way, value in kls.items():
            rows.append({"removed": count, "way": way, "kl": value, "best": best})
            common.print_row(count, way, f"{value:.4f}", f"{value / best - 1:+.1%}")
    return rows


def _greedy(kl: AssembledKL, parent: Architecture, count: int) -> Architecture:
    """Greedy removal without the first layer."""
    removed: list[int] = []
    for _ in range(count):
        left = [layer for layer in range(1, len(parent)) if layer not in removed]
        costs = {layer: kl.kl(baselines.without(parent, [*removed, layer])) for layer in left}
        removed.append(min(left, key=costs.__getitem__))
    return baselines.without(parent, removed)


def _influence(seen: baselines.Activations, parent: Architecture, count: int) -> Architecture:
    """Block influence without the first layer."""
    for removed in range(count, len(parent)):
        found = baselines.block_influence(seen, parent, removed)
        gone = [layer for layer, block in enumerate(found) if block.is_no_op and layer > 0]
        if len(gone) == count:
            return baselines.without(parent, gone)
    raise AssertionError("block influence removes one layer more each time")


def main() -> None:
    """The command line."""
    options = common.parser(__doc__, "a tiny parent, one of everything")
    options.add_argument("--run", type=Path, default=Path("runs/interactions"))
    options.add_argument("--parts", nargs="+", choices=PARTS)
    options.add_argument("--tokens", type=int, default=500_000, help="of uptraining in `trained`")
    options.add_argument("--seconds", type=float, default=200, help="of each search in `blind`")
    args = common.start(options)
    parts = args.parts or (PARTS if args.quick else PARTS[:-1])
    speedups, counts = ((1.02,), (1,)) if args.quick else (SPEEDUPS, DROPPED)
    predicted = (1.01, 1.02) if args.quick else PREDICTED
    with tempfile.TemporaryDirectory() as temporary:
        run = open_run(Path(temporary) / "run" if args.quick else args.run, args)
        figures: dict[str, Any] = {}
        if "prediction" in parts:
            figures["prediction"] = prediction(run, predicted)
        if "gains" in parts:
            figures["gains"] = gains(run, speedups)
        if "drops" in parts:
            figures["drops"] = drops(run, counts)
        if "trained" in parts:
            some = ((1.02,), (1, 2), 2048, 4) if args.quick else (TRAINED, SEEDS, args.tokens, 128)
            figures["trained"] = trained(run, *some)
        if "blind" in parts:
            some = ((1.02,), 2.0) if args.quick else (BLIND, args.seconds)
            figures["blind"] = blind(run, *some)
    common.print_json(args, figures)


if __name__ == "__main__":
    main()
