"""`tongyun specs`: every kind is listed, every spec shown, in tables and in JSON."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tongyun.cli.specs import app
from tongyun.errors import InputError, SpecError
from tongyun.specs import dumps, find, find_chip, names
from tongyun.specs.schema import SCHEMAS


def out(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.parametrize("kind", find.KINDS)
def test_list_names_every_spec(kind: str) -> None:
    table = out("list", kind)
    assert all(name in table for name in names(kind))
    listed = json.loads(out("list", kind, "--json"))
    assert [item["name"] for item in listed] == names(kind)


def test_list_of_all() -> None:
    assert all(kind in out("list") for kind in find.KINDS)
    assert set(json.loads(out("list", "--json"))) == set(find.KINDS)


def test_the_chips_table_shows_ranges_prices_and_sources() -> None:
    [line] = [line for line in out("list", "chips").splitlines() if line.startswith("zhenwu-810e")]
    for cell in ("T-Head", "118.7", "96 (96–103)", "2.4 (1.6–2.8)", "350", "16", "400", "1 (0.5–2)", "v d a"):
        assert cell in line
    assert "rubin †" in out("list", "chips")


def test_show_has_every_figure_with_unit_range_kind_and_source() -> None:
    shown = out("show", "810e")
    for words in (
        "memory.bandwidth",
        "TB/s",
        "1.6 – 2.8",
        "assumed",
        "HBM2e at 3.2 to 3.6",
        "price: 1 (0.5–2) $/h",
    ):
        assert words in shown
    figures = json.loads(out("show", "zhenwu-810e", "--json"))["figures"]
    assert set(figures) == {key for key, _ in find_chip("zhenwu-810e").figures()}
    bandwidth = figures["memory.bandwidth"]
    assert (bandwidth["value"], bandwidth["low"], bandwidth["high"]) == (2.4e12, 1.6e12, 2.8e12)
    assert (bandwidth["unit"], bandwidth["kind"]) == ("B/s", "assumed") and bandwidth["source"]


@pytest.mark.parametrize("kind", find.KINDS)
def test_show_works_for_every_spec(kind: str) -> None:
    for name in names(kind):
        shown: Any = json.loads(out("show", f"{kind}/{name}", "--json"))
        assert shown["name"] == name
        assert name in out("show", f"{kind}/{name}")


def test_show_finds_any_kind_by_name_and_a_file(tmp_path: Path) -> None:
    assert json.loads(out("show", "h200", "--json"))["kind"] == "accelerator"
    assert json.loads(out("show", "prices/h200", "--json"))["chip"] == "h200"
    assert json.loads(out("show", "cpfs", "--json"))["name"] == "cpfs-lingjun"
    assert json.loads(out("show", "qwen3-32b", "--json"))["config"]["num_hidden_layers"] == 64
    mine = tmp_path / "mine.toml"
    mine.write_text(dumps(find_chip("a100")))
    assert json.loads(out("show", str(mine), "--json"))["name"] == "a100"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list", "chip"], r"unknown kind of spec 'chip'; did you mean chips.*accepted: chips, fabrics"),
        (["show", "h20O"], r"unknown spec 'h20O'; did you mean h20"),
        (["show", "fabrics/hpn"], r"unknown fabric 'hpn'; did you mean hpn-"),
    ],
)
def test_wrong_names_say_the_nearest(words: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        out(*words)


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(dumps(find_chip("a100")).replace("[power]", "[powr]"))
    with pytest.raises(SpecError, match=r"mine\.toml: powr: unknown key"):
        out("show", str(mine))


def test_specs_need_no_torch_and_no_plots() -> None:
    code = (
        "import sys, tongyun.cli.specs, tongyun.specs as s\n"
        "s.find_chip('h200').at(), s.find_model('qwen3-8b')\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'rich.table') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_schema_kinds_are_the_folders() -> None:
    folders = {path.name for path in find.CATALOG.iterdir() if path.is_dir()}
    assert folders == {*SCHEMAS, "models"} == set(find.KINDS)
