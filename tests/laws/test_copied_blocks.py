"""What lies at the target was copied from blocks that held it then into blocks that hold it now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.laws.test_migration import TIGHT, configs, engines, loads, policies

from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.simulated import LeapingExecutor, SimulatedExecutor
from tongyun.cloud.front import Front
from tongyun.cloud.migration import Move, Mover, _Flight
from tongyun.cloud.sched.blocks import BlockPool
from tongyun.cloud.sched.freeness import Load
from tongyun.cloud.sched.migrate import MigrationPolicy
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.router import Router, find_router
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig

Place = tuple[int, int]
"""A block, and which time of its being taken this is: what was written before is not in it."""


class Stamped:
    """A pool that counts how often each block was taken."""

    def __init__(self, pool: BlockPool) -> None:
        self.times = [0] * pool.total
        self._take = pool.take
        pool.take = self.take  # type: ignore[method-assign]

    def take(self, count: int) -> list[int]:
        blocks = self._take(count)
        for block in blocks:
            self.times[block] += 1
        return blocks

    def places(self, blocks: Sequence[int]) -> list[Place]:
        return [(block, self.times[block]) for block in blocks]


class Stage(NamedTuple):
    first: int
    past: int
    """Tokens from the first on, up to that one."""
    read: list[Place]
    written: list[Place]


@dataclass
class Seen:
    """What the law has looked at, so that it speaks of what it is about."""

    migrated: int = 0
    overwritten: int = 0
    """Ends of a stage at which the target's blocks had gone to others."""
    reread: int = 0
    """And at which the source's had, and it decoded again."""


class Watched(Mover):
    """Remembers which places every stage reads and writes."""

    def watch(self) -> Seen:
        self.seen = Seen()
        self.stamped = [Stamped(self._scheduler(index).pool) for index in range(len(self._engines))]
        self.stages: dict[str, list[Stage]] = {}
        return self.seen

    def _scheduler(self, index: int) -> Scheduler:
        return self._engines[index].single.scheduler

    def _begin(self, request_id: str, source: int, target: int) -> _Flight:
        self.stages[request_id] = []
        return super()._begin(request_id, source, target)

    def _source(self, flight: _Flight) -> list[Place]:
        return self.stamped[flight.source].places(self._scheduler(flight.source).held(flight.request_id))

    def _target(self, flight: _Flight) -> list[Place]:
        return self.stamped[flight.target].places(self._scheduler(flight.target).reserved(flight.request_id))

    def _copy(self, flight: _Flight, computed: int, from_s: float) -> None:
        stage = Stage(flight.copied, computed, self._source(flight), self._target(flight))
        self.stages[flight.request_id].append(stage)
        super()._copy(flight, computed, from_s)

    def _copied(self, flight: _Flight, now_s: float) -> None:
        if self._under_way(flight):
            one = self._scheduler(flight.source).movable(flight.request_id)
            self.seen.overwritten += not self._target(flight)
            if one is not None and one.decoding:
                read = self.stages[flight.request_id][-1].read
                if self._source(flight)[: len(read)] != read:
                    self.seen.reread += 1
                    # It read what others had written meanwhile.
                    self.stages[flight.request_id].pop()
        super()._copied(flight, now_s)

    def _depart(self, flight: _Flight, missing: int, now_s: float) -> None:
        written = self._target(flight)
        self.stages[flight.request_id].append(Stage(flight.copied - missing, flight.copied, [], written))
        super()._depart(flight, missing, now_s)

    def _land(self, flight: _Flight, now_s: float) -> None:
        moves = len(self.log)
        super()._land(flight, now_s)
        if len(self.log) > moves and self.log[moves].outcome == "migrated":
            self.seen.migrated += 1
            self._check(flight.request_id, flight.target)

    def _check(self, request_id: str, target: int) -> None:
        """Every token that is computed lies where a stage has written it."""
        scheduler = self._scheduler(target)
        seq = scheduler._sequences[request_id]
        places = self.stamped[target].places(seq.blocks)
        size = scheduler.config.block_tokens
        for token in range(seq.computed):
            index = token // size
            assert any(
                stage.first <= token < stage.past and stage.written[index] == places[index]
                for stage in self.stages[request_id]
            ), f"token {token} of {request_id} was never copied to where it should be"


def play(
    load: Sequence[Request],
    loops: Sequence[EngineLoop],
    router: Router,
    policy: MigrationPolicy,
    copy_s: Callable[[int], float],
) -> tuple[Seen, list[Move]]:
    front = Front(loops, router)
    mover = Watched(front, policy, copy_s)
    seen = mover.watch()
    for one in load:
        front.send(one)
    front.advance(float("inf"))
    return seen, mover.log


@settings(max_examples=80, deadline=None)
@given(loads(), configs, policies, st.sampled_from([1.0, 5.0, 30.0]))
def test_what_decodes_at_the_target_was_copied_to_where_it_lies(
    load: list[Request], config: SchedulerConfig, policy: MigrationPolicy, slow: float
) -> None:
    def copy_s(tokens: int) -> float:
        return 0.004 + tokens * 0.0007 * slow

    runs = [
        play(load, engines(config, kind), find_router("round-robin"), policy, copy_s)
        for kind in (LeapingExecutor, SimulatedExecutor)
    ]
    assert runs[0] == runs[1]


class Named:
    """Every request to the engine that its name begins with."""

    def choose(self, request: Request, loads: Sequence[Load]) -> int:
        return int(request.id[0])


ROOMY = replace(TIGHT, max_context_tokens=240, prefix_caching=False)
ANY = MigrationPolicy(interval_s=0.05, below_steps=190, above_steps=100, stages=1, last_tokens=1)


def request(name: str, prompt: int, output: int, arrival_s: float = 0.0) -> Request:
    first = 1000 * ord(name[1])
    return Request(
        id=name, prompt=tuple(range(first, first + prompt)), output_tokens=output, arrival_s=arrival_s
    )


def slowly(tokens: int) -> float:
    return 0.12 * min(tokens, 30)


@pytest.mark.parametrize("kind", [LeapingExecutor, SimulatedExecutor])
def test_a_copy_whose_place_was_given_away_counts_for_nothing(
    kind: type[SimulatedExecutor],
) -> None:
    """The target fills up and empties again while the request's first tokens are under way."""
    load = [request("0a", 30, 200), request("0b", 40, 40)]
    load += [request(f"1{name}", 40, 30, 0.2) for name in "cdef"]
    seen, log = play(load, engines(ROOMY, kind, 2), Named(), ANY, slowly)
    assert seen.overwritten == 1
    assert next(move for move in log if move.request_id == "0a").outcome == "called off"


@pytest.mark.parametrize("kind", [LeapingExecutor, SimulatedExecutor])
def test_a_copy_of_what_was_given_away_counts_for_nothing(kind: type[SimulatedExecutor]) -> None:
    """The request is preempted and computed again while its first tokens are under way."""
    load = [request("0a", 20, 70), request("0b", 20, 70), request("0c", 18, 120)]
    seen, log = play(load, engines(ROOMY, kind, 2), Named(), ANY, slowly)
    assert seen.reread == 1
    assert log[0].request_id == "0c" and log[0].outcome == "called off"
