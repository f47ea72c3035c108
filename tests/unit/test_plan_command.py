"""`tongyun plan`: its JSON contract, its exits, and what it tells people."""

from __future__ import annotations

import json
import os
import re
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
    assert set(found["cut"]) == {"legality", "depth", "memory", "prefill", "ttft", "tpot", "beaten"}
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


def test_two_processes_print_the_same_bytes() -> None:
    """Whatever order their sets have."""
    words = [word for pair in QUESTION.items() for word in pair]
    printed = [
        subprocess.run(
            [sys.executable, "-m", "tongyun", "plan", *words, "--json", "--explain"],
            capture_output=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    drop = re.compile(rb'\n  "seconds": [0-9.e-]+,?')
    first, second = (drop.sub(b"", text) for text in printed)
    assert first == second
    assert 10_000 < len(first) < len(printed[0])


def test_pools_are_searched_unless_told_otherwise() -> None:
    both, alone, apart = answer(), answer(pools="mixed"), answer(pools="split")
    assert {pool["role"] for pool in alone["best"]["plan"]["pools"]} == {"mixed"}
    assert [pool["role"] for pool in apart["best"]["plan"]["pools"]] == ["prefill", "decode"]
    rates = [found["best"]["tok_s_per_chip"] for found in (both, alone, apart)]
    assert rates[0] == max(rates)
    assert "unknown pools 'splt'" in refused(InputError, pools="splt")
    assert "--draft-tokens" in refused(InputError, launch="x", draft_weights="me/eagle3")
    assert "--draft-weights says what --launch writes" in refused(InputError, draft_weights="me/eagle3")


def test_drafts_and_hits_are_asked_for_in_full() -> None:
    plain, drafted = answer(), answer(draft_tokens="2", acceptance="0.8")
    assert drafted["tokens_per_step"] == pytest.approx(1 + 0.8 + 0.64)
    assert drafted["best"]["tok_s_per_chip"] > plain["best"]["tok_s_per_chip"]
    assert answer(prefix_hit="0.5")["best"]["tok_s_per_chip"] > plain["best"]["tok_s_per_chip"]
    assert "go together" in refused(InputError, draft_tokens="2")
    assert "for equal requests" in refused(InputError, prefix_hit="0.5", rate="2")
    assert "prefix_hit must be a share" in refused(InputError, prefix_hit="1")


def test_idle_chips_say_why_in_text_json_and_html(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    asked = {"model": "Qwen/Qwen3-235B-A22B", "chips": "11", "tpot_ms": "60", "pools": "mixed"}
    found = answer(**asked)["best"]["plan"]
    assert found["idle_chips"] == 3
    assert found["idle_reason"] == "3 chips stay idle: the smallest replica as quick takes 4"
    shown = run(**asked, html=str(page)).stdout
    assert found["idle_reason"] in " ".join(shown.split())
    assert found["idle_reason"] in page.read_text()


def test_a_chip_in_twenty_lines_plans_a_large_model_with_ranges(tmp_path: Path) -> None:
    """The file is the one that the documentation shows."""
    docs = Path(__file__).parents[2] / "docs" / "plan.md"
    text = re.search(r"```toml\n(.*?)```", docs.read_text(), re.DOTALL)
    assert text is not None and len(text[1].splitlines()) <= 20
    (tmp_path / "ours.toml").write_text(text[1])
    found = answer(model="Qwen/Qwen3-235B-A22B", chip=str(tmp_path / "ours.toml"), chips="16", tpot_ms="60")
    for key in ("ttft_s", "tpot_s", "tok_s_per_chip", "joules_per_token"):
        low, high = found["best"]["range"][key]
        assert low < found["best"][key] < high, key
    assert "assumed" in found["best"]["source"]
