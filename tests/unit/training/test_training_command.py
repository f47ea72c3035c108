"""`tongyun train` from a recipe to a model directory, as a user runs it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from tongyun.cli.train import train
from tongyun.errors import InputError, SpecError

APP = typer.Typer()
APP.command()(train)


def test_a_recipe_becomes_a_model_with_its_record(write: Callable[[], Path], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    arguments = [str(write()), "--output", str(tmp_path / "out"), "--save", str(tmp_path / "model"), "--json"]
    done = CliRunner().invoke(APP, arguments, catch_exceptions=False)
    torch.set_num_threads(threads)
    assert done.exit_code == 0
    record = json.loads(done.stdout)
    assert record == json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["source"] == "measured"
    assert record["trained_tokens"] == 12 * 256
    assert 0 < record["bits_per_byte"] < math.log2(320)
    assert record["bits_per_byte_of"].keys() == {"pkg/held.py"}
    assert record["compressors"].keys() == {"gzip", "xz"}
    assert record["completions"]["def total(self, "] is not None
    model = tmp_path / "model"
    tensors = load_file(model / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in tensors
    assert record["parameters"] == sum(t.numel() for t in tensors.values())
    assert record["model_bytes"] == sum(file.stat().st_size for file in model.iterdir())
    page = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert f"| pkg/held.py | {record['bits_per_byte']:.2f} |" in page
    assert "def total(self, ⟦" in page
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_finishing_again_gives_the_same_model(write: Callable[[], Path], tmp_path: Path) -> None:
    arguments = [str(write()), "--output", str(tmp_path / "out"), "--resume"]
    unsaid = arguments[:-1]
    first = CliRunner().invoke(APP, arguments, catch_exceptions=False)
    assert "small" in first.stdout
    weights = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    again = CliRunner().invoke(APP, arguments, catch_exceptions=False)
    assert again.stdout == first.stdout
    with pytest.raises(InputError, match="a run is kept there; say --resume"):
        CliRunner().invoke(APP, unsaid, catch_exceptions=False)
    assert (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == weights


def test_a_wrong_recipe_is_refused_before_any_work(
    write: Callable[[str], Path], recipe_text: str, tmp_path: Path
) -> None:
    file = write(recipe_text.replace("vocab", "vocabulary"))
    with pytest.raises(
        SpecError, match=r"recipe\.toml: tokenizer\.vocabulary: unknown key.*did you mean vocab"
    ):
        CliRunner().invoke(APP, [str(file), "--output", str(tmp_path / "out")], catch_exceptions=False)
    assert not (tmp_path / "out").exists()
