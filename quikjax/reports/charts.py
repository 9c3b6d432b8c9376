"""Charts as SVG text: for a page, inline, or as a file of its own. Nothing is loaded from anywhere.

Colours are classes (`s0`, `s1`, ...), given values for light and dark by `STYLE`; series differ in their dashes and markers too,
so that they can be told apart without colour. Every point says its figures when it is pointed at.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

Number = int | float

# Okabe and Ito's palette, told apart by most eyes; lighter in the dark.
_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9", "#6a51a3", "#555555")
_DARK = ("#56b4e9", "#ff8c42", "#2ecc9a", "#e39ac4", "#e6c229", "#9ad0f5", "#b39ddb", "#bbbbbb")
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "4 2", "1 2", "10 4", "3 1")
SERIES = len(_LIGHT)


def _colours(palette: Sequence[str], text: str, faint: str, ground: str) -> str:
    series = "".join(f"--s{index}:{colour};" for index, colour in enumerate(palette))
    return f"{series}--chart-text:{text};--chart-faint:{faint};--chart-ground:{ground};"


STYLE = (
    f":root{{{_colours(_LIGHT, '#222', '#ddd', '#fff')}}}"
    f"@media(prefers-color-scheme:dark){{:root{{{_colours(_DARK, '#ddd', '#444', '#16181d')}}}}}"
    "svg.chart{font:12px system-ui,sans-serif;fill:var(--chart-text);max-width:100%;height:auto}"
    "svg.chart .grid{stroke:var(--chart-faint);stroke-width:1}"
    "svg.chart .rule{stroke:var(--chart-text);stroke-width:1;stroke-dasharray:2 3}"
    "svg.chart .line{fill:none;stroke-width:2}"
    + "".join(
        f"svg.chart .line.s{index}{{stroke:var(--s{index});stroke-dasharray:{_DASHES[index] or 'none'}}}"
        f"svg.chart .dot.s{index}{{fill:var(--s{index});stroke:var(--s{index})}}"
        for index in range(SERIES)
    )
)


@dataclasses.dataclass(frozen=True)
class Point:
    """A point, with the standard error of `y` where it has one."""

    x: Number
    y: Number
    error: Number | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineChart:
    """Series of points over a common axis; a logarithmic axis leaves out what is not positive.

    `rules` are levels of `y` by name.
    """

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[Point]]
    rules: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    log_x: bool = False
    log_y: bool = False
    lines: bool = True


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 340, 64, 16, 16, 44


def line_chart(chart: LineChart, *, standalone: bool = False) -> str:
    """The chart as an `<svg>` element; `standalone` makes it a file with its own colours and background."""
    x = _Axis.of([p.x for points in chart.series.values() for p in points], chart.log_x, _LEFT, _WIDTH - _RIGHT)
    levels = [p.y + sign * (p.error or 0) for points in chart.series.values() for p in points for sign in (-1, 1)]
    y = _Axis.of([*levels, *chart.rules.values()], chart.log_y, _HEIGHT - _BOTTOM, _TOP)
    parts = [*_frame(x, y, chart.x, chart.y)]
    for name, level in chart.rules.items():
        if y.has(level):
            at = y.at(level)
            parts += [
                f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>',
                f'<text x="{_WIDTH - _RIGHT}" y="{at - 4:.1f}" text-anchor="end">{escape(name)}</text>',
            ]
    for index, (name, points) in enumerate(chart.series.items()):
        parts += _series(index % SERIES, name, [p for p in points if x.has(p.x) and y.has(p.y)], x, y, chart.lines)
    legend, height = _legend(list(chart.series))
    return _svg(chart.title, [*parts, *legend], _HEIGHT + height, standalone)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BarChart:
    """Bars of heights `values` named `names` along the axis, those in `marked` in another colour."""

    title: str
    x: str
    y: str
    names: Sequence[str]
    values: Sequence[Number]
    marked: frozenset[int] = frozenset()
    log_y: bool = False


def bar_chart(chart: BarChart, *, standalone: bool = False) -> str:
    """The chart as an `<svg>` element; many bars are drawn without gaps, and only some of them are named."""
    count = max(len(chart.values), 1)
    low = min((value for value in chart.values if value > 0), default=1.0) if chart.log_y else 0.0
    y = _Axis.of([low, *chart.values], chart.log_y, _HEIGHT - _BOTTOM, _TOP)
    wide = (_WIDTH - _RIGHT - _LEFT) / count
    gap = min(2.0, wide / 5)
    parts = _frame(None, y, chart.x, chart.y)
    for index, (name, value) in enumerate(zip(chart.names, chart.values, strict=True)):
        if not y.has(value):
            continue
        top = y.at(value)
        parts.append(
            f'<rect class="dot s{1 if index in chart.marked else 0}" stroke="none" x="{_LEFT + index * wide + gap / 2:.2f}" '
            f'y="{top:.1f}" width="{max(wide - gap, 0.5):.2f}" height="{max(_HEIGHT - _BOTTOM - top, 0.5):.1f}">'
            f"<title>{escape(name)}: {value:.4g}</title></rect>"
        )
    # As many names as have room beside each other: a letter takes about 7 of the drawing's units.
    longest = max((len(name) for name in chart.names), default=0)
    every = max(1, math.ceil((7 * longest + 7) / wide))
    for index in range(0, count if chart.names else 0, every):
        middle = _LEFT + (index + 0.5) * wide
        parts.append(
            f'<text x="{middle:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{escape(chart.names[index])}</text>'
        )
    return _svg(chart.title, parts, _HEIGHT, standalone)


_STRIP_WIDTH, _STRIP_HEIGHT, _STRIP_LEFT = 320, 110, 40


def range_chart(title: str, values: Sequence[Number], marked: Sequence[int]) -> str:
    """A small chart of one value per column, on a logarithmic axis, the `marked` columns in another colour.

    All columns of one colour are one path, so that a page can hold many of these.
    """
    y = _Axis.of(values, True, _STRIP_HEIGHT - 8, 6)
    wide = (_STRIP_WIDTH - _STRIP_LEFT - 4) / max(1, len(values))
    chosen = set(marked)

    def bars(wanted: bool) -> str:
        lines = [
            f"M{_STRIP_LEFT + (column + 0.5) * wide:.1f} {_STRIP_HEIGHT - 8}V{y.at(value):.1f}"
            for column, value in enumerate(values)
            if (column in chosen) == wanted and y.has(value)
        ]
        return f'<path class="dot s{int(wanted)}" stroke-width="{max(wide, 0.7):.2f}" d="{"".join(lines)}"/>'

    ticks = y.ticks()
    shown = [ticks[0], ticks[-1]]
    labels = [f'<text x="{_STRIP_LEFT - 4}" y="{y.at(tick) + 4:.1f}" text-anchor="end">{tick:.3g}</text>' for tick in shown]
    parts = [bars(False), bars(True), *labels]
    label = escape(title, quote=True)
    view = f"0 0 {_STRIP_WIDTH} {_STRIP_HEIGHT}"
    inside = f"<title>{label}</title>{''.join(parts)}"
    return f'<svg class="chart strip" role="img" aria-label="{label}" viewBox="{view}">{inside}</svg>\n'


@dataclasses.dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high` as pixels from `start` to `end`."""

    low: Number
    high: Number
    log: bool
    start: Number
    end: Number

    @classmethod
    def of(cls, values: Sequence[Number], log: bool, start: Number, end: Number) -> "_Axis":
        good = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
        low, high = min(good, default=1.0 if log else 0.0), max(good, default=1.0)
        if log:
            low, high = (low / 1.1, high * 1.1)
        else:
            room = (high - low or abs(high) or 1.0) * 0.05
            # Zero is where a scale begins that comes near it.
            low, high = (0.0 if 0 <= low <= high / 2 else low - room, high + room)
        return cls(low, high, log, start, end)

    def has(self, value: Number) -> bool:
        return math.isfinite(value) and (value > 0 or not self.log)

    def at(self, value: Number) -> float:
        place: Callable[[Number], Number] = math.log if self.log else float
        share = (place(value) - place(self.low)) / (place(self.high) - place(self.low))
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[Number]:
        """Round numbers within the axis, four to ten of them."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            every = max(1, len(decades) // 8)
            steps = (1, 2, 5) if len(decades) <= 3 else (1,)
            found = [step * 10.0**decade for decade in decades[::every] for step in steps]
        if not self.log or sum(self.low <= tick <= self.high for tick in found) < 3:
            raw = (self.high - self.low) / 6
            power = 10.0 ** math.floor(math.log10(raw))
            step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
            found = [step * index for index in range(math.floor(self.low / step), math.ceil(self.high / step) + 1)]
        inside = [tick for tick in found if self.low <= tick <= self.high]
        return inside if len(inside) > 1 else [self.low, self.high]


def _frame(x: "_Axis | None", y: "_Axis", x_name: str, y_name: str) -> list[str]:
    parts = []
    for tick in y.ticks():
        at = y.at(tick)
        parts += [
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>',
            f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:.4g}</text>',
        ]
    for tick in [] if x is None else x.ticks():
        at = x.at(tick) if x is not None else 0.0
        parts += [
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>',
            f'<text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{tick:.4g}</text>',
        ]
    middle = (_HEIGHT - _BOTTOM + _TOP) / 2
    return [
        *parts,
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_name)}</text>',
        f'<text x="14" y="{middle:.0f}" text-anchor="middle" transform="rotate(-90 14 {middle:.0f})">{escape(y_name)}</text>',
    ]


def _series(index: int, name: str, points: Sequence[Point], x: _Axis, y: _Axis, lines: bool) -> list[str]:
    parts = []
    if lines and len(points) > 1:
        path = " ".join(f"{x.at(p.x):.1f},{y.at(p.y):.1f}" for p in points)
        parts.append(f'<polyline class="line s{index}" points="{path}"/>')
    for p in points:
        at, level = x.at(p.x), y.at(p.y)
        if p.error is not None and y.has(p.y - p.error):
            parts.append(
                f'<line class="dot s{index}" x1="{at:.1f}" x2="{at:.1f}" '
                f'y1="{y.at(p.y - p.error):.1f}" y2="{y.at(p.y + p.error):.1f}"/>'
            )
        spread = "" if p.error is None else f" ± {p.error:.2g}"
        parts.append(f"{_marker(index, at, level)}<title>{escape(name)}: {p.x:.4g}, {p.y:.5g}{spread}</title></path>")
    return parts


def _marker(index: int, x: Number, y: Number) -> str:
    """A disc, square, triangle or rhombus, left open for its title."""
    shapes = (
        "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
        "M-3-3h6v6h-6z",
        "M0-4l4 7h-8z",
        "M0-4l4 4l-4 4l-4-4z",
    )
    return f'<path class="dot s{index}" transform="translate({x:.1f} {y:.1f})" d="{shapes[index % len(shapes)]}">'


def _legend(names: Sequence[str]) -> tuple[list[str], int]:
    """Names below the chart, in as many lines as they need, and the height that takes. One series needs none."""
    if len(names) < 2:
        return [], 0
    parts, x, line = [], float(_LEFT), 0
    for index, name in enumerate(names):
        wide = 40 + 7 * len(name)
        if x + wide > _WIDTH and x > _LEFT:
            x, line = float(_LEFT), line + 1
        y = _HEIGHT + 8 + 18 * line
        series = index % SERIES
        parts += [
            f'<line class="line s{series}" x1="{x:.0f}" x2="{x + 22:.0f}" y1="{y}" y2="{y}"/>',
            f"{_marker(series, x + 11, y)}</path>",
            f'<text x="{x + 28:.0f}" y="{y + 4}">{escape(name)}</text>',
        ]
        x += wide
    return parts, 18 * (line + 1) + 4


def _svg(title: str, parts: Sequence[str], height: int, standalone: bool) -> str:
    inside = "\n".join(parts)
    head = f"<title>{escape(title)}</title>"
    if standalone:
        head += f'<style>{STYLE}</style><rect width="100%" height="100%" style="fill:var(--chart-ground)"/>'
    space = ' xmlns="http://www.w3.org/2000/svg"' if standalone else ""
    label = escape(title, quote=True)
    return f'<svg{space} class="chart" role="img" aria-label="{label}" viewBox="0 0 {_WIDTH} {height}">{head}\n{inside}\n</svg>\n'
