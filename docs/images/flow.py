"""Draws `flow.svg`, the picture at the top of docs/architecture.md.

python docs/images/flow.py
"""

from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT = 800, 410
COLUMNS = [28 + 156 * index for index in range(5)]  # left edges
BOX_WIDTH, BOX_HEIGHT = 120, 74
COST_X, COST_WIDTH, COSTS_OF = 504, 268, "on the engine that will serve"
TOP, BOTTOM = 48, 240  # of the two rows of boxes
INK, PALE, RED, TINT = "#222222", "#5a6270", "#b3261e", "#f3f5f8"
STYLE = f"""
  text {{ font: 12px Helvetica, Arial, sans-serif; fill: {INK}; }}
  .lane {{ font-size: 12.5px; fill: {PALE}; }}
  .path {{ font-family: Menlo, Consolas, monospace; font-size: 12px; fill: {PALE}; }}
  .stage {{ font-size: 15px; font-weight: bold; }}
  .note {{ font-size: 12px; fill: {PALE}; }}
  .miss {{ font-size: 12px; fill: {RED}; }}
"""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """A line of text that starts, or has its middle, at (x, y)."""
    escaped = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{escaped}</text>'


def lane(x: float, y: float, width: float, height: float) -> str:
    """A tinted area around the stages that belong to the same thing."""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{TINT}"/>'


def box(x: float, y: float, name: str, lines: tuple[str, str], width: float = BOX_WIDTH) -> str:
    """A stage and two lines on what it makes."""
    frame = (
        f'<rect x="{x}" y="{y}" width="{width}" height="{BOX_HEIGHT}" rx="6" '
        'fill="white" stroke="#3b6ea8" stroke-width="1.5"/>'
    )
    middle = x + width / 2
    words = [text(middle, y + 42 + 17 * i, line, "", "middle") for i, line in enumerate(lines)]
    return frame + text(middle, y + 23, name, "stage", "middle") + "".join(words)


def arrow(points: Sequence[tuple[float, float]], colour: str = INK, marker: str = "head") -> str:
    """A line through points, with an arrow's end where it has a marker."""
    path = " ".join(f"{x},{y}" for x, y in points)
    end = f' marker-end="url(#{marker})"' if marker else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{end}/>'


def head(name: str, colour: str) -> str:
    """The marker of an arrow's end."""
    return (
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M 0 1 L 10 5 L 0 9 z" fill="{colour}"/></marker>'
    )


def middle(column: int) -> float:
    """The middle of a column's boxes."""
    return COLUMNS[column] + BOX_WIDTH / 2


def lanes() -> list[str]:
    """What each stage belongs to, and the folder it writes to."""
    right = COLUMNS[4] + BOX_WIDTH
    return [
        lane(12, 12, 468, 126),
        text(COLUMNS[0], 34, "once, for the parent", "lane"),
        text(COLUMNS[2] + BOX_WIDTH, 34, "RUN/", "path", "end"),
        lane(488, 12, 300, 126),
        text(COST_X, 34, "for every place", "lane"),
        text(right, 34, "RUN/places/<place>/", "path", "end"),
        lane(12, 204, 776, 194),
        text(COLUMNS[2], 226, "for every child", "lane"),
        text(right, 226, "RUN/children/<name>/", "path", "end"),
    ]


def boxes() -> list[str]:
    """The stages."""
    return [
        box(COLUMNS[0], TOP, "parent", ("weights, tokenizer,", "packed text")),
        box(COLUMNS[1], TOP, "library", ("every variant,", "trained by BLD")),
        box(COLUMNS[2], TOP, "score", ("parent with one", "block replaced")),
        box(COST_X, TOP, "cost", ("seconds and bytes of every variant", COSTS_OF), COST_WIDTH),
        box(COLUMNS[0], BOTTOM, "search", ("a block per layer,", "within limits")),
        box(COLUMNS[1], BOTTOM, "assemble", ("a checkpoint,", "served and timed")),
        box(COLUMNS[2], BOTTOM, "uptrain", ("global distillation", "(GKD)")),
        box(COLUMNS[3], BOTTOM, "evaluate", ("quality on test text,", "final timing")),
        box(COLUMNS[4], BOTTOM, "report", ("one page,", "a model card")),
    ]


def arrows() -> list[str]:
    """Which stage reads which, the loop of corrections, and what comes of the child."""
    row, low_row = TOP + BOX_HEIGHT / 2, BOTTOM + BOX_HEIGHT / 2
    high, low = TOP + BOX_HEIGHT, BOTTOM + BOX_HEIGHT
    costs, bus, back = COST_X + COST_WIDTH / 2, 172, BOTTOM + BOX_HEIGHT + 24
    drawn = [
        arrow([(COLUMNS[0] + BOX_WIDTH, row), (COLUMNS[1], row)]),
        arrow([(COLUMNS[1] + BOX_WIDTH, row), (COLUMNS[2], row)]),
        arrow([(costs, high), (costs, bus), (middle(0), bus), (middle(0), BOTTOM)]),
        arrow([(middle(2), high), (middle(2), bus)], marker=""),
        f'<rect x="{middle(1) - 4}" y="{bus - 4}" width="8" height="8" fill="white"/>',
        arrow([(middle(1), high), (middle(1), BOTTOM)]),
        text(middle(2) + 8, bus - 10, "scores", "note"),
        text(costs + 8, bus - 10, "costs", "note"),
        text(middle(1) + 8, bus + 20, "weights", "note"),
    ]
    for column in range(4):
        start, end = COLUMNS[column] + BOX_WIDTH, COLUMNS[column + 1]
        drawn.append(arrow([(start, low_row), (end, low_row)]))
    loop = [(middle(1), low), (middle(1), back), (middle(0), back), (middle(0), low)]
    return [
        *drawn,
        arrow(loop, RED, "miss"),
        text(COLUMNS[0], back + 20, "a miss corrects the predictions", "miss"),
        text(COLUMNS[0], back + 37, "and the search runs again", "miss"),
        arrow([(middle(2), low), (middle(2), back + 6)]),
        text(COLUMNS[2], back + 25, "export, serve", "stage"),
        text(COLUMNS[2], back + 43, "nemotron-nas and GGUF, read back and compared; vLLM", ""),
    ]


def draw() -> str:
    """The picture."""
    label = "Stages of Puzzle: library and score once, cost per place, the rest per child"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{label}">',
            f"<style>{STYLE}</style>",
            f"<defs>{head('head', INK)}{head('miss', RED)}</defs>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            *lanes(),
            *arrows(),
            *boxes(),
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
