"""`tongyun up` on a tiny model: calibrate, plan, serve, load, compare, end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tongyun.cli import build
from tongyun.cloud.engine.calibrate.steps import synthetic
from tongyun.errors import InputError
from tongyun.model.tokenizer import write_byte_tokenizer
from tongyun.model.weights import write_random_checkpoint

LOAD = ("--isl", "16", "--osl", "4", "--requests", "6", "--rate", "5", "--port", "0")


def up(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tongyun", "up", "--threads", "1", "--kernels", "torch", *flags]
    environment = {**os.environ, "TONGYUN_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_up_predicts_serves_measures_and_ends(tmp_path: Path) -> None:
    config = synthetic(2, sparse=True)
    write_random_checkpoint(tmp_path / "model", config)
    write_byte_tokenizer(tmp_path / "model")
    done = up(tmp_path, "--model", str(tmp_path / "model"), "--quick", "--json", *LOAD)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["failed"] == 0 and told["load"]["requests"] == 6
    assert told["sources"] == {"predicted": "simulated", "measured": "measured", "pace": "measured"}
    for name in ("TTFT p50", "TPOT p50", "throughput"):
        assert told["measured"][name] > 0 and told["predicted"][name] > 0
        expected = told["predicted"][name] / told["measured"][name] - 1
        assert told["error"][name] == pytest.approx(expected)
    assert (tmp_path / "chips" / "local.toml").exists()
    # The calibration is kept; people get a table, and the process ends by itself.
    again = up(tmp_path, "--model", str(tmp_path / "model"), "--quick", "--once", *LOAD)
    assert again.returncode == 0, again.stderr
    assert "calibrating" not in again.stderr
    assert "TPOT p50" in again.stdout and "predicted" in again.stdout
    assert "when serving was calibrated, measured" in " ".join(again.stdout.split())


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--isl", "0"), "--isl 0"),
        (("--osl", "1"), "--osl 1"),
        (("--rate", "-1"), "--rate -1"),
        (("--random",), "--random needs --model"),
        (("--model", "./nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_measured(
    flags: tuple[str, ...], problem: str
) -> None:
    refused = CliRunner().invoke(build(), ["up", *flags]).exception
    assert isinstance(refused, InputError)
    assert problem in str(refused)
