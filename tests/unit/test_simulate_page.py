"""`tongyun simulate --html`: one file that stands alone and says where its figures come from."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from tongyun.cli import build
from tongyun.codesign.drawing import PANEL, PANEL_LEFT, Line, Rule, curves
from tongyun.errors import InputError

BASE = ("simulate", "--model", "Qwen/Qwen3-8B", "--chip", "zhenwu-810e", "--tp", "1", "--batch", "32")


class Reader(HTMLParser):
    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    place = tmp_path / "mine.csv"
    rows = [f"{i / 6},{300 + 40 * (i % 7)},{20 + i % 9},{'chat' if i % 3 else '<b>'}" for i in range(90)]
    place.write_text("arrival_s,prompt_tokens,output_tokens,class\n" + "\n".join(rows))
    return place


def run(*flags: str) -> Result:
    return CliRunner().invoke(build(), [*BASE, *flags])


def test_the_page_stands_alone_and_says_what_was_found(trace: Path, tmp_path: Path) -> None:
    place = tmp_path / "run.html"
    flags = ("--trace", str(trace), "--ttft-ms", "800", "--chips", "2", "--html", str(place))
    done = run(*flags, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    text = place.read_text()
    reader = Reader()
    reader.feed(text)
    assert not reader.open and not reader.links
    assert not {"script", "link", "img"} & set(reader.tags)
    assert "url(" not in text and "@import" not in text
    shown = " ".join(reader.text)
    for words in (
        "Qwen/Qwen3-8B on 2 × T-Head Zhenwu 810E PPU",
        "Everything on this page is simulated",
        f"tongyun simulate --model Qwen/Qwen3-8B --chip zhenwu-810e --chips 2 --trace {trace}",
        f"{told['report']['ttft_s']['p50'] * 1e3:.3g} ms",
        f"{told['attainment']:.1%}",
        f"p99 {told['kv_occupancy'][0]['p99']:.1%}, max {told['kv_occupancy'][0]['most']:.1%}",
        "By class",
        "<b>",
        "Over time",
        "KV blocks held",
        "2.4 (1.6–2.8) TB/s",
        "HBM2e at 3.2 to 3.6 Gb/s",
    ):
        assert words in shown, words
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    # Three distributions, waits, two of arrivals, six of the pool.
    assert len(drawings) == 12
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert len(text) < 300_000
    refused = run(*flags)
    assert isinstance(refused.exception, InputError) and "already there" in str(refused.exception)


def test_two_pools_are_drawn_apart_and_the_same_run_gives_the_same_page(trace: Path, tmp_path: Path) -> None:
    flags = ("--trace", str(trace), "--chips", "3", "--prefill-replicas", "1", "--no-prefix-caching")
    texts = []
    for name in ("a.html", "b.html"):
        assert run(*flags, "--html", str(tmp_path / name)).exit_code == 0
        texts.append((tmp_path / name).read_text().replace(name, ""))
    assert texts[0] == texts[1]
    assert "Engines that prefill" in texts[0] and "Engines that decode" in texts[0]
    assert "--no-prefix-caching" in texts[0] and "Prompt tokens in a step" in texts[0]


@pytest.mark.parametrize("log", [False, True])
def test_curves_keep_their_marks_inside(log: bool) -> None:
    line = Line(name="one", x=[0.001, 3.0, 70.0], y=[0.0, 12_345.0, 40_000.0], style="c0", filled=True)
    drawn = curves([line], x="s", y="tokens", log=log, rules=[Rule(x=500.0, name="limit")])
    ElementTree.fromstring(drawn)
    places = [float(x) for x in re.findall(r"[ML](-?[\d.]+) ", drawn)]
    assert min(places) >= PANEL_LEFT and max(places) <= PANEL
    ticks = re.findall(r'text-anchor="(?:middle|end)">([\d.,kM]+)<', drawn)
    assert "40k" in ticks and len(ticks) > 8


def test_a_curve_of_one_point_or_none_above_zero_is_drawn() -> None:
    flat = Line(name="flat", x=[1.0], y=[0.0], style="c0")
    for log in (False, True):
        ElementTree.fromstring(curves([flat], x="s", y="", log=log))
