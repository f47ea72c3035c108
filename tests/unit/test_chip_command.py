"""`tongyun chip`: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
from itertools import pairwise
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
    # Both are sums over kernels, in another order.
    assert answer["seconds_within_envelope"] >= answer["seconds"] * (1 - 1e-12) > 0
    assert all(low <= middle <= high for low, middle, high in answer["joules"].values())


def test_a_trace_has_one_slice_at_a_time_on_each_engine(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    result = CliRunner().invoke(build(), ["chip", "profile", *MODEL, "--trace", str(file), "--json"])
    assert result.exit_code == 0, result.output
    answer, found = json.loads(result.stdout), json.loads(file.read_text())
    threads = {e["tid"]: e["args"]["name"] for e in found["traceEvents"] if e["name"] == "thread_name"}
    assert set(threads.values()) == {"kernels", "load", "store", "tensor", "vector", "icn"}
    assert found["otherData"]["source"] == "simulated"
    slices = [event for event in found["traceEvents"] if event["ph"] == "X"]
    for thread in threads:
        mine = [event for event in slices if event["tid"] == thread]
        assert all({"name", "ts", "dur", "pid", "tid"} <= event.keys() for event in mine)
        for one, following in pairwise(mine):
            assert one["dur"] > 0
            assert one["ts"] + one["dur"] <= following["ts"] + 1e-9
    kernels = [event for event in slices if threads[event["tid"]] == "kernels"]
    assert sum(event["dur"] for event in kernels) == pytest.approx(answer["seconds"] * 1e6)
    assert sum(event["args"]["flops"] for event in kernels) == answer["flops"]
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_the_planner_stands_beside_the_program() -> None:
    arguments = ["chip", "check", "Qwen/Qwen3-0.6B", "--tokens", "4", "--context", "60"]
    result = CliRunner().invoke(build(), [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output)
    works = {work["name"]: work for work in answer["works"]}
    for side in ("planner_s", "analytic_s", "simulated_s"):
        parts = [work[side] for work in works.values() if work["simulated_s"] > 0]
        assert 0 < sum(parts) == pytest.approx(answer["lowered"][side])
    assert answer["lowered"]["planner_flops"] == answer["lowered"]["program_flops"] > 0
    assert works["sampling"]["planner_over_analytic"] is None
    assert answer["sources"]["simulated_s"] == "simulated"
    # One source for both files: nothing that they state is unlike.
    assert answer["unlike"] == []
    shown = CliRunner().invoke(build(), arguments).output
    assert "lowered" in shown
    assert "analytic" in shown


def test_every_cut_of_a_profile_adds_up_to_the_whole() -> None:
    whole: dict[str, list[float]] = {}
    for cut in ("kind", "layer", "operator"):
        arguments = ["chip", "profile", "Qwen/Qwen3-0.6B", "--layers", "3", "--tokens", "4", "--every"]
        result = CliRunner().invoke(build(), [*arguments, "--by", cut, "--json"])
        assert result.exit_code == 0, result.output
        answer = json.loads(result.output)
        parts = answer[f"{cut}s"]
        joules = sum(values[1] for values in answer["joules"].values())
        for name, total in (
            ("cycles", answer["cycles"]), ("flops", answer["flops"]), ("hbm_bytes", answer["hbm_bytes"]),
            ("l2_bytes", answer["l2_bytes"]), ("joules", joules),
        ):  # fmt: skip
            whole.setdefault(name, []).append(total)
            assert sum(part[name] for part in parts.values()) == pytest.approx(total)
        if cut == "layer":
            assert sorted(parts) == ["layer 0", "layer 1", "layer 2", "outside layers"]
            assert len({part["kernels"] for name, part in parts.items() if name != "outside layers"}) == 1
            assert parts["layer 1"]["flops"] == parts["layer 2"]["flops"]
        if cut == "operator":
            assert parts["attention 1"]["kernels"] == 3
            assert parts["embed, outside layers"]["kernels"] == 1
    assert all(len(set(totals)) == 1 for totals in whole.values())


def test_what_is_wrong_is_named() -> None:
    for arguments, words in (
        (["profile", "Qwen/Qwen3-06B"], "did you mean Qwen/Qwen3-0.6B"),
        (["profile", *MODEL, "--chip", "zhenwu-810"], "did you mean zhenwu-810e"),
        (["profile", *MODEL, "--without", "norms"], "did you mean norm"),
        (["profile", "Qwen/Qwen3-0.6B", "--chips", "3"], "num_attention_heads = 16 cannot be dealt out to 3"),
        (["profile", "Qwen/Qwen3-0.6B", "--chips", "32"], "zhenwu-810e joins at most 16 chips, got 32"),
        (["profile", "meta-llama/Llama-3.1-8B"], "unknown model_type 'llama'"),
        (["profile", *MODEL, "--by", "layers"], "did you mean layer"),
        (["check", "Qwen/Qwen3-0.6B", "--chip", "h20"], "h20"),
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
