"""The schedule as a trace: every step and every phase of every request, whole, nested and bounded."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tongyun.cli import build
from tongyun.cloud.engine.clock import VirtualClock
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.simulated import LeapingExecutor, SimulatedExecutor
from tongyun.cloud.engine.step_table import StepTable
from tongyun.cloud.instance import Simulated
from tongyun.cloud.perfetto import events
from tongyun.cloud.record import Recorder
from tongyun.cloud.sched.router import find_router
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig
from tongyun.cloud.schedule import Phase, Schedule
from tongyun.cloud.simulate import play_fleet
from tongyun.cloud.workload import Arrivals, Distribution, Lengths, Process, Workload, requests, sample
from tongyun.errors import InputError
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision
from tongyun.specs import find_chip, find_model

Event = dict[str, Any]


def play(schedule: Schedule, kind: type[SimulatedExecutor] = LeapingExecutor) -> list[Simulated]:
    """Bursts on two engines with few blocks: requests wait, and some are preempted."""
    raw, name = find_model("Qwen/Qwen3-8B")
    config = ModelConfig.from_hf(raw, name=name, file=name)
    limits = SchedulerConfig(blocks=110, max_context_tokens=1700, max_sequences=16, max_step_tokens=256)
    table = StepTable(
        config, find_chip("h20").at(), Precision(), max_step_tokens=256, max_context_tokens=1700
    )
    loops = [EngineLoop(Scheduler(limits), kind(table), VirtualClock()) for _ in range(2)]
    for loop, tape in zip(loops, Recorder(schedule.pool).pool("mixed", 2, 110), strict=True):
        loop.tape = tape
    load = Workload(
        arrivals=Arrivals(process=Process.GAMMA, rate_per_s=9.0, variation=3.0),
        prompt=Lengths(distribution=Distribution.LOGNORMAL, mean=300, variation=1.0, low=4, high=900),
        output=Lengths(distribution=Distribution.LOGNORMAL, mean=80, variation=1.0, low=1, high=400),
        requests=100,
        seed=2,
    )
    return play_fleet(requests(sample(load), vocabulary=32_000), loops, find_router("least-load"))


def lives(schedule: Schedule) -> dict[str, list[Phase]]:
    found: dict[str, list[Phase]] = defaultdict(list)
    for engine in schedule.engines:
        for phase in engine.phases():
            found[phase.request_id].append(phase)
    return found


def check(told: list[Event]) -> None:
    """What every reader of the format relies on."""
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    flows: dict[int, list[str]] = defaultdict(list)
    counts: dict[tuple[int, str], float] = {}
    for event in told:
        assert {"ph", "name", "pid"} <= set(event) and isinstance(event["pid"], int)
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0
            tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        elif event["ph"] == "C":
            assert all(isinstance(value, int) and value >= 0 for value in event["args"].values())
            assert counts.get((event["pid"], event["name"]), 0.0) <= event["ts"]
            counts[event["pid"], event["name"]] = event["ts"]
        elif event["ph"] in "sf":
            flows[event["id"]].append(event["ph"])
        else:
            assert event["ph"] in ("M", "i")
    assert all(pair == ["s", "f"] for pair in flows.values())
    for spans in tracks.values():
        open_until: list[float] = []
        for begin, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while open_until and open_until[-1] <= begin + 2e-3:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + 2e-3
            open_until.append(end)


def test_requests_are_somewhere_from_arrival_to_end() -> None:
    schedule = Schedule()
    results = play(schedule)
    found = lives(schedule)
    records = {one.id: one for result in results for one in result.records}
    assert set(found) == set(records)
    for request_id, phases in found.items():
        record = records[request_id]
        assert phases[0].begin_s == record.arrival_s and phases[-1].end_s == record.ended_s
        assert all(a.end_s == b.begin_s for a, b in itertools.pairwise(phases))
        prefill = next(phase for phase in phases if phase.name in ("prefill", "recompute"))
        # Unless it is preempted before, the first token leaves with the prompt.
        assert prefill.note == "preempted" or prefill.end_s == record.first_token_s
    preempted = sum(phase.note == "preempted" for phases in found.values() for phase in phases)
    assert preempted == sum(result.stats.preemptions for result in results) > 0
    steps = [sum(one.steps for one in engine.stretches()) for engine in schedule.engines]
    assert steps == [result.stats.steps for result in results]
    check(list(events(schedule)))


def test_leaps_and_steps_tell_the_same_lives() -> None:
    leapt, stepped = Schedule(), Schedule()
    assert play(leapt) == play(stepped, SimulatedExecutor)
    assert lives(leapt) == lives(stepped)
    slices = [sum(1 for _ in engine.stretches()) for engine in (*leapt.engines, *stepped.engines)]
    assert sum(slices[:2]) < sum(slices[2:]) / 3


def test_a_bound_ends_all_engines_at_one_moment() -> None:
    schedule = Schedule(most=150)
    play(schedule)
    assert schedule.cut and schedule.end_s < float("inf")
    entries = [*(phase for engine in schedule.engines for phase in engine.phases())]
    stretches = [one for engine in schedule.engines for one in engine.stretches()]
    open_ones = sum(len(engine._live) for engine in schedule.engines)
    assert 50 < len(entries) + len(stretches) <= 150 + open_ones
    assert max(one.end_s for one in entries) <= schedule.end_s
    assert max(one.begin_s for one in stretches) < schedule.end_s
    check(list(events(schedule)))


def test_a_window_shows_its_part_and_no_other() -> None:
    whole, part = Schedule(), Schedule(3.0, 6.0)
    play(whole)
    play(part)
    for all_of, some in zip(whole.engines, part.engines, strict=True):
        within = [one for one in all_of.stretches() if one.end_s >= 3.0 and one.begin_s < 6.0]
        assert list(some.stretches()) == within and within
    names = {phase.request_id for phases in lives(part).values() for phase in phases}
    over = {
        name for name, phases in lives(whole).items() if phases[0].begin_s < 6.0 and phases[-1].end_s > 3.0
    }
    assert names == over
    with pytest.raises(InputError, match="a window from 5 to 5"):
        Schedule(5.0, 5.0)


BASE = ["simulate", "--model", "Qwen/Qwen3-8B", "--chip", "h200", "--chips", "3", "--tp", "1", "--rate", "9"]


def test_the_file_holds_pools_hand_overs_and_where_it_comes_from(tmp_path: Path) -> None:
    place = tmp_path / "run.json"
    flags = [
        "--prefill-replicas",
        "1",
        "--requests",
        "60",
        "--isl",
        "700",
        "--osl",
        "30",
        "--perfetto",
        str(place),
    ]
    done = CliRunner().invoke(build(), [*BASE, *flags], catch_exceptions=False)
    assert done.exit_code == 0 and f"wrote {place}" in done.stderr
    trace = json.loads(place.read_text())
    assert trace["otherData"]["source"] == "simulated" and not trace["otherData"]["cut_by_size"]
    told = trace["traceEvents"]
    check(told)
    assert f"{len(told):,} events" in done.stderr
    titles = {event["args"]["name"] for event in told if event["name"] == "process_name"}
    assert titles == {
        "prefill engine 0 (simulated)",
        "decode engine 0 (simulated)",
        "decode engine 1 (simulated)",
    }
    kinds = [event["name"] for event in told if event["ph"] == "X"]
    assert kinds.count("hand-over") == 60 == sum(event["ph"] == "f" for event in told)
    assert kinds.count("decode") >= 60 and any(kind.startswith("decode × ") for kind in kinds)
    assert not list(tmp_path.glob("*.tmp"))


def test_flags_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    place = str(tmp_path / "run.json")
    for flags, says in (
        (["--window", "0:3"], "--perfetto shows"),
        (["--window", "0-3", "--perfetto", place], "accepted: FROM:TO"),
        (["--window", "4:3", "--perfetto", place], "a window from 4 to 3"),
    ):
        done = CliRunner().invoke(build(), [*BASE, *flags])
        assert isinstance(done.exception, InputError) and says in str(done.exception)
