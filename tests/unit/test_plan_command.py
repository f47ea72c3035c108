"""`tongyun plan`: its JSON contract, its exits, and what it tells people."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from tongyun.cli.plan import plan
from tongyun.errors import Infeasible, InputError, TongyunError

QUESTION = {
    "--model": "Qwen/Qwen3-32B",
    "--chip": "h200",
    "--chips": "8",
    "--isl": "4000",
    "--osl": "500",
    "--ttft-ms": "2000",
    "--tpot-ms": "30",
}


def run(*flags: str, **changes: str | None) -> Result:
    app = typer.Typer()
    app.command()(plan)
    given = {**QUESTION, **{f"--{name.replace('_', '-')}": value for name, value in changes.items()}}
    words = [word for name, value in given.items() if value is not None for word in (name, value)]
    return CliRunner().invoke(app, [*words, *flags])


def answer(**changes: str | None) -> dict[str, Any]:
    result = run("--json", **changes)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(kind: type[TongyunError], **changes: str | None) -> str:
    error = run(**changes).exception
    assert isinstance(error, kind), error
    return str(error)


def test_json_holds_the_contract() -> None:
    found = answer()
    for entry in (found["best"], *found["pareto"]):
        assert {"tp", "pp", "ep", "dp", "batch", "pools"} <= set(entry["plan"])
        for key in ("ttft_s", "tpot_s", "tok_s_per_chip", "usd_per_mtoken", "joules_per_token"):
            assert entry[key] > 0
            low, high = entry["range"][key]
            assert low <= entry[key] <= high
        assert "analytic" in entry["source"]
    assert found["best"]["ttft_s"] <= 2 and found["best"]["tpot_s"] <= 0.03
    assert found["best"]["meets"]
    assert found["evaluated"] > 1000
    assert set(found["cut"]) == {"legality", "depth", "memory", "prefill", "ttft", "tpot"}
    assert found["seconds"] > 0
    pools = found["best"]["plan"]["pools"]
    assert sum(pool["chips"] for pool in pools) + found["best"]["plan"]["idle_chips"] == 8


def test_the_same_question_gives_the_same_bytes() -> None:
    first, second = answer(), answer()
    assert first.pop("seconds") and second.pop("seconds")
    assert json.dumps(first) == json.dumps(second)


def test_a_misspelt_chip_is_answered_with_near_names() -> None:
    message = refused(InputError, chip="h20O")
    assert "did you mean" in message and "h200" in message
    assert InputError.exit_code == 2


def test_a_misspelt_model_is_answered_with_near_names() -> None:
    assert "Qwen/Qwen3-32B" in refused(InputError, model="Qwen/Qwen3-32")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"isl": "60000"}, "40960 positions"),
        ({"dtype": "fp6"}, "unknown dtype 'fp6'"),
        ({"kv_dtype": "int4"}, "unknown KV dtype 'int4'"),
        ({"chips": "0"}, "chips must be at least 1"),
        ({"tpot_ms": "-3"}, "tpot must be a positive time"),
        ({"usd_per_chip_hour": "0"}, "positive number"),
    ],
)
def test_wrong_flags_are_refused(changes: dict[str, str], says: str) -> None:
    assert says in refused(InputError, **changes)


def test_no_plan_is_an_answer_of_no_with_its_limit() -> None:
    result = run("--json", ttft_ms="1")
    assert isinstance(result.exception, Infeasible) and Infeasible.exit_code == 1
    assert "ttft: nearest is" in str(result.exception)
    found = json.loads(result.stdout)
    assert found["best"] is None and found["limit"].startswith("ttft")


def test_memory_says_by_how_many_bytes() -> None:
    assert "bytes) more than" in refused(Infeasible, model="Qwen/Qwen3-235B-A22B", chips="2")


def test_a_price_of_ones_own_scales_the_dollars() -> None:
    one, two = (answer(usd_per_chip_hour=price)["best"] for price in ("1", "2"))
    assert two["usd_per_mtoken"] == pytest.approx(2 * one["usd_per_mtoken"])
    assert one["plan"] == two["plan"]


def test_a_chip_and_a_model_of_ones_own(tmp_path: Path) -> None:
    from tongyun.specs import find_chip, find_model
    from tongyun.specs.write import save

    save(find_chip("h20"), tmp_path / "mine.toml")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(find_model("Qwen/Qwen3-8B")[0]))
    mine = answer(chip=str(tmp_path / "mine.toml"), model=str(tmp_path / "model"), chips="1")
    theirs = answer(chip="h20", model="Qwen/Qwen3-8B", chips="1")
    assert mine["best"]["tpot_s"] == theirs["best"]["tpot_s"]


def test_people_see_best_pareto_and_what_was_cut() -> None:
    shown = run(chips="9").stdout
    for words in ("Qwen/Qwen3-32B on 9 × NVIDIA H200", "Pareto", "tok/s/user", "J/tok", "idle", "by memory"):
        assert words in shown, words


def test_planning_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from tongyun.cli.plan import plan; "
        "plan('Qwen/Qwen3-32B', 4000, 500, 'h200', 8, 2000.0, 30.0, json=True); "
        "assert not {'torch', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["best"]["plan"]["tp"] >= 1
