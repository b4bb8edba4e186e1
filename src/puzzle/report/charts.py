"""Charts as SVG text: lines, dots, heat maps. Colours are the page's CSS variables.

Every mark that says something is a `<g class="mark">` with its sentence as the accessible name; the
page's script shows it beside the pointer, and the arrow keys go from mark to mark. Without a script
a chart is still a picture with a title for each mark. `standalone` adds the colours, for files.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 480.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 12.0, 12.0, 44.0
LEGEND_ROW = 20.0
LIGHT = {
    "ink": "#1c2024",
    "soft": "#5a6370",
    "line": "#dde1e6",
    "page": "#ffffff",
    "parent": "#7d8794",
    "attention": "#2f6db3",
    "ffn": "#b8610f",
    "child": "#b3261e",
    "good": "#1b6e3c",
    "extra": "#6b4fa0",
}
DARK = {
    "ink": "#e8eaed",
    "soft": "#a3acb8",
    "line": "#363c45",
    "page": "#15181c",
    "parent": "#8f99a6",
    "attention": "#6ea8e8",
    "ffn": "#e39a4f",
    "child": "#ff8a80",
    "good": "#6cc58f",
    "extra": "#b59be6",
}
Point = tuple[float, float]


def colours(palette: Mapping[str, str]) -> str:
    """CSS variables of a palette."""
    return "".join(f"--{name}:{value};" for name, value in palette.items())


@dataclass(frozen=True)
class Mark:
    """A point of a series and what it says; `data` become attributes for the page's script."""

    x: float
    y: float
    says: str
    data: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Series:
    """Marks of one colour; `shape` is line, dots, both, or one big dot."""

    name: str
    marks: Sequence[Mark]
    colour: str = "attention"
    shape: str = "both"
    dash: str = ""
    band: Sequence[tuple[float, float]] = ()  # low and high of every mark, drawn behind it
    opacity: float = 1.0


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high` with its label."""

    label: str
    low: float
    high: float
    log: bool = False
    percent: bool = False

    @classmethod
    def of(
        cls, label: str, values: Iterable[float], *, log: bool = False, zero: bool = False
    ) -> "Axis":
        """Around values, with some room; from 0 on with `zero`."""
        known = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
        low, high = min(known), max(known)
        if log:
            room = (high / low) ** 0.05 if high > low else 2.0
            return cls(label, low / room, high * room, log=True)
        room = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
        return cls(label, 0.0 if zero else low - room, high + room)

    def at(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        if self.log:
            value = max(value, self.low)
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int) -> list[float]:
        """Round values on the axis, at most about so many."""
        if self.log:
            return _log_ticks(self.low, self.high)
        step = _step((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]

    def tick_text(self, value: float) -> str:
        """A tick's label."""
        if self.percent:
            return f"{value * 100:.4g} %"
        return short(value)


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for leads in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [lead * 10.0**decade for decade in decades for lead in leads]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(ticks) >= 3:
            break
    keep = -(-len(ticks) // 8)
    return ticks[::keep]


def _step(rough: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next(
        lead * power for lead in (1.0, 2.0, 2.5, 5.0, 10.0) if lead * power >= rough * 0.999
    )


def short(value: float) -> str:
    """`0`, `0.05`, `1.5`, `12k`, `3.2M`: as people write numbers on an axis."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    if value and abs(value) < 1e-3:
        exponent = math.floor(math.log10(abs(value)))
        lead = round(value / 10.0**exponent, 2)
        return f"{lead:g}e{exponent}"
    return f"{round(value, 6):g}"


def plot(
    title: str,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    *,
    size: Point = (WIDTH, HEIGHT),
) -> str:
    """Series in one frame, with a legend where there are several.

    Args:
        title: what the chart shows, for those who cannot see it.
        x: the horizontal axis.
        y: the vertical axis.
        series: what is drawn, in this order.
        size: width and height without the legend.
    """
    named = [one for one in series if one.name] if len(series) > 1 else []
    rows = _legend_rows(named, size[0])
    width, height = size[0], size[1] + LEGEND_ROW * len(rows)
    frame = _Frame(x, y, width, size[1])
    parts = [frame.grid()]
    parts += [frame.draw(one) for one in series]
    for number, row in enumerate(rows):
        parts.append(_legend(row, size[1] + LEGEND_ROW * (number + 0.6)))
    return svg(title, width, height, parts)


@dataclass(frozen=True)
class _Frame:
    """The rectangle between the axes."""

    x: Axis
    y: Axis
    width: float
    height: float

    def at(self, x: float, y: float) -> Point:
        across = LEFT + self.x.at(x) * (self.width - LEFT - RIGHT)
        down = TOP + (1 - min(1.02, max(-0.02, self.y.at(y)))) * (self.height - TOP - BOTTOM)
        return round(across, 1), round(down, 1)

    def grid(self) -> str:
        parts = []
        bottom = self.height - BOTTOM
        for tick in self.y.ticks(5):
            _, down = self.at(self.x.low, tick)
            parts.append(f'<path class="grid" d="M{LEFT} {down}H{self.width - RIGHT}"/>')
            parts.append(text(LEFT - 6, down + 4, self.y.tick_text(tick), "end"))
        for tick in self.x.ticks(6):
            across, _ = self.at(tick, self.y.low)
            parts.append(f'<path class="tick" d="M{across} {bottom}v4"/>')
            parts.append(text(across, bottom + 17, self.x.tick_text(tick), "middle"))
        parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{self.width - RIGHT}"/>')
        middle = (LEFT + self.width - RIGHT) / 2
        parts.append(text(middle, self.height - 8, self.x.label, "middle", "label"))
        high = (TOP + bottom) / 2
        turned = f'transform="rotate(-90 13 {high:.0f})"'
        parts.append(text(13, high, self.y.label, "middle", "label", turned))
        return "".join(parts)

    def draw(self, series: Series) -> str:
        points = [self.at(one.x, one.y) for one in series.marks]
        parts = []
        if series.band:
            lows = [
                self.at(m.x, low) for m, (low, _) in zip(series.marks, series.band, strict=True)
            ]
            highs = [
                self.at(m.x, high) for m, (_, high) in zip(series.marks, series.band, strict=True)
            ]
            if series.shape in ("line", "both"):
                outline = "L".join(f"{a} {b}" for a, b in [*highs, *lows[::-1]])
                parts.append(f'<path class="band" d="M{outline}Z"/>')
            else:
                bars = zip(lows, highs, strict=True)
                parts += [f'<path class="bar" d="M{a} {b}V{d}"/>' for (a, b), (_, d) in bars]
        if series.shape in ("line", "both") and len(points) > 1:
            path = "L".join(f"{a} {b}" for a, b in points)
            dash = f' stroke-dasharray="{series.dash}"' if series.dash else ""
            parts.append(f'<path class="curve" d="M{path}"{dash}/>')
        radius = {"line": 0.0, "both": 3.5, "dots": 4.0}.get(series.shape, 6.0)
        if radius:
            parts += [
                mark(one, f'<circle cx="{a}" cy="{b}" r="{radius}"/>')
                for one, (a, b) in zip(series.marks, points, strict=True)
            ]
        style = f"--c:var(--{series.colour})"
        faint = f' opacity="{series.opacity:.2f}"' if series.opacity < 1 else ""
        return f'<g class="series" style="{style}"{faint}>{"".join(parts)}</g>'


def mark(point: Mark, shape: str) -> str:
    """A shape that says something."""
    says = html.escape(point.says)
    data = "".join(f' data-{key}="{html.escape(value)}"' for key, value in point.data.items())
    return f'<g class="mark" role="img" aria-label="{says}"{data}><title>{says}</title>{shape}</g>'


def text(x: float, y: float, words: str, anchor: str, kind: str = "number", more: str = "") -> str:
    """Words at a place."""
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>'
        f"{html.escape(words)}</text>"
    )


def _legend_rows(series: Sequence[Series], width: float) -> list[list[tuple[Series, float]]]:
    rows: list[list[tuple[Series, float]]] = []
    at = width
    for one in series:
        room = 34 + 6.6 * len(one.name)
        if at + room > width:
            rows.append([])
            at = LEFT
        rows[-1].append((one, at))
        at += room
    return rows


def _legend(row: Sequence[tuple[Series, float]], y: float) -> str:
    parts = []
    for series, x in row:
        style = f"--c:var(--{series.colour})"
        faint = f' opacity="{series.opacity:.2f}"' if series.opacity < 1 else ""
        sign = f'<circle cx="{x + 8}" cy="{y}" r="4"/>'
        if series.shape in ("line", "both"):
            dash = f' stroke-dasharray="{series.dash}"' if series.dash else ""
            sign = f'<path class="curve" d="M{x} {y}h16"{dash}/>'
        parts.append(f'<g class="series" style="{style}"{faint}>{sign}</g>')
        parts.append(text(x + 21, y + 4, series.name, "start"))
    return "".join(parts)


def heat_map(
    title: str,
    columns: Sequence[str],
    layers: int,
    values: Mapping[tuple[int, str], float],
    unit: str,
) -> str:
    """A cell for each layer (from left to right) and column, on a logarithmic scale of lightness.

    Args:
        title: what it shows.
        columns: the names of its rows, from top to bottom.
        layers: how many.
        values: by (layer, column); what is missing stays empty.
        unit: of the values, for what a cell says.
    """
    positive = [value for value in values.values() if value > 0 and math.isfinite(value)]
    high = max(positive, default=1.0)
    low = max(min(positive, default=1.0), high * 1e-4)
    cell_width = max(14.0, min(30.0, 460.0 / max(1, layers)))
    left, cell_height = 18 + 7.2 * max(map(len, columns), default=1), 17.0
    width = left + cell_width * layers + 8
    height = cell_height * len(columns) + 54
    parts = []
    for row, column in enumerate(columns):
        y = row * cell_height
        parts.append(text(left - 6, y + 12.5, column, "end"))
        for layer in range(layers):
            value = values.get((layer, column))
            if value is None or not math.isfinite(value):
                continue
            shade = 0.0
            if value > low and high > low:
                shade = math.log(value / low) / math.log(high / low)
            x = left + layer * cell_width
            shape = (
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell_width - 1.5:.1f}" '
                f'height="{cell_height - 1.5:.1f}" fill-opacity="{0.04 + 0.92 * shade:.2f}"/>'
            )
            says = f"layer {layer}, {column}: {value:.4g} {unit}"
            parts.append(mark(Mark(layer, row, says), shape))
    bottom = cell_height * len(columns)
    every = max(1, -(-layers // 24))
    for layer in range(0, layers, every):
        x = left + (layer + 0.45) * cell_width
        parts.append(text(x, bottom + 14, str(layer), "middle"))
    parts.append(text(left, bottom + 30, "layer", "start", "label"))
    parts.append(_scale(left, bottom + 36, (low, high), unit))
    return svg(title, max(width, 330.0), height, parts, "heat")


def _scale(x: float, y: float, ends: Point, unit: str) -> str:
    steps = 12
    cells = "".join(
        f'<rect x="{x + 74 + 8 * i:.0f}" y="{y:.0f}" width="8" height="10" '
        f'fill-opacity="{0.04 + 0.92 * i / (steps - 1):.2f}"/>'
        for i in range(steps)
    )
    low, high = (short(float(f"{end:.2g}")) for end in ends)
    return (
        text(x + 68, y + 9, low, "end")
        + cells
        + text(x + 80 + 8 * steps, y + 9, f"{high} {unit}", "start")
    )


def svg(title: str, width: float, height: float, parts: Iterable[str], kind: str = "") -> str:
    """A whole picture of so many units."""
    name = html.escape(title)
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {width:.0f} {height:.0f}" role="group" '
        f'aria-label="{name}" xmlns="http://www.w3.org/2000/svg" '
        f'style="max-width:{1.35 * width:.0f}px">{"".join(parts)}</svg>'
    )


STYLE = """
.chart{font:12px system-ui,sans-serif;width:100%;height:auto;display:block}
.chart text{fill:var(--soft)} .chart .label{fill:var(--ink)}
.grid{stroke:var(--line)} .axis,.tick{stroke:var(--soft)}
.chart path{fill:none}
.curve{stroke:var(--c);stroke-width:2} .bar{stroke:var(--c);stroke-width:1.5}
.chart path.band{fill:var(--c);opacity:.16} .series circle{fill:var(--c)}
.heat rect{fill:var(--attention)} .heat .mark rect{stroke:var(--line);stroke-width:.5}
"""


def stack(pictures: Sequence[tuple[str, str]]) -> str:
    """Charts one below the other, each under its title."""
    parts, down, widest = [], 0.0, 0.0
    for title, picture in pictures:
        width, height = _size(picture)
        parts.append(text(4, down + 16, title, "start", "label"))
        head, inside = picture.split(">", 1)
        placed = f'{head} y="{down + 24:.0f}" width="{width:.0f}" height="{height:.0f}">'
        parts.append(placed + inside)
        down, widest = down + height + 34, max(widest, width)
    return svg("; ".join(title for title, _ in pictures), widest, down, parts)


def _size(picture: str) -> Point:
    width, height = picture.split('viewBox="0 0 ')[1].split('"')[0].split()
    return float(width), float(height)


def standalone(picture: str) -> str:
    """A chart as a file of its own, with its colours, light and dark."""
    dark = f"@media (prefers-color-scheme:dark){{svg{{{colours(DARK)}}}}}"
    style = f"<style>svg{{{colours(LIGHT)}background:var(--page)}}{dark}{STYLE}</style>"
    head, inside = picture.split(">", 1)
    width, height = _size(picture)
    return f'{head} width="{width:.0f}" height="{height:.0f}">{style}{inside}\n'
