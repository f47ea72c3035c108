"""Experts placed anew while replicas fail, come and go and requests move: nobody is lost or held up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.laws.test_autoscale import rule
from tests.laws.test_failures import CHIP, clean, hand_over_s, script, site, whole
from tests.laws.test_fleet import Price
from tests.laws.test_migration import configs, copy_s, crowd, loads, policies
from tests.laws.test_moving_replicas import tables
from tests.laws.test_rebalancing import DRIFT, FLEET, LOAD, SHARE, WINDOW

from tongyun.cli.fleet import read_fleet
from tongyun.cloud.engine.clock import VirtualClock
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.simulated import LeapingExecutor, SimulatedExecutor, StepLoad
from tongyun.cloud.front import Front
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.migration import Move, Mover
from tongyun.cloud.rebalance import Placed, Rebalanced, Rebalancing
from tongyun.cloud.relay import Relay
from tongyun.cloud.replica import Replica, State
from tongyun.cloud.sched.migrate import MigrationPolicy
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.router import LeastLoad, RoundRobin
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig
from tongyun.codesign import fleet as fleets
from tongyun.codesign.at_work import AtWork
from tongyun.codesign.fleet import Played
from tongyun.codesign.upkeep import Upkeep
from tongyun.specs import AutoscaleSpec, FailureSpec, OutageSpec
from tongyun.units import Cost


@dataclass(frozen=True)
class Slower(Price):
    """So many times as long."""

    times: float

    def __call__(self, load: StepLoad) -> Cost:
        cost = super().__call__(load)
        return replace(cost, seconds=self.times * cost.seconds)

    def mixed(
        self, decoding: int, context_tokens: int, chunks: Sequence[tuple[int, int]], samples: int
    ) -> tuple[float, float]:
        seconds, joules = super().mixed(decoding, context_tokens, chunks, samples)
        return self.times * seconds, joules

    def decode(self, sequences: int, context_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        return super().decode(sequences, context_tokens) * np.array([[self.times], [1.0]])


class Crowded:
    """Experts that crowd one rank more with every drift until they are placed anew."""

    def __init__(self, role: str, standing: bool, seconds: float) -> None:
        self.role, self.standing, self.seconds = role, standing, seconds
        self.counted = self.drifts = 0
        self.coming = False
        self.sent: list[tuple[float, int]] = []

    def count(self, tokens: int) -> None:
        self.counted += tokens

    def drift(self) -> None:
        self.drifts += 1

    def place(self, moment_s: float, replicas: int) -> Rebalanced | None:
        counted, self.counted = self.counted, 0
        if self.coming or not counted or not self.drifts or not replicas:
            return None
        self.coming = True
        self.sent.append((moment_s, replicas))
        return Rebalanced(
            moment_s=moment_s,
            role=self.role,
            experts=1,
            moved_bytes=float(replicas),
            seconds=self.seconds,
            standing=self.standing,
            crowding_before=2.0,
            crowding_after=1.0,
        )

    def arrived(self) -> None:
        self.coming, self.drifts = False, 0

    def price(self) -> Slower:
        return Slower(1.0 + 0.3 * self.drifts + 0.2 * self.coming)


@dataclass(frozen=True, kw_only=True)
class Told:
    """A fleet of three replicas of two engines that decode, behind two that prefill where that is said."""

    config: SchedulerConfig
    split: bool = False
    failures: FailureSpec | None = None
    rules: tuple[AutoscaleSpec, ...] = ()
    policy: MigrationPolicy | None = None
    every_s: tuple[float | None, float | None] | None = (0.11, 0.17)
    """Between drifts, and between placements."""
    standing: bool = True
    seconds: float = 0.06
    seed: int = 0

    def build(self, kind: type[SimulatedExecutor] = LeapingExecutor) -> AtWork:
        roles = ("prefill", "decode") if self.split else ("mixed",)
        executors = [[kind(Slower(1.0)) for _ in range(6)] for _ in roles]
        engines = [
            [EngineLoop(Scheduler(self.config), one, VirtualClock()) for one in each] for each in executors
        ]
        front: Front | Relay = Front(engines[0], RoundRobin())
        if self.split:
            front = Relay((engines[0], engines[1]), (LeastLoad(), RoundRobin()), hand_over_s)
        movers = () if self.policy is None else (Mover(front.fronts[-1], self.policy, copy_s),)
        running = changing = None
        if self.failures is not None or self.rules:
            sites = [site(role, 3, ranks=2, groups=2) for role in roles]
            running = Upkeep(failures=self.failures, autoscale=self.rules).attach(
                front, sites, CHIP, seed=self.seed, movers=movers
            )
        if self.every_s is not None:
            there: list[Callable[[int], bool]] = [lambda _: True for _ in roles]
            if running is not None:
                there = [equipped(running.of(each)) for each in front.fronts]
            placed = [
                Placed(
                    balance=Crowded(role, self.standing, self.seconds),
                    loops=loops,
                    executors=each,
                    groups=2,
                    there=who,
                )
                for role, loops, each, who in zip(roles, engines, executors, there, strict=True)
            ]
            drift_s, window_s = self.every_s
            ending = None if running is None else running.ending
            changing = Rebalancing(front, placed, drift_s=drift_s, window_s=window_s, ending=ending)
        return AtWork(front=front, running=running, movers=movers, changing=changing)


def equipped(replicas: Sequence[Replica]) -> Callable[[int], bool]:
    return lambda number: replicas[number].equipped


def events(
    told: Told, load: Sequence[Request], kind: type[SimulatedExecutor] = LeapingExecutor
) -> tuple[AtWork, tuple[RequestRecord, ...], list[Move], list[Rebalanced], object]:
    """All that happened."""
    work = told.build(kind)
    records = work.play(load)
    kept = None if work.running is None else work.running.kept(records)
    return (
        work,
        records,
        [move for mover in work.movers for move in mover.log],
        [] if work.changing is None else work.changing.log,
        kept,
    )


fleets_told = st.builds(
    lambda config, split, table, policy, standing, seconds, seed: Told(
        config=config,
        split=split,
        failures=table[0],
        rules=table[1],
        policy=policy,
        standing=standing,
        seconds=seconds,
        seed=seed,
    ),
    configs,
    st.booleans(),
    tables,
    st.one_of(st.none(), policies),
    st.booleans(),
    st.sampled_from([0.01, 0.06, 0.4]),
    st.integers(0, 3),
)


@settings(max_examples=60, deadline=None)
@given(loads(), fleets_told)
def test_leaps_and_steps_and_a_second_run_agree_on_every_event(load: list[Request], told: Told) -> None:
    runs = [events(told, load, kind) for kind in (LeapingExecutor, SimulatedExecutor, LeapingExecutor)]
    assert runs[0][1:] == runs[1][1:] == runs[2][1:]
    whole(runs[0][1], load)
    clean(runs[0][0].front)
    if told.failures is None:
        assert all(record.ok for record in runs[0][1])


@settings(max_examples=30, deadline=None)
@given(loads(), fleets_told)
def test_at_every_instant_a_request_is_in_one_place(load: list[Request], told: Told) -> None:
    work = told.build(SimulatedExecutor)
    front, running = work.front, work.running
    assert running is not None
    arrived: list[str] = []

    def look() -> None:
        within = [one.id for each in front.fronts for one in each.waiting()]
        within += [name for each in front.fronts for name in each.between]
        within += [name for each in front.fronts for one in each.instances for name in one.in_flight]
        if isinstance(front, Relay):
            within += [entry[2].id for entry in front._under_way]
        assert len(within) == len(set(within)) == front.in_flight
        ended = {record.id for record in front.records(arrived)} - set(within)
        assert sorted([*within, *ended, *running.retries.lost]) == sorted(arrived)

    for tick in range(200):
        front.at(tick * 0.053 + 0.001, look)
    for request in load:
        front.advance(request.arrival_s)
        arrived.append(request.id)
        front.send(request)
        look()
    front.advance(200 * 0.053)
    look()


@settings(max_examples=30, deadline=None)
@given(loads(), fleets_told)
def test_what_never_happens_changes_nothing(load: list[Request], told: Told) -> None:
    """Experts that never drift change nothing of a fleet whose replicas come and go, and tables by which
    none comes or goes nothing of one whose experts move."""
    still = events(replace(told, every_s=(None, 0.17)), load)
    assert still[3] == []
    assert still[1:] == events(replace(told, every_s=None), load)[1:]
    rarely = FailureSpec(chip_mtbf_hours=1e9, chip_repair_hours=1.0)
    quiet = events(replace(told, failures=rarely, rules=()), load)
    assert quiet[1:4] == events(replace(told, failures=None, rules=()), load)[1:4]


BUSY = SchedulerConfig(
    blocks=120, block_tokens=4, max_context_tokens=110, max_sequences=16, max_step_tokens=64
)


def test_only_replicas_with_weights_take_part_and_the_others_are_not_held_up() -> None:
    """One that is away neither sends experts nor waits for them: it serves at once when it is back."""
    out = script(OutageSpec(at_s=1.0, instance="mixed-1", for_s=3.01))
    told = Told(config=BUSY, failures=out, every_s=(0.3, 0.4), seconds=0.3)
    work, records, _, log, _ = events(told, crowd(3))
    assert work.running is not None and all(record.ok for record in records)
    away = [one.moved_bytes for one in log if 1.0 < one.moment_s < 4.01]
    assert len(away) > 3 and set(away) == {2.0}
    assert {one.moved_bytes for one in log if not 1.0 <= one.moment_s < 4.1} == {3.0}
    back = next(at_s for at_s, state in work.running.replicas[1].log[1:] if state is State.UP)
    assert back == pytest.approx(4.01)


def test_who_starts_gets_its_weights_where_they_belong_then() -> None:
    scaled = rule(min=1, target=6.0, interval_s=0.3, cooldown_down_s=0.5)
    work = Told(config=BUSY, rules=(scaled,), every_s=(0.3, 0.41)).build()
    running, changing = work.running, work.changing
    assert running is not None and changing is not None
    there: dict[int, int] = {}

    def look(number: int) -> None:
        there[number] = sum(one.equipped for one in running.replicas)

    for number in range(1, 30):
        work.front.at(number * 0.41, partial(look, number))
    assert all(record.ok for record in work.play(crowd(3)))
    found = {round(one.moment_s / 0.41): one.moved_bytes for one in changing.log if one.moment_s < 12}
    assert len(found) > 10 and set(found.values()) == {1.0, 2.0, 3.0}
    assert found == {number: there[number] for number in found}


def test_with_nobody_there_nothing_moves_and_the_run_ends() -> None:
    out = script(OutageSpec(at_s=0.5, node=0), OutageSpec(at_s=0.5, node=1), OutageSpec(at_s=0.5, node=2))
    _, records, _, log, _ = events(Told(config=BUSY, failures=out), crowd(3))
    whole(records, crowd(3))
    assert not any(record.ok for record in records if record.arrival_s > 0.5)
    assert all(one.moment_s < 0.6 for one in log)


def played(folder: Path, more: str, tables: str) -> Played:
    path = folder / "fleet.toml"
    path.write_text(FLEET.format(skew=0.6, more=more).replace("replicas = 1", "replicas = 2") + tables)
    _, fleet = read_fleet(path, isl=2000, osl=200)
    return fleet.play(LOAD, LeastLoad(), chip=fleet.question.chip.at())


AWAY = '\n[failures]\n[[failures.event]]\nat_s = 3.0\ninstance = "mixed-1"\nfor_s = 3.0\n'
SCALED = """
[autoscale]
target = 40
min = 1
weights = "host"
interval_s = 1.0
engine_start = { s = 1.0, kind = "assumed", source = "this test" }
"""


@pytest.mark.parametrize("share", ["", SHARE])
def test_a_fleet_file_says_all_of_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: str
) -> None:
    everything = AWAY + SCALED + "\n[migration]\n"
    stale = played(tmp_path, DRIFT, everything)
    moved = played(tmp_path, DRIFT + WINDOW + share, everything)
    assert moved.kept is not None and moved.kept.failures == 1 and moved.moves is not None
    assert moved.report.succeeded == stale.report.succeeded == len(LOAD)
    assert moved.report.tpot_s is not None and stale.report.tpot_s is not None
    assert moved.report.tpot_s.mean < stale.report.tpot_s.mean
    each = {round(one.moved_bytes / one.experts) for one in moved.rebalanced or ()}
    # An expert on the one replica that is there, or on both.
    assert len(each) == 2 and max(each) == pytest.approx(2 * min(each), abs=2)
    monkeypatch.setattr(fleets, "LeapingExecutor", SimulatedExecutor)
    stepped = played(tmp_path, DRIFT + WINDOW + share, everything)
    assert (stepped.report, stepped.rebalanced, stepped.kept, stepped.moves) == (
        moved.report,
        moved.rebalanced,
        moved.kept,
        moved.moves,
    )
