"""The contestants of the head-to-head, and the speeds of what they make. Not a benchmark itself."""

import argparse
import contextlib
import datetime
import hashlib
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import baselines
import common

import puzzle
from puzzle import artifacts, config, pipeline, settings
from puzzle.artifacts import Record
from puzzle.assemble.stage import ChildState
from puzzle.config import ChildConfig, SearchConfig
from puzzle.cost import COST, table
from puzzle.engines.intervals import Figure, Interval, intervals
from puzzle.errors import Infeasible
from puzzle.evaluate.bootstrap import UnitSums
from puzzle.library import LIBRARY
from puzzle.model import child
from puzzle.model.architecture import Architecture
from puzzle.model.modeling_puzzle import PuzzleConfig
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.score import SCORE
from puzzle.score.assembled import AssembledKL
from puzzle.score.stage import text_shards
from puzzle.search import answers, around, finalists, stage
from puzzle.search.frontier import baseline_choices
from puzzle.stage import Job

WISHES, TRAINED = (1.25, 1.5, 2.17, 3.0), (1.5, 2.17, 3.0)
CODE = (  # decides a row
    "training/losses.py",
    "training/muon.py",
    "training/schedules.py",
    "uptrain/gkd.py",
    "uptrain/trainer.py",
    "uptrain/phases.py",
    "model/modeling_puzzle.py",
    "data/packing.py",
    "data/sources.py",
    "data/sequences.py",
)
LIBRARY_CODE = (  # decides a child's first weights, too
    "library/bld.py",
    "library/training.py",
    "library/initialization.py",
)
SEARCH_CODE = (  # decides which child a search ends at: not what a row of that child says
    "score/exact.py",
    "score/assembled.py",
    "search/mip.py",
    "search/interactions.py",
    "search/around.py",
)
COST_S = 300.0  # methods are compared, not the luck of a table of a minute
TOGETHER = 5  # children that are served beside one parent
AIMS, MOST_TRIES, ASK_MORE = 10, 3, 1.02  # of a way of choosing, at one wish
NEAR = (0.99, 1.05)  # of the wish: a child that is served outside of it is searched again
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
    code: str  # that decides which child it is: `made_by`
    # Parameters of each finalist, which was uptrained on a part of the tokens
    finalists: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """Of the model: two methods may make the same one."""
        narrow = None if self.narrow is None else vars(self.narrow)
        return artifacts.fingerprint([self.blocks, self.weights, narrow])


def served_as(one: Candidate) -> str:
    """What its speed depends on: which halves of layers it has, not their order or weights.

    So methods that remove as many layers are compared at one measured speed, not by its noise.
    """
    halves = [half for block in Architecture.from_names(one.blocks) for half in block.subblocks]
    narrow = None if one.narrow is None else vars(one.narrow)
    return artifacts.fingerprint([sorted(half.name for half in halves), narrow])


class Served(Record):
    """One line of `speeds.jsonl`: the speed-up of all children that are served as this one."""

    served_as: str
    speedup: Interval
    day: str  # of the measurement, as 2026-11-27


def today() -> str:
    """The date, as 2026-11-27."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


class Budget(Record):
    """One line of `budgets.jsonl`: what every method may spend at a wish, once and for all.

    It is what the first child of Puzzle's for the wish cost: its library, and `tokens` of
    distillation. Another child, which a later search finds, gets other tokens, and no row of the
    other methods becomes out of date.
    """

    wish: float
    tokens: int
    flops: float


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
    machine: str  # that it was trained on; speed-ups of another one are others


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
    """Digest of the modules that decide a row of given blocks and weights, and of the baselines."""
    return _digest([*CODE, *(LIBRARY_CODE if weights == "library" else ())])


def made_by(method: str) -> str:
    """Digest of the modules that decide which child a method makes, and of the baselines."""
    return _digest(["score/assembled.py"] if method in DISCRETE else [*LIBRARY_CODE, *SEARCH_CODE])


def _digest(names: Sequence[str]) -> str:
    root, digest = Path(puzzle.__file__).parent, hashlib.sha256()
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
        recipe["cost"] |= {"seconds": COST_S}
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
        return AssembledKL(self.run, text_shards(self.run))

    @cached_property
    def costs(self) -> table.CostTable:
        """Of the main scenario."""
        return table.read(self.run.place_job())

    def predicted(self, architecture: Architecture) -> float:
        """Speed-up by the cost table."""
        parent = self.costs.predict(self.parent).total_s
        return parent / self.costs.predict(architecture).total_s

    def job(self, speedup: float, **search: object) -> Job:
        """A question at the place `here`, by scores alone, with no margin."""
        wish = {"throughput": f"{speedup:.4f}x", "margin": 0.0, "capacity": 0.0} | search
        return self.run.job_of("question", ChildConfig(search=SearchConfig.model_validate(wish)))

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

    def measure(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """With their speed-ups, all served beside one parent, each a few steps in turn."""
        job = self.run.place_job()
        with contextlib.ExitStack() as stack:
            folders = [self.run.parent.folder]
            for one in candidates:
                folders.append(Path(stack.enter_context(tempfile.TemporaryDirectory())))
                made, architecture, state = self.state(one)
                child.save(folders[-1], made, architecture, state, self.run.parent.folder, "")
            starts = common.serve_together(job, folders, self.size.starts)
        figures: dict[str, Figure] = {
            str(index): lambda s, i=index + 1: s.total[0] / s.total[i]
            for index in range(len(candidates))
        }
        shown = intervals(starts, figures, looks=1)
        return [
            one.model_copy(update={"speedup": shown[str(index)]})
            for index, one in enumerate(candidates)
        ]

    def made(
        self,
        method: str,
        wish: float,
        architecture: Architecture,
        label: str,
        weights: Weights = "parent",
        narrow: baselines.Narrow | None = None,
    ) -> Candidate:
        """A child whose speed-up is not measured yet."""
        shape = self.run.parent.shape
        parameters = architecture.parameters(shape)
        if narrow is not None:  # every matrix has the hidden size on one side
            parameters = round(parameters * narrow.hidden / shape.hidden_size)
        return Candidate(
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
            code=made_by(method),
        )

    def measured(self, candidates: Sequence[Candidate], day: str | None = None) -> list[Candidate]:
        """With speed-ups: as measured before (on that day), or now, `TOGETHER` beside one parent.

        They are kept group by group in `speeds.jsonl`, so an interrupted measurement goes on.
        """
        path = self.folder / "speeds.jsonl"
        records = artifacts.read_records(path, Served)
        speeds = {one.served_as: one.speedup for one in records if day in (None, one.day)}
        missing = {served_as(one): one for one in candidates if served_as(one) not in speeds}
        chosen = list(missing.values())
        for first in range(0, len(chosen), TOGETHER):
            for one in self.measure(chosen[first : first + TOGETHER]):
                speeds[served_as(one)] = one.speedup
                served = Served(served_as=served_as(one), speedup=one.speedup, day=today())
                artifacts.append_record(path, served)
        return [one.model_copy(update={"speedup": speeds[served_as(one)]}) for one in candidates]

    def keep(self, candidates: Sequence[Candidate]) -> None:
        """Append to `candidates.jsonl` and print."""
        for one in candidates:
            artifacts.append_record(self.folder / "candidates.jsonl", one)
            self.show(one)

    @staticmethod
    def show(one: Candidate) -> None:
        """As a line of the table of speeds."""
        speed = one.speedup.with_unit(".2f", "x")
        common.print_row(one.method, f"{one.wish}x", one.label, speed, f"{one.parameters:,}")


Choose = Callable[[float], Architecture | None]  # of a way of choosing, by speed-up
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
NO_BLD = "Puzzle's shape, no BLD"
SHAPES = {NO_BLD: "cut", "Puzzle's shape, random weights": "random"}
DEFAULT, ADDITIVE = "Puzzle", "Puzzle, additive (as published)"
FORM = "Puzzle, optimum of the form"
FINALISTS = {"Puzzle, 2 finalists": 2}  # as `puzzle child` makes it: search.finalists
METHODS = (DEFAULT, *FINALISTS, FORM, ADDITIVE, *SEARCHED, *SHAPES, *DISCRETE)


def discrete(shop: Workshop, method: str) -> Iterator[list[Candidate]]:
    """The children on both sides of every wish."""
    lazily = DISCRETE[method]
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

    known: dict[int, Candidate] = {}

    def speed(knob: int) -> float:
        return known[knob].speedup.value if knob in known else guess(knob)

    def sides(wish: float) -> list[int]:
        found = baselines.around(speed, range(len(guesses)), wish)
        return [knob for knob in found if knob is not None]

    while True:  # until both sides of every wish are measured
        missing = sorted({k for wish in shop.size.wishes for k in sides(wish)} - set(known))
        if not missing:
            break
        chosen = []
        for knob in missing:
            architecture, label, narrow = option(knob)
            weights = "parent" if narrow is None else "narrow"
            chosen.append(shop.made(method, 0.0, architecture, label, weights, narrow))
        known |= dict(zip(missing, shop.measured(chosen), strict=True))
    for wish in shop.size.wishes:
        yield [known[knob].model_copy(update={"wish": wish}) for knob in sides(wish)]


@dataclass
class _Aim:
    """A way of choosing at a wish: what it is asked for, and what came of it."""

    method: str
    wish: float
    choose: Choose
    aim: float
    tries: list[Candidate] = field(default_factory=list)
    settled: bool = False

    def ask(self, shop: Workshop) -> Candidate | None:
        """A child to serve; None where there is none.

        A way of choosing that ends outside the limits, as a greedy one may, is asked for more.
        """
        for _ in range(1 if self.tries else AIMS):
            architecture = self.choose(self.aim)
            if architecture is not None:
                return shop.made(self.method, self.wish, architecture, "", "library")
            self.aim *= ASK_MORE
        self.settled = True
        return None

    def see(self, served: Candidate) -> None:
        """Correct the aim where the wish is missed, or the child far beyond it."""
        self.tries.append(served)
        speed = served.speedup.value
        is_near = NEAR[0] <= speed / self.wish <= NEAR[1]
        self.settled = is_near or len(self.tries) == MOST_TRIES
        self.aim *= 1.01 * self.wish / speed

    def best(self) -> list[Candidate]:
        """The child nearest to the wish, of those that meet it where any does."""
        met = [one for one in self.tries if one.speedup.value >= self.wish]
        return sorted(met or self.tries, key=lambda one: abs(one.speedup.value - self.wish))[:1]


def aimed(shop: Workshop, methods: Sequence[str]) -> Iterator[list[Candidate]]:
    """A child just above every wish of every way of choosing; a round is served together."""
    aims = [
        _Aim(method, wish, choose, 1.01 * wish)
        for method in methods
        for choose in [chosen_by(shop, SEARCHED.get(method, method))]
        for wish in shop.size.wishes
    ]
    for _ in range(MOST_TRIES):
        asked = [(aim, aim.ask(shop)) for aim in aims if not aim.settled]
        children = [(aim, made) for aim, made in asked if made is not None]
        served = shop.measured([made for _, made in children])
        for (aim, _), one in zip(children, served, strict=True):
            aim.see(one)
    yield from (aim.best() for aim in aims)


def chosen_by(shop: Workshop, way: str) -> Choose:
    """What a way of choosing from the library takes, with the same costs and no margin.

    Of Puzzle it is the search that `puzzle child` does, without what it aims beyond the wish so as
    to keep its promise on a noisy machine: all are compared at the speed that they are served at.
    Of its form it is the first optimum with interactions, scored around the best sum.
    """
    choices = stage.read_choices(shop.job(1.0))

    def choose(speedup: float) -> Architecture | None:
        job = shop.job(speedup, **({"refinements": 1} if way == FORM else {}))
        try:
            _, best = stage.search(job, choices)
        except Infeasible:
            return None
        if way == ADDITIVE:
            return best.solutions[0].architecture
        if way in (DEFAULT, FORM):
            start = best.solutions[0].blocks
            found = around.refine(job, choices, best.limits, [start], [])
            form = found.blocks if found.form is None else found.form.blocks
            return Architecture.from_names(form if way == FORM else found.blocks)
        shape, costs = shop.run.parent.shape, best.tables["main"]
        others = baseline_choices(best.program, choices, shape, costs)
        blocks = next(one.blocks for one in others if one.name == way)
        return None if blocks is None else Architecture.from_names(blocks)

    return choose


def with_finalists(shop: Workshop, method: str) -> Iterator[list[Candidate]]:
    """The children that `puzzle child` makes: searched, served and corrected until they are met."""
    run, number = shop.run, FINALISTS[method]
    uptrain = run.recipe.uptrain.model_copy(update={"tokens": shop.size.tokens})
    for wish in shop.size.wishes:
        name = f"h2h-{wish}-{number}".replace(".", "_")
        search = SearchConfig(throughput=f"{wish}x", finalists=number)
        run.write_child(name, ChildConfig(search=search, uptrain=uptrain))
        job = run.child_job(name)
        try:
            pipeline.choose_finalist(job)
            pipeline.search_and_serve(job)
        except Infeasible as error:
            print(f"{method} at {wish}x: {error}", flush=True)
            yield []
            continue
        architecture, choice = answers.read(job).best.architecture, finalists.read(job)
        (made,) = shop.measured([shop.made(method, wish, architecture, "", "library")])
        trained = () if choice is None else tuple(one.parameters for one in choice.finalists)
        yield [made.model_copy(update={"finalists": trained})]


def shapes(shop: Workshop, method: str) -> Iterator[list[Candidate]]:
    """The architecture of Puzzle's child with other first weights."""
    for wish in shop.size.wishes:
        for one in candidates_of(shop, DEFAULT, wish):
            architecture = Architecture.from_names(one.blocks)
            yield shop.measured([shop.made(method, wish, architecture, "", SHAPES[method])])


def candidates_of(shop: Workshop, method: str, wish: float) -> list[Candidate]:
    """What a method has made for a wish, by rising speed.

    The last record of every model, of what the newest code has made; a method whose knob is not
    discrete has one child.
    """
    records = artifacts.read_records(shop.folder / "candidates.jsonl", Candidate)
    mine = [one for one in records if (one.method, one.wish) == (method, wish)]
    mine = [one for one in mine if one.code == mine[-1].code][0 if method in DISCRETE else -1 :]
    return sorted({one.key: one for one in mine}.values(), key=lambda one: one.speedup.value)


def made_now(shop: Workshop, method: str, wish: float) -> list[Candidate]:
    """What is there already, unless other code has made it."""
    found = candidates_of(shop, method, wish)
    return [one for one in found if one.code == made_by(method)]


def speed_part(shop: Workshop, methods: Sequence[str]) -> None:
    """Make and measure what is not there yet."""
    common.print_header("method", "wish", "child", "speed-up", "parameters")
    missing = []
    for method in methods:
        known = [made_now(shop, method, wish) for wish in shop.size.wishes]
        if all(known):
            for one in itertools.chain(*known):
                shop.show(one)
        else:
            missing.append(method)
    if missing:
        prepare(shop.run)
    searched = [one for one in missing if one in (DEFAULT, FORM, ADDITIVE, *SEARCHED)]
    found = [aimed(shop, searched)] if searched else []
    for method in missing:
        if method in FINALISTS:
            found.append(with_finalists(shop, method))
        elif method in SHAPES:
            found.append(shapes(shop, method))
        elif method in DISCRETE:
            found.append(discrete(shop, method))
    for group in itertools.chain(*found):
        shop.keep(group)


def serve_part(shop: Workshop, methods: Sequence[str]) -> None:
    """Measure all that was measured before anew: speed-ups of different days cannot be compared."""
    prepare(shop.run)
    known = [
        one
        for method in methods
        for wish in shop.size.wishes
        for one in candidates_of(shop, method, wish)
    ]
    common.print_header("method", "wish", "child", "speed-up", "parameters")
    shop.keep(shop.measured(known, today()))
