"""`tongyun chip`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tongyun.chip.ppu.program import Program
from tongyun.cli import build
from tongyun.errors import InputError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


MODEL = ["Qwen/Qwen3-0.6B", "--layers", "1", "--tokens", "4"]


def test_a_program_is_written_and_read(tmp_path: Path) -> None:
    file = tmp_path / "step.ppu"
    result = CliRunner().invoke(build(), ["chip", "compile", *MODEL, "-o", str(file)])
    assert result.exit_code == 0, result.output
    kernels = len(Program.load(file).kernels)
    assert f"{kernels} kernels" in result.output
    text = CliRunner().invoke(build(), ["chip", "disasm", str(file)])
    assert text.exit_code == 0
    assert text.output.count("BARRIER") == kernels
    assert "; attention" in text.output


def test_a_profile_for_programs() -> None:
    result = CliRunner().invoke(build(), ["chip", "profile", *MODEL, "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output)
    assert answer["source"] == "simulated"
    assert sum(kind["flops"] for kind in answer["kinds"].values()) == answer["flops"] > 0
    assert answer["seconds_within_envelope"] >= answer["seconds"] > 0
    assert all(low <= middle <= high for low, middle, high in answer["joules"].values())


def test_what_is_wrong_is_named() -> None:
    for arguments, words in (
        (["profile", "Qwen/Qwen3-06B"], "did you mean Qwen/Qwen3-0.6B"),
        (["profile", *MODEL, "--chip", "zhenwu-810"], "did you mean zhenwu-810e"),
        (["profile", *MODEL, "--without", "norms"], "did you mean norm"),
        (["profile", "meta-llama/Llama-3.1-8B"], "unknown model_type 'llama'"),
        (["disasm", "no.ppu"], "no.ppu: No such file"),
    ):
        result = CliRunner().invoke(build(), ["chip", *arguments])
        assert isinstance(result.exception, InputError)
        assert words in str(result.exception)
        assert result.exception.exit_code == 2


def test_a_prompt_runs_and_its_tokens_are_torchs() -> None:
    arguments = ["chip", "run", "stdlib-moe", "--prompt", "import os", "--tokens", "4", "--json"]
    result = CliRunner().invoke(build(), arguments)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output)
    assert len(answer["tokens"]) == 4
    assert answer["same"] + answer["near_ties"] == 4
    assert answer["wrong"] == 0
    assert answer["flops"] > 4 * 2 * 1e6
    assert 0 < answer["chip_s"] < answer["wall_s"]
    assert answer["sources"] == {"chip_s": "simulated", "joules": "simulated", "wall_s": "measured"}
    plain = CliRunner().invoke(build(), [*arguments[:-1]])
    assert "(simulated)" in plain.output
    assert answer["text"].strip()[:3] in plain.output


def test_a_run_that_cannot_be_is_refused() -> None:
    for arguments, words in (
        (["stdlib-moe", "--tokens", "2000"], "accepted are 1 … 1024 together"),
        (["stdlib-moe", "--prompt", ""], "at least one in the prompt"),
        (["Qwen/Qwen3-32B", "--random"], "too many to simulate"),
        (["no-such-model"], "no-such-model"),
    ):
        result = CliRunner().invoke(build(), ["chip", "run", *arguments])
        assert isinstance(result.exception, InputError), result.output
        assert words in str(result.exception)
