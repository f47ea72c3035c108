"""`tongyun chip`: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

from typer.testing import CliRunner

from tongyun.chip.ppu.program import Program
from tongyun.cli import build
from tongyun.errors import InputError

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
    # Both are sums over kernels, in another order.
    assert answer["seconds_within_envelope"] >= answer["seconds"] * (1 - 1e-12) > 0
    assert all(low <= middle <= high for low, middle, high in answer["joules"].values())


def test_what_is_wrong_is_named() -> None:
    for arguments, words in (
        (["profile", "Qwen/Qwen3-06B"], "did you mean Qwen/Qwen3-0.6B"),
        (["profile", *MODEL, "--chip", "zhenwu-810"], "did you mean zhenwu-810e"),
        (["profile", *MODEL, "--without", "norms"], "did you mean norm"),
        (["profile", "Qwen/Qwen3-0.6B", "--chips", "3"], "num_attention_heads = 16 cannot be dealt out to 3"),
        (["profile", "Qwen/Qwen3-0.6B", "--chips", "32"], "zhenwu-810e joins at most 16 chips, got 32"),
        (["profile", "meta-llama/Llama-3.1-8B"], "unknown model_type 'llama'"),
        (["disasm", "no.ppu"], "no.ppu: No such file"),
    ):
        result = CliRunner().invoke(build(), ["chip", *arguments])
        assert isinstance(result.exception, InputError)
        assert words in str(result.exception)
        assert result.exception.exit_code == 2


def test_470_gigabytes_need_more_than_four_chips_of_96(tmp_path: Path) -> None:
    file = tmp_path / "step.ppu"
    step = ["chip", "compile", "Qwen/Qwen3-235B-A22B", "--context", "100", "-o", str(file)]
    refused = CliRunner().invoke(build(), [*step, "--chips", "4"])
    assert isinstance(refused.exception, InputError)
    assert refused.exception.exit_code == 2
    assert not file.exists()
    found = re.search(
        r"each of 4 chips needs ([\d,]+) bytes of HBM .*, zhenwu-810e has ([\d,]+): "
        r"([\d,]+) bytes are missing, ([\d,]+) on all",
        str(refused.exception),
    )
    assert found
    needed, there, missing, altogether = (int(number.replace(",", "")) for number in found.groups())
    assert (missing, altogether) == (needed - there, 4 * missing)
    # Dealt out: all but norms, routers and the embedding, which every chip holds, and the cache.
    layer = 2 * 4096 * 128 * 64 + 2 * 4096 * 128 * 4 + 128 * 3 * 4096 * 1536
    alike = 151_936 * 4096 + 94 * (2 * 4096 + 2 * 128 + 128 * 4096) + 4096
    weights = 2 * ((94 * layer + 151_936 * 4096) // 4 + alike)
    cache = 94 * 2 * 128 * 128 * 2
    assert there == 96_000_000_000
    assert 0 <= needed - weights - cache < 2_000_000, "what is left is scratch"
    taken = CliRunner().invoke(build(), [*step, "--chips", "8"])
    assert taken.exit_code == 0, taken.output
    program = Program.load(file)
    assert program.hbm_bytes < there
    assert program.chips == 8
    assert {kernel.layer for kernel in program.kernels} == {*range(94), None}
