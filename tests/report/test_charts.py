"""Charts: round ticks, marks where they belong, files that stand alone."""

import itertools
import re
import xml.etree.ElementTree as ElementTree

import pytest

from puzzle.model.architecture import Architecture
from puzzle.report import charts, strip
from puzzle.report.charts import Axis, Mark, Series


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.05, "0.05"), (1.5, "1.5"), (12_000, "12k"), (3_200_000, "3.2M"), (2e-5, "2e-5")],
)
def test_numbers_read_as_people_write_them(value, text):
    assert charts.short(value) == text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 0.31), (1, 2.7), (0, 400_000), (-1, 1)])
def test_ticks_are_round_and_on_the_axis(low, high):
    ticks = Axis("", low, high).ticks(5)
    assert 2 <= len(ticks) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    steps = {round(b - a, 12) for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1 and str(steps.pop())[0] in "0125"


def test_ticks_of_a_logarithmic_axis():
    assert Axis("", 0.001, 10, log=True).ticks(5) == pytest.approx([0.001, 0.01, 0.1, 1, 10])
    assert Axis("", 64, 512, log=True).ticks(5) == pytest.approx([100, 200, 500])


def test_a_mark_stands_where_its_values_are():
    x, y = Axis("x", 0, 10), Axis("y", 0, 100)
    svg = charts.plot("t", x, y, [Series("", [Mark(0, 0, "low"), Mark(10, 100, "high")])])
    root = ElementTree.fromstring(svg)
    circles = [element.attrib for element in root.iter() if element.tag.endswith("circle")]
    low, high = ((float(c["cx"]), float(c["cy"])) for c in circles)
    assert low == (charts.LEFT, charts.HEIGHT - charts.BOTTOM)
    assert high == (charts.WIDTH - charts.RIGHT, charts.TOP)


def test_what_a_mark_says_is_escaped():
    svg = charts.plot("<t>", Axis("", 0, 1), Axis("", 0, 1), [Series("", [Mark(0, 0, '"<b>&')])])
    ElementTree.fromstring(svg)
    assert "<b>" not in svg and "<t>" not in svg


def test_a_heat_map_is_darker_where_more_is_lost():
    values = {(0, "a"): 0.01, (1, "a"): 1.0, (2, "a"): 0.1}
    svg = charts.heat_map("t", ["a"], 3, values, "nats")
    shades = [float(shade) for shade in re.findall(r'fill-opacity="([\d.]+)"/></g>', svg)]
    assert shades[0] < shades[2] < shades[1]
    assert "layer 1, a: 1 nats" in svg


def test_a_strip_has_a_column_per_layer_and_stands_alone(tiny):
    names = ["gqa_2+gated_96", "no_op+gated_32", "gqa_1+linear", "gqa_2+no_op"]
    svg = strip.architecture("t", Architecture.from_names(names), tiny.shape)
    assert svg.count('class="mark"') == 4
    frames, kept = svg.count('class="frame"'), svg.count('class="kept"')
    assert (frames, kept) == (8, 3)
    file = charts.standalone(svg)
    root = ElementTree.fromstring(file)
    assert "prefers-color-scheme" in file and float(root.attrib["width"]) > 100


def test_eighty_layers_are_shown_in_rows(tiny):
    blocks = Architecture.from_names(["gqa_1+gated_32"] * 80)
    root = ElementTree.fromstring(strip.architecture("t", blocks, tiny.shape))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert width < 640 and height > 4 * strip.ROW
