"""A fleet file with several models: what it may say, what is refused, and what comes of it by model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tongyun.cli import build
from tongyun.cli.fleet import read_fleet
from tongyun.cli.market import read_market
from tongyun.cloud.latency import Slo
from tongyun.cloud.sched.router import find_router
from tongyun.cloud.workload import Arrival
from tongyun.errors import Infeasible, InputError, SpecError
from tongyun.specs import MarketSpec, dumps, find_fleet, find_market, loads

MARKET = """
name = "market"
chip = "h20"

[[model]]
name = "Qwen/Qwen3-32B"
share = 8

[[model]]
name = "chat"
config = "Qwen/Qwen3-14B"
copies = 3
share = 2

[[model]]
name = "tuned"
config = "Qwen/Qwen3-8B"
copies = 4
ttft_ms = 3000
tpot_ms = 50

[[pool]]
models = ["Qwen/Qwen3-32B"]
replicas = 2

[[pool]]
shared = true
replicas = 2

[sharing]
host_gb = 128
"""
LOAD = ("--rate", "4", "--isl", "700", "--osl", "60", "--requests", "150", "--ttft-ms", "5000")
ONE = [Arrival(0.0, 700, 60)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    place = tmp_path / "market.toml"
    place.write_text(MARKET)
    return place


def simulate(file: Path, *flags: str) -> str:
    done = CliRunner().invoke(build(), ["simulate", "--fleet", str(file), *flags], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def told(file: Path, *flags: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(simulate(file, *(flags or LOAD), "--json"))
    return answer


def test_what_models_felt_and_cost_adds_up_to_the_run(file: Path) -> None:
    run = told(file)
    models = run["models"].values()
    assert list(run["models"]) == [
        "Qwen/Qwen3-32B",
        *(f"chat-{n}" for n in (1, 2, 3)),
        *(f"tuned-{n}" for n in (1, 2, 3, 4)),
    ]
    reports = [one["report"] for one in models]
    for key in ("requests", "succeeded", "prompt_tokens", "output_tokens", "met_slo"):
        assert sum(report[key] for report in reports) == run["report"][key]
    for key in ("output_tokens_per_s", "goodput_tokens_per_s", "requests_per_s"):
        assert sum(one[key] for one in models) == pytest.approx(run[key])
    assert sum(one["chips"] for one in models) == pytest.approx(run["chips"]) == 4
    assert sum(one["joules"] for one in models) == pytest.approx(run["joules"])
    paid = sum(one["usd_per_mtoken"] * one["report"]["output_tokens"] for one in models)
    assert paid == pytest.approx(run["usd_per_mtoken"] * run["report"]["output_tokens"])
    switched = [engine["switched"] for engine in run["engines"] if engine["switched"]]
    assert len(switched) == 2
    for name, one in run["models"].items():
        for key in ("count", "loads", "seconds", "in_bytes"):
            assert one["switched"][key] == pytest.approx(
                sum(each.get(name, {key: 0})[key] for each in switched)
            )
    assert run["models"]["Qwen/Qwen3-32B"]["chips"] == 2
    assert run["report"]["succeeded"] == 150


def test_the_same_seed_gives_the_same_run_and_another_one_another(file: Path) -> None:
    first, again, other = told(file), told(file), told(file, *LOAD, "--seed", "1")
    for run in (first, again, other):
        del run["seconds"]
    assert first == again
    assert first["models"] != other["models"]


def test_one_model_that_shares_with_nobody_is_a_plain_fleet(tmp_path: Path) -> None:
    plain, shared = tmp_path / "plain.toml", tmp_path / "shared.toml"
    plain.write_text('name = "one"\nmodel = "Qwen/Qwen3-8B"\nchip = "h20"\n[[pool]]\nreplicas = 2\n')
    shared.write_text(
        'chip = "h20"\nname = "one"\n[[model]]\nname = "Qwen/Qwen3-8B"\n'
        "[[pool]]\nreplicas = 2\nshared = true\n"
    )
    one, other = told(plain), told(shared)
    assert list(other["report"]["slo"].pop("models")) == ["Qwen/Qwen3-8B"]
    for key in ("report", "joules", "use"):
        assert one[key] == other[key]
    for ours, theirs in zip(one["engines"], other["engines"], strict=True):
        theirs["switched"] = {}
        assert ours == theirs


def test_prefill_and_decode_may_be_shared_apart(file: Path) -> None:
    file.write_text(
        MARKET.replace("shared = true", 'shared = true\nrole = "prefill"')
        + '\n[[pool]]\nshared = true\nrole = "decode"\nreplicas = 3\n'
    )
    run = told(file)
    assert run["report"]["succeeded"] == 150
    assert run["chips"] == 7
    assert [pool["role"] for pool in run["parts"][1]["pools"]] == ["prefill", "decode"]


def test_it_shows_models_and_switches(file: Path) -> None:
    shown = simulate(file, *LOAD)
    assert "market: 8 models on 4 × NVIDIA H20" in shown
    assert "shared engines switching" in shown
    assert "switches" in shown and "tuned-4" in shown
    assert "150 requests simulated" in shown


def test_its_schedule_shows_who_came_to_work_when(file: Path, tmp_path: Path) -> None:
    place = tmp_path / "run.json"
    plain, traced = told(file), told(file, *LOAD, "--perfetto", str(place))
    del plain["seconds"], traced["seconds"]
    assert plain == traced
    events = json.loads(place.read_text())["traceEvents"]
    titles = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert titles == {
        *(f"Qwen/Qwen3-32B engine {n} (simulated)" for n in (0, 1)),
        *(f"shared engine {n} (simulated)" for n in (0, 1)),
    }
    changes = [event for event in events if event["name"].startswith("to ")]
    switched = traced["models"].values()
    waited_s = sum(event["dur"] for event in changes) / 1e6
    assert waited_s == pytest.approx(sum(one["switched"]["seconds"] for one in switched), abs=1e-3)
    assert len(changes) >= sum(one["switched"]["count"] for one in switched)


def test_a_trace_says_who_is_asked_and_a_strange_name_is_told_its_neighbours(
    file: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.csv"
    rows = ["0,chat-1", "1,chat-1", "2,tuned-2"]
    trace.write_text(
        "arrival_s,model,prompt_tokens,output_tokens\n" + "".join(f"{row},500,20\n" for row in rows)
    )
    run = told(file, "--trace", str(trace))
    asked = {name: one["report"]["requests"] for name, one in run["models"].items() if one["report"]}
    assert asked == {"chat-1": 2, "tuned-2": 1}
    assert run["models"]["tuned-1"]["usd_per_mtoken"] is None
    trace.write_text(trace.read_text().replace("tuned-2", "tunde-2"))
    done = CliRunner().invoke(build(), ["simulate", "--fleet", str(file), "--trace", str(trace)])
    assert isinstance(done.exception, InputError)
    assert "request 3: unknown model 'tunde-2'; did you mean tuned-2" in str(done.exception)


def test_limits_are_the_models_own_or_the_runs(file: Path) -> None:
    spec = find_market(file)
    assert spec is not None
    market = read_market(file, spec, ONE, slo=Slo(ttft_s=5.0, tpot_s=0.2))
    assert market.models["chat-1"].slo == Slo(ttft_s=5.0, tpot_s=0.2)
    assert market.models["tuned-1"].slo == Slo(ttft_s=3.0, tpot_s=0.05)
    assert market.chips == 4


def test_it_reads_back_as_it_was_written_and_plain_files_are_none(file: Path, tmp_path: Path) -> None:
    spec = find_market(file)
    assert spec is not None
    assert loads(dumps(spec), MarketSpec) == spec
    plain = tmp_path / "plain.toml"
    plain.write_text('name = "one"\nmodel = "Qwen/Qwen3-8B"\nchip = "h20"\n[[pool]]\nreplicas = 2\n')
    assert find_market(plain) is None
    assert find_fleet(plain).model == "Qwen/Qwen3-8B"
    assert find_market(tmp_path / "none.toml") is None


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('models = ["Qwen/Qwen3-32B"]', 'models = ["Qwen/Qwen3-23B"]', "did you mean Qwen/Qwen3-32B"),
        ('models = ["Qwen/Qwen3-32B"]', 'models = ["chat-1", "chat"]', "'chat-1' is in"),
        ("shared = true\n", 'shared = true\nmodels = ["chat"]\n', "no pool serves model 'tuned-1'"),
        ("shared = true\n", "", "are mixed, mixed"),
        ("shared = true\n", 'shared = true\nrole = "decode"\n', "one mixed, or one prefill and one decode"),
        ("shared = true\n", "shared = true\ndp = 2\n", "dp 2; accepted: 1"),
        (
            'config = "Qwen/Qwen3-14B"',
            'config = "Qwen/Qwen3-41B"',
            "did you mean Qwen/Qwen3-4B, Qwen/Qwen3-14B",
        ),
        ('name = "tuned"', 'name = "chat"', "two models are called 'chat-1'"),
        ("copies = 3", "copies = 0", "model.1.copies"),
        ("tpot_ms = 50", "tpot = 50", "did you mean"),
        ("host_gb = 128", 'turns = "token"', "did you mean tokens"),
        ("host_gb = 128", "[migration]\nprompts = true", "that only prefill; no pool has those"),
    ],
)
def test_what_is_wrong_is_named(file: Path, old: str, new: str, says: str) -> None:
    text = MARKET.replace(old, new)
    if says == "are mixed, mixed":
        text = text.replace('models = ["Qwen/Qwen3-32B"]\n', "")
    file.write_text(text)
    with pytest.raises(InputError, match=says) as caught:
        spec = find_market(file)
        assert spec is not None
        read_market(file, spec, ONE, slo=Slo())
    assert caught.value.exit_code == 2


def test_what_does_not_fit_says_by_how_many_bytes(file: Path) -> None:
    def play(text: str) -> None:
        file.write_text(text)
        spec = find_market(file)
        assert spec is not None
        market = read_market(file, spec, ONE, slo=Slo())
        chip = market.models["chat-1"].question.chip.at()
        market.play(ONE, lambda: find_router("least-load"), chip=chip)

    with pytest.raises(
        Infeasible, match=r"Qwen3-235B-A22B does not fit.*: a rank of h20 lacks 3[\d,]+ bytes"
    ):
        play(MARKET.replace("Qwen/Qwen3-8B", "Qwen/Qwen3-235B-A22B"))
    with pytest.raises(
        Infeasible, match=r"7 models do not fit host memory: a node of 2 chips lacks [\d,]+ bytes"
    ):
        play(MARKET.replace("host_gb = 128", "host_gb = 60"))


def test_what_is_for_a_fleet_of_one_model_is_refused(file: Path) -> None:
    with pytest.raises(InputError, match="a fleet of one model"):
        read_fleet(file)
    done = CliRunner().invoke(build(), ["simulate", "--fleet", str(file), "--tp", "2", *LOAD])
    assert "--fleet says that" in str(done.exception)
    done = CliRunner().invoke(build(), ["simulate", "--fleet", str(file), "--html", "x.html", *LOAD])
    assert "--html: not written for several models" in str(done.exception)
    with pytest.raises(SpecError, match="prefix_caching"):
        loads(MARKET.replace('chip = "h20"', 'chip = "h20"\nprefix_caching = 1'), MarketSpec)


MOVING = """
[migration]
interval_ms = 100
below_steps = {steps}
above_steps = {steps}
"""


def bursts(place: Path) -> str:
    """Turn by turn, one of two replicas gets all the long answers."""
    file = place / "bursts.csv"
    rows = [f"{i / 60},{400 + i % 7 * 100},{60 + i % 5 * 40 + (600, 0)[i % 2]}" for i in range(240)]
    file.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]) + "\n")
    return str(file)


def test_moves_of_one_model_in_such_a_file_are_those_of_a_plain_fleet(tmp_path: Path) -> None:
    pool = 'router = "round-robin"\nchip = "h200"\nname = "one"\n{}\n[[pool]]\nreplicas = 2\nbatch = 24\n'
    plain, several = tmp_path / "plain.toml", tmp_path / "several.toml"
    plain.write_text(pool.format('model = "Qwen/Qwen3-8B"') + MOVING.format(steps=25000))
    several.write_text(pool.format('[[model]]\nname = "Qwen/Qwen3-8B"') + MOVING.format(steps=25000))
    load = ("--trace", bursts(tmp_path))
    one, other = told(plain, *load), told(several, *load)
    assert one["moves"] == other["moves"] == other["models"]["Qwen/Qwen3-8B"]["moves"]
    assert one["moves"]["migrated"] + one["moves"]["rescheduled"] > 0
    assert one["engines"] == other["engines"]
    text = simulate(several, *load)
    assert "pause ms, p50 and p99" in text and "moved decoding" in text


def test_models_with_replicas_of_their_own_move_requests_and_others_do_not(tmp_path: Path) -> None:
    file = tmp_path / "moving.toml"
    more = '[[pool]]\nmodels = ["tuned"]\nreplicas = 2\nbatch = 8\n'
    file.write_text('router = "round-robin"\n' + MARKET + more + MOVING.format(steps=4000))
    trace = tmp_path / "trace.csv"
    rows = [
        f"{i / 40},{name},300,{(400, 20)[i % 2]}"
        for i in range(120)
        for name in ("Qwen/Qwen3-32B", "tuned-1", "chat-1")
    ]
    trace.write_text("\n".join(["arrival_s,model,prompt_tokens,output_tokens", *rows]) + "\n")
    run = told(file, "--trace", str(trace))
    moves = {name: one["moves"] for name, one in run["models"].items()}
    assert all(moves[f"chat-{n}"] is None for n in (1, 2, 3))
    assert moves["Qwen/Qwen3-32B"]["migrated"] + moves["Qwen/Qwen3-32B"]["rescheduled"] > 0
    assert moves["tuned-1"]["migrated"] + moves["tuned-1"]["rescheduled"] > 0
    assert moves["tuned-2"]["migrated"] == 0
    for key in ("migrated", "rescheduled", "called_off", "moved_bytes"):
        assert run["moves"][key] == pytest.approx(sum(one[key] for one in moves.values() if one))
    assert run["report"]["succeeded"] == 360


def test_moves_without_two_engines_of_one_model_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "still.toml"
    file.write_text(MARKET.replace("replicas = 2", "replicas = 1", 1) + MOVING.format(steps=100))
    with pytest.raises(SpecError, match=r"migration.*accepted: with a pool that is not shared") as caught:
        simulate(file, *LOAD)
    assert caught.value.exit_code == 2


KEPT = """
[failures]
chip_mtbf_hours = 0.006
chip_repair_hours = 0.001

[[failures.event]]
at_s = 6
instance = "shared/mixed-1"
for_s = 4

[[autoscale]]
pool = "Qwen/Qwen3-32B/mixed"
target = 8
weights = "host"
"""


def test_failures_and_autoscaling_are_told_by_pool_and_money_is_paid_for_what_is_held(tmp_path: Path) -> None:
    file = tmp_path / "kept.toml"
    file.write_text(MARKET + KEPT)
    run = told(file, *LOAD, "--usd-per-chip-hour", "2")
    kept, report = run["kept"], run["report"]
    assert kept["failures"] > 1 and kept["retries"] > 0
    assert set(kept["held"]) == {"Qwen/Qwen3-32B/mixed", "shared/mixed"}
    assert kept["held"]["Qwen/Qwen3-32B/mixed"] < 2 * report["duration_s"]
    assert kept["held"]["shared/mixed"] == pytest.approx(2 * report["duration_s"])
    chips = sum(one["chips"] for one in run["models"].values())
    assert chips == pytest.approx(kept["held_chip_s"] / report["duration_s"])
    spent = 2 * kept["held_chip_s"] / 3600
    assert run["usd_per_mtoken"] == pytest.approx(spent / report["output_tokens"] * 1e6)
    assert report["succeeded"] + report["failed"] == 150
    text = simulate(file, *LOAD)
    assert "requests retried" in text and "chip-hours held" in text


@pytest.mark.parametrize(
    ("wrong", "right", "message"),
    [
        ('instance = "shared/mixed-1"', 'instance = "shared/mixed-7"', "shared/mixed-1"),
        ('pool = "Qwen/Qwen3-32B/mixed"', 'pool = "mixed"', "shared/mixed"),
    ],
)
def test_a_replica_or_pool_that_is_not_there_is_told_its_neighbours(
    tmp_path: Path, wrong: str, right: str, message: str
) -> None:
    file = tmp_path / "kept.toml"
    file.write_text((MARKET + KEPT).replace(wrong, right))
    with pytest.raises(SpecError, match=message):
        simulate(file, *LOAD)
