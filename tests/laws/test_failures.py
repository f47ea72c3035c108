"""Replicas that fail lose nothing twice: every request ends once, every block comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.laws.test_fleet import crowd, fleet, loads

from tongyun.cloud.front import Front
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.relay import Relay
from tongyun.cloud.replica import State
from tongyun.cloud.retries import LOST
from tongyun.cloud.sched.request import Finish, Request
from tongyun.cloud.sched.router import ROUTERS, LeastLoad, find_router
from tongyun.cloud.simulate import play_fleet, play_pools
from tongyun.codesign.upkeep import Running, Site, Upkeep
from tongyun.specs import FailureSpec, OutageSpec, find_chip

CHIP = replace(find_chip("h200").at(), chips_per_node=2)
OFTEN = FailureSpec(
    chip_mtbf_hours=20 / 3600,
    chip_repair_hours=3 / 3600,
    node_mtbf_hours=40 / 3600,
    node_repair_hours=2 / 3600,
)
"""Chips that fail every twenty seconds: as much as a short load can have."""


def site(role: str, replicas: int, *, ranks: int = 1, groups: int = 1) -> Site:
    return Site(role=role, replicas=replicas, ranks=ranks, groups=groups, rank_bytes=1e9)


def one_pool(replicas: int, groups: int = 1, router: str = "least-load") -> tuple[Front, list[Site]]:
    front = Front(fleet(replicas * groups), find_router(router))
    return front, [site("mixed", replicas, ranks=groups, groups=groups)]


def hand_over_s(request: Request) -> float:
    return 0.01 * len(request.prompt)


def two_pools(first: int, second: int) -> tuple[Relay, list[Site]]:
    relay = Relay((fleet(first), fleet(second)), (LeastLoad(), LeastLoad()), hand_over_s)
    return relay, [site("prefill", first), site("decode", second)]


def run(
    spec: FailureSpec | None, together: Front | Relay, sites: Sequence[Site], *, seed: int = 0
) -> Running:
    return Upkeep(failures=spec).attach(together, sites, CHIP, seed=seed)


def script(*events: OutageSpec, **more: object) -> FailureSpec:
    return FailureSpec(event=events, **more)  # type: ignore[arg-type]


def whole(records: Sequence[RequestRecord], load: Sequence[Request]) -> None:
    """Every request has one record; nobody got more than asked, and who was served got it all."""
    asked = {request.id: request for request in load}
    assert sorted(record.id for record in records) == sorted(asked)
    for record in records:
        request = asked[record.id]
        assert record.arrival_s == request.arrival_s
        assert record.prompt_tokens == len(request.prompt)
        if record.ok:
            assert record.output_tokens == request.output_tokens
        else:
            assert record.error is not None and record.error.startswith(LOST)
            assert record.output_tokens < request.output_tokens
        if record.first_token_s is not None:
            assert record.last_token_s is not None
            assert request.arrival_s <= record.first_token_s <= record.last_token_s <= record.ended_s


def clean(together: Front | Relay) -> None:
    """No engine holds anything of anybody."""
    for front in together.fronts:
        for one in front.instances:
            stats = one.loop.stats()
            assert stats.kv_blocks_used == stats.running == stats.waiting == 0
            assert stats.kv_blocks_cached <= stats.kv_blocks_total


pools: st.SearchStrategy[Callable[[], tuple[Front | Relay, list[Site]]]] = st.one_of(
    st.builds(
        lambda replicas, groups, router: lambda: one_pool(replicas, groups, router),
        st.integers(1, 4),
        st.integers(1, 2),
        st.sampled_from(sorted(ROUTERS)),
    ),
    st.builds(lambda first, second: lambda: two_pools(first, second), st.integers(1, 3), st.integers(1, 3)),
)


@given(loads(), pools, st.integers(0, 3), st.sampled_from(["retry", "lose"]))
@settings(max_examples=150)
def test_every_request_ends_once_whatever_fails(
    load: list[Request],
    built: Callable[[], tuple[Front | Relay, list[Site]]],
    seed: int,
    policy: str,
) -> None:
    logs = []
    for _ in range(2):
        together, sites = built()
        running = run(replace(OFTEN, on_failure=policy, retries=2), together, sites, seed=seed)
        records = running.play(load)
        whole(records, load)
        clean(together)
        if policy == "lose":
            assert running.retries.retries == 0
        logs.append((records, running.kept(records)))
    assert logs[0] == logs[1]


@given(loads(), pools, st.integers(0, 3))
@settings(max_examples=60)
def test_requests_in_are_those_out_and_those_within_at_every_moment(
    load: list[Request], built: Callable[[], tuple[Front | Relay, list[Site]]], seed: int
) -> None:
    together, sites = built()
    running = run(replace(OFTEN, retries=1), together, sites, seed=seed)
    arrived: list[str] = []
    seen = 0

    def look() -> None:
        nonlocal seen
        seen += 1
        ended = together.records(arrived)
        if isinstance(together, Relay):
            # Prefilled is not ended where more than one token was asked for.
            asked = {request.id: request.output_tokens for request in load}
            within = {one for front in together.fronts for each in front.instances for one in each.in_flight}
            within |= {entry[2].id for entry in together._under_way}
            within |= {request.id for front in together.fronts for request in front.waiting()}
            ended = [one for one in ended if one.id not in within]
            assert all(one.output_tokens <= asked[one.id] for one in ended)
        assert len(arrived) == len(ended) + len(running.retries.lost) + together.in_flight

    for tick in range(60):
        together.at(tick * 0.5 + 0.01, look)
    for request in load:
        together.advance(request.arrival_s)
        arrived.append(request.id)
        together.send(request)
    together.advance(200.0)
    assert seen == 60


@given(loads(), st.integers(1, 3), st.integers(1, 2))
@settings(max_examples=40)
def test_a_table_by_which_nothing_fails_changes_nothing(
    load: list[Request], replicas: int, groups: int
) -> None:
    rarely = FailureSpec(chip_mtbf_hours=1e9, chip_repair_hours=1.0)
    front, sites = one_pool(replicas, groups)
    plain = play_fleet(load, fleet(replicas * groups), find_router("least-load"))
    running = run(rarely, front, sites)
    assert running.play(load) == [record for one in plain for record in one.records]
    assert [one.result() for one in front.instances] == plain
    relay, sites = two_pools(replicas, groups)
    records, _ = play_pools(load, (fleet(replicas), fleet(groups)), (LeastLoad(), LeastLoad()), hand_over_s)
    assert run(rarely, relay, sites).play(load) == list(records)


@given(loads(), pools, st.integers(0, 3))
@settings(max_examples=60)
def test_however_often_somebody_looks_the_same_happens(
    load: list[Request], built: Callable[[], tuple[Front | Relay, list[Site]]], seed: int
) -> None:
    found = []
    for looks in (0, 90):
        together, sites = built()
        running = run(replace(OFTEN, retries=2), together, sites, seed=seed)
        for tick in range(looks):
            together.at(tick * 0.31 + 0.01, lambda: None)
        records = running.play(load)
        found.append((records, running.kept(records)))
    assert found[0] == found[1]


def one(request_id: str = "r", output_tokens: int = 30, arrival_s: float = 0.0) -> Request:
    return Request(id=request_id, prompt=tuple(range(40)), output_tokens=output_tokens, arrival_s=arrival_s)


def test_what_was_streamed_is_not_streamed_again() -> None:
    """A failure half-way: the first token counts from before, the rest is computed behind it."""
    front, sites = one_pool(2)
    running = run(script(OutageSpec(at_s=0.5, instance="mixed-0", for_s=9.0)), front, sites)
    (record,) = running.play([one()])
    (plain,) = play_fleet([one()], fleet(1), LeastLoad())
    assert record.ok and record.output_tokens == 30
    assert record.first_token_s == plain.records[0].first_token_s
    assert record.ended_s > plain.records[0].ended_s
    streamed = [each.loop.stats().output_tokens for each in front.instances]
    assert sum(streamed) == 30 and min(streamed) > 0
    # What the other engine computed: the prompt, what had been streamed, and the rest but the last.
    assert front.instances[1].loop.stats().computed_tokens == 40 + 30 - 1
    assert (running.retries.retried, running.retries.retries) == (1, 1)


def test_lost_is_lost_with_what_had_come() -> None:
    front, sites = one_pool(2)
    running = run(script(OutageSpec(at_s=0.5, instance="mixed-0"), on_failure="lose"), front, sites)
    (record,) = running.play([one()])
    assert record.finish is Finish.ERROR and record.error == "lost: mixed-0 failed"
    assert 0 < record.output_tokens < 30
    assert not record.ok


def test_retries_come_to_an_end() -> None:
    front, sites = one_pool(2)
    events = [OutageSpec(at_s=0.3 * (i + 1), node=0, for_s=0.05) for i in range(5)]
    running = run(script(*events, retries=2), front, sites)
    (record,) = running.play([one(output_tokens=100)])
    assert record.error == "lost: mixed-0 failed after 2 retries"
    assert running.retries.retries == 2


def test_a_node_takes_all_that_stands_on_it_and_what_waits_is_held() -> None:
    front, sites = one_pool(4)
    running = run(script(OutageSpec(at_s=1.0, node=1, for_s=2.0)), front, sites)
    states: list[list[State]] = []
    for at_s in (0.9, 1.1, 3.2):
        front.at(at_s, lambda: states.append([each.state for each in running.replicas]))
    running.play(crowd(1, count=60))
    up, down = State.UP, State.DOWN
    assert states == [[up] * 4, [up, up, down, down], [up] * 4]
    front, sites = one_pool(2)
    running = run(script(OutageSpec(at_s=1.0, node=0, for_s=2.0)), front, sites)
    records = running.play([one("a"), one("b", arrival_s=1.5)])
    assert all(record.ok for record in records)
    assert next(r for r in records if r.id == "b").first_token_s > 3.0  # type: ignore[operator]


def test_nobody_waits_for_what_never_returns() -> None:
    front, sites = one_pool(1)
    running = run(script(OutageSpec(at_s=0.5, node=0)), front, sites)
    records = running.play([one("a"), one("b", arrival_s=2.0)])
    assert [record.error for record in records] == ["lost: no instance came up again"] * 2
    assert running.kept(records).lost == 2


@pytest.mark.parametrize(
    ("pool", "at_s", "prefills"),
    [("prefill", 0.05, [0, 1]), ("prefill", 0.3, [1, 1]), ("decode", 1.7, [2, 0])],
)
def test_in_pools_a_request_goes_back_to_the_beginning(pool: str, at_s: float, prefills: list[int]) -> None:
    """Between two chunks of its prompt, under way between the pools for 1.2 s, and in decoding."""
    request = replace(one(), prompt=tuple(range(120)))
    relay, sites = two_pools(2, 2)
    running = run(script(OutageSpec(at_s=at_s, instance=f"{pool}-0", for_s=60.0)), relay, sites)
    (record,) = running.play([request])
    whole([record], [request])
    assert record.ok
    assert running.retries.retries == 1
    assert [each.loop.stats().output_tokens for each in relay.first.instances] == prefills
    assert sum(each.loop.stats().output_tokens for front in relay.fronts for each in front.instances) == 30


def test_what_an_engine_had_cached_is_gone() -> None:
    front, sites = one_pool(1)
    running = run(script(OutageSpec(at_s=5.0, instance="mixed-0", for_s=1.0)), front, sites)
    load = [one("a", 2), one("b", 2, 3.0), one("c", 2, 8.0), one("d", 2, 9.0)]
    cached = {record.id: record.cached_tokens for record in running.play(load)}
    assert cached["b"] == cached["d"] == 36
    assert cached["a"] == cached["c"] == 0


def test_who_was_torn_and_found_nobody_did_not_end_before_its_tokens_came() -> None:
    """Torn after the last request had ended."""
    front, sites = one_pool(2)
    running = run(script(OutageSpec(at_s=0.5, node=0)), front, sites)
    records = running.play([one("a"), one("b", 2)])
    whole(records, [one("a"), one("b", 2)])
    torn = next(record for record in records if record.id == "a")
    assert torn.output_tokens > 1 and torn.ended_s >= 0.5


def test_time_down_is_told_and_taken_from_availability() -> None:
    front, sites = one_pool(4)
    events = (OutageSpec(at_s=1.0, instance="mixed-0", for_s=2.0), OutageSpec(at_s=2.0, node=0, for_s=2.0))
    running = run(script(*events), front, sites)
    records = running.play(crowd(2, count=100))
    kept = running.kept(records)
    span_s = max(r.ended_s for r in records) - min(r.arrival_s for r in records)
    assert kept.there_chip_s == pytest.approx(4 * span_s)
    # mixed-0 from 1 to 4, mixed-1 from 2 to 4.
    assert kept.down_chip_s == pytest.approx(3.0 + 2.0)
    assert kept.availability == pytest.approx(1 - 5.0 / (4 * span_s))
    assert kept.held_chip_s == pytest.approx(kept.there_chip_s)
    assert kept.failures == 2
