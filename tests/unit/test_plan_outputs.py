"""`tongyun plan` with --explain, --compare, --launch and --html, as people and programs use them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from tongyun.cli.compared import named
from tongyun.cli.plan import plan
from tongyun.cli.planning import command
from tongyun.codesign.drawing import Bar, Point, points, ranges, waterfall
from tongyun.errors import Infeasible, InputError

BASE = ["--model", "Qwen/Qwen3-8B", "--isl", "2000", "--osl", "200", "--tpot-ms", "50"]


def run(*flags: str) -> Result:
    app = typer.Typer()
    app.command()(plan)
    return CliRunner().invoke(app, [*BASE, *flags])


def answer(*flags: str) -> dict[str, Any]:
    result = run("--json", *flags)
    assert result.exit_code == 0, result.exception
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(kind: type[Exception], *flags: str) -> str:
    error = run(*flags).exception
    assert isinstance(error, kind), error
    return str(error)


def test_explain_in_json_adds_up() -> None:
    found = answer("--chip", "h20", "--explain")
    told = found["explain"]
    for step in told["steps"]:
        assert sum(line["seconds"] for line in step["lines"]) == pytest.approx(step["seconds"], rel=1e-12)
        assert all("analytic" in line["source"] or line["bound"] == "host" for line in step["lines"])
    assert sum(told["tpot_s"].values()) == pytest.approx(found["best"]["tpot_s"], rel=1e-9)
    assert "explain" not in answer("--chip", "h20")


def test_explain_for_people() -> None:
    shown = run("--chip", "h20", "--chips", "2", "--explain").stdout
    for words in ("Where the time goes", "decode step", "prefill step", "dense_up", "roofline", "host_step"):
        assert words in shown, words


def test_compare_asks_every_chip_the_same() -> None:
    found = answer("--compare", "h20,h200:2")
    assert set(found) == {"compare", "seconds"}
    rows = found["compare"]
    assert [(row["chip"], row["chips"]) for row in rows] == [("h20", 1), ("h200", 2)]
    alone = answer("--chip", "h200", "--chips", "2")
    assert rows[1]["best"] == alone["best"]
    both = answer("--chip", "h20", "--compare", "h200:2")
    assert both["best"] == rows[0]["best"]
    assert [row["chip"] for row in both["compare"]] == ["h20", "h200"]


def test_compare_says_which_limit_binds() -> None:
    result = run("--compare", "h20,tpu-v5e")
    assert result.exit_code == 0, result.exception
    assert "no: memory" in re.sub(r"\s+", " ", result.stdout)
    assert "h20" in result.stdout
    assert "1 × tpu-v5e" in refused(Infeasible, "--compare", "tpu-v5e")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("h200", [("h200", 8)]),
        ("h200, h20:16", [("h200", 8), ("h20", 16)]),
        ("./my.toml:4", [("./my.toml", 4)]),
    ],
)
def test_names_and_counts(text: str, found: list[tuple[str, int]]) -> None:
    assert named(text, 8) == found


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "--chip"),
        (("--compare", "h20,"), "h200,h20:16"),
        (("--compare", "h20", "--explain"), "--explain is about one chip"),
        (("--compare", "h20", "--launch", "x"), "--launch is about one chip"),
        (("--chip", "h20", "--engine", "vllm"), "--launch"),
        (("--compare", "h20O"), "did you mean"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags: tuple[str, ...], says: str) -> None:
    assert says in refused(InputError, *flags)


def test_launch_writes_the_files_of_an_engine(tmp_path: Path) -> None:
    folder = str(tmp_path / "out")
    result = run("--chip", "h20", "--launch", folder, "--engine", "kubernetes")
    assert result.exit_code == 0, result.exception
    places = sorted(place.name for place in Path(folder).iterdir())
    assert places == ["kubernetes-sglang.yaml", "kubernetes-vllm.yaml"]
    workload = next(iter(yaml.safe_load_all((tmp_path / "out" / places[0]).read_text())))
    assert workload["kind"] == "Deployment"
    assert "already there" in refused(InputError, "--chip", "h20", "--launch", folder)
    assert run("--chip", "h20", "--launch", folder, "--force").exit_code == 0
    assert len(list(Path(folder).iterdir())) == 5


def test_launch_json_stays_json(tmp_path: Path) -> None:
    result = run("--json", "--chip", "zhenwu-810e", "--launch", str(tmp_path / "out"))
    assert json.loads(result.stdout)["best"]["plan"]
    assert "Kubernetes resource name" in result.stderr
    assert sorted(place.name for place in (tmp_path / "out").iterdir()) == [
        "ray-serve.yaml",
        "sglang.sh",
        "vllm.sh",
    ]


def test_no_plan_writes_no_launch_file(tmp_path: Path) -> None:
    refused(Infeasible, "--chip", "tpu-v5e", "--launch", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


class _Reader(HTMLParser):
    """Collects tags and text, and that tags are closed in the order they were opened."""

    VOID = frozenset({"meta"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []

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


def test_the_page_stands_alone(tmp_path: Path) -> None:
    place = tmp_path / "plan.html"
    flags = ("--chip", "zhenwu-810e", "--compare", "h20,tpu-v5e", "--html", str(place))
    assert run(*flags).exit_code == 0
    text = place.read_text()
    reader = _Reader()
    reader.feed(text)
    assert not reader.open and not reader.links
    assert not {"script", "link", "img"} & set(reader.tags)
    assert "url(" not in text and "@import" not in text
    shown = " ".join(reader.text)
    for words in (
        "Qwen/Qwen3-8B on 1 × T-Head Zhenwu 810E PPU",
        "Predicted, not measured",
        "Best plan",
        "Pareto",
        "Where each microsecond goes",
        "attention_decode",
        "Compared under the same limits",
        "no plan. memory: ",
        "2.4 (1.6–2.8) TB/s",
        "Sources and assumptions",
        "memory.bandwidth",
        "HBM2e at 3.2 to 3.6 Gb/s",
        "tongyun plan --model Qwen/Qwen3-8B",
    ):
        assert words in shown, words
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 4
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    again = tmp_path / "again.html"
    run("--chip", "zhenwu-810e", "--compare", "h20,tpu-v5e", "--html", str(again))
    assert again.read_text() == text.replace(str(place), str(again))
    assert "already there" in refused(InputError, *flags)


def test_the_page_of_no_plan_says_so(tmp_path: Path) -> None:
    refused(Infeasible, "--chip", "tpu-v5e", "--html", str(tmp_path / "no.html"))
    assert "No plan" in (tmp_path / "no.html").read_text()


def test_what_a_spec_says_cannot_become_markup(tmp_path: Path) -> None:
    from dataclasses import replace

    from tongyun.specs import find_chip, save

    save(replace(find_chip("h20"), title="<script>x</script>", name="own"), tmp_path / "own.toml")
    place = tmp_path / "own.html"
    assert run("--chip", str(tmp_path / "own.toml"), "--html", str(place)).exit_code == 0
    assert "<script" not in place.read_text()


def test_the_command_is_what_was_asked() -> None:
    given = {"model": "a b", "isl": 10, "chip": None, "tpot_ms": 30.0, "json": True, "force": False}
    assert command(given) == "tongyun plan --model 'a b' --isl 10 --tpot-ms 30 --json"


def test_drawings_keep_their_marks_inside() -> None:
    marks = [Point(x=3.0, y=1e4, title="<a>", style="in"), Point(x=120.0, y=2.0, title="b", style="best")]
    drawn = ElementTree.fromstring(points(marks, x="x", y="y"))
    circles = drawn.findall("circle")
    assert len(circles) == 2
    assert all(0 < float(c.get("cx", 0)) < 720 and 0 < float(c.get("cy", 0)) < 340 for c in circles)
    bars = [Bar(name=str(i), size=size, label="", style="memory") for i, size in enumerate((1.0, 3.0, 2.0))]
    boxes = ElementTree.fromstring(waterfall(bars, title="t")).findall("rect")
    ends = [float(b.get("x", 0)) + float(b.get("width", 0)) for b in boxes]
    assert [float(b.get("x", 0)) for b in boxes[1:]] == pytest.approx(ends[:-1], abs=0.2)
    lines = ElementTree.fromstring(ranges({"a": (2.0, 1.0, 4.0)}, unit="$")).findall("line")
    assert float(lines[0].get("x2", 0)) - 150 == pytest.approx(
        4 * (float(lines[0].get("x1", 0)) - 150), abs=0.2
    )
