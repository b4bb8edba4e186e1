"""The page of `puzzle compare`: children, of one run or several, in one picture and one table.

Reads: what the children's stages have written. Writes: `RUN/compare/index.html` of the first run.
"""

from pathlib import Path

from markupsafe import Markup

from puzzle import artifacts
from puzzle.commands.summary import ChildSummary
from puzzle.report.charts import Axis, Mark, Series, plot
from puzzle.report.page import render
from puzzle.run import Run

FOLDER = "compare"
COLOURS = ("child", "attention", "ffn", "good", "extra", "parent")


def write(run: Run, children: list[ChildSummary]) -> Path:
    """Write the page into a run's folder; returns its path."""
    path = run.folder / FOLDER / "index.html"
    several = len({child.run for child in children}) > 1
    html = render(
        "compare.html.jinja",
        f"{run.recipe.parent}: children compared",
        children=children,
        several=several,
        picture=Markup(picture(children)),
        first=next(child for child in children if child.retention is not None),
    )
    artifacts.write_text(path, html)
    return path


def picture(children: list[ChildSummary]) -> str:
    """Retention against speed-up, with intervals; a colour for each run."""
    by_run: dict[str, list[tuple[Mark, tuple[float, float]]]] = {}
    for child in children:
        speed = child.measured_speedup or child.predicted_speedup
        kept = child.retention
        if speed is None or kept is None:
            continue
        word = "measured" if child.measured_speedup else "predicted"
        says = f"{child.child}: {speed:.2f}x {word}, keeps {kept.value:.1%} of top-1"
        ends = (kept.low, kept.high)
        by_run.setdefault(child.run, []).append((Mark(speed, kept.value, says), ends))
    series = [Series("parent", [Mark(1.0, 1.0, "the parent")], "parent", "dot")]
    for index, (run, shown) in enumerate(by_run.items()):
        shown.sort(key=lambda pair: pair[0].x)
        marks, band = [mark for mark, _ in shown], [ends for _, ends in shown]
        colour = COLOURS[index % len(COLOURS)]
        series.append(Series(run, marks, colour, "dots", band=band))
    marks = [mark for one in series for mark in one.marks]
    heights = [value for one in series for ends in one.band for value in ends]
    x = Axis.of("throughput, times the parent's", [mark.x for mark in marks])
    y = Axis.of("top-1 accuracy kept", [1.0, *heights])
    shares = Axis(y.label, y.low, y.high, percent=True)
    return plot("what each child keeps against its speed", x, shares, series)
