"""Requests that move while replicas fail, come and go: nobody is lost or doubled, no block or token is."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.laws.test_autoscale import rule
from tests.laws.test_failures import CHIP, OFTEN, clean, script, site, whole
from tests.laws.test_migration import EAGER, TIGHT, configs, copy_s, crowd, engines, loads, policies

from tongyun.cloud.engine.interface import Turn
from tongyun.cloud.engine.simulated import LeapingExecutor, SimulatedExecutor
from tongyun.cloud.front import Front
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.migration import Move, Mover
from tongyun.cloud.replica import State
from tongyun.cloud.retries import LOST
from tongyun.cloud.sched.migrate import MigrationPolicy
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.router import ROUTERS, find_router
from tongyun.cloud.sched.scheduler import SchedulerConfig
from tongyun.codesign.upkeep import Kept, Running, Upkeep
from tongyun.specs import AutoscaleSpec, FailureSpec, OutageSpec

SCALED = rule(min=1, target=3.0, cooldown_down_s=1.0, interval_s=0.4)
STORMS = replace(OFTEN, chip_mtbf_hours=6 / 3600, chip_repair_hours=1 / 3600, retries=2)
tables = st.tuples(
    st.sampled_from([None, STORMS, replace(STORMS, on_failure="lose")]), st.sampled_from([(), (SCALED,)])
).filter(any)


class Together:
    """Engines whose requests move, under the tables of a fleet file."""

    def __init__(
        self,
        config: SchedulerConfig,
        policy: MigrationPolicy,
        failures: FailureSpec | None,
        rules: tuple[AutoscaleSpec, ...] = (),
        *,
        kind: type[SimulatedExecutor] = LeapingExecutor,
        count: int = 3,
        router: str = "round-robin",
        seed: int = 0,
    ) -> None:
        self.tokens: dict[str, list[int]] = defaultdict(list)
        watch = None if kind is LeapingExecutor else self.saw
        self.front = Front(engines(config, kind, count), find_router(router), watch=watch)
        self.mover = Mover(self.front, policy, copy_s)
        self.running: Running = Upkeep(failures=failures, autoscale=rules).attach(
            self.front, [site("mixed", count)], CHIP, seed=seed, movers=[self.mover]
        )

    def saw(self, turn: Turn) -> None:
        for request_id, token in turn.result.tokens.items():
            self.tokens[request_id].append(token)

    def play(self, load: Sequence[Request]) -> tuple[list[RequestRecord], Kept, list[Move]]:
        records = self.running.play(load)
        return records, self.running.kept(records), self.mover.log

    def look(self, arrived: int) -> None:
        """Requests in are those out and those within; a block has as many holders as it should."""
        within = [*self.front.between, *(request.id for request in self.front.waiting())]
        ended = len(self.running.retries.lost)
        for one in self.front.instances:
            scheduler, held = one.loop.scheduler, Counter[int]()  # type: ignore[attr-defined]
            scheduler.settle()
            assert set(scheduler._sequences) == set(one.in_flight)
            within += one.in_flight
            ended += sum(record is not None for record in one.records.values())
            for seq in scheduler._sequences.values():
                held.update(seq.blocks)
                known = len(seq.history) - len(seq.request.prompt)
                assert not self.tokens or known <= len(self.tokens[seq.request.id])
            for blocks in scheduler._residents.reserved.values():
                held.update(blocks)
            assert set(scheduler._residents.reserved) <= set(self.mover._flights)
            pool = scheduler.pool
            assert [pool.holders(block) for block in range(pool.total)] == [
                held[block] for block in range(pool.total)
            ]
            assert pool.free + len(held) == pool.total
        assert len(within) == len(set(within))
        assert len(within) == self.front.in_flight
        assert len(within) + ended == arrived
        moves = Counter(
            index for flight in self.mover._flights.values() for index in (flight.source, flight.target)
        )
        for index, one in enumerate(self.front.instances):
            assert one.moves == moves[index]


@settings(max_examples=60, deadline=None)
@given(loads(), configs, policies, tables, st.integers(0, 3))
def test_at_every_instant_requests_and_blocks_are_all_somewhere(
    load: list[Request],
    config: SchedulerConfig,
    policy: MigrationPolicy,
    table: tuple[FailureSpec | None, tuple[AutoscaleSpec, ...]],
    seed: int,
) -> None:
    one = Together(config, policy, *table, kind=SimulatedExecutor, seed=seed)
    arrived = 0
    for tick in range(400):
        one.front.at(tick * 0.031 + 0.001, lambda: one.look(arrived))
    for request in load:
        one.front.advance(request.arrival_s)
        arrived += 1
        one.front.send(request)
        one.look(arrived)
    one.front.advance(400 * 0.031)
    one.look(arrived)
    records = one.running.play([])
    whole(records, load)
    clean(one.front)
    assert not one.front.between and not one.mover._flights
    ended = {record.id: record for record in records}
    for request in load:
        # Torn and sent again or moved: what was streamed was streamed once.
        assert len(one.tokens[request.id]) == ended[request.id].output_tokens


@settings(max_examples=60, deadline=None)
@given(loads(), configs, policies, tables, st.sampled_from(sorted(ROUTERS)), st.integers(0, 3))
def test_leaps_and_steps_and_a_second_run_agree_on_every_event(
    load: list[Request],
    config: SchedulerConfig,
    policy: MigrationPolicy,
    table: tuple[FailureSpec | None, tuple[AutoscaleSpec, ...]],
    router: str,
    seed: int,
) -> None:
    runs = [
        Together(config, policy, *table, kind=kind, router=router, seed=seed).play(load)
        for kind in (LeapingExecutor, SimulatedExecutor, LeapingExecutor)
    ]
    assert runs[0] == runs[1] == runs[2]
    whole(runs[0][0], load)
    if table[0] is None:
        assert all(record.ok for record in runs[0][0])


@settings(max_examples=30, deadline=None)
@given(loads(), configs, policies)
def test_tables_by_which_nothing_comes_or_goes_change_no_move(
    load: list[Request], config: SchedulerConfig, policy: MigrationPolicy
) -> None:
    plain = Together(config, policy, None).play(load)
    rarely = FailureSpec(chip_mtbf_hours=1e9, chip_repair_hours=1.0)
    assert Together(config, policy, rarely).play(load) == plain
    records, _, log = Together(config, policy, None, (rule(min=3),)).play(load)
    assert (records, log) == (plain[0], plain[2])


def under_way(policy: MigrationPolicy, outcome: str) -> tuple[Move, float, float]:
    """A move of the crowd's that nothing disturbs, and from when to when its last copy was under way."""
    log = Together(TIGHT, policy, None).play(crowd(1))[2]
    move = next(move for move in log if move.outcome == outcome and move.downtime_s > 0.004)
    return move, move.moment_s - move.downtime_s, move.moment_s


SLOW = replace(EAGER, last_tokens=64, stages=1)
"""All in one last copy: it is easily hit."""


@pytest.mark.parametrize("policy", ["retry", "lose"])
def test_who_was_leaving_an_engine_that_dies_is_sent_again_or_lost(policy: str) -> None:
    move, left_s, _ = under_way(SLOW, "migrated")
    failures = script(
        OutageSpec(at_s=left_s + 0.001, instance=f"mixed-{move.source}", for_s=2.0), on_failure=policy
    )
    one = Together(TIGHT, SLOW, failures)
    records, kept, log = one.play(crowd(1))
    whole(records, crowd(1))
    torn = [each for each in log if each.outcome == "torn"]
    assert [each.request_id for each in torn] == [move.request_id]
    (record,) = (record for record in records if record.id == move.request_id)
    if policy == "retry":
        assert record.ok and kept.lost == 0 and kept.retries > 1
    else:
        assert record.error == f"{LOST}mixed-{move.source} failed"
        assert record.output_tokens > 0


def test_who_was_on_the_way_to_an_engine_that_dies_goes_back_and_is_no_retry() -> None:
    move, left_s, _ = under_way(SLOW, "migrated")
    failures = script(OutageSpec(at_s=left_s + 0.001, instance=f"mixed-{move.target}", for_s=2.0))
    one = Together(TIGHT, SLOW, failures)
    records, _, log = one.play(crowd(1))
    whole(records, crowd(1))
    (back,) = (each for each in log if each.request_id == move.request_id and each.moment_s <= left_s + 0.002)
    assert back.outcome == "recomputed"
    assert move.request_id not in one.running.retries._stories
    assert all(record.ok for record in records)


def test_a_copy_begun_while_it_decodes_on_is_called_off_when_either_dies() -> None:
    staged = replace(EAGER, last_tokens=0, stages=3)
    move, left_s, _ = under_way(staged, "migrated")
    for end in ("source", "target"):
        failures = script(OutageSpec(at_s=left_s - 0.035, instance=f"mixed-{getattr(move, end)}", for_s=2.0))
        records, _, log = Together(TIGHT, staged, failures).play(crowd(1))
        whole(records, crowd(1))
        ends = [each for each in log if each.request_id == move.request_id and each.moment_s < left_s]
        assert ends[-1].outcome == "called off"


def test_a_node_that_takes_both_ends_tears_the_move_once() -> None:
    move, left_s, _ = under_way(SLOW, "migrated")
    events = [
        OutageSpec(at_s=left_s + 0.001, instance=f"mixed-{index}", for_s=1.0)
        for index in (move.target, move.source)
    ]
    records, _, log = Together(TIGHT, SLOW, script(*events)).play(crowd(1))
    whole(records, crowd(1))
    assert sum(each.request_id == move.request_id and each.moment_s < left_s + 0.002 for each in log) == 1


def test_nothing_is_taken_from_an_engine_that_has_failed() -> None:
    """In the midst of its last step it is not given requests, as one that drains is not either."""
    failures = replace(STORMS, retries=9)
    one = Together(TIGHT, EAGER, failures)
    _, kept, log = one.play(crowd(2))
    down = defaultdict(list)
    for change in kept.log:
        down[change.replica].append((change.moment_s, change.state))
    assert kept.failures > 3
    for move in log:
        if move.outcome == "migrated":
            begun_s = move.moment_s - move.downtime_s
            states = [state for at_s, state in down[f"mixed-{move.source}"] if at_s < begun_s]
            assert states[-1] is not State.DOWN


def test_what_is_stopped_gives_its_requests_away_and_is_off_sooner() -> None:
    """Eight requests want two replicas; of four that come later, those on the second are left when the
    eight have ended, and one replica is enough."""
    early = [Request(id=f"e{i}", prompt=(i, 1, 2), output_tokens=60, arrival_s=0.1) for i in range(8)]
    late = [Request(id=f"l{i}", prompt=(i, 3, 4), output_tokens=100, arrival_s=1.0) for i in range(4)]
    more = rule(min=1, max=2, target=5.0, cooldown_down_s=0.0, interval_s=0.25)
    offs, logs = [], []
    for policy in (EAGER, replace(EAGER, below_steps=float("-inf"))):
        one = Together(TIGHT, policy, None, (more,), count=2)
        records, kept, log = one.play([*early, *late])
        assert all(record.ok for record in records)
        offs.append(max(change.moment_s for change in kept.log if change.state is State.OFF))
        logs.append(log)
    assert logs[1] == []
    assert {move.outcome for move in logs[0]} == {"migrated"}
    # To the replica that came up, and from it when it is stopped: one after the other, whatever the interval.
    assert [move.target for move in logs[0] if move.moment_s < 2] == [1] * (len(logs[0]) - 2)
    first, second = (move for move in logs[0] if move.source == 1)
    assert second.moment_s - first.moment_s < 2 * EAGER.interval_s
    assert offs[0] < offs[1] - 0.3


def test_a_replica_that_comes_up_is_given_running_requests() -> None:
    load = crowd(0)
    up = rule(min=1, target=10.0, interval_s=0.5, cooldown_down_s=100.0)
    _, kept, log = Together(TIGHT, EAGER, None, (up,), router="freeness").play(load)
    came = {change.replica: change.moment_s for change in kept.log if change.state is State.UP}
    given = [
        move for move in log if move.outcome == "migrated" and came.get(f"mixed-{move.target}", 0.0) > 0.0
    ]
    assert len(came) == 3 and len(given) > 3
    assert all(move.moment_s > came[f"mixed-{move.target}"] for move in given)


def test_moves_and_the_bound_on_replicas_leave_nobody_waiting_for_ever() -> None:
    """To nothing and back, with a request held before anybody is up."""
    one = Together(TIGHT, EAGER, None, (rule(min=0, target=4.0, interval_s=0.3, cooldown_down_s=0.5),))
    load = crowd(2)
    records, kept, _ = one.play([*load, replace(load[0], id="last", arrival_s=load[-1].arrival_s + 60.0)])
    assert len(records) == len(load) + 1 and all(record.ok for record in records)
    assert any(change.state is State.OFF and change.moment_s > 1.0 for change in kept.log)
