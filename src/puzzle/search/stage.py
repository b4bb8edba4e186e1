"""Stage `search`: one block per layer, the best sum of scores within the constraints.

Or the other direction: the best of one figure within a sum of scores (`search.maximize`,
`search.minimize`, `search.kl`). Solved exactly on HiGHS (`mip.py`; the rows are built in
`space_program.py`). Every solution carries its objective, proven bound, gap and seconds. Where no
architecture meets the constraints, `Infeasible` says what binds, the best attainable value of each
and the nearest possible relaxation. With `cost.batch_sizes` there is one program per batch size of
the main scenario, and the best wins. A child that is made, not asked about, goes on from there: its
blocks are scored again in its own company (`around.py`). Paper: section 4.1, appendix B.

Reads: scores and costs, and what serving this child has shown (`tried.py`). Writes:
`search/solutions.json`, `frontier.jsonl`, `baselines.jsonl` (`answers.py`).
"""

import difflib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from puzzle import artifacts
from puzzle.artifacts import Inputs
from puzzle.config import SearchConfig
from puzzle.cost import table as costs
from puzzle.cost.refit import CostModel, in_own_table
from puzzle.cost.table import CostTable
from puzzle.errors import Infeasible, UserError
from puzzle.model.architecture import Architecture, Block
from puzzle.score import SCORE
from puzzle.score import results as scores
from puzzle.search import around, finalists, mip, tried
from puzzle.search.answers import (
    ANSWER,
    BASELINES,
    FRONTIER,
    Answer,
    Solution,
    SweepPoint,
    predict,
)
from puzzle.search.constraints import KINDS, Constraint, Tables, check, constraints
from puzzle.search.frontier import baseline_choices, frontier
from puzzle.search.program import Program
from puzzle.search.space_program import (
    Choices,
    Limit,
    build,
    explain_infeasible,
    for_target,
    homogeneous,
)
from puzzle.stage import Bytes, Effort, Job, Need, Work
from puzzle.training import launch

# A measurement's interval is about so wide on either side: aimed at with less, a wish is missed or
# left undecided.
LEAST_MARGIN = 0.01
MOST_FOR_INTERVALS = 0.05  # of a margin, for what is measured with wide intervals
# Half the width of a measured interval, as a share, over the noise of the parent's steps in the
# cost stage: the median of 19 measurements, most of twelve starts, in five runs (docs/log.md).
INTERVAL_PER_NOISE = 0.11
PROGRAM_S = 5.0  # the programs of a search and its frontier, about
REFINEMENT_SHARE = 0.75  # of the work of the scores that one refinement takes, about (docs/log.md)


@dataclass(frozen=True)
class Searched:
    """One batch size of the main scenario, searched; `name` is that of its table."""

    name: str
    settings: SearchConfig
    tables: Tables
    constraints: list[Constraint]
    limits: list[Limit]
    program: Program
    margin: float
    solutions: list[Solution]

    @property
    def batch_size(self) -> int:
        """Of the main scenario."""
        return self.tables["main"].scenario.batch_size


def _facts(job: Job) -> Inputs:
    return {}


def _check(job: Job) -> None:
    cost, settings = job.place.cost, job.child.search
    check(settings, {"main": cost.scenario} | cost.scenarios)
    if settings.target is not None and job.run.recipe.score.metric != "kl":
        raise UserError(
            f"search.kl: the scores are of {job.run.recipe.score.metric}; expected score.metric=kl"
        )
    if job.child.search.architecture is not None:
        try:
            given = Architecture.from_names(job.child.search.architecture)
        except UserError as error:
            raise UserError(f"search.architecture: {error}") from None
        expected = job.run.parent.shape.num_hidden_layers
        if len(given) != expected:
            raise UserError(
                f"search.architecture: got {len(given)} blocks, expected {expected}: one for each "
                "layer of the parent"
            )
        for index, (block, layer) in enumerate(zip(given, job.space.layers, strict=True)):
            if block not in layer.blocks:
                names = [known.name for known in layer.blocks]
                close = difflib.get_close_matches(block.name, names, n=3) or names[:3]
                raise UserError(
                    f"search.architecture: layer {index}: got {block.name!r}, which is not in the "
                    f"search space; expected one of its {len(names)}, such as {', '.join(close)}"
                )


def _execute(job: Job, folder: Path) -> None:
    choices = read_choices(job)
    answer, best = search(job, choices, settle=True)
    answer.write(folder / ANSWER)
    settings, table = job.child.search, best.tables["main"]
    parent = Architecture.of_parent(job.run.parent.shape)
    points = frontier(choices, table, parent, settings, best.limits)
    artifacts.write_records(folder / FRONTIER, points)
    baselines = baseline_choices(best.program, choices, job.run.parent.shape, table)
    artifacts.write_records(folder / BASELINES, baselines)
    job.run.progress.say(f"  {summary(answer)}")


def read_choices(job: Job) -> Choices:
    """The scored blocks of every layer and their losses.

    Raises `UserError` where the scores are unfinished or out of date.
    """
    job.manifest(SCORE)
    losses = scores.losses(job.run)
    layers = [
        [block for block in layer if block in job.space.layers[index].blocks]
        for index, layer in enumerate(scores.scored_layers(job.run, losses))
    ]
    values = [losses[index, block.name] for index, layer in enumerate(layers) for block in layer]
    from puzzle.search import validate

    return Choices(layers, np.array(values), validate.curve(job.run), _missing(job, layers))


def _missing(job: Job, layers: Sequence[Sequence[Block]]) -> np.ndarray:
    """The capacity times the share of the parent's parameters that every block lacks [C]."""
    shape = job.run.parent.shape
    whole = Architecture.of_parent(shape).parameters(shape)
    lacking = [
        shape.parameters(of_parent) - shape.parameters(block)
        for of_parent, layer in zip(shape.parent_blocks, layers, strict=True)
        for block in layer
    ]
    return finalists.capacity(job) * np.array(lacking) / whole


def search(job: Job, choices: Choices, *, settle: bool = False) -> tuple[Answer, Searched]:
    """The answer to what the job's child asks, from tables only; nothing is written.

    What serving this child for the same wish has shown corrects the tables. Raises `Infeasible`
    where no architecture meets the constraints.

    Args:
        job: a child's.
        choices: the blocks and their losses.
        settle: for the child that is made, not for a question: once its tries are used up, or no
            further one would be better, the answer is the best of those that are met.
    """
    settings, cost = job.child.search, job.place.cost
    _check(job)
    models, tries = _models(job), tried.Tries.of(job)
    swept = [_search_one(job, name, models, choices, tries) for name in cost.sweep]
    solved = [one for one in swept if one.solutions]
    best = min(solved, key=lambda one: one.solutions[0].rank, default=swept[0])
    final = None
    if settle and solved and _is_refined(job) and not tries.are_used_up(settings.attempts):
        best = _refined(job, best, choices, tries)
    if settle:
        final = tries.settle(best.solutions[0] if solved else None, settings.attempts)
        final = final if final is not None and choices.has(final.blocks) else None
    if final is not None:
        best = _with_final(next(s for s in swept if s.name == final.tables["main"]), final, choices)
    elif not solved:
        first = swept[0]
        message = explain_infeasible(
            first.program, first.constraints, first.tables, settings.time_limit_s
        )
        if settings.kl is not None:
            message += f"; kl {settings.kl:g} is asked, too"
        if tries.refused:
            message += f"; {len(tries.refused)} that were served and missed are not tried again"
        raise Infeasible(message)
    tables = {name: model.table for name, model in models.items()}
    parent = Architecture.of_parent(job.run.parent.shape)
    of_parent = best_of_parent(tables, cost.sweep, parent)
    answer = Answer(
        constraints=best.constraints,
        margin=best.margin,
        uncertainty=models[best.name].uncertainty(best.solutions[0].architecture),
        final=None if final is None else final.source,
        batch_size=best.batch_size,
        parent_batch_size=of_parent.scenario.batch_size,
        sweep=[
            SweepPoint(
                batch_size=one.batch_size,
                objective=one.solutions[0].rank if one.solutions else None,
            )
            for one in swept
        ],
        parent=predict(best.tables | {"main": of_parent}, parent),
        solutions=best.solutions,
    )
    return answer, best


def _models(job: Job) -> dict[str, CostModel]:
    """By table: the costs, corrected by what serving this child has shown."""
    parent = Architecture.of_parent(job.run.parent.shape)
    tables = {name: costs.read(job, name) for name in job.place.cost.measured}
    seen = tried.observations(job)
    return {
        name: CostModel.of(
            table, parent, [in_own_table(one, tables, parent) for one in seen.get(name, ())]
        )
        for name, table in tables.items()
    }


def _is_refined(job: Job) -> bool:
    """Whether the best sum is only where the search begins: sums of KLs, and a free choice."""
    settings = job.child.search
    is_free = settings.architecture is None and settings.target is None and not settings.homogeneous
    return is_free and settings.refinements > 0 and job.run.recipe.score.metric == "kl"


def _refined(job: Job, one: Searched, choices: Choices, tries: tried.Tries) -> Searched:
    """With the best child around its first solution in that one's place."""
    first, *others = one.solutions
    starts = [first.blocks, *(child.blocks for child in tries.children)]
    known = [blocks for blocks in starts if choices.has(blocks)]
    found = around.refine(job, choices, one.limits, known, tries.refused)
    solution = _given(choices, found.blocks, one.tables, one.settings)
    least = solution.objective + solution.missing
    gap = (least - first.bound) / max(abs(least), 1e-12)
    updates = {"bound": first.bound, "gap": gap, "seconds": first.seconds, "kl": found.kl}
    steps = "1 step" if found.steps == 1 else f"{found.steps} steps"
    first_says = f"{found.first_kl:.4f} at the optimum"
    says = f"{found.kl:.4f} after {steps} around it"
    if found.first_missing:
        first_says += f" (missing parameters: {found.first_missing:.4f})"
        says += f" (missing parameters: {solution.missing:.4f})"
    job.run.progress.say(f"  assembled KL {first_says}, {says}")
    if found.form is not None:
        of = "KL and missing parameters" if solution.missing else "KL"
        job.run.progress.say(
            f"  optimum of the model with interactions: {of} {found.form.value:.4f} predicted "
            f"(none below {found.form.bound:.4f}, proven), {found.form.assembled:.4f} assembled"
        )
    return replace(one, solutions=[solution.model_copy(update=updates), *others])


def _with_final(one: Searched, final: tried.MeasuredChild, choices: Choices) -> Searched:
    """The answer is an earlier try; what is proven is still said of the best there is."""
    solution = _given(choices, final.blocks, one.tables, one.settings)
    if one.solutions:
        bound = min(solution.rank, one.solutions[0].bound)
        gap = (solution.rank - bound) / max(abs(solution.rank), 1e-12)
        kl = None if one.solutions[0].kl is None else final.objective - solution.missing
        solution = solution.model_copy(update={"bound": bound, "gap": gap, "kl": kl})
    return replace(one, solutions=[solution])


def best_of_parent(tables: Tables, swept: Iterable[str], parent: Architecture) -> CostTable:
    """The main scenario at the batch size, of those swept, where the parent is fastest."""
    return max((tables[name] for name in swept), key=lambda t: t.tokens / t.predict(parent).total_s)


def summary(answer: Answer) -> str:
    """One line: the loss of quality, the proof of what is optimal, and the predicted speed."""
    best = answer.best
    child, parent = (
        f"{figures['main'].throughput_tok_per_s:,.0f} tok/s"
        for figures in (best.predicted, answer.parent)
    )
    batch = f" at batch {answer.batch_size}" if len(answer.sweep) > 1 else ""
    missing = f" and {best.missing:.4f} for missing parameters" if best.missing else ""
    proof = f"proven gap {best.gap:.2%}"
    if best.kl is not None:
        proof = f"no sum is below {best.bound:.4f}, which is proven"
    return (
        f"score sum {best.objective:.4f}{missing}, {proof}, {best.seconds:.2f} s; "
        f"predicted {child}{batch} (parent {parent})"
    )


def _search_one(
    job: Job,
    name: str,
    models: Mapping[str, CostModel],
    choices: Choices,
    tries: tried.Tries,
) -> Searched:
    """Search with the table called `name` as the main scenario's; not for what was refused."""
    settings, cost = job.child.search, job.place.cost
    tables = {"main": models[name].table}
    tables |= {other: models[other].table for other in cost.scenarios}
    parent = Architecture.of_parent(job.run.parent.shape)
    swept = {other: models[other].table for other in cost.sweep}
    asked = constraints(settings, tables, best_of_parent(swept, swept, parent), parent)
    refused = [names for names in tries.refused if choices.has(names)]
    rows = [choices.columns(names) for names in refused]
    away = tuple(mip.overlap_row(columns, len(columns) - 1) for columns in rows)

    def searched(margin: float) -> Searched:
        limits = [_aimed_limit(one, tables[one.scenario], margin) for one in asked]
        program = build(choices, limits, settings)
        if settings.target is not None and settings.kl is not None:
            target = Limit(KINDS[settings.target], tables["main"], 0.0)
            program = for_target(program, choices, target, settings.kl)
        if settings.architecture is not None:
            solutions = [_given(choices, settings.architecture, tables, settings)]
        else:
            solutions = _solve(program, choices, settings, tables)
            if any(solution.blocks in refused for solution in solutions):
                apart = replace(program, extra=(*program.extra, *away))
                solutions = _solve(apart, choices, settings, tables)
        return Searched(name, settings, tables, asked, limits, program, margin, solutions)

    measured = [c for c in asked if c.kind.timed or c.kind is KINDS["memory"]]
    if settings.architecture is not None or not measured:
        return searched(0.0)
    if settings.margin is not None:
        return _first_feasible(searched, settings.margin)
    if models[name].is_exact:
        return searched(0.0)
    answer = _first_feasible(searched, LEAST_MARGIN)
    if not answer.solutions:
        return answer
    of_model = models[name].uncertainty(answer.solutions[0].architecture)
    expected = INTERVAL_PER_NOISE * tables["main"].noise
    of_intervals = min(tries.uncertainty if tries.children else expected, MOST_FOR_INTERVALS)
    return _first_feasible(searched, LEAST_MARGIN + max(of_model, of_intervals))


def _first_feasible(searched: Callable[[float], Searched], margin: float) -> Searched:
    """Near the best attainable there may be no room for a margin: then with less, at last none."""
    for share in (1.0, 0.5):
        answer = searched(share * margin)
        if answer.solutions:
            return answer
    return searched(0.0)


def _aimed_limit(constraint: Constraint, table: CostTable, margin: float) -> Limit:
    """Timed constraints are aimed at with a margin, and so is memory where it is measured."""
    limit = constraint.limit
    if constraint.kind.timed:
        limit /= 1 + margin
    elif constraint.kind is KINDS["memory"] and table.constant.workspace_bytes:
        limit /= 1 + min(margin, LEAST_MARGIN)
    return Limit(constraint.kind, table, limit)


def _solve(
    program: Program, choices: Choices, settings: SearchConfig, tables: Tables
) -> list[Solution]:
    if settings.homogeneous:
        began = time.perf_counter()
        columns = homogeneous(program, choices)
        if columns is None:
            return []
        loss = float(program.costs[columns].sum())  # all of them were tried: it is the bound, too
        optima = [mip.Optimum(columns, loss, loss, time.perf_counter() - began)]
    else:
        layers = len(choices.layers)
        differ = settings.diversity if settings.diversity >= 1 else settings.diversity * layers
        optima = mip.diverse(
            program,
            solutions=settings.solutions,
            overlap=int(np.floor(layers - differ + 1e-9)),
            gap=settings.gap,
            time_limit_s=settings.time_limit_s,
        )
    return [_solution(optimum, choices, tables, settings) for optimum in optima]


def _solution(
    optimum: mip.Optimum, choices: Choices, tables: Tables, settings: SearchConfig
) -> Solution:
    blocks = choices.names(optimum.columns)
    predicted = predict(tables, Architecture.from_names(blocks))
    target, bound = None, optimum.bound
    if settings.target is not None:
        # of the whole model, and comparable between batch sizes
        kind, table = KINDS[settings.target], tables["main"]
        constant, per = kind.resource(table.constant), kind.amount(table.scenario)
        target, bound = ((least + constant) / per for least in (optimum.objective, optimum.bound))
    score_sum = float(choices.losses[optimum.columns].sum())
    return Solution(
        blocks=blocks,
        objective=score_sum,
        missing=choices.missing_of(optimum.columns),
        predicted_kl=choices.curve.kl(score_sum) if choices.curve else None,
        target=target,
        bound=bound,
        gap=optimum.gap,
        seconds=optimum.seconds,
        predicted=predicted,
    )


def _given(
    choices: Choices, names: Sequence[str], tables: Tables, settings: SearchConfig
) -> Solution:
    """Exactly this architecture, with its sum of scores."""
    chosen = choices.columns(names)
    least = float(choices.costs[chosen].sum())
    if settings.target is not None:
        kind, table = KINDS[settings.target], tables["main"]
        blocks = [choices.blocks[column] for column in chosen]
        layers = (table.block(block, layer) for layer, block in enumerate(blocks))
        least = sum(map(kind.resource, layers))
    return _solution(mip.Optimum(chosen, least, least, 0.0), choices, tables, settings)


def _need(job: Job) -> Need:
    """A refinement scores the blocks that a search could choose, in a smaller model."""
    if not _is_refined(job):
        return Need(memory=Bytes(host=2e8), disk_bytes=1e6, effort=Effort(beside_s=PROGRAM_S))
    refinements = job.child.search.refinements * _walks(job)
    scoring, share = SCORE.work().need(job), REFINEMENT_SHARE * refinements
    if job.run.device.type == "cuda":  # one process does what scoring shares out
        share *= launch.processes(job.run)
    return Need(
        flops=REFINEMENT_SHARE * refinements * scoring.flops,
        memory=scoring.memory,
        instead=scoring.instead,
        disk_bytes=1e6,
        effort=replace(scoring.effort.times(share), beside_s=PROGRAM_S),
    )


def _walks(job: Job) -> int:
    """How often the search around a child runs (`around.refine`).

    Where parameters count it runs among halves of layers and from what that finds, too.

    What the searches of finalists have measured, the child's own does not measure again.
    """
    capacities = list(finalists.children(job)) or [job.child.search.capacity]
    return sum(3 if capacity else 1 for capacity in capacities)


WORK = Work(facts=_facts, execute=_execute, need=_need, check=_check)
