"""Requests that move between living engines: whatever ends a move, and whenever, nobody is lost or doubled.

Gateway and engines are the real ones without their threads and processes: the test says whose turn it is,
which end of a line reads what comes next, and who dies. The executor keeps the tokens themselves as keys
and values, and fails where it reads others than the request's.
"""

from __future__ import annotations

import zlib
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tongyun.cloud.engine import apart, carry, live
from tongyun.cloud.engine.clock import VirtualClock
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.protocol import StepResult, TokenEvent
from tongyun.cloud.engine.replicas import Replicas
from tongyun.cloud.sched.freeness import Load
from tongyun.cloud.sched.migrate import MigrationPolicy
from tongyun.cloud.sched.request import Batch, Finish, Request
from tongyun.cloud.sched.router import RoundRobin, Router
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig

BLOCK_TOKENS = 4
EAGER = MigrationPolicy(interval_s=1e6, below_steps=1e9, above_steps=0.0, last_tokens=2)


def spell(known: Sequence[int]) -> int:
    """The token after these."""
    return zlib.crc32(array("q", known).tobytes()) % 1000


class Scribe:
    """An executor whose keys and values are the tokens."""

    def __init__(self, blocks: int) -> None:
        self.cells = np.full((blocks, BLOCK_TOKENS), -1, np.int64)
        self.block_bytes = BLOCK_TOKENS * 8

    def execute(self, batch: Batch) -> StepResult:
        tokens = {}
        for piece in batch.pieces:
            for at in range(piece.start, piece.end):
                self.cells[piece.blocks[at // BLOCK_TOKENS], at % BLOCK_TOKENS] = piece.history[at]
            read = self.cells[list(piece.blocks)].reshape(-1)[: piece.end].tolist()
            assert read == list(piece.history[: piece.end]), f"{piece.request.id} reads what is not its own"
            if piece.samples:
                tokens[piece.request.id] = spell(read)
        return StepResult(tokens=tokens, duration_s=1.0)

    def read_blocks(self, blocks: Sequence[int], out: memoryview) -> None:
        out[:] = self.cells[list(blocks)].tobytes()

    def write_blocks(self, blocks: Sequence[int], contents: memoryview) -> None:
        self.cells[list(blocks)] = np.frombuffer(contents, np.int64).reshape(-1, BLOCK_TOKENS)


class Still:
    """A thread that never runs."""

    def __init__(self, **_: Any) -> None: ...

    def start(self) -> None: ...

    def join(self) -> None: ...


class End:
    """One end of a line, whose words lie in a queue until somebody reads them."""

    def __init__(self) -> None:
        self.said: deque[Any] = deque()
        self.dead = False

    def send(self, item: Any) -> None:
        if self.dead:
            raise BrokenPipeError
        self.said.append(item)


class Skewed:
    """A router that likes the first engines best."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def choose(self, request: Request, loads: Sequence[Load]) -> int:
        return int(self._rng.integers(0, len(loads), 2).min())


class World:
    def __init__(self, config: SchedulerConfig, count: int, router: Router) -> None:
        self.events: dict[str, list[TokenEvent]] = defaultdict(list)
        self.requests: dict[str, Request] = {}
        self.down, self.up = [End() for _ in range(count)], [End() for _ in range(count)]
        self.loops = [
            EngineLoop(Scheduler(config), Scribe(config.blocks), VirtualClock()) for _ in range(count)
        ]
        self._config, self._windows = config, carry.Windows(count, 1)
        self.carriers = [carry.Carrier(loop, self._windows, index) for index, loop in enumerate(self.loops)]
        self.far: dict[int, apart.Attendant] = {}
        self.near: dict[int, apart.Distant] = {}
        self.ended: set[int] = set()
        starts = [partial(self._start, index) for index in range(count)]
        self.gateway = Replicas(starts, router, self._saw, policy=EAGER)

    def _start(self, index: int, sink: live.Sink) -> apart.Distant:
        loop, carrier = self.loops[index], self.carriers[index]
        start = partial(live.LiveEngine, loop, carrier=carrier)
        self.far[index] = apart.Attendant(self.up[index], start)
        standing = live.Standing(loop.room(), 0)
        self.near[index] = apart.Distant(self.down[index], self._config, loop.stats(), standing, sink)
        return self.near[index]

    def _saw(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            self.events[event.request_id].append(event)

    def submit(self, request: Request) -> None:
        self.requests[request.id] = request
        self.gateway.submit(request)

    def kill(self, index: int) -> None:
        """What it has said can still be read; it does nothing more."""
        self.down[index].dead = True
        self.down[index].said.clear()

    def revive(self, index: int) -> None:
        """Start another in the place of one of whose end all are told."""
        self.ended.remove(index)
        self.down[index], self.up[index] = End(), End()
        config = self._config
        self.loops[index] = loop = EngineLoop(Scheduler(config), Scribe(config.blocks), VirtualClock())
        self.carriers[index] = carry.Carrier(loop, self._windows, index)
        self.gateway.put(index, partial(self._start, index))

    @property
    def living(self) -> list[int]:
        return [index for index, end in enumerate(self.down) if not end.dead]

    def possible(self) -> list[Callable[[], None]]:
        """What may happen next: an engine takes its turn, and then words that are read."""
        found: list[Callable[[], None]] = []
        for index, end in enumerate(self.down):
            engine = self.far[index].engine
            if self.up[index].said:
                found.append(partial(self._hear, index))
            elif end.dead and index not in self.ended:
                found.append(partial(self._end, index))
            if not end.dead and end.said:
                found.append(partial(self._read, index))
            if not end.dead and (engine._inbox or self.loops[index].has_work):
                found.insert(0, engine._turn)
        return found

    def _hear(self, index: int) -> None:
        self.near[index]._hear(self.up[index].said.popleft())

    def _read(self, index: int) -> None:
        self.far[index].give(self.down[index].said.popleft())

    def _end(self, index: int) -> None:
        self.ended.add(index)
        self.near[index]._ended()

    def settle(self) -> None:
        """Let everything happen in turn until nothing is left to do."""
        for _ in range(4000):
            actions = self.possible()
            if not actions:
                return
            for action in actions:
                action()
            self.check()
        raise AssertionError("it never ends")

    def check(self) -> None:
        """Blocks are held by whom they should be, and a request is at one engine at most."""
        here: Counter[str] = Counter()
        for index in self.living:
            scheduler, held = self.loops[index].scheduler, Counter[int]()
            here.update(list(scheduler._sequences))
            for seq in scheduler._sequences.values():
                held.update(seq.blocks)
            for blocks in scheduler._residents.reserved.values():
                held.update(blocks)
            pool = scheduler.pool
            assert [pool.holders(b) for b in range(pool.total)] == [held[b] for b in range(pool.total)]
            assert scheduler.running + len(scheduler._residents.reserved) <= scheduler.config.max_sequences
        assert all(count == 1 for count in here.values())

    @property
    def outcomes(self) -> dict[str, int]:
        return dict(self.gateway._mover.stats.outcomes)

    def verdict(self, aborted: set[str], deaths: int) -> None:
        """All has ended as it should, and nothing is kept for anybody."""
        for name, request in self.requests.items():
            known, events = list(request.prompt), self.events[name]
            tokens = [event.token for event in events if event.token is not None]
            for token in tokens:
                assert token == spell(known), f"{name}: token {len(known) - len(request.prompt)}"
                known.append(token)
            assert [event.finish is not None for event in events] == [False] * (len(events) - 1) + [True]
            finish = events[-1].finish
            stops = bool(tokens) and tokens[-1] in request.stop_token_ids
            whole = stops or len(tokens) == request.output_tokens
            assert not set(tokens[:-1]) & request.stop_token_ids
            # Who lost two engines may end with the second.
            assert whole or (name in aborted) or (finish is Finish.ERROR and deaths > 1), (name, events[-1])
        assert not self.gateway._mover._moves and not self.gateway._flights
        for index in self.living:
            scheduler, carrier = self.loops[index].scheduler, self.carriers[index]
            assert scheduler.pool.used == 0 and not scheduler._residents.reserved
            assert not carrier._giving and not carrier._taking
            assert not self.far[index].engine._in_flight and not self.near[index]._in_flight


@pytest.fixture(autouse=True, scope="module")
def still() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "Thread", Still)
        patch.setattr(apart, "Thread", Still)
        # Two blocks of the scribe's a slice.
        patch.setattr(carry, "SLICE_BYTES", 2 * BLOCK_TOKENS * 8)
        yield


def limits(blocks: int = 40, sequences: int = 6, *, caching: bool = True) -> SchedulerConfig:
    return SchedulerConfig(
        blocks=blocks,
        block_tokens=BLOCK_TOKENS,
        max_context_tokens=91,
        max_sequences=sequences,
        max_step_tokens=24,
        prefix_caching=caching,
    )


def some(rng: np.random.Generator, number: int) -> Request:
    """Prompts that begin alike, lengths of all kinds; some may stop early."""
    return Request(
        id=f"r{number}",
        prompt=tuple(range(int(rng.integers(0, 2)) * 500, 999))[: int(rng.integers(1, 40))],
        output_tokens=int(rng.integers(1, 50)),
        priority=int(rng.random() < 0.2),
        stop_token_ids=frozenset(rng.integers(0, 1000, 20).tolist()) if rng.random() < 0.3 else frozenset(),
    )


def play(seed: int, config: SchedulerConfig, count: int = 3, *, revive: bool = False) -> World:
    """A world in which everything happens by chance."""
    rng, world = np.random.default_rng(seed), World(config, count, Skewed(seed))
    aborted: set[str] = set()
    deaths = int(rng.integers(0, count)) if rng.random() < 0.5 else 0
    most, killed = 6 if revive else deaths, 0
    for _ in range(1000):
        dice = rng.random()
        if dice < 0.05:
            if len(world.requests) < 20:
                world.submit(some(rng, len(world.requests)))
        elif dice < 0.052:
            if world.requests:
                aborted.add(name := f"r{int(rng.integers(len(world.requests)))}")
                world.gateway.abort(name)
        elif dice < 0.055:
            if killed < most and len(world.living) > 1:
                killed += 1
                world.kill(int(rng.choice(world.living)))
        elif dice < 0.06 + 0.04 * revive:
            if revive and world.ended:
                world.revive(min(world.ended))
        elif dice < 0.15:
            world.gateway._mover.tick()
        elif actions := world.possible():
            # Words are mostly read before the next turn, as they are where a step takes longer.
            actions[int(rng.integers(0, len(actions), 2).max())]()
        world.check()
    world.settle()
    world.gateway._mover.tick()
    world.settle()
    world.verdict(aborted, killed)
    world.gateway.close()
    return world


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([24, 40]), st.booleans())
def test_no_request_block_or_token_is_lost_or_doubled(seed: int, blocks: int, caching: bool) -> None:
    play(seed, limits(blocks, caching=caching))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([24, 40]))
def test_nor_where_others_take_the_places_of_those_that_ended(seed: int, blocks: int) -> None:
    world = play(seed, limits(blocks), revive=True)
    known = world.gateway.stats()
    assert known.output_tokens >= sum(
        event.token is not None for events in world.events.values() for event in events
    )
    assert [replica.up for replica in known.replicas] == [index in world.living for index in range(3)]


def test_chance_moves_most_kinds_of_requests() -> None:
    seen: Counter[str] = Counter()
    for seed in range(20):
        seen.update(play(seed, limits(24)).outcomes)
    assert min(seen["migrated"], seen["rescheduled"], seen["called off"]) > 5, seen


def nothing(world: World) -> None: ...


def abort(world: World) -> None:
    world.gateway.abort("r")


def crowd(world: World) -> None:
    """Those who run at the target need what was kept for the request."""
    world.loops[1].scheduler.give_up("r")


def fill(world: World) -> None:
    """Others wait at the target, and nothing more is kept for who comes."""
    world.gateway.submit(other := Request(id="w", prompt=tuple(range(60)), output_tokens=30))
    world.requests["w"] = other


@pytest.mark.parametrize(
    ("what", "outcomes"),
    [
        (nothing, {"migrated"}),
        (abort, {"called off", "migrated"}),
        (partial(World.kill, index=0), {"called off", "migrated"}),
        (partial(World.kill, index=1), {"called off", "recomputed", "migrated"}),
        (crowd, {"called off", "recomputed", "migrated"}),
        (fill, {"called off", "recomputed", "migrated"}),
    ],
)
@pytest.mark.parametrize("output", [7, 12, 60])
def test_at_whatever_moment_something_happens(
    what: Callable[[World], None], outcomes: set[str], output: int
) -> None:
    seen = set()
    for moment in range(200):
        world = World(limits(24 if what is fill else 40), 2, RoundRobin())
        world.submit(Request(id="r", prompt=tuple(range(30)), output_tokens=output))
        while len(world.events["r"]) < 4:
            world.possible()[-1]()
        world.gateway._mover._begin(world.gateway._flights["r"].movable, 0, 1)
        happened = False
        for at in range(400):
            if at == moment:
                happened = sum(world.outcomes.values()) == 0
                what(world)
            if not (actions := world.possible()):
                break
            # Words wait for other words, and now and then for a step.
            actions[at % len(actions) if at % 3 == 0 else -1]()
            world.check()
        world.settle()
        world.gateway._mover.tick()
        world.settle()
        world.verdict({"r"} if what is abort else set(), 0)
        world.gateway.close()
        if what is abort and happened and output == 60:
            assert world.events["r"][-1].finish is Finish.ABORT
        seen |= {name for name, count in world.outcomes.items() if count}
        if not happened:
            break
    assert moment > 10 and not happened
    assert (seen == outcomes) if output == 60 else (seen <= outcomes | {"called off"}), (seen, moment)
