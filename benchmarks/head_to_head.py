"""Who keeps more of the parent at the same measured speed? The embedded parent on vLLM.

    python benchmarks/head_to_head.py [--run runs/head-to-head] [--parts speed quality table]
                                      [--only METHOD ...] [--tokens N] [--seeds N] [--final]
                                      [--quick] [--json]

speed     What every method makes of the parent for each wish (benchmarks/baselines.py), served
          beside the parent in turn: half an hour that needs a quiet machine.
quality   KL, LM loss and top-1 of every child on validation text, as it is made and after
          distillation: hours. One loss (cosine and KL; the KL alone where the hidden width differs
          from the parent's), one order of the data, one learning rate, and the same total training
          FLOPs: Puzzle's children have paid for their library, what needs none trains for longer.

Most methods have a discrete knob: the children on both sides of a wish are served and trained, and
the figure at the wish is interpolated in the logarithm of the speed-up. What a method cannot reach
is printed as "at most". Finished rows are kept in benchmarks/results/head_to_head/ and not run
again; a row that other code has made is marked, and run again. `--parts table` only prints.
`--final` reads test text, once, at the end.

Unstructured and 2:4 sparsity have no speed-up on this engine, so they have no row.
"""

import argparse
import hashlib
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import baselines
import common
import numpy as np
import torch

import puzzle
from puzzle import artifacts, config, pipeline, settings
from puzzle.artifacts import Record
from puzzle.assemble.stage import ChildState
from puzzle.config import ChildConfig, SearchConfig, UptrainConfig
from puzzle.cost import COST, table
from puzzle.cost.scenarios import served_scenarios
from puzzle.engines.intervals import Interval
from puzzle.engines.turns import Served, measure_pair
from puzzle.errors import Infeasible
from puzzle.evaluate.bootstrap import UnitSums, bootstrap
from puzzle.evaluate.quality import Text, unit_sums
from puzzle.library import LIBRARY
from puzzle.model import child
from puzzle.model.architecture import Architecture
from puzzle.model.modeling_puzzle import PuzzleConfig, PuzzleForCausalLM
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.score import SCORE
from puzzle.search import answers, stage
from puzzle.search.frontier import baseline_choices
from puzzle.search.validate import AssembledKL
from puzzle.stage import Job
from puzzle.uptrain.gkd import Pair
from puzzle.uptrain.trainer import Trainer

PARTS = ("speed", "quality", "table")
RESULTS = Path(__file__).parent / "results" / "head_to_head"
WISHES, TRAINED = (1.25, 1.5, 2.17, 3.0), (1.5, 2.17)
CODE = (  # decides a row
    "training/losses.py",
    "training/schedules.py",
    "uptrain/gkd.py",
    "uptrain/trainer.py",
    "uptrain/phases.py",
    "model/modeling_puzzle.py",
    "data/packing.py",
    "data/sources.py",
    "data/sequences.py",
)
LIBRARY_CODE = (  # decides which child, and its first weights
    "library/bld.py",
    "library/training.py",
    "library/initialization.py",
    "score/exact.py",
    "search/space_program.py",
    "search/stage.py",
)
TOO_MUCH = 1.05  # a child that was aimed at a wish is searched again where it is faster than this
Weights = str  # library, parent, cut or random: where a child's weights come from


class Candidate(Record):
    """One line of `candidates.jsonl`: a child as a method makes it, and its measured speed-up."""

    method: str
    label: str
    wish: float
    blocks: list[str]
    weights: Weights
    narrow: baselines.Narrow | None = None
    speedup: Interval
    parameters: int
    kv_bytes_per_token: int
    code: str

    @property
    def key(self) -> str:
        """Of the model: two methods may make the same one."""
        narrow = None if self.narrow is None else vars(self.narrow)
        return artifacts.fingerprint([self.blocks, self.weights, narrow])


class Row(Record):
    """One line of `quality.jsonl`: a model on one side of the corpus."""

    key: str  # of the candidate
    tokens: int  # of distillation; 0: as it is made
    seed: int
    split: str
    model: UnitSums
    parent: UnitSums
    minutes: float
    code: str


@dataclass(frozen=True)
class Size:
    """How much is done."""

    wishes: tuple[float, ...]
    trained: tuple[float, ...]
    tokens: int  # of distillation of a Puzzle child
    seeds: int
    starts: int
    evolution: baselines.Evolution
    sequences: int


def code_of(weights: Weights) -> str:
    """Digest of the modules that decide a row, and of the baselines."""
    root = Path(puzzle.__file__).parent
    names = [*CODE, *(LIBRARY_CODE if weights == "library" else ())]
    digest = hashlib.sha256()
    for path in [*(root / name for name in names), Path(baselines.__file__)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


# ------------------------------------------------------------------------------------- preparation


def open_run(folder: Path, args: argparse.Namespace) -> Run:
    """The run, of which nothing is made yet."""
    if args.quick:
        recipe: common.Settings = common.tiny_recipe(folder.parent)
        recipe["cost"] |= {"starts": 2}
        recipe["search"] = {"throughput": "1.02x"}
    else:
        recipe = settings.read_yaml(settings.recipe_path("pocket"))
    return Run(config.parse(recipe | {"out": str(folder)}), folder, Progress(quiet=args.quick))


def prepare(run: Run) -> None:
    """Library, scores and costs, where they are not there."""
    run.write()
    for each in (LIBRARY, SCORE):
        pipeline.execute_stage(each, Job(run))
    pipeline.execute_stage(COST, run.place_job())


@dataclass
class Workshop:
    """The run, and what is computed once."""

    run: Run
    size: Size
    folder: Path  # where rows are kept

    @cached_property
    def parent(self) -> Architecture:
        """The parent's blocks."""
        return Architecture.of_parent(self.run.parent.shape)

    @cached_property
    def seen(self) -> baselines.Activations:
        """The parent's activations on text for scores."""
        return baselines.activations(self.run)

    @cached_property
    def kl(self) -> AssembledKL:
        """KL of assembled children on text for scores."""
        return AssembledKL(self.run, baselines.text_shards(self.run))

    @cached_property
    def costs(self) -> table.CostTable:
        """Of the main scenario."""
        return table.read(self.run.place_job())

    def predicted(self, architecture: Architecture) -> float:
        """Speed-up by the cost table."""
        parent = self.costs.predict_parent(self.parent).total_s
        return parent / self.costs.predict(architecture).total_s

    def job(self, speedup: float, margin: float = 0.0) -> Job:
        """A question at the place `here`."""
        wish = SearchConfig(throughput=f"{speedup:.4f}x", margin=margin)
        return self.run.job_of("question", ChildConfig(search=wish))

    def state(self, candidate: Candidate) -> tuple[PuzzleConfig, Architecture, baselines.State]:
        """Config, blocks and weights of a candidate, as its method makes it."""
        architecture = Architecture.from_names(candidate.blocks)
        if candidate.narrow is not None:
            return baselines.narrow_model(self.run, self.seen, candidate.narrow)
        config = self.run.parent.child_config(architecture)
        if candidate.weights == "cut":
            return config, architecture, baselines.cut_from_parent(self.run, architecture)
        state = dict(ChildState(self.run, architecture))
        if candidate.weights == "random":
            state = baselines.random_weights(state)
        return config, architecture, state

    # ------------------------------------------------------------------------------------- speeds

    def measure(self, candidate: Candidate) -> Candidate:
        """With its speed-up, as the product measures it."""
        job = self.run.place_job()
        scenario = served_scenarios(job)["main"]
        with tempfile.TemporaryDirectory() as name:
            made, architecture, state = self.state(candidate)
            child.save(Path(name), made, architecture, state, self.run.parent.folder, "")
            sides = (Served(self.run.parent.folder, scenario, 0), Served(Path(name), scenario, 0))
            starts = self.size.starts
            measurement = measure_pair(job.engine, *sides, starts, lambda m: True, lambda: None)
        return candidate.model_copy(update={"speedup": measurement.speedup})

    def candidate(
        self,
        method: str,
        wish: float,
        architecture: Architecture,
        label: str,
        weights: Weights = "parent",
        narrow: baselines.Narrow | None = None,
    ) -> Candidate:
        """A child, measured, unless the same one was measured before."""
        shape = self.run.parent.shape
        parameters = architecture.parameters(shape)
        if narrow is not None:  # every matrix has the hidden size on one side
            parameters = round(parameters * narrow.hidden / shape.hidden_size)
        made = Candidate(
            method=method,
            label=label,
            wish=wish,
            blocks=architecture.names,
            weights=weights,
            narrow=narrow,
            speedup=Interval(value=0.0, low=0.0, high=0.0),
            parameters=parameters,
            kv_bytes_per_token=architecture.kv_elements_per_token(shape)
            * self.run.parent.dtype.itemsize,
            code=code_of(weights),
        )
        known = artifacts.read_records(self.folder / "candidates.jsonl", Candidate)
        same = [one for one in known if (one.blocks, one.narrow) == (made.blocks, narrow)]
        if same:  # speed does not depend on the weights
            return made.model_copy(update={"speedup": same[-1].speedup})
        return self.measure(made)

    def keep(self, candidates: Sequence[Candidate]) -> None:
        """Append to `candidates.jsonl` and print."""
        for one in candidates:
            artifacts.append_record(self.folder / "candidates.jsonl", one)
            speed = one.speedup.with_unit(".2f", "x")
            common.print_row(one.method, f"{one.wish}x", one.label, speed, f"{one.parameters:,}")


Knobs = Callable[[Workshop], list[tuple[Architecture, str, baselines.Narrow | None]]]


def depth_by(choose: Callable[[Workshop, int], Architecture]) -> Knobs:
    """A method that removes any number of layers."""

    def knobs(shop: Workshop) -> list[tuple[Architecture, str, baselines.Narrow | None]]:
        counts = range(1, len(shop.parent))
        return [(choose(shop, n), f"{n} of {len(shop.parent)} layers", None) for n in counts]

    return knobs


def removal(half: str) -> Knobs:
    """Greedy removal by KL."""

    def knobs(shop: Workshop) -> list[tuple[Architecture, str, baselines.Narrow | None]]:
        found = baselines.greedy_removal(shop.kl, shop.parent, half)
        word = "layers" if half == "both" else f"{half}s"
        return [(a, f"{n} of {len(a)} {word}", None) for n, a in enumerate(found) if n]

    return knobs


def narrower(depth: bool) -> Knobs:
    """Minitron's widths."""

    def knobs(shop: Workshop) -> list[tuple[Architecture, str, baselines.Narrow | None]]:
        found = baselines.minitron(shop.run, shop.seen, depth)
        blocks = [baselines.narrow_architecture(shop.parent, narrow) for narrow in found]
        return [(a, narrow.label, narrow) for a, narrow in zip(blocks, found, strict=True)]

    return knobs


DISCRETE: dict[str, Knobs] = {
    "depth, block influence": depth_by(
        lambda shop, n: baselines.block_influence(shop.seen, shop.parent, n)
    ),
    "depth, contiguous": depth_by(lambda shop, n: baselines.contiguous(shop.seen, shop.parent, n)),
    "depth, greedy by KL": removal("both"),
    "depth, EvoPress": depth_by(
        lambda shop, n: baselines.evopress(shop.run, shop.parent, n, shop.size.evolution)
    ),
    "Minitron, width": narrower(depth=False),
    "Minitron, width and depth": narrower(depth=True),
    "attention removal": removal("attention"),
}
SEARCHED = {"Puzzle, greedy": "greedy", "Puzzle, max-parameters": "most parameters"}
SHAPES = {"Puzzle's shape, no BLD": "cut", "Puzzle's shape, random weights": "random"}
DEFAULT = "Puzzle"
METHODS = (DEFAULT, *SEARCHED, *SHAPES, *DISCRETE)


def discrete(shop: Workshop, method: str) -> Iterator[list[Candidate]]:
    """The children on both sides of every wish."""
    lazily = DISCRETE[method]
    known: dict[int, Candidate] = {}
    if method == "depth, EvoPress":  # a search for each number: only those that are needed
        made: dict[int, tuple[Architecture, str, baselines.Narrow | None]] = {}
        guesses = DISCRETE["depth, block influence"](shop)  # as many layers take about as long

        def option(knob: int) -> tuple[Architecture, str, baselines.Narrow | None]:
            if knob not in made:
                blocks = baselines.evopress(shop.run, shop.parent, knob + 1, shop.size.evolution)
                made[knob] = (blocks, guesses[knob][1], None)
            return made[knob]

    else:
        guesses = lazily(shop)
        option = guesses.__getitem__

    def guess(knob: int) -> float:
        architecture, _, narrow = guesses[knob]
        if narrow is None:
            return shop.predicted(architecture)
        shape = shop.run.parent.shape  # no table knows these widths
        parameters = architecture.parameters(shape) * narrow.hidden / shape.hidden_size
        return float((shop.parent.parameters(shape) / parameters) ** 0.7)

    def speed(knob: int) -> float:
        return known[knob].speedup.value if knob in known else guess(knob)

    for wish in shop.size.wishes:
        while True:  # until both sides are measured
            sides = baselines.around(speed, range(len(guesses)), wish)
            missing = [knob for knob in sides if knob is not None and knob not in known]
            if not missing:
                break
            for knob in missing:
                architecture, label, narrow = option(knob)
                weights = "parent" if narrow is None else "narrow"
                known[knob] = shop.candidate(method, wish, architecture, label, weights, narrow)
        yield [known[k].model_copy(update={"wish": wish}) for k in sides if k is not None]


def aimed(
    shop: Workshop, method: str, choose: Callable[[float], Architecture | None]
) -> Iterator[list[Candidate]]:
    """A child just above every wish; where it is missed or far beyond, the aim is corrected."""
    for wish in shop.size.wishes:
        aim, tries = wish, []
        for _ in range(3):
            architecture = choose(aim)
            if architecture is None:
                break
            tries.append(shop.candidate(method, wish, architecture, "", "library"))
            speed = tries[-1].speedup.value
            if wish <= speed <= TOO_MUCH * wish:
                break
            aim *= 1.01 * wish / speed
        met = [one for one in tries if one.speedup.value >= wish]
        yield [min(met or tries, key=lambda one: abs(one.speedup.value - wish))] if tries else []


def chosen_by(shop: Workshop, baseline: str) -> Callable[[float], Architecture | None]:
    """What another way of choosing from the same library takes, with the same costs."""
    choices = stage.read_choices(shop.job(1.0))

    def choose(speedup: float) -> Architecture | None:
        try:
            _, best = stage.search(shop.job(speedup), choices)
        except Infeasible:
            return None
        found = baseline_choices(best.program, choices, shop.run.parent.shape, best.tables["main"])
        blocks = next(one.blocks for one in found if one.name == baseline)
        return None if blocks is None else Architecture.from_names(blocks)

    return choose


def default(shop: Workshop) -> Iterator[list[Candidate]]:
    """The children that `puzzle child` makes: searched, served and corrected until they are met."""
    for wish in shop.size.wishes:
        name = f"h2h-{wish}".replace(".", "_")
        settings = SearchConfig(throughput=f"{wish}x")
        shop.run.write_child(name, ChildConfig(search=settings))
        job = shop.run.child_job(name)
        try:
            pipeline.search_and_serve(job)
        except Infeasible as error:
            print(f"{DEFAULT} at {wish}x: {error}", flush=True)
            yield []
            continue
        architecture = answers.read(job).best.architecture
        made = shop.candidate(DEFAULT, wish, architecture, "", "library")
        yield [made]


def shapes(shop: Workshop, method: str) -> Iterator[list[Candidate]]:
    """The architecture of Puzzle's child with other first weights."""
    for wish in shop.size.wishes:
        for one in candidates_of(shop, DEFAULT, wish):
            architecture = Architecture.from_names(one.blocks)
            yield [shop.candidate(method, wish, architecture, "", SHAPES[method])]


def candidates_of(shop: Workshop, method: str, wish: float) -> list[Candidate]:
    """What a method has made for a wish: the last of every model, by rising speed."""
    records = artifacts.read_records(shop.folder / "candidates.jsonl", Candidate)
    mine = [one for one in records if (one.method, one.wish) == (method, wish)]
    return sorted({one.key: one for one in mine}.values(), key=lambda one: one.speedup.value)


def speed_part(shop: Workshop, methods: Sequence[str]) -> None:
    """Measure what is not measured yet."""
    common.print_header("method", "wish", "child", "speed-up", "parameters")
    for method in methods:
        known = [wish for wish in shop.size.wishes if candidates_of(shop, method, wish)]
        if len(known) == len(shop.size.wishes):  # nothing to do
            for wish in known:
                for one in candidates_of(shop, method, wish):
                    speed = one.speedup.with_unit(".2f", "x")
                    common.print_row(method, f"{wish}x", one.label, speed, f"{one.parameters:,}")
            continue
        prepare(shop.run)
        if method == DEFAULT:
            found = default(shop)
        elif method in SHAPES:
            found = shapes(shop, method)
        elif method in SEARCHED:
            found = aimed(shop, method, chosen_by(shop, SEARCHED[method]))
        else:
            found = discrete(shop, method)
        for group in found:
            shop.keep(group)


# ------------------------------------------------------------------------------------------ quality


def library_flops(run: Run) -> float:
    """BLD: the parent's layers once, and 6 FLOPs a parameter of each variant, for every token."""
    shape = run.parent.shape
    parent = Architecture.of_parent(shape).parameters(shape) - shape.constant_parameters
    trained = sum(
        shape.parameters(variant)
        for index, layer in enumerate(run.space.layers)
        for variant in layer.subblocks
        if variant not in shape.parent_blocks[index].subblocks
    )
    return float(run.recipe.library.tokens * (2 * parent + 6 * trained))


def token_flops(run: Run, parameters: int) -> float:
    """Distillation: 6 FLOPs a parameter of the child and 2 of the parent, for every token."""
    shape = run.parent.shape
    return 6.0 * parameters + 2.0 * Architecture.of_parent(shape).parameters(shape)


def tokens_for(shop: Workshop, candidate: Candidate) -> int:
    """Tokens of distillation by which a candidate costs as much as Puzzle's child for its wish."""
    run, (reference, *_) = shop.run, candidates_of(shop, DEFAULT, candidate.wish)
    budget = library_flops(run) + shop.size.tokens * token_flops(run, reference.parameters)
    if candidate.weights == "library":
        budget -= library_flops(run)
    step = run.recipe.uptrain.batch_sequences * run.recipe.corpus.sequence_length
    return round(budget / token_flops(run, candidate.parameters) / step) * step


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
    folder = run.folder / "trained" / f"{candidate.key}-{candidate.code}-{tokens}-{seed}"
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
        (folder / artifacts.UNFINISHED).mkdir(parents=True, exist_ok=True)
        weights = folder / "child.pt"
        if weights.exists():
            model.load_state_dict(torch.load(weights, weights_only=True))
        else:
            Trainer(job, folder, Pair(model, run.parent_model, uptrain)).train()
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
        code=candidate.code,
    )


def plan(shop: Workshop, methods: Sequence[str]) -> list[tuple[Candidate, int, int]]:
    """(candidate, tokens, seed) of every row, cheap ones first."""
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
        now = one.model_copy(update={"code": key[-1]})
        row = measure_row(shop, now, tokens, seed, split)
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

    def as_json(self) -> dict[str, Any]:
        """For the results' file."""
        return vars(self) | {"top1": self.top1.as_json()}


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
    if method in DISCRETE and max(speeds) < wish:
        return f"at most {max(speeds):.2f}x"
    of_each = []
    for one in found:
        tokens = tokens_for(shop, one) if trained else 0
        of_each.append(rows_for(shop, rows, one, tokens, split))
    if not all(of_each):
        return None
    weights = [1.0] * len(found)
    if method in DISCRETE:
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
    columns = [parent.metrics["top1"]]
    columns += [
        [
            sum(values) / len(values)
            for values in zip(*(r.model.metrics["top1"] for r in each), strict=True)
        ]
        for each in of_each
    ]

    def retention(sums: Any) -> Any:
        kept = sum(w * sums[i + 1] for i, w in enumerate(weights)) / np.maximum(sums[0], 1e-12)
        return kept + (1 - sum(weights))

    return Point(
        method=method,
        wish=wish,
        tokens=round(sum(w * r.tokens for w, r in zip(weights, first, strict=True))),
        speeds=speeds,
        top1=bootstrap(columns, retention),
        kl=mean("kl", 0.0),
        lm_loss=mean("lm_loss", parent.mean("lm_loss").value),
        labels=[one.label for one in found],
        parameters=[one.parameters for one in found],
        kv_bytes_per_token=[one.kv_bytes_per_token for one in found],
        seeds=seeds,
        minutes=sum(row.minutes for row in first),
        stale=any(row.code != code_of(one.weights) for row, one in zip(first, found, strict=True)),
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
    return points


def print_budget(shop: Workshop) -> None:
    """The formula of the budget, and what scoring takes beside it."""
    run = shop.run
    score = SCORE.work().need(Job(run)).flops
    print(
        "training FLOPs: BLD = tokens x (2 x the parent's layers + 6 x all variants) = "
        f"{library_flops(run):.3g}; distillation = tokens x (6 x child + 2 x parent); scoring, "
        f"beside it: {score:.3g}"
    )


def main() -> None:
    """The command line."""
    options = common.parser(__doc__, "a tiny parent, one wish, modelled speeds")
    options.add_argument("--run", type=Path, default=Path("runs/head-to-head"))
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    options.add_argument("--tokens", type=int, default=1_200_000, help="of a Puzzle child")
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--final", action="store_true", help="read test text: once, at the end")
    args = common.start(options)
    evolution = baselines.Evolution()
    size = Size(WISHES, TRAINED, args.tokens, args.seeds, 4, evolution, 128)
    if args.quick:
        quick = baselines.Evolution(2, 2, 1, (1, 1))
        size = Size((1.02,), (1.02,), 2048, 1, 2, quick, 4)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run" if args.quick else args.run
        rows = Path(temporary) / "rows" if args.quick else RESULTS
        rows.mkdir(parents=True, exist_ok=True)
        shop = Workshop(open_run(folder, args), size, rows)
        methods = [method for method in METHODS if method in args.only]
        split = "test" if args.final else "validation"
        print_budget(shop)
        if "speed" in args.parts:
            speed_part(shop, methods)
        if "quality" in args.parts:
            quality_part(shop, methods, split)
        points = table_part(shop, methods, split)
        common.print_json(args, [one.as_json() for one in points])


if __name__ == "__main__":
    main()
