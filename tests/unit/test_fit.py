"""A plan that does not fit says by how many bytes, what takes them, and what would fit."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tongyun.cli import build
from tongyun.cli.planning import ask
from tongyun.codesign.fit import check_fit, fit, smallest_cut
from tongyun.codesign.plan import Plan
from tongyun.codesign.space import Question
from tongyun.codesign.steady import USABLE_MEMORY
from tongyun.errors import Infeasible
from tongyun.model.shard import Shard


def question(model: str = "Qwen/Qwen3-32B", chip: str = "h20") -> Question:
    asked = {"model": model, "chip": chip, "chips": 64, "isl": 900, "osl": 100}
    return ask(asked, ttft_s=None, tpot_s=None, dtypes=(None, None), usd_per_chip_hour=None)


def plan(**shard: int) -> Plan:
    return Plan(shard=Shard(**shard), batch=64, step_tokens=2048, replicas=1, idle_chips=0)


def test_the_bytes_lacking_are_those_that_more_memory_would_have_to_bring() -> None:
    asked, tight = question("Qwen/Qwen3-235B-A22B"), plan(tp=4)
    chip = asked.chip.at()
    lacking = fit(asked, chip, tight, 64).lacking_bytes
    assert lacking > 0
    enough = replace(chip, memory_bytes=chip.memory_bytes + (lacking + 1) / USABLE_MEMORY)
    short = replace(chip, memory_bytes=chip.memory_bytes + (lacking - 2) / USABLE_MEMORY)
    assert (
        fit(asked, enough, tight, 64).blocks >= 1000 // 64 and not fit(asked, enough, tight, 64).lacking_bytes
    )
    assert 0 < fit(asked, short, tight, 64).lacking_bytes <= 3


def test_the_refusal_adds_up_to_the_byte() -> None:
    asked = question("Qwen/Qwen3-235B-A22B")
    with pytest.raises(Infeasible) as caught:
        check_fit(asked, asked.chip.at(), plan(tp=4), 64)
    lacking, weights, activations, keys, there = (
        int(size.replace(",", "")) for size in re.findall(r"([\d,]+) bytes", str(caught.value))
    )
    assert weights + activations + keys - there == lacking
    assert "batch 64, 2048 tokens a step" in str(caught.value) and "1000 tokens in blocks" in str(
        caught.value
    )


def test_what_would_fit_is_the_smallest_that_does() -> None:
    asked = question("Qwen/Qwen3-235B-A22B")
    chip = asked.chip.at()
    found = smallest_cut(asked, chip, plan(tp=1), 64)
    assert found is not None and not fit(asked, chip, found, 64).lacking_bytes
    ranks = found.shard.ranks
    for tp in range(1, ranks):
        if asked.model.heads % tp == 0:
            assert fit(asked, chip, plan(tp=tp), 64).lacking_bytes
    assert f"Would fit: {found.shard}, {ranks} chips a replica" in refusal(asked, plan(tp=1))


def refusal(asked: Question, tried: Plan) -> str:
    with pytest.raises(Infeasible) as caught:
        check_fit(asked, asked.chip.at(), tried, 64)
    return str(caught.value)


def test_where_a_step_takes_the_room_a_smaller_one_is_offered() -> None:
    told = refusal(question(), replace(plan(tp=1), step_tokens=2_000_000))
    assert "Would fit: as cut with fewer than 2000000 tokens a step or batch 64" in told


FLEET = """
name = "tight"
model = "Qwen/Qwen3-235B-A22B"
chip = "h20"
[[pool]]
replicas = 2
tp = 2
"""


@pytest.mark.parametrize("words", [["simulate", "--rate", "1", "--fleet"], ["serve", "--twin", "--fleet"]])
def test_a_fleet_file_is_refused_the_same_way(tmp_path: Path, words: list[str]) -> None:
    file = tmp_path / "tight.toml"
    file.write_text(FLEET)
    told = CliRunner().invoke(build(), [*words, str(file)]).exception
    assert isinstance(told, Infeasible) and told.exit_code == 1
    assert re.search(r"as tp2 pp1 ep1 dp1: a rank of h20 lacks [\d,]{14,} bytes", str(told))
    assert "Would fit: tp" in str(told)
