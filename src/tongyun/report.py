"""How numbers, tables, plots and JSON look, everywhere in Tongyun.

A number is shown with three significant digits, its unit, its range if it has one,
and where it comes from. JSON is SI and strict. Knows nothing of what the numbers mean.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tongyun.units import Source

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console, RenderableType
    from rich.progress import Progress
    from rich.table import Table

NOTHING = "–"
"""What a cell shows where there is no number."""

SOURCE_STYLE: Mapping[Source, str] = {
    Source.MEASURED: "green",
    Source.SIMULATED: "cyan",
    Source.ANALYTIC: "blue",
    Source.VENDOR: "white",
    Source.DERIVED: "magenta",
    Source.ASSUMED: "yellow",
}
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_SMALL_PREFIXES = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))


# Numbers.


def number(value: float | None, digits: int = 3) -> str:
    """`1,234`, `12.3`, `0.00123`: `digits` significant ones; nothing or not-a-number is a dash."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -4 or exponent > 14:
        return f"{value:.{digits - 1}e}"
    places = max(0, digits - 1 - exponent)
    text = f"{value:,.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def scale(value: float, unit: str) -> tuple[float, str]:
    """The power of ten and prefixed unit in which `value` of an SI `unit` reads best.

    Seconds go down to ns and never up; dollars, tokens and plain counts keep their unit.
    """
    if unit in ("", "$", "%") or unit.startswith(("$", "tokens", "requests")):
        return 1.0, unit
    size = abs(value)
    prefixes = _SMALL_PREFIXES if unit == "s" else _PREFIXES
    for factor, prefix in prefixes:
        if size >= factor:
            return factor, prefix + unit
    return (1.0, unit) if size == 0 else (prefixes[-1][0], prefixes[-1][1] + unit)


def quantity(value: float | None, unit: str, *, low: float | None = None, high: float | None = None) -> str:
    """`2.4 TB/s`, or `2.4 (1.6–2.8) TB/s` with a range, from SI."""
    if value is None or not math.isfinite(value):
        return number(value)
    factor, name = scale(value, unit)
    span = ""
    if low is not None and high is not None and low < high:
        span = f" ({number(low / factor)}–{number(high / factor)})"
    if name.startswith("$"):
        return f"{name[:1]}{number(value)}{span}{name[1:]}"
    return f"{number(value / factor)}{span} {name}".rstrip()


def source_tag(sources: str | Source | Sequence[Source] | frozenset[Source]) -> str:
    """Rich markup of a source, or of a mixture such as `analytic+assumed`, in one colour each."""
    text = sources if isinstance(sources, str) else Source.mix(sources)
    names = [Source(name) for name in str(text).split("+") if name]
    return "+".join(f"[{SOURCE_STYLE[name]}]{name.value}[/]" for name in names)


# Tables.


@dataclass(frozen=True, kw_only=True)
class Column:
    """A table column; numbers stand to the right, and only long texts are meant to wrap."""

    name: str
    left: bool = False
    wrap: bool = False


def column(name: str, *, left: bool = False, wrap: bool = False) -> Column:
    return Column(name=name, left=left, wrap=wrap)


def table(
    title: str, columns: Sequence[Column], rows: Sequence[Sequence[str]], *, caption: str | None = None
) -> Table:
    """The one table style. Cells are text already; markup in them is obeyed."""
    from rich import box
    from rich.table import Table

    drawn = Table(
        title=title or None,
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        caption_style="dim",
        header_style="bold",
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for item, width in zip(columns, _widths(columns, rows, console().width), strict=True):
        drawn.add_column(
            item.name,
            justify="left" if item.left else "right",
            width=width,
            no_wrap=item.left and not item.wrap,
            overflow="fold",
        )
    for row in rows:
        drawn.add_row(*row)
    return drawn


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[str]], available: int) -> list[int]:
    """Width of each column: as its longest cell, or narrower so that all of them fit.

    Long texts give way first, then numbers, whose range goes to a second line whole.
    """
    cells = [[item.name, *(_bare(row[i]) for row in rows)] for i, item in enumerate(columns)]
    widths = [max(map(len, column_cells)) for column_cells in cells]
    excess = sum(widths) + 2 * len(columns) - available
    least = [
        20 if item.wrap else max(len(word) for cell in column_cells for word in cell.split() or [""])
        for item, column_cells in zip(columns, cells, strict=True)
    ]
    giving = [i for i, item in enumerate(columns) if item.wrap or not item.left]
    for i in sorted(giving, key=lambda i: (not columns[i].wrap, least[i] - widths[i])):
        given = max(0, min(excess, widths[i] - least[i]))
        widths[i] -= given
        excess -= given
    return widths


def _bare(cell: str) -> str:
    """A cell's text without its markup."""
    return re.sub(r"(?<!\\)\[/?[a-z ]*\]", "", cell)


def console(*, stderr: bool = False) -> Console:
    """The console all commands print to; wide when nobody watches, so that no cell is cut."""
    from rich.console import Console

    plain = Console(stderr=stderr, highlight=False)
    return plain if plain.is_terminal else Console(stderr=stderr, highlight=False, width=200)


def show(*parts: RenderableType) -> None:
    """Print to standard output."""
    out = console()
    for part in parts:
        out.print(part)


def progress() -> Progress:
    """The one progress bar: on standard error, gone when done, silent when nobody watches."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    watched = console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=watched,
        transient=True,
        disable=not watched.is_terminal,
    )


# JSON.


def plain(value: Any) -> Any:
    """What JSON can hold: dataclasses as objects, enums as their value, arrays and sets as lists.

    Not-a-number and infinities become null: JSON has neither, and a reader must be
    able to tell "no number" from a number.
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return _plain_parts(value)


def _plain_parts(value: Any) -> Any:
    """`plain` of what has parts, or a text form of its own."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | deque | range):
        return [plain(item) for item in value]
    if isinstance(value, frozenset | set):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, Path | date):
        return value.isoformat() if isinstance(value, date) else str(value)
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no JSON form")


def to_json(value: Any, *, indent: int | None = 2) -> str:
    """Strict JSON of anything `plain` accepts, in the order given."""
    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


# Plots.


def bars(values: Mapping[str, float], unit: str, *, width: int = 40) -> str:
    """Horizontal bars in the terminal, longest `width` cells; negative values are drawn as zero."""
    if not values:
        return ""
    most = max(*values.values(), 0.0) or 1.0
    label = max(map(len, values))
    lines = []
    for name, value in values.items():
        eighths = round(8 * width * max(value, 0.0) / most)
        bar = "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")
        lines.append(f"{name:<{label}}  {bar:<{width}}  {quantity(value, unit)}")
    return "\n".join(lines)


MARKS = "●○▲△■□◆◇"


def scatter(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x: str,
    y: str,
    width: int = 64,
    height: int = 16,
) -> str:
    """Points in the terminal, one mark a series; later series are drawn over earlier ones."""
    points = [point for line in series.values() for point in line if all(map(math.isfinite, point))]
    if not points:
        return "no points"
    x_low, x_high = _span([point[0] for point in points])
    y_low, y_high = _span([point[1] for point in points])
    grid = [[" "] * width for _ in range(height)]
    for mark, line in zip(_marks(len(series)), series.values(), strict=True):
        for px, py in line:
            if math.isfinite(px) and math.isfinite(py):
                col = round((px - x_low) / (x_high - x_low) * (width - 1))
                row = round((py - y_low) / (y_high - y_low) * (height - 1))
                grid[height - 1 - row][col] = mark
    top, bottom = number(y_high), number(y_low)
    margin = max(len(top), len(bottom))
    edge = [top, *[""] * (height - 2), bottom]
    lines = [f"{side:>{margin}} │{''.join(cells)}" for side, cells in zip(edge, grid, strict=True)]
    left, right = number(x_low), number(x_high)
    lines.append(" " * margin + " └" + "─" * width)
    lines.append(" " * (margin + 2) + left + right.rjust(width - len(left)))
    legend = "  ".join(f"{mark} {name}" for mark, name in zip(_marks(len(series)), series, strict=True))
    return "\n".join([y, *lines, f"{x:>{margin + 2 + width}}", legend])


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _marks(count: int) -> Iterator[str]:
    return (MARKS[i % len(MARKS)] for i in range(count))


@contextmanager
def plot(path: Path, *, title: str, x: str, y: str) -> Iterator[Axes]:
    """Axes in the one style; what was drawn is written to `path` (its suffix decides) on leaving."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(cast(Any, _PLOT_STYLE)):
        drawn = Figure(figsize=(7.2, 4.2), layout="constrained")
        FigureCanvasAgg(drawn)
        axes = drawn.add_subplot()
        axes.set_title(title, loc="left")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        yield axes
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        drawn.savefig(temporary, format=path.suffix.removeprefix(".") or "png")
        temporary.replace(path)


_PLOT_STYLE: Mapping[str, Any] = {
    "figure.dpi": 120,
    "font.size": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "tongyun",
}
