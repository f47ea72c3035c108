"""A fleet file's `[experts]` table: what it makes of a simulated load, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tongyun.cli import build
from tongyun.cli.fleet import read_fleet
from tongyun.errors import InputError

FLEET = """
name = "wide"
model = "Qwen/Qwen3-30B-A3B"
chip = "h100"
{experts}
[[pool]]
replicas = 1
tp = 1
ep = 8
dp = 8
"""
SKEW = 'skew = { ratio = 0.6, kind = "assumed", source = "this test" }\n'
DRIFT = 'drift = { fraction = 0.2, kind = "assumed", source = "this test" }\n'


def fleet(folder: Path, table: str, model: str = "Qwen/Qwen3-30B-A3B") -> Path:
    path = folder / "fleet.toml"
    experts = f"[experts]\n{table}" if table else ""
    path.write_text(FLEET.format(experts=experts).replace("Qwen/Qwen3-30B-A3B", model))
    return path


def simulated(path: Path) -> dict[str, Any]:
    load = ("--rate", "80", "--isl", "2000", "--osl", "60", "--requests", "100", "--json")
    done = CliRunner().invoke(build(), ["simulate", "--fleet", str(path), *load], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_crowded_experts_cost_time_and_rebalancing_gives_most_of_it_back(tmp_path: Path) -> None:
    tables = (
        "",
        SKEW,
        SKEW + DRIFT + "rebalance = true\nredundant = 16\n",
        SKEW + "rebalance = true\nredundant = 16\n",
    )
    answers = [simulated(fleet(tmp_path, table)) for table in tables]
    even, crowded, stale, rebalanced = (answer["report"]["latency_s"]["mean"] for answer in answers)
    assert crowded > stale > rebalanced > even
    assert rebalanced - even < 0.2 * (crowded - even)
    assert answers[0]["expert_crowding"] == {}
    assert answers[1]["expert_crowding"]["8"] > 1.3
    assert 1 <= answers[3]["expert_crowding"]["8"] < 1.02
    assert "assumed" in answers[1]["source"]


def test_recorded_counts_stand_for_a_law(tmp_path: Path) -> None:
    lines = [",".join(str(1 + (expert + layer) % 4) for expert in range(128)) for layer in range(48)]
    (tmp_path / "counts.csv").write_text("\n".join(lines))
    _, read = read_fleet(fleet(tmp_path, 'counts = "counts.csv"\n'))
    assert read.experts is not None
    # Of any sixteen neighbours in four sizes, four are of each.
    assert read.experts.crowding(8) == pytest.approx(1)
    assert read.experts.picks(8)[0] == pytest.approx(8 * 4 / (128 * 2.5))


@pytest.mark.parametrize(
    ("table", "model", "says"),
    [
        ("rebalance = true\n", "Qwen/Qwen3-30B-A3B", "experts: accepted: one of skew and counts"),
        (SKEW + "redundant = 8\n", "Qwen/Qwen3-30B-A3B", "redundant and drift need rebalance = true"),
        (SKEW + "rebalance = true\nredundant = 3\n", "Qwen/Qwen3-30B-A3B", "accepted: multiples of ep"),
        (SKEW, "Qwen/Qwen3-8B", "Qwen3-8B has no experts; leave the table out"),
        ('counts = "none.csv"\n', "Qwen/Qwen3-30B-A3B", "none.csv: cannot be read"),
        ('counts = "bad.csv"\n', "Qwen/Qwen3-30B-A3B", "bad.csv:2: expected 128 counts"),
    ],
)
def test_a_table_that_cannot_be_is_refused(tmp_path: Path, table: str, model: str, says: str) -> None:
    good = ",".join(["1"] * 128)
    (tmp_path / "bad.csv").write_text(f"{good}\n1,2,three\n")
    path = fleet(tmp_path, table, model)
    if "8B" in model:
        path.write_text(path.read_text().replace("ep = 8\ndp = 8", "ep = 1"))
    with pytest.raises(InputError, match=says):
        read_fleet(path)
