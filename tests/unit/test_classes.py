"""Classes of service and migration as a fleet file says them: what is refused, and what they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tongyun.cli import build
from tongyun.errors import InputError, SpecError
from tongyun.specs import FleetSpec, dumps, find_fleet, loads

FLEET = """
name = "two-classes"
model = "Qwen/Qwen3-8B"
chip = "h200"
router = "freeness"

[[class]]
name = "chat"
priority = 2
ttft_ms = 300
headroom = 0.2

[[class]]
name = "batch"
priority = -1
ttft_ms = 60000

[migration]
interval_ms = 100
below_steps = 25000
above_steps = 25000

[[pool]]
replicas = 2
batch = 24
"""


def fleet(place: Path, old: str = "", new: str = "") -> Path:
    assert old in FLEET
    file = place / "fleet.toml"
    file.write_text(FLEET.replace(old, new) if old else FLEET)
    return file


def trace(
    place: Path, classes: tuple[str, ...] = ("batch", "batch", "chat"), longer: tuple[int, ...] = (0,)
) -> Path:
    """Eighty requests a second, far more than two replicas of 24 requests serve at once."""
    file = place / "load.csv"
    rows = [
        f"{i / 80},{400 + i % 7 * 100},{60 + i % 5 * 40 + longer[i % len(longer)]},"
        f"{classes[i % len(classes)]}"
        for i in range(240)
    ]
    file.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens,class", *rows]) + "\n")
    return file


def simulate(*flags: str) -> dict[str, Any]:
    done = CliRunner().invoke(build(), ["simulate", *flags, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_it_reads_back_as_it_was_written(tmp_path: Path) -> None:
    spec = find_fleet(fleet(tmp_path))
    assert [each.priority for each in spec.classes] == [2, -1]
    assert loads(dumps(spec), FleetSpec) == spec


def test_the_higher_class_goes_first_and_each_is_held_to_its_own_limits(tmp_path: Path) -> None:
    load = str(trace(tmp_path))
    told = simulate("--fleet", str(fleet(tmp_path)), "--trace", load)
    chat, batch = told["classes"]["chat"]["report"], told["classes"]["batch"]["report"]
    assert chat["ttft_s"]["p99"] < 0.3 < batch["ttft_s"]["p50"]
    assert told["classes"]["chat"]["attainment"] == 1.0
    assert chat["met_slo"] + batch["met_slo"] == told["report"]["met_slo"]
    # By the limit of the other class it would have missed.
    assert batch["met_slo"] > 0

    level = fleet(tmp_path, "priority = 2", "priority = -1")
    equal = simulate("--fleet", str(level), "--trace", load)["classes"]["chat"]["report"]
    assert equal["ttft_s"]["p99"] > 3 * chat["ttft_s"]["p99"]


def test_ageing_bounds_how_long_the_lower_class_waits(tmp_path: Path) -> None:
    load = str(trace(tmp_path, ("batch", "chat", "chat", "chat")))
    strict = simulate("--fleet", str(fleet(tmp_path)), "--trace", load)["classes"]
    aged_file = fleet(tmp_path, 'router = "freeness"', 'router = "freeness"\nclass_aging_s = 0.1')
    aged = simulate("--fleet", str(aged_file), "--trace", load)["classes"]
    assert aged["batch"]["report"]["ttft_s"]["most"] < 0.8 * strict["batch"]["report"]["ttft_s"]["most"]
    assert aged["chat"]["report"]["ttft_s"]["p99"] > strict["chat"]["report"]["ttft_s"]["p99"]


def test_moves_are_told_in_both_outputs(tmp_path: Path) -> None:
    flags = ("--fleet", str(fleet(tmp_path, 'router = "freeness"', 'router = "round-robin"')))
    # Turn by turn, one replica gets all the long answers.
    load = ("--trace", str(trace(tmp_path, longer=(600, 0))))
    moves = simulate(*flags, *load)["moves"]
    assert moves["migrated"] + moves["rescheduled"] > 0
    text = CliRunner().invoke(build(), ["simulate", *flags, *load]).stdout
    assert f"{moves['migrated']:,}" in text and "pause ms, p50 and p99" in text


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("priority = 2", "priority = 2.5", "a whole number from -1000 to 1000"),
        ("headroom = 0.2", "headroom = 1.2", "from 0 to 0.95"),
        ('name = "batch"', 'name = "chat"', "'chat' is there twice"),
        ("ttft_ms = 300", "ttft = 300", "ttft_ms"),
        ("above_steps = 25000", "above_steps = 40", "give and take at once"),
        ("interval_ms = 100", "interval_ms = 0", "from 1"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        find_fleet(fleet(tmp_path, old, new))


def test_a_class_that_the_file_does_not_know_is_refused(tmp_path: Path) -> None:
    flags = ["simulate", "--fleet", str(fleet(tmp_path)), "--trace", str(trace(tmp_path, ("chatt",)))]
    done = CliRunner().invoke(build(), flags)
    assert isinstance(done.exception, InputError)
    assert "chatt" in str(done.exception) and "did you mean chat" in str(done.exception)
