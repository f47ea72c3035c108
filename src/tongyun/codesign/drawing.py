"""Small drawings as inline SVG: points, a waterfall and stacked bars, in the page's own colours.

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


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{body}</svg>'
