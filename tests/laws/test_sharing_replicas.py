"""Models that share instances which fail, come and go: no request, block or byte is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.laws.test_autoscale import rule
from tests.laws.test_failures import CHIP, OFTEN, clean, script, whole
from tests.laws.test_fleet import crowd, fleet, loads
from tests.laws.test_turns import NAMES, ONE, shared, spread

from tongyun.cloud.engine.shared import SharedLoop
from tongyun.cloud.engine.simulated import LeapingExecutor, SimulatedExecutor
from tongyun.cloud.front import Front, Fronts
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.relay import Relay
from tongyun.cloud.replica import State
from tongyun.cloud.sched.affinity import ByModel
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.router import LeastLoad
from tongyun.cloud.sched.turns import Groups
from tongyun.cloud.several import Several
from tongyun.cloud.simulate import play
from tongyun.codesign.upkeep import Kept, Running, Site, Upkeep
from tongyun.specs import AutoscaleSpec, FailureSpec, OutageSpec

SCALED = rule(min=1, target=3.0, cooldown_down_s=1.0, interval_s=0.4)
STORMS = replace(OFTEN, retries=2)
tables = st.tuples(
    st.sampled_from([None, STORMS, replace(STORMS, on_failure="lose")]), st.sampled_from([(), (SCALED,)])
).filter(any)
Built = tuple[Fronts, list[Site], list[SharedLoop]]


def hand_over_s(request: Request) -> float:
    return 0.01 * len(request.prompt)


def site(name: str, replicas: int, *, rank_bytes: float = 1e9) -> Site:
    return Site(role=name, replicas=replicas, ranks=1, groups=1, rank_bytes=rank_bytes)


def mixed(count: int = 3, kind: type[SimulatedExecutor] = LeapingExecutor, **more: object) -> Built:
    loops = [shared(first=i, executor=kind, **more) for i in range(count)]  # type: ignore[arg-type]
    return Front(loops, ByModel()), [site("shared/mixed", count)], loops


def split(kind: type[SimulatedExecutor] = LeapingExecutor) -> Built:
    first = [shared(first=i, turns=Groups, executor=kind) for i in range(2)]
    second = [shared(first=i, executor=kind) for i in range(2)]
    relay = Relay((first, second), (ByModel(), ByModel()), hand_over_s)
    return relay, [site("shared/prefill", 2), site("shared/decode", 2)], first + second


def beside(kind: type[SimulatedExecutor] = LeapingExecutor) -> Built:
    """Four models share two instances, and each of two others has two engines of its own."""
    loops = [shared("abcd", first=i, executor=kind) for i in range(2)]
    pool = Front(loops, ByModel())
    own = {name: Front(fleet(2), LeastLoad()) for name in "ef"}
    sites = [site("shared/mixed", 2), site("e/mixed", 2), site("f/mixed", 2)]
    return Several({**dict.fromkeys("abcd", pool), **own}), sites, loops


def run(
    built: Built, failures: FailureSpec | None, rules: Sequence[AutoscaleSpec] = (), seed: int = 0
) -> Running:
    return Upkeep(failures=failures, autoscale=tuple(rules)).attach(built[0], built[1], CHIP, seed=seed)


def nothing_left(built: Built) -> None:
    clean(built[0])
    for loop in built[2]:
        assert not loop.has_work and not loop._counts and loop._turns.order == ()
        assert loop.residence.away_bytes == 0


layouts = st.sampled_from([mixed, split, beside])


@settings(max_examples=80, deadline=None)
@given(loads(), layouts, tables, st.integers(0, 3))
def test_every_request_ends_once_and_a_second_run_and_steps_agree_on_every_event(
    load: list[Request],
    layout: Callable[..., Built],
    table: tuple[FailureSpec | None, tuple[AutoscaleSpec, ...]],
    seed: int,
) -> None:
    logs: list[tuple[list[RequestRecord], Kept]] = []
    for kind in (LeapingExecutor, SimulatedExecutor, LeapingExecutor):
        built = layout(kind=kind)
        running = run(built, *table, seed=seed)
        records = running.play(spread(load))
        whole(records, load)
        nothing_left(built)
        if table[0] is None:
            assert all(record.ok for record in records)
        logs.append((records, running.kept(records)))
    assert logs[0] == logs[1] == logs[2]


@settings(max_examples=30, deadline=None)
@given(loads(), st.sampled_from([0.0, 30.0, float("inf")]), tables, st.integers(0, 3))
def test_at_every_instant_requests_blocks_and_bytes_are_all_somewhere(
    load: list[Request],
    host: float,
    table: tuple[FailureSpec | None, tuple[AutoscaleSpec, ...]],
    seed: int,
) -> None:
    built = mixed(host=host)
    front, _, loops = built
    running, arrived = run(built, *table, seed=seed), 0

    def look() -> None:
        ended = len(front.records([])) + len(running.retries.lost)
        assert arrived == ended + front.in_flight
        for loop in loops:
            memory = loop.residence
            assert memory.used_bytes <= memory.memory_bytes + 1
            assert memory.away_bytes <= memory.host_bytes
            stats = loop.stats()
            assert sum(count for _, count, _ in loop.models) == stats.running + stats.waiting
            for name in NAMES:
                pool = memory.pool(name)
                assert memory.here(name) + memory.away(name) == pool.used + pool.idle

    for tick in range(250):
        front.at(tick * 0.1 + 0.003, look)
    for request in spread(load):
        front.advance(request.arrival_s)
        arrived += 1
        front.send(request)
        look()
    front.advance(25.0)
    whole(running.play([]), load)
    nothing_left(built)


@settings(max_examples=30, deadline=None)
@given(loads(), layouts)
def test_tables_by_which_nothing_comes_or_goes_change_nothing(
    load: list[Request], layout: Callable[..., Built]
) -> None:
    plain = layout()
    records = play(spread(load), plain[0])
    rarely = FailureSpec(chip_mtbf_hours=1e9, chip_repair_hours=1.0)
    still = rule(min=3 if layout is mixed else 2)
    for failures, rules in ((rarely, ()), (None, (still,)), (rarely, (still,))):
        built = layout()
        assert run(built, failures, rules).play(spread(load)) == records
        for ours, theirs in zip(built[0].fronts, plain[0].fronts, strict=True):
            assert [one.result() for one in ours.instances] == [one.result() for one in theirs.instances]


def test_an_instance_that_fails_gives_up_all_of_its_models_and_begins_as_at_first() -> None:
    load = [replace(one, model="abcd"[i % 4]) for i, one in enumerate(crowd(4, rate=20.0, count=200))]
    built = mixed(2, memory=ONE + 150)
    running = run(built, script(OutageSpec(at_s=4.0, instance="shared/mixed-0", for_s=3.0)))
    seen: dict[float, tuple[list[str], int]] = {}

    def look(at_s: float) -> None:
        one = built[0].fronts[0].instances[0]
        seen[at_s] = (list(built[2][0].residence.resident), len(one.in_flight))

    for at_s in (0.0, 4.0, 4.5, 6.9):
        built[0].at(at_s, lambda at_s=at_s: look(at_s))  # type: ignore[misc]
    records = running.play(load)
    whole(records, load)
    assert all(record.ok for record in records)
    models = {record.model for record in records if record.id in running.retries._stories}
    # Between its failure and the end of its last step some end.
    assert len(models) > 1 and 0 <= seen[4.0][1] - running.retries.retries < 5
    assert seen[4.5] == seen[6.9] == (seen[0.0][0], 0)


@pytest.mark.parametrize(("weights", "gigabytes"), [("host", 1), ("neighbour", 5)])
def test_one_that_starts_waits_for_its_weights_and_a_bare_host_for_those_of_all(
    weights: str, gigabytes: int
) -> None:
    loops = [shared(first=i) for i in range(2)]
    front = Front(loops, ByModel())
    one = Site(role="shared/mixed", replicas=2, ranks=1, groups=1, rank_bytes=1e9, host_bytes=5e9)
    running = Upkeep(autoscale=(rule(min=0, weights=weights),)).attach(front, [one], CHIP)
    records = running.play([Request(id="r", prompt=(1, 2), output_tokens=2, arrival_s=0.5, model="a")])
    assert records[0].ok
    out, link = CHIP.scale_out, CHIP.host_bytes_per_s
    assert out is not None and link is not None
    rate = link if weights == "host" else min(link, out.bytes_per_s * out.achieved)
    latency_s = 0.0 if weights == "host" else out.latency_s
    (took_s,) = running.kept(records).cold_starts_s
    assert took_s == pytest.approx(latency_s + gigabytes * 1e9 / rate + 0.5)


def test_a_node_takes_replicas_of_several_pools_at_once_and_counts_once() -> None:
    """Two chips a node: e/mixed-0 and e/mixed-1 are on the second."""
    built = beside()
    running = run(
        built, script(OutageSpec(at_s=2.0, node=0, for_s=1.0), OutageSpec(at_s=2.0, node=1, for_s=1.0))
    )
    records = running.play(spread(crowd(6, rate=5.0, count=60)))
    kept = running.kept(records)
    down = Counter(change.replica for change in kept.log if change.state is State.DOWN)
    assert down == {"shared/mixed-0": 1, "shared/mixed-1": 1, "e/mixed-0": 1, "e/mixed-1": 1}
    assert kept.failures == 2
    assert set(kept.held) == {"shared/mixed", "e/mixed", "f/mixed"}
    assert sum(kept.held.values()) == pytest.approx(kept.held_chip_s)
    assert all(record.ok for record in records)
