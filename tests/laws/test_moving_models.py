"""Requests of several models move among their model's own replicas: nobody is lost, doubled or led astray."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.laws.test_failures import CHIP, clean, hand_over_s, script, site, whole
from tests.laws.test_migration import EAGER, NEVER, TIGHT, configs, copy_s, crowd, engines, loads, policies
from tests.laws.test_moving_replicas import SLOW, tables
from tests.laws.test_turns import shared

from tongyun.cloud.engine.loop import EngineLoop, Turn
from tongyun.cloud.engine.simulated import LeapingExecutor, SimulatedExecutor
from tongyun.cloud.front import Front, Fronts
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.migration import Move, Mover
from tongyun.cloud.relay import Relay
from tongyun.cloud.sched.affinity import ByModel
from tongyun.cloud.sched.migrate import MigrationPolicy
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.router import LeastLoad, RoundRobin
from tongyun.cloud.sched.scheduler import SchedulerConfig
from tongyun.cloud.several import Several
from tongyun.cloud.simulate import play
from tongyun.codesign.upkeep import Kept, Running, Upkeep
from tongyun.specs import AutoscaleSpec, FailureSpec, OutageSpec

Table = tuple[FailureSpec | None, tuple[AutoscaleSpec, ...]]
STILL: Table = (None, ())
MODELS = "vwxab"
"""Three replicas of v, two of w; two that prefill and two that decode for x; a and b share two."""
MOVING = "vwx"


class Told(NamedTuple):
    records: list[RequestRecord]
    logs: list[list[Move]]
    """Of each model whose requests move."""
    kept: Kept | None


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a fleet of these models is told."""

    config: SchedulerConfig
    policy: MigrationPolicy | None
    table: Table = STILL
    seed: int = 0


class Models:
    """Models with replicas of their own, whose requests move, beside two that share theirs."""

    def __init__(self, rules: Rules, kind: type[SimulatedExecutor] = LeapingExecutor) -> None:
        self.tokens: dict[str, list[int]] = defaultdict(list)
        watch = None if kind is LeapingExecutor else self.saw
        config = rules.config
        relay = Relay(
            (engines(config, kind, 2), engines(config, kind, 2)),
            (LeastLoad(), RoundRobin()),
            hand_over_s,
            watches=(watch, watch),
        )
        pool = Front([shared("ab", first=i, executor=kind) for i in range(2)], ByModel(), watch=watch)
        self.of: dict[str, Fronts] = {
            "v": Front(engines(config, kind, 3), RoundRobin(), watch=watch),
            "w": Front(engines(config, kind, 2), RoundRobin(), watch=watch),
            "x": relay,
            "a": pool,
            "b": pool,
        }
        self.front = Several(self.of)
        self.movers = [
            Mover(self.of[name].fronts[-1], rules.policy, copy_s)
            for name in MOVING
            if rules.policy is not None
        ]
        self.running: Running | None = None
        failures, scaled = rules.table
        if failures is not None or scaled:
            names = {"v/mixed": 3, "w/mixed": 2, "x/prefill": 2, "x/decode": 2, "shared/mixed": 2}
            self.running = Upkeep(failures=failures, autoscale=scaled).attach(
                self.front,
                [site(name, replicas) for name, replicas in names.items()],
                CHIP,
                seed=rules.seed,
                movers=self.movers,
            )

    def saw(self, turn: Turn) -> None:
        for request_id, token in turn.result.tokens.items():
            self.tokens[request_id].append(token)

    def play(self, load: Sequence[Request]) -> Told:
        logs = [mover.log for mover in self.movers]
        if self.running is None:
            return Told(play(load, self.front), logs, None)
        records = self.running.play(load)
        return Told(records, logs, self.running.kept(records))

    def look(self, arrived: Sequence[Request]) -> None:
        """Requests in are those out and those within, each at its model's; blocks have as many holders as
        they should."""
        model = {request.id: request.model for request in arrived}
        lost = [] if self.running is None else list(self.running.retries.lost)
        over = len(lost)
        for name, fleet in self.of.items():
            if name == "b":
                continue
            own = [one.id for one in arrived if one.model == name or (name == "a" and one.model == "b")]
            within = self._within(fleet)
            assert len(within) == len(set(within)) == fleet.in_flight
            assert set(within) <= set(own) and all(model[one] in (name, "b") for one in within)
            ended = [record.id for record in fleet.records(own) if record.id not in set(within)]
            assert sorted(within + ended + [one for one in lost if one in set(own)]) == sorted(own)
            over += len(ended)
        assert over + self.front.in_flight == len(arrived)
        for mover in self.movers:
            ends = Counter(end for one in mover._flights.values() for end in (one.source, one.target))
            assert [one.moves for one in mover.front.instances] == [
                ends[index] for index in range(len(mover.front.instances))
            ]

    def _within(self, fleet: Fronts) -> list[str]:
        found = [entry[2].id for entry in fleet._under_way] if isinstance(fleet, Relay) else []
        for front in fleet.fronts:
            found += [*front.between, *(request.id for request in front.waiting())]
            for one in front.instances:
                found += one.in_flight
                if isinstance(one.loop, EngineLoop):
                    self._blocks(one.loop)
        return found

    def _blocks(self, loop: EngineLoop) -> None:
        scheduler, held = loop.scheduler, Counter[int]()
        scheduler.settle()
        for seq in scheduler._sequences.values():
            held.update(seq.blocks)
        for name, blocks in scheduler._residents.reserved.items():
            assert any(name in mover._flights for mover in self.movers)
            held.update(blocks)
        pool = scheduler.pool
        assert [pool.holders(block) for block in range(pool.total)] == [held[b] for b in range(pool.total)]
        assert pool.free + len(held) == pool.total


def spread(load: Sequence[Request], models: str = MODELS) -> list[Request]:
    """The first models have most of the requests."""
    turn = "vwxvwvxa" + "vwxvwvxb"
    return [replace(one, model=turn[i % 16] if models == MODELS else models) for i, one in enumerate(load)]


rules = st.builds(
    Rules,
    config=configs,
    policy=policies,
    table=st.one_of(st.just(STILL), tables),
    seed=st.integers(0, 3),
)


@settings(max_examples=60, deadline=None)
@given(loads(), rules)
def test_at_every_instant_requests_and_blocks_are_all_somewhere(load: list[Request], rules: Rules) -> None:
    one = Models(rules, SimulatedExecutor)
    load = spread(load)
    arrived: list[Request] = []
    for tick in range(250):
        one.front.at(tick * 0.043 + 0.001, lambda: one.look(arrived))
    for request in load:
        one.front.advance(request.arrival_s)
        arrived.append(request)
        one.front.send(request)
        one.look(arrived)
    one.front.advance(250 * 0.043)
    one.look(arrived)
    if one.running is None:
        one.front.advance(float("inf"))
        records = one.front.records([])
    else:
        records = one.running.play([])
    one.look(arrived)
    whole(records, load)
    clean(one.front)
    assert not any(front.between for front in one.front.fronts)
    assert not any(mover._flights for mover in one.movers)
    ended = {record.id: record for record in records}
    for request in load:
        assert ended[request.id].model == request.model
        # Torn and sent again or moved: what was streamed was streamed once.
        assert len(one.tokens[request.id]) == ended[request.id].output_tokens


@settings(max_examples=60, deadline=None)
@given(loads(), rules)
def test_leaps_and_steps_and_a_second_run_agree_on_every_event(load: list[Request], rules: Rules) -> None:
    load = spread(load)
    kinds = (LeapingExecutor, SimulatedExecutor, LeapingExecutor)
    runs = [Models(rules, kind).play(load) for kind in kinds]
    assert runs[0] == runs[1] == runs[2]
    whole(runs[0].records, load)
    if rules.table[0] is None:
        assert all(record.ok for record in runs[0].records)


@settings(max_examples=40, deadline=None)
@given(loads(), configs, policies)
def test_a_model_is_what_it_would_be_alone(
    load: list[Request], config: SchedulerConfig, policy: MigrationPolicy
) -> None:
    """Records and moves of each are those of its fleet without the others."""
    rules, load = Rules(config=config, policy=policy), spread(load)
    records, logs, _ = Models(rules).play(load)
    for name, log in zip(MOVING, logs, strict=True):
        alone = Models(rules).play([one for one in load if one.model == name])
        assert alone.logs[MOVING.index(name)] == log
        assert alone.records == [record for record in records if record.model == name]


@settings(max_examples=30, deadline=None)
@given(loads(), configs, st.one_of(st.just(STILL), tables))
def test_to_look_and_never_move_changes_nothing(
    load: list[Request], config: SchedulerConfig, table: Table
) -> None:
    load = spread(load)
    looked = Models(Rules(config=config, policy=NEVER, table=table)).play(load)
    plain = Models(Rules(config=config, policy=None, table=table)).play(load)
    assert not any(looked.logs)
    assert (looked.records, looked.kept) == (plain.records, plain.kept)


@pytest.mark.parametrize("seed", range(3))
def test_crowded_models_do_move_requests_and_each_its_own(seed: int) -> None:
    """So that the laws above speak of moves at all."""
    load = spread([replace(one, arrival_s=one.arrival_s / 3) for one in crowd(seed)])
    model = {request.id: request.model for request in load}
    _, logs, _ = Models(Rules(config=TIGHT, policy=EAGER)).play(load)
    for name, log in zip(MOVING, logs, strict=True):
        assert {model[move.request_id] for move in log} == {name}
        assert any(move.outcome == "migrated" for move in log)
    assert sum(move.outcome == "migrated" for log in logs for move in log) > 30


@pytest.mark.parametrize("policy", ["retry", "lose"])
@pytest.mark.parametrize("name", ["v", "w"])
def test_a_failure_tears_the_moves_of_its_own_model_alone(name: str, policy: str) -> None:
    load = spread([replace(one, arrival_s=one.arrival_s / 2) for one in crowd(1)])
    whose = MOVING.index(name)
    calm = Models(Rules(config=TIGHT, policy=SLOW)).play(load)
    move = next(each for each in calm.logs[whose] if each.outcome == "migrated" and each.downtime_s > 0.004)
    at_s = move.moment_s - move.downtime_s + 0.001
    failures = script(
        OutageSpec(at_s=at_s, instance=f"{name}/mixed-{move.source}", for_s=2.0), on_failure=policy
    )
    one = Models(Rules(config=TIGHT, policy=SLOW, table=(failures, ())))
    records, logs, _ = one.play(load)
    whole(records, load)
    assert [each.request_id for each in logs[whose] if each.outcome == "torn"] == [move.request_id]
    for index, log in enumerate(logs):
        if index != whose:
            assert log == calm.logs[index]
    (record,) = (record for record in records if record.id == move.request_id)
    assert record.ok == (policy == "retry")
    others = [record for record in records if record.model != name]
    assert sorted(others, key=lambda one: one.id) == sorted(
        (record for record in calm.records if record.model != name), key=lambda one: one.id
    )
