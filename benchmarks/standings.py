"""The rows of the head-to-head: quality of every child, the table, the picture, the sentences.

Not a benchmark itself.
"""

import math
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from contest import (
    ADDITIVE,
    DEFAULT,
    DISCRETE,
    NO_BLD,
    Budget,
    Candidate,
    Row,
    Workshop,
    candidates_of,
    code_of,
    made_by,
    prepare,
)
from numpy.typing import NDArray

from puzzle import artifacts
from puzzle.config import ChildConfig, UptrainConfig
from puzzle.engines import machine
from puzzle.engines.intervals import Interval
from puzzle.evaluate.bootstrap import UnitSums, bootstrap
from puzzle.evaluate.quality import Text, unit_sums
from puzzle.library import memory as library_memory
from puzzle.model import child
from puzzle.model.architecture import Architecture
from puzzle.model.modeling_puzzle import PuzzleForCausalLM
from puzzle.report import charts
from puzzle.report.charts import Axis, Mark, Series
from puzzle.run import Run
from puzzle.search import finalists
from puzzle.uptrain import memory
from puzzle.uptrain.gkd import Pair
from puzzle.uptrain.phases import phases
from puzzle.uptrain.trainer import Trainer

Vector = NDArray[np.float64]
COLOURS, DASHES = ("attention", "ffn", "good", "extra", "parent"), ("", "6 3", "2 3")

# ------------------------------------------------------------------------------------------ quality


def library_flops(run: Run) -> float:
    """BLD: the parent's layers once, and 6 FLOPs a parameter of a variant, for every token."""
    shape = run.parent.shape
    parent = Architecture.of_parent(shape).parameters(shape) - shape.constant_parameters
    trained = sum(
        shape.parameters(variant) * library_memory.budget(run, variant)
        for _, variant in library_memory.trained_variants(run)
    )
    return float(2 * parent * library_memory.longest_budget(run) + 6 * trained)


def token_flops(run: Run, parameters: int, narrower: float = 1.0) -> float:
    """Distillation: 6 FLOPs a parameter of the child and 2 of the parent, for every token.

    And the optimiser's of a step, for which a batch of tokens is taken. `narrower`: the child's
    hidden width as a share of the parent's; Muon's products of a matrix go with its short side.
    """
    shape, recipe = run.parent.shape, run.recipe
    batch = recipe.uptrain.batch_sequences * recipe.corpus.sequence_length
    per_step = memory.step_flops(run.job_of("head-to-head", ChildConfig(uptrain=recipe.uptrain)))
    stepped = narrower * per_step / batch * (parameters - narrower * shape.constant_parameters)
    parent = Architecture.of_parent(shape).parameters(shape)
    return 6.0 * parameters + 2.0 * parent + stepped


def budget_at(shop: Workshop, wish: float) -> float:
    """FLOPs that every method may spend at a wish, on a library and on distillation."""
    path = shop.folder / "budgets.jsonl"
    for known in artifacts.read_records(path, Budget):
        if (known.wish, known.tokens) == (wish, shop.size.tokens):
            return known.flops
    run, (first, *_) = shop.run, candidates_of(shop, DEFAULT, wish)
    flops = library_flops(run) + shop.size.tokens * token_flops(run, first.parameters)
    artifacts.append_record(path, Budget(wish=wish, tokens=shop.size.tokens, flops=flops))
    return flops


def tokens_for(shop: Workshop, candidate: Candidate) -> int:
    """Tokens of distillation by which a candidate costs as much as Puzzle's child for its wish."""
    run, budget = shop.run, budget_at(shop, candidate.wish)
    if candidate.weights == "library":
        budget -= library_flops(run)
    part = finalists.SHARE * shop.size.tokens
    budget -= sum(part * token_flops(run, parameters) for parameters in candidate.finalists)
    step = run.recipe.uptrain.batch_sequences * run.recipe.corpus.sequence_length
    narrow, width = candidate.narrow, run.parent.shape.hidden_size
    narrower = 1.0 if narrow is None else narrow.hidden / width
    return round(budget / token_flops(run, candidate.parameters, narrower) / step) * step


def quality_of(shop: Workshop, model: PuzzleForCausalLM, split: str) -> tuple[UnitSums, UnitSums]:
    """(of the model, of the parent) on one side of the corpus."""
    run, size = shop.run, shop.run.recipe.evaluate.batch_sequences
    text = Text.of(run, split, shop.size.sequences)  # type: ignore[arg-type]
    known = shop.__dict__.setdefault(f"parent-{split}", [])
    if not known:
        known.append(unit_sums(run, run.parent_model, text, size))
    return unit_sums(run, model, text, size), known[0]


def measure_row(shop: Workshop, candidate: Candidate, tokens: int, seed: int, split: str) -> Row:
    """Distil, unless that is done, and evaluate."""
    run, began = shop.run, time.perf_counter()
    code = code_of(candidate.weights)
    folder = run.folder / "trained" / f"{candidate.key}-{code}-{tokens}-{seed}"
    made, _, state = shop.state(candidate)
    device, attention = run.device.torch_device, run.placement.attention
    model = child.build(made, state, torch.float32, device, attention)
    if tokens:
        changes: dict[str, object] = {
            "tokens": tokens,
            "seed": seed,
            "keep": "last",
            "validate_steps": 10**9,
            "cosine_weight": 0.0 if candidate.narrow else run.recipe.uptrain.cosine_weight,
        }
        uptrain = UptrainConfig.model_validate(run.recipe.uptrain.model_dump() | changes)
        job = run.job_of("head-to-head", ChildConfig(uptrain=uptrain))
        step = uptrain.batch_sequences * run.recipe.corpus.sequence_length
        assert phases(job)[-1].last == -(-tokens // step), "the row says other tokens"
        (folder / artifacts.UNFINISHED).mkdir(parents=True, exist_ok=True)
        weights = folder / "child.pt"
        if weights.exists():
            model.load_state_dict(torch.load(weights, weights_only=True))
        else:
            choice = memory.choose(job)
            pair = Pair(model, run.parent_model, uptrain, choice.activation_checkpointing)
            Trainer(job, folder, pair, choice).train()
            torch.save(model.state_dict(), weights)
            shutil.rmtree(folder / artifacts.UNFINISHED)
        model.eval()
    found, parent = quality_of(shop, model, split)
    return Row(
        key=candidate.key,
        tokens=tokens,
        seed=seed,
        split=split,
        model=found,
        parent=parent,
        minutes=(time.perf_counter() - began) / 60,
        code=code,
        machine=machine()[0],
    )


def is_too_slow(method: str, found: Sequence[Candidate], wish: float) -> bool:
    """Whether not even the fastest child of a method with a discrete knob gets there."""
    return method in DISCRETE and max(one.speedup.value for one in found) < wish


def plan(shop: Workshop, methods: Sequence[str]) -> list[tuple[Candidate, int, int]]:
    """(candidate, tokens, seed) of every row that a table shows, cheap ones first."""
    rows = [
        (one, 0, 1)
        for method in methods
        for wish in shop.size.wishes
        for one in candidates_of(shop, method, wish)
    ]
    for seed in range(1, shop.size.seeds + 1):
        for wish in shop.size.trained:
            for method in methods:
                candidates = candidates_of(shop, method, wish)
                if candidates and not is_too_slow(method, candidates, wish):
                    rows += [(one, tokens_for(shop, one), seed) for one in candidates]
    return rows


def quality_part(shop: Workshop, methods: Sequence[str], split: str) -> None:
    """Measure the rows that are missing, one after the other."""
    path = shop.folder / "quality.jsonl"
    rows = plan(shop, methods)
    for number, (one, tokens, seed) in enumerate(rows, start=1):
        known = artifacts.read_records(path, Row)
        key = (one.key, tokens, seed, split, code_of(one.weights))
        if key in {(r.key, r.tokens, r.seed, r.split, r.code) for r in known}:
            continue
        prepare(shop.run)
        row = measure_row(shop, one, tokens, seed, split)
        artifacts.append_record(path, row)
        kept = row.model.retention(row.parent)
        print(
            f"row {number} of {len(rows)}: {one.method}, {one.wish}x, {one.label or one.weights}, "
            f"{tokens:,} tokens, seed {seed}: KL {row.model.mean('kl').value:.4f}, "
            f"top-1 {kept.value if kept else 0:.2%}, {row.minutes:.1f} min",
            flush=True,
        )


# ------------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Point:
    """A method's figures at a wish, interpolated where its knob is discrete."""

    method: str
    wish: float
    split: str  # of the text that quality is of
    tokens: int
    speeds: list[float]  # of the children it is made from
    top1: Interval  # retention
    kl: float
    lm_loss: float
    labels: list[str]
    parameters: list[int]
    kv_bytes_per_token: list[int]
    seeds: int
    minutes: float
    stale: bool  # made by other code than that of now
    machines: list[str]  # that rows were measured on
    paired_by: str  # documents; sequences where the text has too few of them
    right: Vector  # tokens of every document, or sequence, [D] that it predicts
    parents_right: Vector  # [D], the same of the parent

    def as_json(self) -> dict[str, Any]:
        """For the results' file."""
        told = {key: value for key, value in vars(self).items() if not key.endswith("right")}
        return told | {"top1": self.top1.as_json()}

    def lead_over(self, other: "Point") -> Interval:
        """How much more of the parent's top-1 accuracy it keeps, paired by documents."""
        return lead(self.parents_right, self.right, other.right)


def right_of(rows: Sequence[Row]) -> Vector:
    """Tokens of every document [D] that are predicted, the mean of the rows' seeds."""
    return np.asarray(np.mean([row.model.metrics["top1"] for row in rows], axis=0))


def kept(parents_right: Vector, right: Vector) -> Interval:
    """Share of the parent's top-1 accuracy."""
    return bootstrap((parents_right, right), lambda s: s[1] / np.maximum(s[0], 1e-12))


def lead(parents_right: Vector, right: Vector, others_right: Vector) -> Interval:
    """How much more of the parent's top-1 accuracy is kept than by another, paired by documents."""
    columns = (parents_right, right, others_right)
    return bootstrap(columns, lambda sums: (sums[1] - sums[2]) / np.maximum(sums[0], 1e-12))


def rows_for(
    shop: Workshop, rows: Sequence[Row], candidate: Candidate, tokens: int, split: str
) -> list[Row]:
    """The rows of a candidate by seed, the newest of each."""
    mine = [r for r in rows if (r.key, r.tokens, r.split) == (candidate.key, tokens, split)]
    return list({row.seed: row for row in mine}.values())


def point(
    shop: Workshop, method: str, wish: float, trained: bool, split: str
) -> Point | str | None:
    """A method at a wish; "at most" where it does not get there; None where rows are missing."""
    rows = artifacts.read_records(shop.folder / "quality.jsonl", Row)
    found = candidates_of(shop, method, wish)
    if not found:
        return None
    speeds = [one.speedup.value for one in found]
    if is_too_slow(method, found, wish):
        return f"at most {max(speeds):.2f}x"
    of_each = []
    for one in found:
        tokens = tokens_for(shop, one) if trained else 0
        of_each.append(rows_for(shop, rows, one, tokens, split))
    if not all(of_each):
        return None
    low, high = (0.0 if len(found) == 1 else math.log(speeds[0])), math.log(speeds[-1])
    share = (math.log(wish) - low) / (high - low) if high > low else 1.0
    weights = [share] if len(found) == 1 else [1 - share, share]
    first = [each[0] for each in of_each]
    seeds = min(len(each) for each in of_each)

    def mean(metric: str, of_nothing: float) -> float:
        value = sum(
            weight * sum(row.model.mean(metric).value for row in each) / len(each)
            for weight, each in zip(weights, of_each, strict=True)
        )
        return value + (1 - sum(weights)) * of_nothing  # the parent is on the slower side

    parent = first[0].parent
    parents_right = np.array(parent.metrics["top1"])
    right = (1 - sum(weights)) * parents_right
    for weight, each in zip(weights, of_each, strict=True):
        right += weight * right_of(each)
    return Point(
        method=method,
        wish=wish,
        split=split,
        tokens=round(sum(w * r.tokens for w, r in zip(weights, first, strict=True)) / sum(weights)),
        speeds=speeds,
        top1=kept(parents_right, right),
        kl=mean("kl", 0.0),
        lm_loss=mean("lm_loss", parent.mean("lm_loss").value),
        labels=[one.label for one in found],
        parameters=[one.parameters for one in found],
        kv_bytes_per_token=[one.kv_bytes_per_token for one in found],
        seeds=seeds,
        minutes=sum(row.minutes for row in first),
        stale=any(
            (row.code, one.code) != (code_of(one.weights), made_by(method))
            for row, one in zip(first, found, strict=True)
        ),
        machines=sorted({row.machine for each in of_each for row in each}),
        paired_by="sequences" if len(parents_right) == shop.size.sequences else "documents",
        right=right,
        parents_right=parents_right,
    )


def table_part(shop: Workshop, methods: Sequence[str], split: str) -> list[Point]:
    """Print every wish's table; the points that are there."""
    points = []
    for wish in shop.size.wishes:
        for trained in (False, True) if wish in shop.size.trained else (False,):
            when = "after distillation at equal FLOPs" if trained else "before distillation"
            print(f"\n{wish}x, {when}, on {split} text")
            names = ("method", "children at", "top-1 kept", "95 % interval", "KL", "LM loss")
            common.print_header(*names, "parameters", "KV B/token", "tokens", "seeds", "min")
            found = [(method, point(shop, method, wish, trained, split)) for method in methods]
            ranked = sorted(
                found, key=lambda pair: -pair[1].top1.value if isinstance(pair[1], Point) else 1
            )
            for method, one in ranked:
                if not isinstance(one, Point):
                    common.print_row(method, one or "not run", *[""] * 9)
                    continue
                points.append(one)
                common.print_row(
                    method + (" (other code)" if one.stale else ""),
                    " and ".join(f"{speed:.2f}x" for speed in one.speeds),
                    f"{one.top1.value:.1%}",
                    f"{one.top1.low:.1%} to {one.top1.high:.1%}",
                    f"{one.kl:.3f}",
                    f"{one.lm_loss:.3f}",
                    " and ".join(f"{p / 1e6:.1f}M" for p in one.parameters),
                    " and ".join(map(str, one.kv_bytes_per_token)),
                    f"{one.tokens:,}",
                    one.seeds,
                    f"{one.minutes:.0f}",
                )
    machines = sorted({machine for one in points for machine in one.machines})
    print(f"\nrows of {'; '.join(machines)}")
    return points


# ------------------------------------------------------------------------------------------ readme

SECTION = re.compile(r"(<!-- head-to-head:begin -->\n).*?(<!-- head-to-head:end -->)", re.DOTALL)


def update_readme(points: Sequence[Point], root: Path) -> str:
    """Write sentences and picture into the repository at `root`; returns the sentences.

    There is a picture once methods have lines in it: points at several wishes.
    """
    lines = sentences(points)
    if len({point.wish for point in points}) > 1:
        artifacts.write_text(root / "docs" / "images" / "head_to_head.svg", picture(points))
        lines += ["", "![who keeps more at the same speed](docs/images/head_to_head.svg)"]
    section = "\n".join(lines)
    readme = (root / "README.md").read_text(encoding="utf-8")
    readme = SECTION.sub(lambda markers: f"{markers[1]}{section}\n{markers[2]}", readme)
    artifacts.write_text(root / "README.md", readme)
    return section


def sentences(points: Sequence[Point]) -> list[str]:
    """Where Puzzle wins, by how much, and where it does not: a table, and a sentence for a wish."""
    rows, verdicts, shown, shapes = [], [], [], []
    for wish in sorted({point.wish for point in points if point.tokens}):
        at = {p.method: p for p in points if p.wish == wish and p.tokens}
        ours = at.get(DEFAULT)
        others = [p for p in at.values() if not p.method.startswith(DEFAULT)]
        if ours is None or not others:
            continue
        best = max(others, key=lambda p: p.top1.value)
        published = at.get(ADDITIVE)
        cells = (
            f"{wish:g}x",
            _share(ours),
            f"{_share(best)}: {_called(best.method)}",
            f"{_share(published)}" if published else "not run",
            f"{len(others)}",
        )
        rows.append(f"| {' | '.join(cells)} |")
        verdicts.append(_verdict(ours, best))
        if (shape := at.get(NO_BLD)) is not None:
            shapes.append(f"{shape.top1.value:.1%} at {wish:g}x")
        shown += at.values()
    if not rows:
        return []
    head = (
        "parent's measured throughput",
        "Puzzle keeps",
        "best other method",
        "best sum of scores, as published",
        "others",
    )
    table = [f"| {' | '.join(head)} |", f"| {' | '.join(['---', *['---:'] * 4])} |", *rows]
    if shapes:
        verdicts.append(
            "The shape that Puzzle finds, cut from the parent without BLD and distilled for longer "
            f"with what its library has cost, keeps {', '.join(shapes)}."
        )
    return [*table, "", " ".join(verdicts), _conditions(shown)]


def _verdict(ours: Point, best: Point) -> str:
    """Who keeps more at a wish, with the interval of the difference."""
    lead = ours.lead_over(best)
    points = f"{100 * lead.value:+.1f} points, {100 * lead.low:+.1f} to {100 * lead.high:+.1f}"
    if lead.low > 0:
        told = f"Puzzle keeps more than all others ({points} to {_called(best.method)})"
    elif lead.high < 0:
        told = f"Puzzle keeps less than {_called(best.method)} ({points})"
    else:
        told = f"Puzzle and {_called(best.method)} cannot be told apart ({points})"
    return f"At {ours.wish:g}x {told}."


def _called(method: str) -> str:
    """`depth, EvoPress` inside a sentence."""
    kind, comma, name = method.partition(", ")
    return f"{name} ({kind})" if comma and kind == "depth" else method


def _conditions(trained: Sequence[Point]) -> str:
    """On which text, with how many seeds and tokens."""
    seeds = sorted({point.seeds for point in trained})
    tokens = sorted(f"{point.tokens / 1e6:.1f}M" for point in trained)
    machines = sorted({machine for point in trained for machine in point.machines})
    number = f"{seeds[0]} seed" if seeds == [1] else f"{_range(seeds)} seeds"
    return (
        f"(Top-1 accuracy kept on {trained[0].split} text, with 95 % intervals of the text and not "
        f"of the speeds; differences are paired by {trained[0].paired_by}; {number}; "
        f"{_range(tokens)} tokens of "
        f"distillation (on {'; '.join(machines)}): as many FLOPs for all at a speed-up, the "
        "training of Puzzle's library included. A method that cannot reach a speed-up is left out. "
        "How the best sum does at equal predicted speed: benchmarks/results/interactions.txt.)"
    )


def _range(values: Sequence[object]) -> str:
    """Of what is sorted: `2`, or `1 to 3`."""
    return " to ".join(map(str, dict.fromkeys((values[0], values[-1]))))


def _share(one: Point) -> str:
    return f"{one.top1.value:.1%} ({one.top1.low:.1%} to {one.top1.high:.1%})"


def picture(points: Sequence[Point]) -> str:
    """Retention against speed-up, a line per method: before and after distillation."""
    methods = list(dict.fromkeys(point.method for point in points))
    titles = ("as it is made", "after distillation, at equal training FLOPs")
    shown = []
    for trained, title in zip((False, True), titles, strict=True):
        series = []
        for number, method in enumerate(methods):
            mine = sorted(
                (p for p in points if p.method == method and bool(p.tokens) == trained),
                key=lambda p: p.wish,
            )
            marks = [
                Mark(p.wish, p.top1.value, f"{method}, {p.wish:.2f}x: {p.top1.value:.1%}")
                for p in mine
            ]
            colour = "child" if method == DEFAULT else COLOURS[number % len(COLOURS)]
            dash = "" if method == DEFAULT else DASHES[number // len(COLOURS) % len(DASHES)]
            if marks:
                series.append(Series(method, marks, colour, "both", dash))
        if not series:
            continue
        marks = [mark for one in series for mark in one.marks]
        x = Axis.of("measured speed-up", [mark.x for mark in marks])
        y = Axis.of("top-1 accuracy kept", [mark.y for mark in marks])
        y = Axis(y.label, y.low, y.high, percent=True)
        shown.append((title, charts.plot(title, x, y, series, size=(640.0, 380.0))))
    return charts.standalone(charts.stack(shown))
