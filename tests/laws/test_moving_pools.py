"""Requests that move within the pool that decodes, behind one that prefills: nobody is lost or doubled."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.laws.test_failures import CHIP, clean, script, site, whole
from tests.laws.test_migration import EAGER, NEVER, TIGHT, configs, copy_s, crowd, engines, loads, policies
from tests.laws.test_moving_replicas import SLOW, tables

from tongyun.cli.fleet import read_fleet
from tongyun.cloud.engine.interface import Turn
from tongyun.cloud.engine.simulated import LeapingExecutor, SimulatedExecutor
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.migration import Move, Mover, Moves, Moving
from tongyun.cloud.prompts import PromptMover
from tongyun.cloud.relay import Relay
from tongyun.cloud.retries import LOST
from tongyun.cloud.sched.migrate import MigrationPolicy, PromptPolicy
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.router import LeastLoad, RoundRobin
from tongyun.cloud.sched.scheduler import SchedulerConfig
from tongyun.cloud.simulate import play, play_pools
from tongyun.cloud.workload import Arrivals, Distribution, Lengths, Process, Workload, sample
from tongyun.codesign.fleet import Played
from tongyun.codesign.upkeep import Kept, Running, Upkeep
from tongyun.specs import AutoscaleSpec, FailureSpec, OutageSpec

moving_prompts = st.sampled_from([None, PromptPolicy(interval_s=0.05), PromptPolicy(interval_s=0.3)])
RARELY = FailureSpec(chip_mtbf_hours=1e9, chip_repair_hours=1.0)


def hand_over_s(request: Request) -> float:
    return copy_s(len(request.prompt))


class Pools:
    """Two engines that prefill and three that decode, whose requests move, under a fleet file's tables."""

    def __init__(
        self,
        config: SchedulerConfig,
        policy: MigrationPolicy,
        failures: FailureSpec | None = None,
        rules: tuple[AutoscaleSpec, ...] = (),
        *,
        kind: type[SimulatedExecutor] = LeapingExecutor,
        seed: int = 0,
        prompts: PromptPolicy | None = None,
        send_s: float = 0.003,
    ) -> None:
        """With `prompts`, they are given out turn by turn, and those that wait move."""
        self.tokens: dict[str, list[int]] = defaultdict(list)
        watch = None if kind is LeapingExecutor else self.saw
        self.relay = Relay(
            (engines(config, kind, 2), engines(config, kind, 3)),
            (LeastLoad() if prompts is None else RoundRobin(), RoundRobin()),
            hand_over_s,
            watches=(watch, watch),
        )
        self.mover = Mover(self.relay.second, policy, copy_s)
        self.movers: list[Moving] = [self.mover]
        if prompts is not None:
            self.movers.append(PromptMover(self.relay.first, prompts, send_s))
        self.running: Running | None = None
        if failures is not None or rules:
            self.running = Upkeep(failures=failures, autoscale=rules).attach(
                self.relay, [site("prefill", 2), site("decode", 3)], CHIP, seed=seed, movers=self.movers
            )

    def saw(self, turn: Turn) -> None:
        for request_id, token in turn.result.tokens.items():
            self.tokens[request_id].append(token)

    def play(self, load: Sequence[Request]) -> tuple[list[RequestRecord], Kept | None, list[Move]]:
        if self.running is None:
            return play(load, self.relay), None, self.mover.log
        records = self.running.play(load)
        return records, self.running.kept(records), self.mover.log

    def look(self, arrived: Sequence[str]) -> None:
        """Requests in are those out and those within; a block has as many holders as it should."""
        relay = self.relay
        within = [entry[2].id for entry in relay._under_way]
        for front in relay.fronts:
            within += front.between
            within += [request.id for request in front.waiting()]
            for one in front.instances:
                scheduler, held = one.single.scheduler, Counter[int]()
                scheduler.settle()
                assert set(scheduler._sequences) == set(one.in_flight)
                within += one.in_flight
                for seq in scheduler._sequences.values():
                    held.update(seq.blocks)
                for blocks in scheduler._residents.reserved.values():
                    held.update(blocks)
                pool = scheduler.pool
                assert [pool.holders(block) for block in range(pool.total)] == [
                    held[block] for block in range(pool.total)
                ]
                assert pool.free + len(held) == pool.total
        assert len(within) == len(set(within)) == relay.in_flight
        ended = [record.id for record in relay.records(arrived) if record.id not in set(within)]
        lost = [] if self.running is None else list(self.running.retries.lost)
        assert sorted(within + ended + lost) == sorted(arrived)
        for mover in self.movers:
            ways = mover._flights if isinstance(mover, Mover) else mover._ways  # type: ignore[attr-defined]
            ends = Counter(index for way in ways.values() for index in (way.source, way.target))
            assert [one.moves for one in mover.front.instances] == [
                ends[index] for index in range(len(mover.front.instances))
            ]


@settings(max_examples=60, deadline=None)
@given(loads(), configs, policies, st.one_of(st.just((None, ())), tables), st.integers(0, 3), moving_prompts)
def test_at_every_instant_requests_and_blocks_are_all_somewhere(
    load: list[Request],
    config: SchedulerConfig,
    policy: MigrationPolicy,
    table: tuple[FailureSpec | None, tuple[AutoscaleSpec, ...]],
    seed: int,
    prompts: PromptPolicy | None,
) -> None:
    one = Pools(config, policy, *table, kind=SimulatedExecutor, seed=seed, prompts=prompts, send_s=0.05)
    arrived: list[str] = []
    for tick in range(300):
        one.relay.at(tick * 0.041 + 0.001, lambda: one.look(arrived))
    for request in load:
        one.relay.advance(request.arrival_s)
        arrived.append(request.id)
        one.relay.send(request)
    one.relay.advance(300 * 0.041)
    one.look(arrived)
    if one.running is None:
        one.relay.advance(float("inf"))
        records = one.relay.records(arrived)
    else:
        one.running.play([])
        records = [*one.running.retries.whole(one.relay.records(arrived)), *one.running.retries.lost.values()]
    whole(records, load)
    clean(one.relay)
    assert not any(front.between for front in one.relay.fronts) and not one.mover._flights
    ended = {record.id: record for record in records}
    for request in load:
        # Torn and sent again or moved: what was streamed was streamed once.
        assert len(one.tokens[request.id]) == ended[request.id].output_tokens


@settings(max_examples=60, deadline=None)
@given(loads(), configs, policies, st.one_of(st.just((None, ())), tables), st.integers(0, 3), moving_prompts)
def test_leaps_and_steps_and_a_second_run_agree_on_every_event(
    load: list[Request],
    config: SchedulerConfig,
    policy: MigrationPolicy,
    table: tuple[FailureSpec | None, tuple[AutoscaleSpec, ...]],
    seed: int,
    prompts: PromptPolicy | None,
) -> None:
    pools = [
        Pools(config, policy, *table, kind=kind, seed=seed, prompts=prompts)
        for kind in (LeapingExecutor, SimulatedExecutor, LeapingExecutor)
    ]
    runs = [each.play(load) for each in pools]
    assert runs[0] == runs[1] == runs[2]
    logs = [[mover.log for mover in each.movers] for each in pools]
    assert logs[0] == logs[1] == logs[2]
    whole(runs[0][0], load)
    if table[0] is None:
        assert all(record.ok for record in runs[0][0])


@settings(max_examples=40, deadline=None)
@given(loads(), configs)
def test_to_look_and_never_move_changes_nothing(load: list[Request], config: SchedulerConfig) -> None:
    watched, _, log = Pools(config, NEVER).play(load)
    pools = engines(config, count=2), engines(config, count=3)
    plain, _ = play_pools(load, pools, (LeastLoad(), RoundRobin()), hand_over_s)
    assert log == []
    assert watched == list(plain)


@pytest.mark.parametrize("seed", range(3))
def test_crowded_engines_do_move_requests_and_preempt_fewer(seed: int) -> None:
    """So that the laws above speak of moves at all."""
    runs = [Pools(TIGHT, policy) for policy in (NEVER, EAGER)]
    for one in runs:
        one.play(crowd(seed))
    moves = Moves.of(runs[1].mover.log, token_bytes=2.0)
    assert moves.migrated > 20 and moves.rescheduled > 3
    assert moves.moved_bytes == 2.0 * sum(move.tokens for move in runs[1].mover.log)
    still, moved = (sum(one.loop.stats().preemptions for one in run.relay.second.instances) for run in runs)
    assert moved < still


def test_what_was_handed_over_goes_along_with_who_waits_and_is_not_computed_again() -> None:
    one = Pools(TIGHT, EAGER)
    load = crowd(1)
    one.play(load)
    asked = {request.id: request for request in load}
    waited = [move for move in one.mover.log if move.outcome == "rescheduled"]
    whole_copies = [move for move in waited if move.tokens]
    # The others were preempted before, and have nothing that could go along.
    assert len(whole_copies) > 5
    for move in whole_copies:
        assert move.tokens == len(asked[move.request_id].prompt)
        assert move.downtime_s >= copy_s(move.tokens)
    # Where nobody is preempted, the pool that decodes computes one token a step of each and nothing else.
    roomy = Pools(replace(TIGHT, blocks=200, max_sequences=3), replace(EAGER, above_steps=40))
    roomy.play(load)
    stats = [each.loop.stats() for each in roomy.relay.second.instances]
    assert {move.outcome for move in roomy.mover.log if move.tokens} >= {"rescheduled"}
    assert sum(each.preemptions for each in stats) == 0
    assert sum(each.computed_tokens for each in stats) == sum(r.output_tokens - 1 for r in load)


@pytest.mark.parametrize("policy", ["retry", "lose"])
def test_who_was_leaving_an_engine_that_dies_begins_at_the_first_pool_again(policy: str) -> None:
    log = Pools(TIGHT, SLOW, RARELY).play(crowd(1))[2]
    move = next(each for each in log if each.outcome == "migrated" and each.downtime_s > 0.004)
    left_s = move.moment_s - move.downtime_s
    failures = script(
        OutageSpec(at_s=left_s + 0.001, instance=f"decode-{move.source}", for_s=2.0), on_failure=policy
    )
    one = Pools(TIGHT, SLOW, failures)
    records, kept, log = one.play(crowd(1))
    assert kept is not None and one.running is not None
    whole(records, crowd(1))
    assert [each.request_id for each in log if each.outcome == "torn"] == [move.request_id]
    (record,) = (record for record in records if record.id == move.request_id)
    prefilled = [each.loop.stats().computed_tokens for each in one.relay.first.instances]
    prompts = sum(len(request.prompt) for request in crowd(1))
    if policy == "retry":
        # What the reader has is part of the prompt that the first pool computes now.
        assert record.ok and kept.lost == 0 and sum(prefilled) > prompts
    else:
        assert record.error == f"{LOST}decode-{move.source} failed"
        assert record.output_tokens > 1


def test_who_was_on_the_way_to_an_engine_that_dies_goes_back_and_is_no_retry() -> None:
    log = Pools(TIGHT, SLOW, RARELY).play(crowd(1))[2]
    move = next(each for each in log if each.outcome == "migrated" and each.downtime_s > 0.004)
    left_s = move.moment_s - move.downtime_s
    # An engine of the first pool that has the target's number is another one.
    for pool, outcome in (("decode", "recomputed"), ("prefill", "migrated")):
        events = OutageSpec(at_s=left_s + 0.001, instance=f"{pool}-{move.target % 2}", for_s=2.0)
        if pool == "decode":
            events = replace(events, instance=f"decode-{move.target}")
        one = Pools(TIGHT, SLOW, script(events))
        records, _, log = one.play(crowd(1))
        whole(records, crowd(1))
        found = next(each for each in log if each.request_id == move.request_id and each.moment_s > left_s)
        assert found.outcome == outcome
        assert one.running is not None
        assert move.request_id not in one.running.retries._stories
        assert all(record.ok for record in records)


SPLIT = """
name = "split"
model = "Qwen/Qwen3-32B"
chip = "a100"
{more}
[[pool]]
role = "prefill"
replicas = 4
step_tokens = 2048

[[pool]]
role = "decode"
replicas = 4
batch = 128
"""


def played(folder: Path, more: str) -> Played:
    path = folder / "fleet.toml"
    path.write_text(SPLIT.format(more=more))
    _, fleet = read_fleet(path, isl=1500, osl=600)
    lengths = Lengths(distribution=Distribution.LOGNORMAL, mean=600, variation=1.2, low=8, high=4000)
    workload = Workload(
        arrivals=Arrivals(process=Process.GAMMA, rate_per_s=2.5, variation=3.0),
        prompt=Lengths(distribution=Distribution.LOGNORMAL, mean=1500, variation=1.2, low=16, high=8000),
        output=lengths,
        requests=400,
        seed=2,
    )
    return fleet.play(sample(workload), LeastLoad(), chip=fleet.question.chip.at())


def test_a_fleet_file_of_two_pools_moves_those_that_decode(tmp_path: Path) -> None:
    still, moved = played(tmp_path, ""), played(tmp_path, "[migration]\n")
    assert still.moves is None
    assert moved.moves is not None and moved.moves.migrated > 10
    assert moved.report.succeeded == still.report.succeeded == 400
    # Prompts are computed as they were: only the pool behind has changed.
    assert moved.report.ttft_s == still.report.ttft_s
    preempted = [sum(each.preemptions for each in one.engines[4:]) for one in (still, moved)]
    assert preempted[1] < preempted[0]
    assert played(tmp_path, "[migration]\n") == moved
