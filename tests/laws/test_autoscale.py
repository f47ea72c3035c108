"""Replicas that come and go: starts take what the formula says, and nobody is lost on the way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.laws.test_failures import clean, hand_over_s, one_pool, two_pools, whole
from tests.laws.test_fleet import crowd, fleet, loads

from tongyun.cloud.cold_start import ColdStarts, FromHost, FromNeighbour, FromStorage, Way
from tongyun.cloud.front import Front
from tongyun.cloud.latency import RequestRecord, Slo, summarise
from tongyun.cloud.relay import Relay
from tongyun.cloud.replica import Replica, State
from tongyun.cloud.sched.autoscale import Autoscaler, By, Rule, Seen
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.router import LeastLoad, find_router
from tongyun.cloud.simulate import play_fleet
from tongyun.codesign.upkeep import Kept, Site, Upkeep
from tongyun.specs import AutoscaleSpec, FailureSpec, Figure, find_chip
from tongyun.units import Source

CHIP = replace(find_chip("h200").at(), chips_per_node=2)
START = Figure.of(0.5, Source.ASSUMED, "a test's")


def rule(**more: object) -> AutoscaleSpec:
    given = {
        "target": 5.0,
        "interval_s": 1.0,
        "cooldown_down_s": 4.0,
        "weights": "host",
        "engine_start": START,
    }
    return AutoscaleSpec(**(given | more))  # type: ignore[arg-type]


def played(
    load: list[Request],
    together: Front | Relay,
    sites: list[Site],
    *rules: AutoscaleSpec,
    failures: FailureSpec | None = None,
) -> tuple[list[RequestRecord], Kept]:
    running = Upkeep(failures=failures, autoscale=rules).attach(together, sites, CHIP)
    records = running.play(load)
    return records, running.kept(records)


# ── the policy ───────────────────────────────────────────────────────────────────────


def policy(**more: object) -> Autoscaler:
    given = {"by": By.REQUESTS, "target": 10.0, "least": 1, "most": 8, "cooldown_down_s": 60.0}
    return Autoscaler(Rule(**(given | more)))  # type: ignore[arg-type]


def seen(have: int, requests: int = 0, tokens: int = 0, wait_s: float = 0.0) -> Seen:
    return Seen(have, 0, requests, tokens, wait_s)


def test_what_is_wanted_is_the_load_over_the_target() -> None:
    assert policy().decide(0.0, seen(1, requests=35)) == 4
    assert policy().decide(0.0, seen(1, requests=500)) == 8
    assert policy(step=2).decide(0.0, seen(1, requests=500)) == 3
    assert policy(by=By.TOKENS, target=1000.0).decide(0.0, seen(2, requests=1, tokens=5500)) == 6
    # Within a tenth of the target nothing moves.
    assert policy().decide(0.0, seen(4, requests=43)) == 4
    assert policy().decide(0.0, seen(4, requests=45)) == 5


def test_fewer_only_when_no_more_were_wanted_for_so_long() -> None:
    one = policy()
    assert one.decide(0.0, seen(4, requests=40)) == 4
    assert one.decide(30.0, seen(4, requests=5)) == 4
    assert one.decide(61.0, seen(4, requests=5)) == 1
    quick = policy(cooldown_down_s=0.0, step=1)
    assert quick.decide(0.0, seen(4, requests=5)) == 3


def test_more_only_so_long_after_the_last_start() -> None:
    one = policy(cooldown_up_s=30.0, step=1)
    assert one.decide(0.0, seen(1, requests=80)) == 2
    assert one.decide(10.0, seen(2, requests=80)) == 2
    assert one.decide(30.0, seen(2, requests=80)) == 3


def test_none_while_nobody_asks_and_one_as_soon_as_somebody_does() -> None:
    one = policy(least=0, cooldown_down_s=0.0)
    assert one.decide(0.0, seen(1)) == 0
    assert one.decide(1.0, seen(0, requests=1)) == 1
    assert policy(least=0, by=By.WAIT, target=2.0).decide(0.0, seen(0, requests=1)) == 1


def test_a_wait_above_the_target_asks_for_more_and_far_below_for_one_less() -> None:
    one = policy(by=By.WAIT, target=2.0, cooldown_down_s=0.0)
    assert one.decide(0.0, seen(2, requests=9, wait_s=5.0)) == 5
    assert one.decide(1.0, seen(5, requests=9, wait_s=1.5)) == 5
    assert one.decide(2.0, seen(5, requests=9, wait_s=0.0)) == 4


@given(
    st.lists(st.tuples(st.floats(0, 50), st.integers(0, 200), st.floats(0, 9)), max_size=30),
    st.sampled_from(By),
    st.integers(0, 3),
    st.integers(3, 9),
)
def test_wishes_stay_within_their_bounds(
    looks: list[tuple[float, int, float]], by: By, least: int, most: int
) -> None:
    one = Autoscaler(Rule(by=by, target=3.0, least=least, most=most, cooldown_down_s=10.0))
    have, now_s = least, 0.0
    for gap_s, requests, wait_s in looks:
        now_s += gap_s
        have = one.decide(now_s, Seen(have, 0, requests, requests * 7, wait_s))
        assert least <= have <= most
        assert have or not requests


# ── cold starts ──────────────────────────────────────────────────────────────────────

NET = FromNeighbour(link_bytes_per_s=4e9, latency_s=0.001)
STORE = FromStorage(link_bytes_per_s=60e9, client_bytes_per_s=20e9, whole_bytes_per_s=50e9, latency_s=0.25)


def starts(
    way: Way, moments: list[float], *, ranks: int = 2, per_node: int = 4, serving: int = 0
) -> list[float]:
    """When replicas of `ranks` chips, of 8 GB each, that begin at these moments are up."""
    front = Front(fleet(len(moments)), LeastLoad())
    ready: dict[str, float] = {}
    loader = ColdStarts(
        front,
        way,
        start_s=3.0,
        senders=lambda: serving,
        up=lambda one, now_s: ready.update({one.name: now_s}),
    )
    for i, moment_s in enumerate(moments):
        nodes = [(ranks * i + rank) // per_node for rank in range(ranks)]
        replica = Replica(f"mixed-{i}", front, [i], nodes=nodes, state=State.OFF)
        front.at(moment_s, lambda replica=replica, at=moment_s: loader.begin(replica, 8e9, at))  # type: ignore[misc]
    front.advance(float("inf"))
    return [ready[f"mixed-{i}"] for i in range(len(moments))]


def test_a_start_takes_latency_bytes_over_the_bandwidth_and_the_engines_own() -> None:
    assert starts(FromHost(link_bytes_per_s=16e9), [1.0]) == pytest.approx([1.0 + 0.5 + 3.0])
    assert starts(NET, [1.0]) == pytest.approx([1.0 + 0.001 + 8 / 4 + 3.0])
    # Two ranks share their node's 20 GB/s.
    assert starts(STORE, [1.0]) == pytest.approx([1.0 + 0.25 + 8 / 10 + 3.0])


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_those_who_load_at_once_share_what_is_shared(count: int) -> None:
    """Two replicas a node: min(20 GB/s over a node's ranks, 50 GB/s over all)."""
    rate = min(20e9 / min(2 * count, 4), 50e9 / (2 * count))
    assert max(starts(STORE, [0.0] * count)) == pytest.approx(0.25 + 8e9 / rate + 3.0)
    # One replica that serves sends to all.
    assert starts(NET, [0.0] * count, serving=2) == pytest.approx([0.001 + 8 / 4 * count + 3.0] * count)
    assert starts(NET, [0.0] * count, serving=2 * count) == pytest.approx([0.001 + 8 / 4 + 3.0] * count)
    assert starts(FromHost(link_bytes_per_s=16e9), [0.0] * count) == pytest.approx([3.5] * count)


def test_who_comes_later_slows_the_first_from_then_on() -> None:
    """1 GB of 8 alone at 4 GB/s, then both at 2 until the first has its 7, the second the rest alone."""
    first, second = starts(NET, [0.0, 0.25], serving=2)
    assert first == pytest.approx(0.001 + 0.25 + 7 / 2 + 3.0)
    assert second == pytest.approx(0.001 + 0.25 + 7 / 2 + 1 / 4 + 3.0)


@given(st.lists(st.floats(0, 5), min_size=1, max_size=6), st.integers(0, 4))
@settings(max_examples=40)
def test_nobody_loads_faster_than_alone_and_all_get_there(moments: list[float], serving: int) -> None:
    for way, alone_s in ((NET, 0.001 + 2 + 3.0), (STORE, 0.25 + 0.8 + 3.0)):
        for begun_s, up_s in zip(moments, starts(way, moments, serving=serving), strict=True):
            assert up_s - begun_s >= alone_s - 1e-9


# ── pools under it ───────────────────────────────────────────────────────────────────

STORM = FailureSpec(chip_mtbf_hours=30 / 3600, chip_repair_hours=2 / 3600)


@given(
    loads(),
    st.booleans(),
    st.integers(0, 2),
    st.sampled_from(["requests", "tokens", "wait"]),
    st.sampled_from([None, STORM]),
)
@settings(max_examples=100)
def test_every_request_ends_once_whoever_comes_and_goes(
    load: list[Request], split: bool, least: int, by: str, failures: FailureSpec | None
) -> None:
    logs = []
    target = {"requests": 3.0, "tokens": 100.0, "wait": 0.5}[by]
    for _ in range(2):
        together, sites = two_pools(3, 3) if split else one_pool(4, 2)
        records, kept = played(
            load, together, sites, rule(min=least, by=by, target=target), failures=failures
        )
        whole(records, load)
        clean(together)
        if failures is None:
            assert all(record.ok for record in records)
        assert kept.held_chip_s + kept.down_chip_s <= kept.there_chip_s * (1 + 1e-9)
        logs.append((records, kept))
    assert logs[0] == logs[1]


def test_as_many_at_least_as_at_most_is_a_fleet_that_stands_still() -> None:
    load = crowd(3)
    front, sites = one_pool(3)
    records, kept = played(load, front, sites, rule(min=3))
    plain = play_fleet(load, fleet(3), find_router("least-load"))
    assert records == [record for one in plain for record in one.records]
    assert kept.held_chip_s == pytest.approx(kept.there_chip_s)
    assert not kept.cold_starts_s


def test_from_nothing_to_nothing() -> None:
    """Held until a start has come to its end; off when all is done and the cooldown over."""
    front, sites = one_pool(2)
    load = [
        Request(id="a", prompt=(1, 2, 3), output_tokens=5, arrival_s=2.5),
        Request(id="b", prompt=(1, 2, 3), output_tokens=5, arrival_s=30.0),
    ]
    records, kept = played(load, front, sites, rule(min=0))
    load_s = 1e9 / CHIP.host_bytes_per_s if CHIP.host_bytes_per_s else 0.0
    # Looked at each second, at 3 and, since a look comes before what arrives then, at 31.
    first = {record.id: record.first_token_s for record in records}
    assert first["a"] == pytest.approx(3.0 + load_s + 0.5 + 0.023)
    assert first["b"] == pytest.approx(31.0 + load_s + 0.5 + 0.023)
    states = [change.state for change in kept.log if change.replica == "mixed-0"]
    assert states == [State.OFF, State.LOADING, State.UP, State.DRAINING, State.OFF, State.LOADING, State.UP]
    assert kept.cold_starts_s == pytest.approx([load_s + 0.5] * 2)


def test_a_failed_replica_is_replaced_by_one_that_was_off() -> None:
    front, sites = one_pool(3)
    failures = FailureSpec(chip_mtbf_hours=25 / 3600, chip_repair_hours=20 / 3600)
    records, kept = played(crowd(4, rate=2.0, count=120), front, sites, rule(min=1), failures=failures)
    starts = [change for change in kept.log if change.state is State.LOADING]
    assert kept.failures > 0 and len(starts) > 1
    assert all(record.ok or record.error for record in records)
    assert sum(record.ok for record in records) > 100


def day(seed: int, rate: float = 6.0, span_s: float = 240.0, count: int = 1000) -> list[Request]:
    """Lengths of `crowd` at a rate that goes up and down like a day: rate · (1 - cos) by thinning."""
    rng = np.random.default_rng([seed, 7])
    moments = np.cumsum(rng.exponential(1 / (2 * rate), 4 * count))
    kept = moments[rng.random(len(moments)) < (1 - np.cos(2 * np.pi * moments / span_s)) / 2][:count]
    return [
        replace(one, arrival_s=float(t)) for one, t in zip(crowd(seed, count=len(kept)), kept, strict=True)
    ]


SLO = Slo(ttft_s=3.0, tpot_s=0.2)


@pytest.mark.parametrize("seed", range(3))
def test_more_room_for_the_scaler_never_serves_fewer_in_time(seed: int) -> None:
    met = []
    for most in (1, 2, 4, 8):
        front, sites = one_pool(8)
        records, _ = played(day(seed), front, sites, rule(min=1, max=most))
        met.append(summarise(records, SLO).met_slo)
    assert met == sorted(met)
    assert met[0] < met[-1]


@pytest.mark.parametrize("seed", range(3))
def test_more_that_always_stand_never_serve_fewer_in_time(seed: int) -> None:
    met = []
    for least in (1, 2, 4, 8):
        front, sites = one_pool(8)
        records, _ = played(day(seed), front, sites, rule(min=least))
        met.append(summarise(records, SLO).met_slo)
    assert met == sorted(met)


@pytest.mark.parametrize("seed", range(3))
def test_a_day_takes_fewer_chip_hours_than_a_fleet_for_its_peak(seed: int) -> None:
    load = day(seed, rate=20.0, count=4800)
    least = next(
        n
        for n in range(1, 9)
        if summarise(
            [r for one in play_fleet(load, fleet(n), LeastLoad()) for r in one.records], SLO
        ).attainment
        >= 0.99
    )
    assert least > 1
    front, sites = one_pool(8)
    records, kept = played(load, front, sites, rule(min=1, target=6.0))
    report = summarise(records, SLO)
    assert report.attainment >= 0.99
    assert kept.held_chip_s < 0.95 * least * report.duration_s


def test_pools_are_scaled_each_by_its_own_rule() -> None:
    relay, sites = two_pools(3, 3)
    records, kept = played(
        crowd(5, rate=10.0),
        relay,
        sites,
        rule(pool="prefill", by="tokens", target=200.0),
        rule(pool="decode", target=4.0),
    )
    assert all(record.ok for record in records)
    started = {change.replica.split("-")[0] for change in kept.log if change.state is State.LOADING}
    assert "decode" in started
    assert hand_over_s(Request(id="x", prompt=(1,), output_tokens=1)) > 0
