"""Small drawings as inline SVG: points, curves, a waterfall and bars, in the page's own colours.

Draws what it is given; knows nothing of plans. Colours are CSS variables, so that a page
decides what is light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from tongyun.report import number

WIDTH, HEIGHT = 720, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 44
PANEL, PANEL_HEIGHT, PANEL_LEFT = 470, 220, 50
"""Of a drawing half as wide as the page."""


@dataclass(frozen=True, kw_only=True)
class Point:
    x: float
    y: float
    title: str
    style: str
    """A class of the page's stylesheet."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar of a waterfall."""

    name: str
    size: float
    label: str
    style: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve through points in order of x."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str
    filled: bool = False
    """Down to zero, for a level of which the area means something."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A vertical line at a value of x."""

    x: float
    name: str


def points(marks: Sequence[Point], *, x: str, y: str) -> str:
    """A scatter plot from zero, each mark with its title as a tooltip."""
    x_most, y_most = (_above(max(getattr(mark, axis) for mark in marks)) for axis in ("x", "y"))
    across = (WIDTH - LEFT - RIGHT) / x_most
    up = (HEIGHT - TOP - BOTTOM) / y_most
    floor = HEIGHT - BOTTOM
    parts = []
    for i in range(6):
        at_x, at_y = LEFT + across * x_most * i / 5, floor - up * y_most * i / 5
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at_y:.1f}" y2="{at_y:.1f}"/>')
        parts.append(_text(LEFT - 8, at_y + 4, number(y_most * i / 5), "end"))
        parts.append(_text(at_x, floor + 18, number(x_most * i / 5), "middle"))
    for mark in marks:
        place = f'cx="{LEFT + across * mark.x:.1f}" cy="{floor - up * mark.y:.1f}"'
        radius = 7 if mark.style == "best" else 4
        parts.append(
            f'<circle class="{mark.style}" {place} r="{radius}"><title>{escape(mark.title)}</title></circle>'
        )
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 6, x, "end"))
    parts.append(_text(LEFT + 6, TOP + 4, y, "start"))
    return _svg(HEIGHT, parts, f"{y} over {x}")


def curves(
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    log: bool = False,
    rules: Sequence[Rule] = (),
    span: tuple[float, float] | None = None,
) -> str:
    """Lines from zero up over one axis, which is logarithmic with `log`; half as wide as the page.

    The axis reaches as far as `span`, or as what is drawn.
    """
    begin = min(line.x[0] for line in lines) if span is None else span[0]
    ends = [line.x[-1] for line in lines] + [rule.x for rule in rules]
    end = max(ends) if span is None else span[1]
    across = _Log(begin, end) if log else _Linear(begin, end)
    y_most = _above(max(max(line.y, default=0.0) for line in lines) or 1.0)
    floor = PANEL_HEIGHT - BOTTOM
    up = (floor - TOP) / y_most
    parts = []
    for i in range(6):
        at_y = floor - up * y_most * i / 5
        parts.append(
            f'<line class="grid" x1="{PANEL_LEFT}" x2="{PANEL - RIGHT}" y1="{at_y:.1f}" y2="{at_y:.1f}"/>'
        )
        parts.append(_text(PANEL_LEFT - 6, at_y + 4, _short(y_most * i / 5), "end"))
    for tick in across.ticks():
        at = across.place(tick)
        anchor = "middle" if at < PANEL - RIGHT - 12 else "end"
        parts.append(_text(min(at, PANEL - 2), floor + 16, _short(tick), anchor))
    for line in lines:
        parts.append(_path(line, [across.place(value) for value in line.x], floor, up))
    for i, rule in enumerate(rules):
        at = across.place(rule.x)
        parts.append(f'<line class="rule" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{floor}"/>')
        parts.append(_text(at - 4, TOP + 12 + 14 * i, rule.name, "end"))
    parts.append(_text(PANEL - RIGHT, PANEL_HEIGHT - 6, x, "end"))
    parts.append(_text(PANEL_LEFT + 4, TOP - 4, y, "start"))
    return _svg(PANEL_HEIGHT, parts, f"{y} over {x}", width=PANEL)


def _short(value: float) -> str:
    """`25k` where an axis has no room for 25,000."""
    factor, suffix = (1e6, "M") if value >= 1e6 else (1e3, "k") if value >= 1e4 else (1.0, "")
    return f"{number(value / factor)}{suffix}"


def _path(line: Line, places: Sequence[float], floor: float, up: float) -> str:
    steps = [f"{at:.1f} {floor - up * value:.1f}" for at, value in zip(places, line.y, strict=True)]
    drawn = "M" + "L".join(steps)
    title = f"<title>{escape(line.name)}</title>"
    area = ""
    if line.filled:
        ground = f"{drawn}L{places[-1]:.1f} {floor}L{places[0]:.1f} {floor}Z"
        area = f'<path class="area {line.style}" d="{ground}">{title}</path>'
    return f'{area}<path class="curve {line.style}" d="{drawn}">{title}</path>'


@dataclass(frozen=True)
class _Linear:
    begin: float
    end: float

    def place(self, value: float) -> float:
        span = (self.end - self.begin) or 1.0
        return PANEL_LEFT + (PANEL - PANEL_LEFT - RIGHT) * (value - self.begin) / span

    def ticks(self) -> list[float]:
        """Three to seven round values."""
        span = (self.end - self.begin) or 1.0
        power = 10.0 ** math.floor(math.log10(span / 4))
        step = next(times * power for times in (1, 2, 2.5, 5, 10) if span / (times * power) <= 6)
        first = math.ceil(self.begin / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.end / step + 1e-9) + 1)]


@dataclass(frozen=True)
class _Log:
    """Both ends above zero."""

    begin: float
    end: float

    def place(self, value: float) -> float:
        low, high = math.log10(self.begin), math.log10(self.end)
        return PANEL_LEFT + (PANEL - PANEL_LEFT - RIGHT) * (math.log10(value) - low) / ((high - low) or 1.0)

    def ticks(self) -> list[float]:
        """Powers of ten, and between them as many as there is room for."""
        low, high = math.floor(math.log10(self.begin)), math.ceil(math.log10(self.end))
        found: list[float] = []
        for times in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            values = (n * 10.0**power for power in range(low, high + 1) for n in times)
            tried = [v for v in values if self.begin * 0.999 <= v <= self.end * 1.001]
            if found and len(tried) > 8:
                break
            found = tried
        return found


def waterfall(bars: Sequence[Bar], *, title: str) -> str:
    """Bars that begin where the one above ends, so that the last ends at the sum."""
    row, name_width, label_width = 20, 150, 96
    height = row * len(bars) + 8
    whole = sum(bar.size for bar in bars) or 1.0
    across = (WIDTH - name_width - label_width) / whole
    parts, begin = [], 0.0
    for i, bar in enumerate(bars):
        y = 4 + row * i
        left, width = name_width + across * begin, max(across * bar.size, 1.0)
        parts.append(_text(name_width - 8, y + 13, bar.name, "end"))
        parts.append(
            f'<rect class="{bar.style}" x="{left:.1f}" y="{y + 2}" width="{width:.1f}" height="{row - 5}">'
            f"<title>{escape(bar.name)}: {escape(bar.label)}</title></rect>"
        )
        parts.append(_text(left + width + 5, y + 13, bar.label, "start"))
        begin += bar.size
    return _svg(height, parts, title)


def ranges(rows: Mapping[str, tuple[float, float, float]], *, unit: str) -> str:
    """A bar for each name up to its value, with a whisker from the least to the most."""
    row, name_width, label_width = 30, 150, 150
    across = (WIDTH - name_width - label_width) / max(most for _, _, most in rows.values())
    parts = []
    for i, (name, (value, low, high)) in enumerate(rows.items()):
        y = 4 + row * i
        middle = y + row / 2
        parts.append(_text(name_width - 8, middle + 4, name, "end"))
        box = f'x="{name_width}" y="{y + 5}" width="{across * value:.1f}" height="{row - 10}"'
        parts.append(f'<rect class="best" {box}/>')
        ends = f'x1="{name_width + across * low:.1f}" x2="{name_width + across * high:.1f}"'
        parts.append(f'<line class="whisker" {ends} y1="{middle}" y2="{middle}"/>')
        span = f" ({number(low)}–{number(high)})" if low < high else ""
        parts.append(
            _text(name_width + across * high + 6, middle + 4, f"{unit}{number(value)}{span}", "start")
        )
    return _svg(row * len(rows) + 8, parts, unit)


def _above(value: float) -> float:
    """Five round steps that reach `value`."""
    step = value / 5 if value > 0 else 1.0
    power = 10.0 ** math.floor(math.log10(step))
    nice = next(
        (
            times
            for times in (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
            if times * power >= step * 0.999999
        ),
        10.0,
    )
    return 5 * power * nice


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(height: float, parts: Sequence[str], label: str, *, width: int = WIDTH) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(label)}">{body}</svg>'
