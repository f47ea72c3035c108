"""Requests that move between engines: nobody is lost or doubled, and no block or token is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.laws.test_fleet import Price

from tongyun.cloud.engine.clock import VirtualClock
from tongyun.cloud.engine.interface import Turn
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.simulated import LeapingExecutor, SimulatedExecutor
from tongyun.cloud.front import Front
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.migration import Move, Mover, Moves, play_migrating
from tongyun.cloud.sched.freeness import Load, Room, freeness
from tongyun.cloud.sched.migrate import MigrationPolicy, Movable
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.router import ROUTERS, find_router
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig
from tongyun.cloud.simulate import play_fleet

NEVER = MigrationPolicy(interval_s=0.07, below_steps=float("-inf"))
EAGER = MigrationPolicy(interval_s=0.05, below_steps=30, above_steps=30, last_tokens=2)

configs = st.builds(
    SchedulerConfig,
    blocks=st.sampled_from([30, 44, 80]),
    block_tokens=st.just(4),
    max_context_tokens=st.just(110),
    max_sequences=st.sampled_from([4, 12]),
    max_step_tokens=st.just(32),
    prefix_caching=st.booleans(),
    aging_s=st.sampled_from([None, 3.0]),
)
policies = st.builds(
    MigrationPolicy,
    interval_s=st.sampled_from([0.05, 0.3]),
    below_steps=st.sampled_from([5.0, 30.0]),
    above_steps=st.sampled_from([5.0, 30.0]),
    stages=st.integers(1, 3),
    last_tokens=st.sampled_from([0, 1, 4]),
    headroom=st.sampled_from([{}, {"gold": 0.4}]),
)


@st.composite
def loads(draw: st.DrawFn) -> list[Request]:
    """Crowded by a seed: lists drawn one by one are too sparse to fill a cache."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(5, 60))
    moments = np.cumsum(rng.gamma(0.2, 0.25, count))
    return [
        Request(
            id=f"r{i}",
            prompt=tuple(range(int(rng.integers(0, 3)) * 1000, 9999))[: int(rng.integers(1, 50))],
            output_tokens=int(rng.integers(1, 60)),
            arrival_s=float(moment),
            priority=(gold := int(rng.random() < 0.2)),
            priority_class="gold" if gold else "plain",
        )
        for i, moment in enumerate(moments)
    ]


def engines(
    config: SchedulerConfig, kind: type[SimulatedExecutor] = LeapingExecutor, count: int = 3
) -> list[EngineLoop]:
    return [EngineLoop(Scheduler(config), kind(Price()), VirtualClock()) for _ in range(count)]


def copy_s(tokens: int) -> float:
    return 0.004 + tokens * 0.0007


class Witness:
    """Looks at every engine at many moments, and at every token where steps are taken one by one."""

    def __init__(self, load: list[Request], config: SchedulerConfig, policy: MigrationPolicy) -> None:
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.load, self.policy = load, policy
        self.front = Front(engines(config, SimulatedExecutor), find_router("round-robin"), watch=self.saw)
        self.mover = Mover(self.front, policy, copy_s)
        self.sent = 0

    def saw(self, turn: Turn) -> None:
        for request_id, token in turn.result.tokens.items():
            self.tokens[request_id].append(token)

    def play(self) -> None:
        for request in self.load:
            self.front.send(request)
            self.sent += 1
            self.look()
        end_s = self.load[-1].arrival_s
        for tick in range(1, 400):
            self.front.advance(end_s + tick * 0.031)
            self.look()
        self.front.advance(float("inf"))
        self.look()

    def look(self) -> None:
        here: list[str] = []
        ended = 0
        for one in self.front.instances:
            scheduler, held = one.loop.scheduler, defaultdict(int)
            scheduler.settle()
            assert set(scheduler._sequences) == set(one.in_flight)
            here += one.in_flight
            ended += sum(record is not None for record in one.records.values())
            assert one.prompt_tokens_due == sum(
                len(progress.request.prompt)
                for progress in one.in_flight.values()
                if progress.first_s is None
            )
            for seq in scheduler._sequences.values():
                for block in seq.blocks:
                    held[block] += 1
                assert len(seq.history) == len(seq.request.prompt) + len(self.tokens[seq.request.id])
            for blocks in scheduler._residents.reserved.values():
                for block in blocks:
                    held[block] += 1
            pool = scheduler.pool
            assert [pool.holders(b) for b in range(pool.total)] == [held.get(b, 0) for b in range(pool.total)]
            assert pool.free + len(held) == pool.total
            assert scheduler.running + len(scheduler._residents.reserved) <= scheduler.config.max_sequences
            assert scheduler._waiting.blocks == sum(
                scheduler._residents._blocks_for(seq)
                for seq in scheduler._sequences.values()
                if not seq.blocks
            )
        assert len(here) == len(set(here))
        assert len(here) + ended + len(self.front.between) == self.sent


@settings(max_examples=60)
@given(loads(), configs, policies)
def test_no_request_block_or_token_is_lost_or_doubled(
    load: list[Request], config: SchedulerConfig, policy: MigrationPolicy
) -> None:
    witness = Witness(load, config, policy)
    witness.play()
    words = SimulatedExecutor(Price())
    for request in load:
        expected = words.new_tokens(request, len(request.prompt), request.output_tokens)
        assert witness.tokens[request.id] == list(expected)
    for one in witness.front.instances:
        assert one.loop.scheduler.pool.used == 0
        assert not one.loop.scheduler._residents.reserved
    assert not witness.front.between
    records = [record for one in witness.front.instances for record in one.result().records]
    assert sorted(record.id for record in records) == sorted(request.id for request in load)


@settings(max_examples=60)
@given(loads(), configs, policies, st.sampled_from(sorted(ROUTERS)))
def test_leaps_and_steps_and_a_second_run_agree_on_every_record_and_move(
    load: list[Request], config: SchedulerConfig, policy: MigrationPolicy, name: str
) -> None:
    runs = [
        play_migrating(load, engines(config, kind), find_router(name), policy, copy_s)
        for kind in (LeapingExecutor, SimulatedExecutor, LeapingExecutor)
    ]
    assert runs[0] == runs[1] == runs[2]


@settings(max_examples=40)
@given(loads(), configs, st.sampled_from(sorted(ROUTERS)))
def test_to_look_and_never_move_changes_nothing(
    load: list[Request], config: SchedulerConfig, name: str
) -> None:
    watched, log = play_migrating(load, engines(config), find_router(name), NEVER, copy_s)
    assert log == []
    assert watched == play_fleet(load, engines(config), find_router(name))


def crowd(seed: int) -> list[Request]:
    rng = np.random.default_rng(seed)
    moments = np.cumsum(rng.gamma(0.25, 4 / 14, 300))
    prompts = np.clip(rng.lognormal(2.5, 1.2, 300), 1, 60).astype(int)
    outputs = np.clip(rng.lognormal(2.7, 0.9, 300), 1, 49).astype(int)
    return [
        Request(id=f"r{i}", prompt=tuple(range(i, i + p)), output_tokens=int(o), arrival_s=float(t))
        for i, (t, p, o) in enumerate(zip(moments, prompts, outputs, strict=True))
    ]


TIGHT = SchedulerConfig(
    blocks=60, block_tokens=4, max_context_tokens=110, max_sequences=32, max_step_tokens=64
)


@pytest.mark.parametrize("seed", range(3))
def test_crowded_engines_do_move_requests_and_preempt_fewer(seed: int) -> None:
    """So that the laws above speak of moves at all."""
    load = crowd(seed)
    still = play_fleet(load, engines(TIGHT), find_router("round-robin"))
    moved, log = play_migrating(load, engines(TIGHT), find_router("round-robin"), EAGER, copy_s)
    moves = Moves.of(log, token_bytes=2.0)
    assert moves.migrated > 20 and moves.rescheduled > 5
    assert moves.moved_bytes == 2.0 * sum(move.tokens for move in log)
    assert sum(one.stats.preemptions for one in moved) < sum(one.stats.preemptions for one in still)


def test_a_pause_is_the_last_copy_and_the_step_it_has_to_wait_for() -> None:
    _, log = play_migrating(crowd(1), engines(TIGHT), find_router("round-robin"), EAGER, copy_s)
    migrated = [move for move in log if move.outcome == "migrated"]
    # A step of these engines takes at most 0.02 + 0.064 + what is remembered.
    longest_s = 0.02 + 0.064 + 1e-5 * 240
    most = EAGER.last_tokens + longest_s / 0.02 + 1
    assert all(copy_s(0) <= move.downtime_s <= copy_s(int(most)) + longest_s for move in migrated)
    assert all(1 < move.stages <= EAGER.stages + 1 for move in migrated)
    # Far less than copying all of it while it waits, which is what stages are for.
    assert np.median([move.downtime_s for move in migrated]) < copy_s(60)


def load_of(free: int, running: int, waiting: int = 0, head: int = 0, **more: object) -> Load:
    room = Room(100, 16, free, running, waiting, head, head, 8)
    whole: Callable[..., Load] = Load
    return whole(running + waiting, 0, lambda: room, **more)


def test_freeness_counts_what_waits_and_what_a_class_keeps_free() -> None:
    assert freeness(load_of(50, 5), {}, whole_queue=False) == 50 * 16 / 5
    assert freeness(load_of(50, 4, 1, 60), {}, whole_queue=False) == -10 * 16 / 5
    gold = load_of(50, 5, classes={"gold": 1})
    assert freeness(gold, {"gold": 0.4}, whole_queue=False) == 10 * 16 / 5
    assert freeness(gold, {}, whole_queue=False) == 50 * 16 / 5
    assert freeness(load_of(50, 0), {}, whole_queue=False) == 800


def test_the_neediest_is_paired_with_the_freest_and_one_that_closes_gives_first() -> None:
    policy = MigrationPolicy(below_steps=32, above_steps=128)
    loads = [load_of(90, 1), load_of(1, 9), load_of(40, 1), load_of(10, 9, 2, 30), load_of(20, 9)]
    assert policy.pairs(loads) == [(3, 0), (1, 2)]
    closing = [load_of(90, 2, up=False), *loads[1:]]
    assert policy.pairs(closing) == [(0, 2)]


def test_the_lowest_class_and_then_the_shortest_goes_and_only_where_it_helps() -> None:
    policy = MigrationPolicy()
    source, target = load_of(1, 9), load_of(60, 2)
    some = [Movable("a", 1, True, 50), Movable("b", 0, True, 400), Movable("c", 0, True, 300)]
    chosen = policy.choose(some, source, target)
    assert chosen is not None and chosen.id == "c"
    assert policy.choose([Movable("d", 0, True, 961)], source, target) is None
    assert policy.choose(some, target, load_of(30, 9)) is None


def test_moves_are_told_in_order_and_by_whom() -> None:
    _, log = play_migrating(crowd(2), engines(TIGHT), find_router("round-robin"), EAGER, copy_s)
    assert all(isinstance(move, Move) and move.source != move.target for move in log)
    assert {move.outcome for move in log} <= {"migrated", "rescheduled", "recomputed", "called off"}


def test_records_keep_the_moment_of_the_first_token_wherever_it_came() -> None:
    results, log = play_migrating(crowd(0), engines(TIGHT), find_router("round-robin"), EAGER, copy_s)
    where = {record.id: index for index, one in enumerate(results) for record in one.records}
    last = {move.request_id: move.target for move in log if move.outcome != "called off"}
    assert all(where[name] == target for name, target in last.items())
    records: list[RequestRecord] = [record for one in results for record in one.records]
    assert all(r.first_token_s is not None and r.arrival_s < r.first_token_s <= r.ended_s for r in records)
