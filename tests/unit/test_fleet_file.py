"""A fleet file: what it may say, what is refused, and that flags saying the same give the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tongyun.cli import build
from tongyun.cli.fleet import read_fleet
from tongyun.errors import InputError, SpecError
from tongyun.specs import FleetSpec, dumps, find_fleet, loads

FLEET = """
name = "two-pools"
model = "Qwen/Qwen3-8B"
chip = "h200"
router = "prefix"

[[pool]]
role = "decode"
replicas = 3
batch = 48

[[pool]]
role = "prefill"
replicas = 1
tp = 2
step_tokens = 4096
"""
LOAD = ("--rate", "6", "--isl", "800", "--osl", "40", "--requests", "60", "--json")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    place = tmp_path / "fleet.toml"
    place.write_text(FLEET)
    return place


def simulate(*flags: str) -> dict[str, Any]:
    done = CliRunner().invoke(build(), ["simulate", *flags, *LOAD], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def refused(*flags: str) -> str:
    done = CliRunner().invoke(build(), ["simulate", *flags, *LOAD])
    assert isinstance(done.exception, InputError)
    return str(done.exception)


def test_pools_may_be_cut_differently_and_come_in_the_order_of_a_request(file: Path) -> None:
    spec, fleet = read_fleet(file)
    assert spec.router == "prefix"
    assert [pool.role for pool in fleet.pools] == ["prefill", "decode"]
    assert fleet.question.chips == 2 + 3
    assert fleet.idle_chips == 0
    assert fleet.pools[0].plan.shard.tp == 2
    assert fleet.pools[1].plan.batch == 48


def test_it_reads_back_as_it_was_written(file: Path) -> None:
    spec = find_fleet(file)
    assert loads(dumps(spec), FleetSpec) == spec


def test_pools_of_different_cuts_serve_everybody(file: Path) -> None:
    told = simulate("--fleet", str(file))
    assert told["report"]["succeeded"] == 60
    assert told["report"]["output_tokens"] == 60 * 40
    assert [pool["role"] for pool in told["pools"]] == ["prefill", "decode"]
    assert len(told["engines"]) == 1 + 3


def test_a_file_and_the_flags_that_say_the_same_give_the_same_run(tmp_path: Path) -> None:
    place = tmp_path / "same.toml"
    place.write_text(
        'name = "same"\nmodel = "Qwen/Qwen3-8B"\nchip = "h200"\n[[pool]]\nreplicas = 2\ntp = 2\nbatch = 32\n'
    )
    ours = simulate("--fleet", str(place))
    theirs = simulate(
        *("--model", "Qwen/Qwen3-8B", "--chip", "h200", "--chips", "4", "--tp", "2", "--batch", "32")
    )
    for told in (ours, theirs):
        del told["seconds"]
    assert ours == theirs


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('role = "decode"', 'role = "decoding"', "did you mean decode"),
        ('role = "decode"', 'role = "prefill"', "one mixed, or one prefill and one decode"),
        ("replicas = 3", "replicas = 0", "pool.0.replicas"),
        ("batch = 48", "batsch = 48", "did you mean batch"),
        ('router = "prefix"', 'router = "prefx"', "did you mean prefix"),
        ('router = "prefix"', "prefix_caching = 1", "true or false"),
        ('chip = "h200"', 'chip = "h20O"', "did you mean"),
        ('model = "Qwen/Qwen3-8B"', "", "model: missing"),
    ],
)
def test_what_is_wrong_is_named(file: Path, old: str, new: str, says: str) -> None:
    file.write_text(FLEET.replace(old, new))
    with pytest.raises(InputError, match=says):
        read_fleet(file)


def test_no_pools_at_all_is_named(tmp_path: Path) -> None:
    place = tmp_path / "none.toml"
    place.write_text('name = "none"\nmodel = "Qwen/Qwen3-8B"\nchip = "h200"\npool = []\n')
    with pytest.raises(SpecError, match=r"\[\[pool\]\]"):
        read_fleet(place)


def test_a_flag_beside_the_file_is_refused_even_at_its_default(file: Path) -> None:
    assert "--fleet says that" in refused("--fleet", str(file), "--chips", "1")
    assert "--router" in refused("--fleet", str(file), "--router", "least-load")
    assert "--model is missing" in refused("--chip", "h200")
