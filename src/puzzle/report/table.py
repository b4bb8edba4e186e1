"""The table a run ends with: parent against child, on the page and in the terminal."""

from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from puzzle.engines.intervals import Interval
from puzzle.evaluate.results import ModelResult, Quality, Results
from puzzle.stage import Job


class Row(NamedTuple):
    """One line: a name, and a figure of the parent, of the child, of the uptrained child."""

    name: str
    parent: str
    child: str
    uptrained: str


QUALITY_ROWS = (  # name, field of `Quality`, format
    ("KL(parent || model), nats/token", "kl", ".4f"),
    ("LM loss, nats/token", "lm_loss", ".4f"),
    ("perplexity", "perplexity", ",.3f"),
    ("top-1 token accuracy", "top1", ".2%"),
    ("top-5 token accuracy", "top5", ".2%"),
    ("top-10 token accuracy", "top10", ".2%"),
)


def rows(results: Results) -> list[Row]:
    """Speed, sizes, quality and retention."""
    table = _speed_rows(results)
    models = (results.parent, results.child, results.uptrained)
    table.append(Row("parameters", *(f"{model.parameters:,}" for model in models)))
    cache = (f"{model.kv_cache_bytes_per_token:,}" for model in models)
    table.append(Row("KV cache, bytes per token", *cache))
    for name, field, form in QUALITY_ROWS:
        values = [_figure(model.quality, field) for model in models]
        if values[0] is not None:
            cells = ["" if value is None else format(value.value, form) for value in values]
            table.append(Row(name, *cells))
    table.append(Row("retention of top-1", *(_retention(model) for model in models)))
    table.append(Row("  its 95 % interval", *(_retention_interval(model) for model in models)))
    return table


def _speed_rows(results: Results) -> list[Row]:
    """What was measured, where something was, and what was predicted."""
    table, word = [], results.speed_word
    error = ""
    if results.speed is not None:
        sides = (results.speed.parent, results.speed.child)
        parent, child = (f"{side.throughput_tok_per_s.value:,.0f}" for side in sides)
        engine, measured = results.costs.engine.engine, results.speed.speedup
        table.append(Row(f"output tok/s, {word} ({engine})", parent, "", child))
        table.append(Row(f"speed-up, {word}", "1.00x", "", f"{measured.value:.2f}x"))
        if measured.low < measured.high:
            interval = f"{measured.low:.2f}x to {measured.high:.2f}x"
            table.append(Row("  its 95 % interval", "", "", interval))
        share = results.served.scenarios["main"].prediction_error
        error = f" ({share * 100:+.1f} %)"
    predicted = [
        figures.throughput_tok_per_s
        for figures in (results.predicted_parent, results.predicted_child)
    ]
    speedup = f"{results.predicted_speedup:.2f}x{error}"
    table.insert(
        len(table) // 2,
        Row("output tok/s, predicted", f"{predicted[0]:,.0f}", "", f"{predicted[1]:,.0f}"),
    )
    return [*table, Row("speed-up, predicted", "1.00x", "", speedup)]


def _figure(quality: Quality, field: str) -> Interval | None:
    value: Interval | None = getattr(quality, field)
    return value


def _retention(model: ModelResult) -> str:
    return "" if model.retention is None else f"{model.retention.value:.1%}"


def _retention_interval(model: ModelResult) -> str:
    kept = model.retention
    return "" if kept is None or kept.low == kept.high else f"{kept.low:.1%} to {kept.high:.1%}"


def print_results(job: Job, results: Results, page: Path) -> None:
    """The answer, the table, where the page is and what can be done next; 80 columns."""
    console = Console(highlight=False, soft_wrap=True)
    for line in answer(results):
        console.print(line)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in Row._fields:
        label = "" if column == "name" else column
        table.add_column(label, justify="left" if column == "name" else "right")
    for row in rows(results):
        table.add_row(*row)
    Console(highlight=False).print(table)
    for warning in results.warnings:
        console.print(f"note: {warning}")
    run, name = job.run.folder, job.child.name
    child = "" if name == "main" else f" --child {name}"
    console.print(f"report    {page}")
    console.print(f"serve     puzzle serve {run}{child}")
    console.print(f"export    puzzle export {run}{child} --to gguf")
    console.print(f"another   puzzle child {run} --name fast --throughput 2x")


def answer(results: Results) -> list[str]:
    """How much faster, how much is kept, and whether it is what was asked."""
    speedup = f"{results.speedup:.2f}x the parent's throughput, {results.speed_word}"
    if results.speed is not None and results.speed.speedup.low < results.speed.speedup.high:
        ends = results.speed.speedup
        speedup += f" ({ends.low:.2f}x to {ends.high:.2f}x)"
    lines, kept = [speedup], results.uptrained.retention
    if kept is not None:
        lines.append(
            f"{kept.value:.1%} of its top-1 accuracy kept ({kept.low:.1%} to {kept.high:.1%})"
        )
    return lines + [one.told(results.speed_word) for one in results.served.promises]
