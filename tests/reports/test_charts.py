"""Charts are well-formed, hold every point at its place, and escape what people name their series."""

import math
import xml.etree.ElementTree as ET

import pytest

from quikjax.reports.charts import BarChart, LineChart, Point, bar_chart, line_chart


def places(svg: str, kind: str) -> list[tuple[float, float]]:
    found = []
    for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}" + kind):
        if "translate" in node.get("transform", "") and len(node):
            x, y = node.get("transform", "")[len("translate(") : -1].split()
            found.append((float(x), float(y)))
    return found


@pytest.mark.parametrize("log", [False, True])
def test_points_are_where_their_numbers_say(log: bool) -> None:
    values = [1.0, 10.0, 100.0]
    chart = LineChart(title="t", x="x", y="y", series={"a": [Point(v, v) for v in values]}, log_x=log, log_y=log)
    points = places(line_chart(chart, standalone=True), "path")
    assert len(points) == 3
    place = math.log if log else float
    share = (place(values[1]) - place(values[0])) / (place(values[2]) - place(values[0]))
    for axis in (0, 1):
        assert (points[1][axis] - points[0][axis]) / (points[2][axis] - points[0][axis]) == pytest.approx(share, abs=0.005)
    assert points[0][0] < points[2][0]
    assert points[0][1] > points[2][1]


def test_names_are_escaped_and_what_cannot_be_drawn_is_left_out() -> None:
    series = {"<script>&": [Point(1, float("nan")), Point(2, 3, 0.5)], "b": [Point(0, -1)]}
    svg = line_chart(LineChart(title='"t"', x="<x>", y="y", series=series, log_y=True), standalone=True)
    assert "<script>" not in svg
    assert len(places(svg, "path")) == 1
    empty = line_chart(LineChart(title="t", x="x", y="y", series={"a": []}), standalone=True)
    assert places(empty, "path") == []


def test_bars_have_their_heights() -> None:
    svg = bar_chart(
        BarChart(title="t", x="x", y="y", names=["a", "b"], values=[1.0, 4.0], marked=frozenset({1})), standalone=True
    )
    bars = [node for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect") if "dot" in node.get("class", "")]
    heights = [float(node.get("height", "")) for node in bars]
    assert heights[1] / heights[0] == pytest.approx(4, rel=0.01)
    assert bars[1].get("class") == "dot s1"


def test_a_narrow_logarithmic_axis_has_round_numbers_too() -> None:
    svg = line_chart(
        LineChart(title="t", x="x", y="y", series={"a": [Point(726.0, 5.2), Point(878.0, 7.9)]}, log_x=True), standalone=True
    )
    texts = [node.text for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"700", "750", "800", "850"} <= set(texts) or {"700", "800", "900"} <= set(texts)
