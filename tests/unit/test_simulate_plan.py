"""`tongyun simulate --plan`: the fleet is the best plan of a file, and what is none is refused by key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tongyun.cli import build
from tongyun.errors import InputError

LOAD = ("--rate", "3", "--isl", "600", "--osl", "40", "--requests", "60")


def invoke(*words: str) -> dict[str, Any]:
    done = CliRunner().invoke(build(), [*words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture(scope="module")
def planned() -> dict[str, Any]:
    flags = ("--chip", "h200", "--chips", "16", "--isl", "600", "--osl", "40", "--tpot-ms", "40")
    return invoke("plan", "--model", "Qwen/Qwen3-30B-A3B", *flags, "--dtype", "fp8")


@pytest.fixture
def file(tmp_path: Path, planned: dict[str, Any]) -> Path:
    place = tmp_path / "plan.json"
    place.write_text(json.dumps(planned))
    return place


def test_the_best_plan_is_the_fleet(file: Path, planned: dict[str, Any]) -> None:
    told = invoke("simulate", "--plan", str(file), *LOAD)
    best = planned["best"]["plan"]
    pool = told["pools"][0]["plan"]
    assert told["chips"] == 16 and told["model"] == planned["model"]
    axes = ("tp", "pp", "ep", "dp")
    assert [pool["shard"][axis] for axis in axes] == [best[axis] for axis in axes]
    assert (pool["replicas"], pool["step_tokens"]) == (best["replicas"], best["step_tokens"])
    assert pool["batch"] == max(1, best["batch"] // best["dp"])
    assert told["report"]["succeeded"] == 60
    # Stored types are the plan's: the same cut in bf16 has other blocks.
    cut = ("--tp", str(best["tp"]), "--ep", str(best["ep"]), "--dp", str(best["dp"]))
    sized = ("--batch", str(pool["batch"]), "--step-tokens", str(pool["step_tokens"]), "--chips", "16")
    base = ("simulate", "--model", planned["model"], "--chip", "h200", *LOAD, *cut, *sized)
    same, other = invoke(*base, "--dtype", "fp8"), invoke(*base)
    assert same["report"] == told["report"] and same["engines"] == told["engines"]
    assert other["engines"][0]["kv_blocks_total"] < told["engines"][0]["kv_blocks_total"]


def refused(*words: str) -> str:
    done = CliRunner().invoke(build(), ["simulate", *words, *LOAD])
    assert isinstance(done.exception, InputError), done.output
    return str(done.exception)


def test_what_a_plan_says_is_not_said_again(file: Path) -> None:
    assert "--tp: --plan says that" in refused("--plan", str(file), "--tp", "2")
    assert "the plan is for h200, not h20" in refused("--plan", str(file), "--chip", "h20")
    assert "--fleet and --plan" in refused("--plan", str(file), "--fleet", "x.toml")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"best": None, "limit": "no memory"}, "best: there is no plan: no memory"),
        ({"best": {"plan": 3}}, "best.plan: expected an object, got 3"),
        ({"best": {"plan": {"tp": 0}}}, "best.plan.tp: expected a whole number ≥ 1, got 0"),
        ({"chips": "many"}, "chips: expected a whole number ≥ 1, got 'many'"),
        ({"model": "Qwen/Qwen3-8C"}, "did you mean"),
        ({"precision": {"weights": "bf17"}}, "precision: 'bf17'"),
        ({"precision": {"weight": "bf16"}}, "precision.weight: unknown; accepted: weights"),
    ],
)
def test_a_plan_that_is_none_is_refused_by_key(
    file: Path, planned: dict[str, Any], change: dict[str, Any], says: str
) -> None:
    file.write_text(json.dumps({**planned, **change}))
    assert says in refused("--plan", str(file))


def test_a_file_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    place = tmp_path / "plan.json"
    assert "plan.json: No such file" in refused("--plan", str(place))
    place.write_text("{\n  model: 3}")
    assert "plan.json:2: not JSON" in refused("--plan", str(place))
    place.write_text("[1]")
    assert "plan.json: model: missing; accepted: what `tongyun plan" in refused("--plan", str(place))
