"""Several engines as one: the simulation's routers choose, and the end of one ends no request."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

import pytest
from test_engine_apart import CONFIG, Reader, Slow, build, request

from tongyun.cloud.engine.apart import Distant, attend
from tongyun.cloud.engine.keeper import EXITED, HUNG, Keeper, Upkeep
from tongyun.cloud.engine.live import LiveEngine, Sink, Standing
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.replicas import Replicas
from tongyun.cloud.sched.freeness import Load
from tongyun.cloud.sched.request import Finish, Request
from tongyun.cloud.sched.router import find_router
from tongyun.errors import RequestError, ServiceError


class Farm:
    """Replicas whose far ends are threads of this process; `cut` is what the death of one looks like."""

    def __init__(self, count: int, router: str, seconds: float, upkeep: Upkeep | None = None) -> None:
        self.reader, self.sent = Reader(), [0] * count
        self._far: list[threading.Thread] = []
        self._there: list[Connection] = []
        self.near: list[Distant] = []
        self.loops = [build(seconds) for _ in range(count)]
        self.seen: list[Sequence[Load]] = []
        self._policy = find_router(router)

        starts = [partial(self._start, loop) for loop in self.loops]
        # As many fates as replicas at first; then those that are begun in their places.
        self.fates: list[EngineLoop] = []
        keep = None
        if upkeep is not None:
            processes = [Fake(self, index, None) for index in range(count)]
            keep = partial(Keeper, processes=processes, upkeep=upkeep)
        self._beat_s = None if upkeep is None else upkeep.beat_s
        self.engine = Replicas(starts, self, self.reader, keep=keep)

    def choose(self, one: Request, loads: Sequence[Load]) -> int:
        """The router that is tried, with a note of what it saw and said."""
        self.seen.append([load._replace(room=load.room()) for load in loads])
        chosen = self._policy.choose(one, loads)
        self.sent[loads[chosen].engine] += 1
        return chosen

    def _start(self, loop, sink: Sink) -> Distant:
        here, there = multiprocessing.Pipe()
        self._there.append(there)
        far = threading.Thread(target=attend, args=(there, partial(LiveEngine, loop), self._beat_s))
        far.start()
        self._far.append(far)
        self.near.append(Distant(here, CONFIG, loop.stats(), Standing(loop.room(), 0), sink))
        return self.near[-1]

    def cut(self, index: int) -> None:
        """End the line, as the operating system does with what a dead process had open."""
        with socket.socket(fileno=os.dup(self._there[index].fileno())) as other:
            other.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.engine.close()
        for far in self._far:
            far.join(10)
            assert not far.is_alive()


@dataclass
class Fake:
    """A process that is a thread; another in its place is the farm's next loop."""

    farm: Farm
    line: int
    loop: EngineLoop | None

    def again(self) -> Fake:
        return Fake(self.farm, len(self.farm.near), self.farm.fates.pop(0))

    def built(self, timeout_s: float) -> bool:
        return True

    def ready(self) -> None: ...

    def connect(self, sink: Sink) -> Distant:
        assert self.loop is not None
        self.line = len(self.farm.near)
        return self.farm._start(self.loop, sink)

    def kill(self) -> str:
        with suppress(OSError):
            self.farm.cut(self.line)
        return "SIGKILL"


@contextmanager
def farm(
    count: int = 2, router: str = "round-robin", seconds: float = 0.0, upkeep: Upkeep | None = None
) -> Iterator[Farm]:
    one = Farm(count, router, seconds, upkeep)
    yield one
    one.close()


def test_requests_are_shared_out_in_turn_and_counted_together() -> None:
    with farm(3) as one:
        for n in range(12):
            one.engine.submit(request(f"r{n}"))
        for n in range(12):
            assert [event.finish for event in one.reader.wait(f"r{n}")] == [None] * 5 + [Finish.LENGTH]
        assert one.sent == [4, 4, 4]
        stats = one.engine.stats()
        assert stats.finished == {Finish.LENGTH: 12} and stats.output_tokens == 72
        assert stats.kv_blocks_total == 3 * CONFIG.blocks and stats.kv_blocks_used == 0


def test_the_least_loaded_is_asked_by_what_is_in_flight_now() -> None:
    with farm(2, "least-load", 0.01) as one:
        one.engine.submit(request("long", prompt=20, output=150))
        one.engine.submit(request("short", prompt=8, output=2))
        one.reader.wait("short")
        one.engine.submit(request("next", prompt=8, output=20))
        assert one.sent == [1, 2]
        one.engine.abort("long")
        assert one.reader.wait("long")[-1].finish is Finish.ABORT
        one.reader.wait("next")
    assert [[load[:2] for load in loads] for loads in one.seen[:2]] == [[(0, 0), (0, 0)], [(1, 20), (0, 0)]]
    assert one.seen[2][1][:2] == (0, 0)


def test_what_was_sent_since_the_latest_report_counts_as_waiting() -> None:
    with farm(1, seconds=0.05) as one:
        for n in range(3):
            one.engine.submit(request(f"r{n}", prompt=9, output=2))
        rooms = [loads[0].room for loads in one.seen]
        assert [room.waiting for room in rooms] == [0, 1, 2]
        assert [room.waiting_blocks for room in rooms] == [0, 3, 6]
        assert [room.head_blocks for room in rooms] == [0, 3, 3]
        for n in range(3):
            one.reader.wait(f"r{n}")
        one.engine.submit(request("last"))
        assert one.seen[-1][0].room.waiting == 0
        one.reader.wait("last")


def test_the_end_of_one_ends_no_request() -> None:
    with farm(2, seconds=0.01) as one:
        for n in range(4):
            one.engine.submit(request(f"r{n}", output=60))
        one.reader.wait("r0", tokens=10)
        one.cut(0)
        for n in range(4):
            events = one.reader.wait(f"r{n}")
            assert [event.finish for event in events] == [None] * 59 + [Finish.LENGTH]
        assert one.engine.failure is None and one.near[0].failure is not None
        one.engine.submit(request("later"))
        one.reader.wait("later")
        assert one.sent == [2, 5]
        stats = one.engine.stats()
        assert stats.running == stats.kv_blocks_used == 0 and stats.kv_blocks_total == CONFIG.blocks


def test_with_the_last_one_requests_end_and_are_refused() -> None:
    with farm(2, seconds=0.01) as one:
        one.engine.submit(request("r", output=150))
        one.reader.wait("r", tokens=1)
        one.cut(0)
        limit = time.monotonic() + 10
        while one.sent[1] == 0 and time.monotonic() < limit:
            time.sleep(0.005)
        one.cut(1)
        assert one.reader.wait("r")[-1].finish is Finish.ERROR
        assert "process ended" in str(one.engine.failure)
        with pytest.raises(ServiceError, match="the engine has stopped"):
            one.engine.submit(request("s"))


def test_a_request_is_not_carried_on_for_ever() -> None:
    with farm(3, seconds=0.01) as one:
        one.engine.submit(request("poison", output=150))
        one.reader.wait("poison", tokens=1)
        one.cut(0)
        one.reader.wait("poison", tokens=20)
        second = one.sent.index(1, 1)
        one.cut(second)
        assert one.reader.wait("poison")[-1].finish is Finish.ERROR
        assert sum(one.sent) == 2 and one.engine.failure is None


QUICK = Upkeep(hang_after_s=0.4, first_s=0.2)


def up(one: Farm) -> list[bool]:
    return [replica.up for replica in one.engine.stats().replicas]


def until(what: Callable[[], object]) -> None:
    limit = time.monotonic() + 10
    while not what():
        assert time.monotonic() < limit, "it did not come to that"
        time.sleep(0.005)


def test_another_takes_the_place_of_one_that_ended_and_counters_go_on() -> None:
    with farm(2, seconds=0.01, upkeep=QUICK) as one:
        one.fates = [build(0.01)]
        for n in range(4):
            one.engine.submit(request(f"r{n}", output=60))
        one.reader.wait("r0", tokens=10)
        before = one.engine.stats()
        one.cut(0)
        until(lambda: up(one) == [False, True])
        assert one.engine.stats().output_tokens >= before.output_tokens
        until(lambda: up(one) == [True, True])
        for n in range(4):
            events = one.reader.wait(f"r{n}")
            assert [event.finish for event in events] == [None] * 59 + [Finish.LENGTH]
        for n in range(4):
            one.engine.submit(request(f"s{n}"))
            one.reader.wait(f"s{n}")
        # Both of those that lost their engine went to the other; then it is turns again.
        assert one.sent == [4, 6]
        stats = one.engine.stats()
        assert stats.kv_blocks_total == 2 * CONFIG.blocks and stats.kv_blocks_used == 0
        assert stats.finished == {Finish.LENGTH: 8}
        assert [replica.restarts for replica in stats.replicas] == [{EXITED: 1}, {}]


def test_what_a_hung_engine_had_goes_on_elsewhere_and_new_requests_avoid_it_before() -> None:
    freed = threading.Event()
    with farm(2, seconds=0.001, upkeep=QUICK) as one:
        one.loops[0]._executor, one.fates = Slow(1, freed), [build()]
        # Long prompts that take long steps are no reason: these give signs.
        one.loops[1]._executor = Slow(30)
        one.engine.submit(request("hung"))
        one.engine.submit(request("slow", output=2))
        until(lambda: one.engine._keeper.doubted(0))
        one.engine.submit(request("new", output=1))
        one.engine.submit(request("newer", output=1))
        assert one.sent == [1, 3] and up(one) == [True, True]
        for name, tokens in (("hung", 6), ("slow", 2), ("new", 1), ("newer", 1)):
            assert [event.token is None for event in one.reader.wait(name)] == [False] * tokens
        until(lambda: one.engine.stats().replicas[0].restarts == {HUNG: 1} and up(one) == [True, True])
        assert one.engine.stats().replicas[1].restarts == {}
        freed.set()


def test_with_all_gone_requests_end_until_one_is_back() -> None:
    with farm(1, upkeep=QUICK, seconds=0.01) as one:
        one.fates = [build()]
        one.engine.submit(request("r", output=150))
        one.reader.wait("r", tokens=1)
        one.cut(0)
        assert one.reader.wait("r")[-1].finish is Finish.ERROR
        assert up(one) == [False] and one.engine.failure is None
        with pytest.raises(ServiceError, match="no replica is up"):
            one.engine.submit(request("s"))
        until(lambda: up(one) == [True])
        one.engine.submit(request("s"))
        assert len(one.reader.wait("s")) == 6


def test_with_all_given_up_the_engine_has_failed() -> None:
    with farm(1, upkeep=Upkeep(restarts=0)) as one:
        one.cut(0)
        until(lambda: up(one) == [False])
        assert "process ended" in str(one.engine.failure)
        with pytest.raises(ServiceError, match="the engine has stopped"):
            one.engine.submit(request("s"))


def test_what_can_never_run_is_refused_and_leaves_no_trace() -> None:
    with farm(2) as one:
        with pytest.raises(RequestError, match="the context holds at most 200"):
            one.engine.submit(request("long", prompt=190, output=20))
        one.engine.submit(request("r", output=150))
        with pytest.raises(RequestError, match="already in flight"):
            one.engine.submit(request("r"))
        one.reader.wait("r")
        one.engine.submit(request("long", prompt=50))
        one.reader.wait("long")
        assert one.seen[-1][0][:2] == one.seen[-1][1][:2] == (0, 0)
