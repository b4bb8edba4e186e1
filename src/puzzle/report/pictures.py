"""The report's charts, drawn from what the stages have written."""

import statistics
from collections.abc import Sequence

from puzzle.cost import table as costs
from puzzle.evaluate.results import Results
from puzzle.library.records import read_curve, read_index
from puzzle.model.architecture import Architecture, parse_block
from puzzle.report.charts import Axis, Mark, Series, heat_map, plot
from puzzle.score import results as scores
from puzzle.search import answers, tried
from puzzle.search.answers import Figures
from puzzle.search.stage import best_of_parent
from puzzle.search.validate import Validation
from puzzle.stage import Job
from puzzle.uptrain import trainer

MOST_LEGEND_ENTRIES = 14
DASHES = ("", "6 3", "2 3", "8 3 2 3")


def frontier(job: Job, results: Results) -> str:
    """The best sum of scores for each speed, the chosen child and other ways of choosing.

    A point of the frontier carries its number, under which `puzzle child --solution` makes it.
    """
    answer, parent = answers.read(job), results.predicted_parent
    first = len(answer.solutions)

    def mark(name: str, figures: Figures, objective: float, **data: str) -> Mark:
        speed = figures.throughput_tok_per_s / parent.throughput_tok_per_s
        says = f"{name}: {speed:.2f}x predicted, sum of scores {objective:.4f}"
        return Mark(speed, objective, says, data)

    points = [  # on a logarithmic scale, so without the parent's 0
        mark(f"point {first + i}", p.figures, p.objective, solution=str(first + i))
        for i, p in enumerate(answers.read_frontier(job))
        if p.objective > 0
    ]
    chosen = mark("this child", results.predicted_child, answer.best.objective, solution="0")
    others = [
        mark(b.name, b.figures, b.objective)
        for b in answers.read_baselines(job)
        if b.figures is not None and b.objective is not None and b.objective > 0
    ]
    series = [
        Series("frontier", points),
        Series("other ways of choosing", others, "ffn", "dots"),
        Series("this child", [chosen], "child", "dot"),
    ]
    marks = [*points, chosen]
    x = Axis.of("predicted throughput, times the parent's", [1.0, *(m.x for m in marks)])
    y = Axis.of("sum of block scores", [m.y for m in (*marks, *others)], log=True)
    return plot("the best sum of block scores for each throughput", x, y, series)


def block_scores(job: Job) -> str:
    """The KL of every block in every layer."""
    kl = {key: score.kl for key, score in scores.read(job.run).items()}
    columns = sorted({name for _, name in kl}, key=parse_block, reverse=True)
    layers = job.run.parent.shape.num_hidden_layers
    title = "KL(parent || parent with one block replaced), by layer and block"
    return heat_map(title, columns, layers, kl, "nats per token")


def validation(validated: Validation | None) -> str:
    """Sums of scores against the KL of assembled children; empty where that was not asked."""
    if validated is None or validated.overall.spearman is None:
        return ""
    series = []
    for origin, colour in (("random", "ffn"), ("searched", "attention")):
        marks = [
            Mark(p.score_sum, p.kl, f"{origin}: sum {p.score_sum:.3f}, KL {p.kl:.3f}")
            for p in validated.points
            if p.origin == origin and p.score_sum > 0 and p.kl > 0
        ]
        series.append(Series(origin, marks, colour, "dots"))
    marks = [mark for one in series for mark in one.marks]
    x = Axis.of("sum of block scores", [mark.x for mark in marks], log=True)
    y = Axis.of("KL of the assembled child, nats", [mark.y for mark in marks], log=True)
    return plot("sums of scores against the KL of assembled children", x, y, series)


def library(job: Job) -> str:
    """Normalised MSE of every variant in every layer after training; no-ops for comparison."""
    index = read_index(job)
    if not index:
        return ""
    values = {(r.layer, f"{r.slot} {r.variant}"): r.nmse_after for r in index}
    columns = list(dict.fromkeys(column for _, column in values))
    layers = job.run.parent.shape.num_hidden_layers
    title = "normalised MSE of the block's output, by layer and variant"
    return heat_map(title, columns, layers, values, "of the parent's variance")


def bld(job: Job) -> str:
    """Validation loss of every kind of variant while it was trained: the median over layers."""
    by_kind: dict[tuple[str, str], dict[int, list[float]]] = {}
    for point in read_curve(job):
        points = by_kind.setdefault((point.slot, point.variant), {})
        points.setdefault(point.tokens, []).append(point.validation)
    if not by_kind:
        return ""
    slots, series = [slot for slot, _ in by_kind], []
    for index, ((slot, variant), points) in enumerate(by_kind.items()):
        place = slots[:index].count(slot)
        medians = {tokens: statistics.median(losses) for tokens, losses in points.items()}
        name = f"{slot} {variant}" if len(by_kind) <= MOST_LEGEND_ENTRIES else ""
        marks = [
            Mark(tokens, loss, f"{slot} {variant}, {tokens:,} tokens: {loss:.4g}")
            for tokens, loss in medians.items()
        ]
        colour = "attention" if slot == "attention" else "ffn"
        dash = DASHES[place % len(DASHES)]
        opacity = 1 - 0.5 * place / slots.count(slot)
        series.append(Series(name, marks, colour, "line", dash, opacity=opacity))
    marks = [mark for one in series for mark in one.marks]
    x = Axis.of("tokens", [mark.x for mark in marks], zero=True)
    y = Axis.of("normalised MSE, held out", [mark.y for mark in marks], log=True)
    return plot("validation loss of the variants while they were trained", x, y, series)


def uptraining(job: Job) -> str:
    """The KL on training batches and on validation text; that only without a KL weight."""
    curve = trainer.read_curve(job)
    trained = [(point.tokens, point.losses["kl"]) for point in curve if "kl" in point.losses]
    validated = [(p.tokens, p.validation["kl"]) for p in curve if p.validation is not None]
    if not validated:
        return ""
    series = [
        Series(name, [Mark(t, kl, f"{t:,} tokens: KL {kl:.4f}") for t, kl in points], colour, shape)
        for name, points, colour, shape in (
            ("training batch", trained, "parent", "line"),
            ("validation text", validated, "child", "both"),
        )
    ]
    x = Axis.of("tokens", [t for t, _ in (*trained, *validated)], zero=True)
    shown = [kl for _, kl in trained or validated]
    high = min(max(shown), 2.5 * max(statistics.median(shown), 1e-6))
    y = Axis.of(
        "KL(parent || child), nats per token", [*(kl for _, kl in validated), high], zero=True
    )
    return plot("KL while the child was uptrained", x, y, series)


def by_position(results: Results) -> str:
    """KL by position before and after uptraining, with its intervals."""
    series = []
    for name, model, colour in (
        ("before uptraining", results.child, "parent"),
        ("uptrained", results.uptrained, "child"),
    ):
        curve = model.by_position
        starts = [0, *curve.ends[:-1]]
        marks = [
            Mark(end, kl.value, f"positions {start:,} to {end:,}: KL {kl.with_unit('.4f', '')}")
            for start, end, kl in zip(starts, curve.ends, curve.kl, strict=True)
        ]
        band = [(kl.low, kl.high) for kl in curve.kl]
        series.append(Series(name, marks, colour, "both", band=band))
    ends = results.uptrained.by_position.ends
    heights = [value for one in series for ends_of in one.band for value in ends_of]
    x = Axis.of("tokens before the end of the bucket", ends, log=True)
    y = Axis.of("KL(parent || child), nats per token", heights, zero=True)
    return plot("KL by position in a long sequence", x, y, series)


def predictions(job: Job, results: Results) -> str:
    """Predicted against measured speed-up of every child that was served for this one."""
    cost = job.place.cost
    tables = {name: costs.read(job, name) for name in cost.sweep}
    parent = Architecture.of_parent(job.run.parent.shape)
    of_parent = Figures.of(best_of_parent(tables, cost.sweep, parent), parent)
    series: list[Series] = []
    tries = tried.read_measured(job)
    if not tries or not results.costs.measured:
        return ""
    marks, band = [], []
    for one in tries:
        measured = one.measurements["main"].speedup
        table = tables[one.tables["main"]]
        figures = Figures.of(table, Architecture.from_names(one.blocks))
        predicted = figures.throughput_tok_per_s / of_parent.throughput_tok_per_s
        marks.append(Mark(predicted, measured.value, _predicted(predicted, measured.value)))
        band.append((measured.low, measured.high))
    series.append(Series("served before it was uptrained", marks, "attention", "dots", band=band))
    if results.speed is not None:
        speedup, predicted = results.speed.speedup, results.predicted_speedup
        final = Mark(predicted, speedup.value, _predicted(predicted, speedup.value))
        ends = [(speedup.low, speedup.high)]
        series.append(Series("the finished child", [final], "child", "dots", band=ends))
    return _against(series)


def _predicted(predicted: float, measured: float) -> str:
    error = predicted / measured - 1
    return f"predicted {predicted:.2f}x, measured {measured:.2f}x ({100 * error:+.1f} %)"


def _against(series: Sequence[Series]) -> str:
    """Measured over predicted, with the line on which both are equal."""
    values = [value for one in series for mark in one.marks for value in (mark.x, mark.y)]
    values += [value for one in series for ends in one.band for value in ends]
    x, y = (Axis.of(f"{word} speed-up", values) for word in ("predicted", "measured"))
    ends = [Mark(at, at, "") for at in (x.low, x.high)]
    equal = Series("equal", ends, "parent", "line", "3 3")
    return plot("predicted against measured speed-up", x, y, [equal, *series])
