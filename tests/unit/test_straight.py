"""A plain command line read without Typer: the same values, and everything else left to it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from tongyun.cli import plan as declared
from tongyun.cli.plan import plan
from tongyun.cli.straight import PLAN, read

ASKED = ["--model", "Qwen/Qwen3-32B", "--chip", "h200", "--isl", "4000", "--osl", "500"]
PLAIN = (
    ASKED,
    [*ASKED, "--chips", "8", "--ttft-ms", "2000", "--tpot-ms", "30.5", "--json", "--explain"],
    [*ASKED, "--compare", "h20,gb200:16", "--html", "a/page.html", "--force", "--prefix-hit", "0"],
)
NOT_PLAIN = (
    ["--chip", "h200"],
    ["--help"],
    [*ASKED, "--chips", "eight"],
    [*ASKED, "--chips", "8.0"],
    [*ASKED, "--chips", "-1"],
    [*ASKED, "--tpot-ms", "1e2"],
    [*ASKED, "--chips=8"],
    [*ASKED, "--chips"],
    [*ASKED, "--chips", "8", "--chips", "9"],
    [*ASKED, "--chisp", "8"],
    [*ASKED, "--dtype", ""],
    [*ASKED, "--dtype", "--json"],
    [*ASKED, "more"],
)


def test_flags_are_those_that_the_command_declares() -> None:
    hints = get_type_hints(plan)
    signature = inspect.signature(plan).parameters
    declares = {
        name: (hints[name], ... if each.default is inspect.Parameter.empty else each.default)
        for name, each in signature.items()
    }
    assert list(declares) == list(PLAN)
    for name, (kind, default) in PLAN.items():
        assert declares[name][1] == default, name
        assert declares[name][0] == (kind | None if default is None else kind), name


@pytest.mark.parametrize("words", PLAIN)
def test_a_plain_line_is_read_as_typer_reads_it(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs: list[dict[str, Any]] = []
    monkeypatch.setattr("tongyun.cli.planning.carry_out", theirs.append)
    app = typer.Typer()
    app.command()(declared.plan)
    assert CliRunner().invoke(app, words).exit_code == 0
    ours = read(words, PLAN)
    assert ours is not None and [ours] == theirs
    assert list(ours) == list(theirs[0])
    assert {name: type(value) for name, value in ours.items()} == {n: type(v) for n, v in theirs[0].items()}


@pytest.mark.parametrize("words", NOT_PLAIN)
def test_what_is_not_plain_is_left_to_typer(words: list[str]) -> None:
    assert read(words, PLAN) is None


def test_a_plain_plan_starts_without_typer() -> None:
    code = (
        "import sys; from tongyun.cli import main; main(); "
        "assert not {'typer', 'pydantic', 'rich', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", *ASKED, "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_errors_and_a_reader_that_leaves_end_in_exit_codes() -> None:
    start = [sys.executable, "-m", "tongyun", "plan"]
    wrong = subprocess.run([*start, *ASKED, "--chip", "h2000"], capture_output=True, text=True, check=False)
    unknown = subprocess.run(
        [*start, *ASKED[:2], "--chip", "h2000", *ASKED[4:]], capture_output=True, text=True, check=False
    )
    assert (wrong.returncode, unknown.returncode) == (2, 2)
    assert "h200" in unknown.stderr and "Traceback" not in unknown.stderr
    with subprocess.Popen(
        [*start, *ASKED, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as left:
        assert left.stdout is not None and left.stderr is not None
        # Nobody reads: closed long before there is an answer.
        left.stdout.close()
        assert left.stderr.read() == ""
    assert left.returncode == 1
