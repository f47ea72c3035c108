"""`tongyun simulate` with drafts: by flags, by a fleet file and by a plan; refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tongyun.cli import build
from tongyun.errors import InputError

FLEET = """
name = "drafting"
model = "Qwen/Qwen3-8B"
chip = "h100"

[drafts]
tokens = 2
acceptance = { fraction = 0.7, kind = "measured", source = "on our traffic" }

[[pool]]
replicas = 2
batch = 16
"""
UPKEEP = """
[failures]
chip_mtbf_hours = 0.005
chip_repair_hours = 0.001
on_failure = "retry"
retries = 50
"""
LOAD = ("--rate", "6", "--isl", "500", "--osl", "60", "--requests", "60")
FLAGS = ("--model", "Qwen/Qwen3-8B", "--chip", "h100", "--chips", "2", "--tp", "1", "--batch", "16")


def run(*flags: str) -> str:
    done = CliRunner().invoke(build(), ["simulate", *flags, *LOAD], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def told(*flags: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(run(*flags, "--json"))
    return answer


def refused(*flags: str) -> str:
    done = CliRunner().invoke(build(), ["simulate", *flags, *LOAD])
    assert isinstance(done.exception, InputError), done.output
    return str(done.exception)


def fleet(tmp_path: Path, *changes: tuple[str, str], more: str = "") -> str:
    text = FLEET
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "fleet.toml").write_text(text + more)
    return str(tmp_path / "fleet.toml")


def test_flags_and_a_file_that_say_the_same_give_the_same_run(tmp_path: Path) -> None:
    by_file = told("--fleet", fleet(tmp_path))
    by_flags = told(*FLAGS, "--draft-tokens", "2", "--acceptance", "0.7")
    assert by_file["report"] == by_flags["report"] and by_file["engines"] == by_flags["engines"]
    assert (by_file["draft_tokens"], by_file["acceptance"]) == (2, 0.7)
    assert by_file["tokens_per_step"] == 1 + by_file["accepted_per_step"]
    assert by_file["report"]["output_tokens"] == 60 * 60
    # Drafts are of no use to who has one token left to come, nor beyond it.
    assert by_file["accepted_per_step"] == pytest.approx(0.7 + 0.49, rel=0.05)
    assert "measured" in by_file["source"]
    plain = told(*FLAGS)
    assert plain["accepted_per_step"] is None and plain["tokens_per_step"] is None
    assert plain["report"]["tpot_s"]["mean"] > by_file["report"]["tpot_s"]["mean"]
    text = run("--fleet", fleet(tmp_path))
    assert "drafts right in a step" in text and "of 2" in text
    assert "drafts" not in run(*FLAGS)
    run("--fleet", fleet(tmp_path), "--html", str(tmp_path / "run.html"))
    assert "of 2 drafts" in (tmp_path / "run.html").read_text()


def test_replicas_that_fail_lose_no_token(tmp_path: Path) -> None:
    found = told("--fleet", fleet(tmp_path, more=UPKEEP))
    assert found["kept"] is not None and found["accepted_per_step"] > 0
    assert found["report"]["succeeded"] == 60
    assert found["report"]["output_tokens"] == 60 * 60


def test_a_plan_with_drafts_is_played_with_them(tmp_path: Path) -> None:
    asked = ("--model", "Qwen/Qwen3-8B", "--chip", "h100", "--chips", "2", "--isl", "500", "--osl", "60")
    flags = ("--tpot-ms", "20", "--draft-tokens", "2", "--acceptance", "0.7", "--pools", "mixed", "--json")
    done = CliRunner().invoke(build(), ["plan", *asked, *flags], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    place = tmp_path / "plan.json"
    place.write_text(done.stdout)
    found = told("--plan", str(place))
    assert (found["draft_tokens"], found["acceptance"]) == (2, 0.7)
    assert found["accepted_per_step"] == pytest.approx(0.7 + 0.49, rel=0.05)
    whole = json.loads(done.stdout)
    place.write_text(json.dumps(whole | {"acceptance": 1.5}))
    assert "acceptance: expected a probability from 0 to 1, got 1.5" in refused("--plan", str(place))
    place.write_text(json.dumps(whole | {"draft_tokens": -1}))
    assert "draft_tokens: expected a whole number" in refused("--plan", str(place))
    place.write_text(done.stdout)
    assert "--draft-tokens: --plan says that" in refused("--plan", str(place), "--draft-tokens", "1")


def test_what_makes_no_sense_is_refused_by_name(tmp_path: Path) -> None:
    assert "go together" in refused(*FLAGS, "--draft-tokens", "2")
    assert "acceptance must be a probability" in refused(*FLAGS, "--draft-tokens", "2", "--acceptance", "1.5")
    assert "--acceptance: --fleet says that" in refused("--fleet", fleet(tmp_path), "--acceptance", "0.5")
    many = fleet(tmp_path, ("tokens = 2", "tokens = 40"))
    assert "drafts.tokens: expected 1 … 16, got 40" in refused("--fleet", many)
    bare = fleet(tmp_path, ("fraction = 0.7, ", ""))
    assert "drafts.acceptance" in refused("--fleet", bare)
