"""`[failures]` and `[autoscale]` of a fleet file: what they do to a run, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tongyun.cli import build
from tongyun.cli.fleet import read_fleet
from tongyun.cloud.sched.router import LeastLoad
from tongyun.cloud.workload import Arrival
from tongyun.codesign.fleet import Played
from tongyun.errors import InputError
from tongyun.specs import FleetSpec, dumps, find_fleet, loads

FLEET = """
name = "comes-and-goes"
model = "Qwen/Qwen3-32B"
chip = "h200"

[[pool]]
replicas = 6
tp = 2

[failures]
chip_mtbf_hours = 0.05
chip_repair_hours = 0.01
on_failure = "retry"
retries = 2

[[failures.event]]
at_s = 5
instance = "mixed-0"
for_s = 30

[autoscale]
target = 16
min = 2
max = 5
weights = "storage"
storage = "cpfs-lingjun"
"""
LOAD = ("--rate", "6", "--isl", "800", "--osl", "60", "--requests", "200")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    place = tmp_path / "fleet.toml"
    place.write_text(FLEET)
    return place


def run(*flags: str) -> str:
    done = CliRunner().invoke(build(), ["simulate", *flags, *LOAD], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_it_reads_back_as_it_was_written(file: Path) -> None:
    spec = find_fleet(file)
    assert loads(dumps(spec), FleetSpec) == spec


def test_both_tables_show_in_text_and_json(file: Path) -> None:
    told = run("--fleet", str(file))
    for line in ("failures", "requests retried", "availability", "chip-hours held", "cold starts"):
        assert line in told
    answer: dict[str, Any] = json.loads(run("--fleet", str(file), "--json"))
    kept = answer["kept"]
    assert kept["failures"] >= 1
    assert 0 < kept["held_chip_s"] < kept["there_chip_s"]
    assert answer["report"]["requests"] == 200
    assert answer["report"]["succeeded"] + kept["lost"] == 200
    assert {"moment_s", "replica", "state"} == set(kept["log"][0])
    again = json.loads(run("--fleet", str(file), "--json"))
    del answer["seconds"], again["seconds"]
    assert answer == again


def test_without_the_tables_nothing_is_told_of_them(file: Path) -> None:
    file.write_text(FLEET.split("[failures]", maxsplit=1)[0])
    assert json.loads(run("--fleet", str(file), "--json"))["kept"] is None
    assert "chip-hours" not in run("--fleet", str(file))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            'instance = "mixed-0"',
            'instance = "mixed-6"',
            r"failures.event.0.instance: unknown instance 'mixed-6'",
        ),
        ('instance = "mixed-0"', "node = 2", r"failures.event.0.node: 2: accepted: nodes 0 … 1"),
        ('instance = "mixed-0"', "", "exactly one of instance and node"),
        ("for_s = 30", "for_s = 0", "failures.event.0.for_s: expected a number from 0.001"),
        ("at_s = 5", "at_s = -5", "failures.event.0.at_s"),
        ("chip_mtbf_hours = 0.05", "chip_mtbf_hour = 0.05", "did you mean chip_mtbf_hours"),
        ("chip_mtbf_hours = 0.05", "", "come together"),
        ("chip_mtbf_hours = 0.05", "chip_mtbf_hours = 0.001", "mostly broken"),
        ('on_failure = "retry"', 'on_failure = "retri"', "did you mean retry"),
        ("retries = 2", "retries = 0", "failures.retries"),
        ("max = 5", "max = 7", r"autoscale.max: 7: accepted: up to 6 replicas of mixed"),
        ("max = 5", "max = 1", "max 1 is below min 2"),
        ("target = 16", "target = 0", "expected a number from 0.001"),
        ("target = 16", "", "autoscale.*target: missing"),
        ("target = 16", 'target = 16\nby = "request"', "did you mean requests"),
        ("target = 16", 'target = 16\npool = "decode"', "autoscale.pool: unknown pool 'decode'"),
        ('"cpfs-lingjun"', '"cpfs-lingjum"', "autoscale.storage: .*did you mean cpfs-lingjun"),
        ('storage = "cpfs-lingjun"', "", "come together"),
        ('weights = "storage"', 'weights = "tape"', "autoscale.*weights"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_key(file: Path, old: str, new: str, says: str) -> None:
    assert old in FLEET
    file.write_text(FLEET.replace(old, new))
    with pytest.raises(InputError, match=says) as caught:
        read_fleet(file)
    assert str(file) in str(caught.value)


def test_one_pool_has_one_rule(file: Path) -> None:
    table = FLEET[FLEET.index("[autoscale]") :].replace("[autoscale]", "[[autoscale]]")
    file.write_text(FLEET[: FLEET.index("[autoscale]")] + 2 * table)
    with pytest.raises(InputError, match=r"autoscale.1: the pool mixed has a rule already"):
        read_fleet(file)


def storm(file: Path, weights: str) -> Played:
    """One replica, then ten times what it can do: the others start."""
    head = FLEET[: FLEET.index("[failures]")]
    file.write_text(f'{head}[autoscale]\ntarget = 8\nmin = 1\ninterval_s = 5\nweights = "{weights}"\n')
    if weights == "storage":
        file.write_text(file.read_text() + 'storage = "cpfs-lingjun"\n')
    _, fleet = read_fleet(file)
    load = [Arrival(i / 20, 800, 100) for i in range(1200)]
    return fleet.play(load, LeastLoad(), chip=fleet.question.chip.at())


def test_where_the_weights_are_says_how_soon_help_comes(file: Path) -> None:
    """32 B in bf16 on two ranks: 33 GB each over PCIe, the network, or an eighth of 25 GB/s."""
    runs = {weights: storm(file, weights) for weights in ("host", "neighbour", "storage")}
    waits = [max(run.kept.cold_starts_s) for run in runs.values() if run.kept is not None]
    assert waits == sorted(waits)
    assert waits[0] == pytest.approx(20 + 32.8e9 / 63.015e9, rel=0.01)
    tails = [run.report.ttft_s.p99 for run in runs.values() if run.report.ttft_s is not None]
    assert tails == sorted(tails)
    assert tails[2] > 1.05 * tails[1]


def test_chips_that_are_off_cost_nothing(file: Path) -> None:
    """Money is that of the chip-seconds held; a fleet for the peak pays for all of them."""
    scaled = storm(file, "host")
    assert scaled.kept is not None and scaled.usd_per_mtoken is not None
    file.write_text(FLEET[: FLEET.index("[failures]")])
    _, fleet = read_fleet(file)
    price = fleet.question.price
    assert price is not None
    hours = scaled.kept.held_chip_s / 3600
    assert scaled.usd_per_mtoken == pytest.approx(
        hours * price.chip_hour.value / scaled.report.output_tokens * 1e6, rel=1e-9
    )
    still = fleet.play(
        [Arrival(i / 20, 800, 100) for i in range(1200)], LeastLoad(), chip=fleet.question.chip.at()
    )
    assert scaled.joules < still.joules
