"""How numbers, tables, plots and JSON look."""

import json
import math
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tongyun import report
from tongyun.units import DType, Source


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "∞"),
        (-math.inf, "-∞"),
        (0, "0"),
        (-0.0, "0"),
        (1, "1"),
        (12.345, "12.3"),
        (0.0012345, "0.00123"),
        (1234.4, "1,234"),
        (999.6, "1,000"),
        (2.40, "2.4"),
        (-7.0, "-7"),
        (1.5e-7, "1.50e-07"),
        (3e15, "3.00e+15"),
        (np.float64(2.5), "2.5"),
    ],
)
def test_number(value: float | None, shown: str) -> None:
    assert report.number(value) == shown


@given(st.floats(1e-4, 1e14))
def test_number_is_within_half_of_the_third_digit(value: float) -> None:
    assert float(report.number(value).replace(",", "")) == pytest.approx(value, rel=5.1e-3)


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (350e9, "B/s", "350 GB/s"),
        (118.7e12, "FLOP/s", "119 TFLOP/s"),
        (5e-6, "s", "5 µs"),
        (3.2e-10, "s", "0.32 ns"),
        (90.0, "s", "90 s"),
        (0.0, "s", "0 s"),
        (400.0, "W", "400 W"),
        (350e3, "W", "350 kW"),
        (1.25, "$/h", "$1.25/h"),
        (0.00042, "$", "$0.00042"),
        (32768.0, "tokens", "32,768 tokens"),
        (0.5, "", "0.5"),
        (None, "s", "–"),
        (math.nan, "s", "–"),
    ],
)
def test_quantity(value: float | None, unit: str, shown: str) -> None:
    assert report.quantity(value, unit) == shown


def test_a_range_stands_behind_the_value_in_its_unit() -> None:
    assert report.quantity(2.4e12, "B/s", low=1.6e12, high=2.8e12) == "2.4 (1.6–2.8) TB/s"
    assert report.quantity(1.0, "$/h", low=0.5, high=2.0) == "$1 (0.5–2)/h"
    assert report.quantity(2.4e12, "B/s", low=2.4e12, high=2.4e12) == "2.4 TB/s"


def test_source_tag() -> None:
    assert report.source_tag(Source.MEASURED) == "[green]measured[/]"
    assert report.source_tag("analytic+assumed") == "[blue]analytic[/]+[yellow]assumed[/]"
    assert report.source_tag(frozenset({Source.ASSUMED, Source.MEASURED})).startswith("[green]measured")
    assert report.source_tag(frozenset()) == ""


def rendered(drawn: Any, width: int) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with console.file:
        console.print(drawn)
        return console.export_text().splitlines()


def test_a_table_that_fits_keeps_its_cells_whole() -> None:
    columns = [report.column("chip", left=True), report.column("TB/s")]
    lines = rendered(report.table("Chips", columns, [["h200", "4.8"], ["ppu", "2.4 (1.6–2.8)"]]), 80)
    assert lines[0].strip() == "Chips"
    assert any("2.4 (1.6–2.8)" in line for line in lines)


def test_a_narrow_table_moves_ranges_whole_to_the_next_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "console", lambda **_: Console(width=30))
    columns = [report.column("chip", left=True), report.column("TB/s"), report.column("W")]
    rows = [["zhenwu-810e", "[green]2.4 (1.6–2.8)[/]", "400"]]
    lines = rendered(report.table("", columns, rows), 30)
    assert any(line.rstrip().endswith("400") and "2.4" in line and "1.6" not in line for line in lines)
    assert any("(1.6–2.8)" in line for line in lines)
    assert all("zhenwu-810e" in line for line in lines if "2.4" in line)


@dataclass(frozen=True)
class Thing:
    dtype: DType
    size: float
    where: Path
    more: Any = None


def test_json_of_everything_we_hold() -> None:
    thing = Thing(DType.BF16, math.nan, Path("a/b"), {DType.FP8: np.arange(3), "x": (1, 2.5)})
    assert json.loads(report.to_json(thing)) == {
        "dtype": "bf16",
        "size": None,
        "where": "a/b",
        "more": {"fp8": [0, 1, 2], "x": [1, 2.5]},
    }
    assert report.plain([math.inf, -math.inf, np.float32(1.5), np.int64(3), np.bool_(True), np.nan]) == [
        None, None, 1.5, 3, True, None,
    ]  # fmt: skip
    assert report.plain({Source.VENDOR, Source.ASSUMED}) == ["assumed", "vendor"]
    assert report.plain(frozenset({2, 1})) == [1, 2]
    assert report.plain(deque([1])) == [1]
    assert report.plain(datetime(2026, 1, 2, tzinfo=UTC)) == "2026-01-02T00:00:00+00:00"
    assert report.plain(np.array([[1.0, np.inf]])) == [[1.0, None]]
    assert type(report.plain(np.float64(1.0))) is float
    for strange in (object(), b"bytes", {"x": object()}, Thing):
        with pytest.raises(TypeError, match="has no JSON form"):
            report.plain(strange)


@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
def test_json_is_always_strict(value: Any) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = report.to_json(value, indent=None)
    assert json.loads(text, parse_constant=refuse) == report.plain(value)


def test_bars() -> None:
    lines = report.bars(
        {"prefill": 2e-3, "decode": 1e-3, "lost": -1.0, "none": 0.0}, "s", width=10
    ).splitlines()
    assert lines[0] == "prefill  ██████████  2 ms"
    assert lines[1].count("█") == 5 and lines[1].endswith("1 ms")
    assert "█" not in lines[2] + lines[3]
    assert report.bars({}, "s") == ""


def test_scatter_puts_marks_where_the_points_are() -> None:
    drawn = report.scatter(
        {"all": [(0, 0), (1, 1), (math.nan, 3)], "best": [(1, 1)]}, x="tokens/s", y="$", width=11, height=5
    )
    lines = drawn.splitlines()
    assert lines[0] == "$" and lines[-1] == "● all  ○ best"
    assert lines[1].endswith("○") and lines[1].startswith("1 │")
    assert lines[5].startswith("0 │●")
    assert report.scatter({"none": []}, x="x", y="y") == "no points"
    assert "●" in report.scatter({"one": [(2, 2)]}, x="x", y="y")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_is_written_in_one_move(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "plots" / f"cost.{suffix}"
    with report.plot(path, title="Cost", x="batch", y="$ per million tokens") as axes:
        axes.plot([1, 2], [3, 4], label="h200")
    assert path.stat().st_size > 1000
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_progress_is_silent_when_nobody_watches(capfd: pytest.CaptureFixture[str]) -> None:
    with report.progress() as bar:
        task = bar.add_task("measuring", total=3)
        bar.advance(task, 3)
    assert capfd.readouterr() == ("", "")
