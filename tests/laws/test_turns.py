"""Models that share an instance lose no request, no block and no byte, and cost nothing to who is alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.laws.test_fleet import CONFIG, Price, crowd, fleet, loads

from tongyun.cloud.engine.shared import SharedLoop, Switching, Tenant
from tongyun.cloud.engine.simulated import LeapingExecutor, SimulatedExecutor
from tongyun.cloud.front import Front
from tongyun.cloud.instance import Simulated
from tongyun.cloud.latency import Slo, summarise
from tongyun.cloud.sched.affinity import ByModel
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.residence import Footprint
from tongyun.cloud.sched.router import find_router
from tongyun.cloud.sched.scheduler import Scheduler
from tongyun.cloud.sched.turns import Groups, Rounds, Turns, Work, quotas_s
from tongyun.cloud.simulate import play_fleet

NAMES = "abcdef"
ONE = 100.0 + 10.0 + CONFIG.blocks
"""Bytes that one model needs: weights, what it works with, and all of its blocks of a byte."""


def shared(
    names: str = NAMES,
    *,
    memory: float = ONE,
    host: float = float("inf"),
    rate: float = 200.0,
    prefetch: bool = True,
    first: int = 0,
    first_s: float = 2.0,
    turns: Callable[[], Turns] = Rounds,
    executor: type[SimulatedExecutor] = LeapingExecutor,
) -> SharedLoop:
    tenants = {
        name: Tenant(
            scheduler=Scheduler(CONFIG),
            executor=executor(Price()),  # type: ignore[arg-type]
            footprint=Footprint(weights=100.0, block=1.0, working=10.0),
            prices=Price(),
            context_tokens=50,
            limit_s=0.1,
            first_s=first_s,
        )
        for name in names
    }
    way = Switching(bytes_per_s=rate, start_s=0.01, prefetch=prefetch)
    return SharedLoop(tenants, (memory, host), turns(), way, first=first)


def spread(load: list[Request], names: str = NAMES) -> list[Request]:
    """Half of the requests to the first model, half of the rest to the second and so on, mixed."""
    return [
        replace(request, model=names[min(((i * 7919) % 64 or 1).bit_length() - 1, len(names) - 1)])
        for i, request in enumerate(load)
    ]


memories = st.sampled_from([ONE, ONE + 150, ONE + 350, 6 * ONE])
hosts = st.sampled_from([0.0, 30.0, float("inf")])


@given(loads(), st.integers(1, 3), memories, hosts, st.booleans(), st.sampled_from([Rounds, Groups]))
def test_every_request_ends_once_and_every_block_comes_back(
    load: list[Request],
    instances: int,
    memory: float,
    host: float,
    prefetch: bool,
    turns: Callable[[], Turns],
) -> None:
    def played() -> list[Simulated]:
        loops = [
            shared(memory=memory, host=host, prefetch=prefetch, first=i, turns=turns)
            for i in range(instances)
        ]
        results = play_fleet(spread(load), loops, ByModel())
        assert all(loop.residence.away_bytes == 0 for loop in loops)
        return results

    results = played()
    ended = sorted(record.id for one in results for record in one.records)
    assert ended == sorted(request.id for request in load)
    assert all(one.stats.kv_blocks_used == one.stats.running == one.stats.waiting == 0 for one in results)
    assert sum(one.stats.output_tokens for one in results) == sum(r.output_tokens for r in load)
    assert results == played()


@pytest.mark.parametrize("host", [0.0, 30.0, float("inf")])
def test_at_every_instant_requests_and_blocks_are_all_somewhere(host: float) -> None:
    loops = [shared(host=host, first=i) for i in range(2)]
    front = Front(loops, ByModel())
    load = spread(crowd(3))
    seen: Counter[str] = Counter()

    def look(now_s: float) -> None:
        came = sum(request.arrival_s < now_s for request in load)
        over = sum(record is not None for one in front.instances for record in one.records.values())
        flying = sum(len(one.in_flight) for one in front.instances)
        assert came == over + flying + front.held
        for loop in loops:
            memory = loop.residence
            assert memory.used_bytes <= memory.memory_bytes + 1
            assert memory.away_bytes <= memory.host_bytes
            assert sum(count for _, count, _ in loop.models) == loop.stats().running + loop.stats().waiting
            for name in NAMES:
                pool = memory.pool(name)
                assert memory.here(name) + memory.away(name) == pool.used + pool.idle
                assert 0 <= memory.away(name) <= pool.used
                seen["away"] += memory.away(name) > 0
            seen["several"] += len(memory.resident) > 1

    for tick in range(400):
        front.at(tick * 0.1, lambda tick=tick: look(tick * 0.1))  # type: ignore[misc]
    for request in load:
        front.send(request)
    front.advance(float("inf"))
    assert seen["several"] > 0
    assert (seen["away"] > 0) == (host > 0)


@given(loads(), st.integers(1, 3))
def test_one_model_alone_is_a_fleet_that_knows_no_models(load: list[Request], instances: int) -> None:
    load = [replace(request, model="a") for request in load]
    ours = play_fleet(load, [shared("a") for _ in range(instances)], ByModel())
    theirs = play_fleet(load, fleet(instances), find_router("least-load"))
    assert [one.records for one in ours] == [one.records for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert replace(one.stats, switched={}) == other.stats
        # It is there from the start.
        assert one.stats.switched["a"].in_bytes == one.stats.switched["a"].seconds == 0


@given(loads(), memories, hosts)
def test_steps_that_are_leapt_are_those_that_are_taken(
    load: list[Request], memory: float, host: float
) -> None:
    ours, theirs = (
        play_fleet(spread(load), [shared(memory=memory, host=host, executor=kind)], ByModel())
        for kind in (LeapingExecutor, SimulatedExecutor)
    )
    assert [one.records for one in ours] == [one.records for one in theirs]
    assert ours[0].stats.switched == theirs[0].stats.switched


@pytest.mark.parametrize("seed", range(6))
def test_room_for_all_and_no_way_to_go_serves_no_fewer_in_time(seed: int) -> None:
    def met(**given: float) -> int:
        load = spread(crowd(seed, rate=8.0))
        results = play_fleet(load, [shared(first=i, **given) for i in range(2)], ByModel())  # type: ignore[arg-type]
        records = [record for one in results for record in one.records]
        return summarise(records, Slo(ttft_s=4.0, tpot_s=0.2)).met_slo

    free = met(memory=6 * ONE)
    paid = [met(rate=rate) for rate in (400.0, 100.0, 25.0)]
    assert free >= paid[0] >= paid[1] >= paid[2]
    assert free > paid[2]


def test_an_aborted_request_leaves_nothing_behind_wherever_its_blocks_are() -> None:
    loop = shared("ab")
    front = Front([loop], ByModel())
    for number, name in enumerate("abab"):
        request = Request(
            id=f"r{number}", prompt=range(100), output_tokens=90, arrival_s=number * 0.1, model=name
        )
        front.send(request)
    for tick in range(1, 200):
        front.advance(0.4 + tick * 0.05)
        if loop.residence.away_bytes:
            break
    assert loop.residence.away_bytes > 0
    for number in range(4):
        assert front.instances[0].abort(f"r{number}")
    assert loop.residence.away_bytes == 0
    assert not loop.has_work
    assert loop.stats().kv_blocks_used == 0
    assert not front.instances[0].abort("r0")


# ── policies alone ───────────────────────────────────────────────────────────────────


def test_a_round_earns_every_model_the_time_it_lasts() -> None:
    works = [Work(0.02, 0.1, 0.5), Work(0.01, 0.05, 1.0), Work(0.02, 0.2, 0.0)]
    quotas = quotas_s(works)
    round_s = sum(quotas) + sum(one.switch_s for one in works)
    for quota, one in zip(quotas, works, strict=True):
        assert quota / one.step_s * one.limit_s >= round_s
    # What is crowded beyond its limits still goes round, no turn longer than allowed.
    crowded = quotas_s([one._replace(step_s=0.05) for one in works * 3], most_s=2.0)
    assert max(crowded) == pytest.approx(2.0)
    # Where changing costs nothing, a turn lasts as long as a token may take.
    assert quotas_s([one._replace(switch_s=0.0) for one in works]) == [0.1, 0.05, 0.2]


def test_rounds_go_round_and_who_is_alone_goes_on() -> None:
    def work(_: str) -> Work:
        return Work(0.02, 0.1, 0.5)

    turns = Rounds()
    assert turns.choose(0.0, work) is None
    turns.arrived("a", 9.0)
    assert turns.choose(0.0, work) == ("a", float("inf"))
    turns.arrived("b", float("inf"))
    turns.arrived("c", 30.0)
    first = turns.choose(1.0, work)
    assert first is not None and first.model == "a" and 1.0 < first.end_s < 5.1
    assert turns.order == ("a", "b", "c")
    turns.extend(1.0)
    assert turns.choose(first.end_s, work) == ("a", first.end_s + 1.0)
    second = turns.choose(first.end_s + 1.0, work)
    assert second is not None and second.model == "b"
    assert turns.order == ("b", "c", "a")
    turns.left("b")
    third = turns.choose(first.end_s + 1.0, work)
    assert third is not None and third.model == "c"


def test_a_prompt_about_to_be_late_goes_first_and_who_was_at_work_goes_on_behind_it() -> None:
    def work(_: str) -> Work:
        return Work(0.02, 0.1, 0.5)

    turns = Rounds()
    for name, due_s in (("a", 0.5), ("b", 1.5), ("c", 1.2)):
        turns.arrived(name, due_s)
    assert turns.choose(0.0, work) is not None
    turns.begun("a")
    assert turns.order == ("a", "b", "c")
    late = turns.choose(1.3, work)
    assert late is not None and late.model == "c"
    turns.begun("c")
    assert turns.order == ("c", "a", "b")
    again = turns.choose(1.6, work)
    assert again is not None and again.model == "b"
    assert turns.order == ("b", "c", "a")
    turns.left("b")
    after = turns.choose(1.7, work)
    assert after is not None and after.model == "c"


def test_prompts_go_in_groups_in_the_order_of_the_first() -> None:
    turns = Groups(most=2)
    for name in "abaab":
        turns.arrived(name, 1.0)
    gone = []
    while (turn := turns.choose(0.0, lambda _: Work(1, 1, 1))) is not None:
        gone.append(turn.model)
        turns.left(turn.model)
    assert gone == ["a", "a", "b", "b", "a"]
