"""`puzzle search`: questions to a run, or to a published table. They change nothing."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import JsonValue

from puzzle import config, settings
from puzzle.commands.options import (
    ChildOption,
    Json,
    Limit,
    Maximize,
    Minimize,
    PredictedKL,
    Quiet,
    Set,
    constraint_changes,
    emit,
    given,
    open_run,
)
from puzzle.errors import UserError
from puzzle.run import Run
from puzzle.stage import Job


def search(
    context: typer.Context,
    run_directory: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A run directory.")
    ] = None,
    throughput: Limit = None,
    user_throughput: Limit = None,
    latency: Limit = None,
    time_to_first_token: Limit = None,
    inter_token_latency: Limit = None,
    memory: Limit = None,
    parameters: Limit = None,
    kv_cache: Limit = None,
    solutions: Annotated[int | None, typer.Option(help="How many architectures.")] = None,
    diversity: Annotated[
        float | None,
        typer.Option(help="In how many layers they must differ: a share, or a number from 1 on."),
    ] = None,
    gap: Annotated[float | None, typer.Option(help="Relative gap to prove; 0 is exact.")] = None,
    child: ChildOption = "",
    place: Annotated[str | None, typer.Option(help="Ask for another place.")] = None,
    table: Annotated[
        Path | None,
        typer.Option(help="Search a published block-library table instead of a run."),
    ] = None,
    minimize: Minimize = None,
    maximize: Maximize = None,
    kl: PredictedKL = None,
    max_: Annotated[
        list[str] | None,
        typer.Option("--max", metavar="KEY=VALUE", help="With --table: an upper bound of a sum."),
    ] = None,
    min_: Annotated[
        list[str] | None,
        typer.Option("--min", metavar="KEY=VALUE", help="With --table: a lower bound of a sum."),
    ] = None,
    set_: Set = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask which architecture would meet constraints; nothing is changed. `child` makes it."""
    changes = constraint_changes(context)
    if table is not None:
        if run_directory is not None or set_ or changes or kl is not None:
            raise UserError(
                "search --table: takes --minimize or --maximize, --max, --min, --gap, "
                "--solutions, --diversity"
            )
        target = _target(minimize, maximize)
        _ask_table(table, target, max_ or [], min_ or [], (gap, solutions, diversity), as_json)
        return
    changes |= given(context, config.TARGETS)
    if run_directory is None or max_ or min_:
        raise UserError(
            "search: give a run directory, or --table FILE with --minimize KEY --max KEY=VALUE"
        )
    changes |= given(context, ("solutions", "diversity", "gap"))
    this = open_run(run_directory, quiet)
    job = question(this, child or this.child_names()[0], changes, set_ or [], place)
    answer_question(job, quiet, as_json)


def question(
    run: Run,
    name: str,
    changes: dict[str, JsonValue],
    assignments: list[str],
    place: str | None = None,
) -> Job:
    """A job like a child's, with other settings of the search; nothing is written."""
    child = run.child_config(name)
    values = child.model_dump(mode="json")
    values["search"] = config.with_constraints(values["search"], changes)
    values["place"] = place or child.place
    asked = settings.validate_changed(config.ChildConfig, values, assignments, "search")
    return run.job_of(name, asked)


def answer_question(job: Job, quiet: bool, as_json: bool) -> None:
    """Print the answer to a question. Raises `Infeasible` where there is none."""
    from puzzle.search import stage

    answer, _ = stage.search(job, stage.read_choices(job))
    for number, solution in enumerate(answer.solutions):
        figures, parent = solution.predicted["main"], answer.parent["main"]
        speedup = figures.throughput_tok_per_s / parent.throughput_tok_per_s
        if quiet:
            continue
        kl = solution.predicted_kl
        stands_for = "" if kl is None else f", about {kl:.2g} nats of KL"
        print(
            f"{number}: score sum {solution.objective:.4f} (proven gap {solution.gap:.2%})"
            f"{stands_for}, "
            f"predicted {speedup:.2f}x throughput, {figures.parameters:,} parameters, "
            f"{figures.memory_bytes / 2**20:,.0f} MiB"
        )
        print(f"   {' '.join(solution.blocks)}")
    emit(answer.as_json(), as_json)


def _target(minimize: str | None, maximize: str | None) -> tuple[str, bool]:
    """(the key, whether it is maximised)."""
    key = minimize or maximize
    if key is None or (minimize and maximize):
        raise UserError(
            "search --table: expected one of --minimize KEY and --maximize KEY, e.g. "
            "--minimize metrics.kl_div"
        )
    return key, maximize is not None


def _ask_table(
    path: Path,
    target: tuple[str, bool],
    most: list[str],
    least: list[str],
    options: tuple[float | None, int | None, float | None],
    as_json: bool,
) -> None:
    """Search a table; `options` are gap, solutions and diversity."""
    from puzzle.search import published
    from puzzle.search.table import Table

    gap, solutions, diversity = options
    if gap is not None and not gap >= 0:
        raise UserError(f"search --gap: got {gap}, expected a share of at least 0")
    if solutions is not None and solutions < 1:
        raise UserError(f"search --solutions: got {solutions}, expected at least 1")
    bounds = published.parse_bounds(most, at_least=False)
    bounds += published.parse_bounds(least, at_least=True)
    table = Table.read(config.expanded(path))
    share, layers = 0.2 if diversity is None else diversity, len(table.layers)
    differ = 1
    if (solutions or 1) > 1:
        differ = round(share if share >= 1 else share * layers)
    if not 0 < differ <= layers:
        raise UserError(f"--diversity: got {diversity}, expected a share, or 1 to {layers} layers")
    question = published.Question(
        target=target[0],
        maximize=target[1],
        bounds=bounds,
        gap=1e-4 if gap is None else gap,
        solutions=solutions or 1,
        differ=differ,
    )
    answers = published.search(table, question)
    for answer in answers:
        totals = ", ".join(f"{key} {value:.8g}" for key, value in answer.totals.items())
        print(
            f"objective {answer.objective:.8g}, proven gap {answer.gap:.1e}, "
            f"{answer.seconds:.2f} s; {totals}"
        )
    records: list[JsonValue] = [answer.as_dict() for answer in answers]
    first = answers[0].as_dict()
    emit(first if len(answers) == 1 else {**first, "solutions": records}, as_json)
