"""The schedule of requests that move, or are lost and sent again: each is in one place at every moment."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.laws.test_failures import script
from tests.laws.test_migration import EAGER, TIGHT, configs, crowd, loads, policies
from tests.laws.test_moving_pools import Pools, moving_prompts
from tests.laws.test_moving_replicas import SLOW, Together, tables
from tests.laws.test_schedule import check, lives

from tongyun.cloud.engine.simulated import LeapingExecutor, SimulatedExecutor
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.migration import Move
from tongyun.cloud.perfetto import events
from tongyun.cloud.sched.migrate import MigrationPolicy, PromptPolicy
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.scheduler import SchedulerConfig
from tongyun.cloud.schedule import Phase, Schedule
from tongyun.specs import AutoscaleSpec, FailureSpec, OutageSpec

Table = tuple[FailureSpec | None, tuple[AutoscaleSpec, ...]]
STILL: Table = (None, ())


def told(
    load: list[Request],
    config: SchedulerConfig,
    policy: MigrationPolicy,
    table: Table = STILL,
    kind: type[SimulatedExecutor] = LeapingExecutor,
) -> tuple[Schedule, list[RequestRecord], list[Move]]:
    one, schedule = Together(config, policy, *table, kind=kind), Schedule()
    loops = [each.loop for each in one.front.instances]
    for loop, tape in zip(loops, schedule.pool("mixed", len(loops), config.blocks), strict=True):
        loop.tape = tape
    records, _, log = one.play(load)
    return schedule, records, log


def places(schedule: Schedule) -> dict[str, list[tuple[int, Phase]]]:
    """Each request's phases with their engines, one after the other."""
    found: dict[str, list[tuple[int, Phase]]] = {}
    for engine in schedule.engines:
        for phase in engine.phases():
            found.setdefault(phase.request_id, []).append((engine.number, phase))
    return {name: sorted(all_of, key=lambda at: at[1].begin_s) for name, all_of in found.items()}


def contiguous(schedule: Schedule, records: Sequence[RequestRecord]) -> None:
    """Phases follow each other from arrival to end, whatever engines they are on."""
    found = places(schedule)
    for record in records:
        if record.ok:
            phases = [phase for _, phase in found[record.id]]
            assert phases[0].begin_s == record.arrival_s and phases[-1].end_s == record.ended_s
            assert all(a.end_s == b.begin_s for a, b in itertools.pairwise(phases))
    check(list(events(schedule)))


@settings(max_examples=60, deadline=None)
@given(loads(), configs, policies, st.one_of(st.just(STILL), tables))
def test_a_request_is_in_one_place_from_arrival_to_end(
    load: list[Request], config: SchedulerConfig, policy: MigrationPolicy, table: Table
) -> None:
    schedule, records, log = told(load, config, policy, table)
    stepped = told(load, config, policy, table, SimulatedExecutor)
    assert lives(schedule) == lives(stepped[0]) and schedule.hands == stepped[0].hands
    contiguous(schedule, records)
    moving = [phase for phases in lives(schedule).values() for phase in phases if phase.name == "moving"]
    assert len(moving) <= len(schedule.hands) <= len(log)
    if table == STILL:
        # Where engines fail, who left at the end of a step goes back at once, in no time.
        assert len(moving) == len(schedule.hands) == sum(move.downtime_s > 0 for move in log)


@settings(max_examples=40, deadline=None)
@given(loads(), configs, policies, st.one_of(st.just(STILL), tables), moving_prompts)
def test_so_it_is_where_it_goes_from_pool_to_pool(
    load: list[Request],
    config: SchedulerConfig,
    policy: MigrationPolicy,
    table: Table,
    prompts: PromptPolicy | None,
) -> None:
    one, schedule = Pools(config, policy, *table, prompts=prompts, send_s=0.02), Schedule()
    for role, front in zip(("prefill", "decode"), one.relay.fronts, strict=True):
        loops = [each.loop for each in front.instances]
        for loop, tape in zip(loops, schedule.pool(role, len(loops), config.blocks), strict=True):
            loop.tape = tape
    contiguous(schedule, one.play(load)[0])
    assert {hand.name for hand in schedule.hands} <= {"hand-over", "moving"}


@pytest.mark.parametrize("seed", range(3))
def test_each_move_is_told_as_it_was(seed: int) -> None:
    schedule, _, log = told(crowd(seed), TIGHT, EAGER)
    found = places(schedule)
    outcomes = Counter(move.outcome for move in log)
    assert outcomes["migrated"] > 10 and outcomes["rescheduled"] > 2
    for move in log:
        if move.outcome not in ("migrated", "rescheduled"):
            continue
        index, (number, phase) = next(
            (index, at)
            for index, at in enumerate(found[move.request_id])
            if at[1].name == "moving" and at[1].end_s == move.moment_s
        )
        (source, before), (target, after) = (found[move.request_id][each] for each in (index - 1, index + 1))
        assert (source, number, target) == (move.source, move.target, move.target)
        assert phase.end_s - phase.begin_s == pytest.approx(move.downtime_s)
        assert before.note == "taken away"
        if move.outcome == "migrated":
            assert before.name == after.name == "decode"
        else:
            # It may be admitted when it arrives.
            assert before.name == "waiting" and after.name in ("waiting", "prefill", "recompute")
    slices = [event for event in events(schedule) if event["ph"] == "X" and event["name"] == "moving"]
    arrows = [event for event in events(schedule) if event["ph"] == "s"]
    assert len(slices) == len(arrows) == outcomes["migrated"] + outcomes["rescheduled"]


def test_who_was_leaving_an_engine_that_dies_waits_elsewhere_from_when_it_left() -> None:
    log = told(crowd(1), TIGHT, SLOW)[2]
    move = next(move for move in log if move.outcome == "migrated" and move.downtime_s > 0.004)
    left_s = move.moment_s - move.downtime_s
    failures = script(OutageSpec(at_s=left_s + 0.001, instance=f"mixed-{move.source}", for_s=2.0))
    schedule, _, log = told(crowd(1), TIGHT, SLOW, (failures, ()))
    (torn,) = (each for each in log if each.outcome == "torn")
    life = places(schedule)[torn.request_id]
    index = next(index for index, (_, phase) in enumerate(life) if phase.begin_s == pytest.approx(left_s))
    number, phase = life[index]
    assert phase.name == "waiting" and number != move.source
    assert life[index - 1][0] == move.source and life[index - 1][1].note == "taken away"
