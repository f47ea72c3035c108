"""Who has ended or hangs is replaced, at a limited rate; who is only slow or idle is left alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from tongyun.cloud.engine import keeper as module
from tongyun.cloud.engine.keeper import EXITED, HUNG, UNREADY, Keeper, Upkeep
from tongyun.errors import InputError, ServiceError

QUICK = Upkeep(hang_after_s=0.3, first_s=0.01, restarts=3)


@dataclass
class Engine:
    awaited: bool = False
    signs: int = 0
    failure: BaseException | None = None
    told: bool = False
    closed: bool = False

    def outlive(self) -> None:
        assert self.failure is not None
        self.told = True

    def close(self) -> None:
        assert self.told
        self.closed = True


@dataclass
class Process:
    """What becomes of those begun in its place: ready, or what is wrong with them; None: never ready."""

    fates: list[Any] = field(default_factory=list)
    fate: Any = "ready"
    begun: list[Process] = field(default_factory=list)
    engine: Engine = field(default_factory=Engine)
    killed: threading.Event = field(default_factory=threading.Event)
    moment_s: float = field(default_factory=time.monotonic)

    def again(self) -> Process:
        self.begun.append(Process(self.fates, self.fates.pop(0) if self.fates else "ready", self.begun))
        return self.begun[-1]

    def built(self, timeout_s: float) -> bool:
        if self.fate is None:
            time.sleep(timeout_s)
        return self.fate is not None

    def ready(self) -> None:
        if self.fate != "ready":
            raise self.fate

    def connect(self, sink: Any) -> Engine:
        return self.engine

    def kill(self) -> str:
        self.killed.set()
        self.die("killed")
        return "SIGKILL"

    def die(self, why: str) -> None:
        self.engine.failure = self.engine.failure or ServiceError(why)


class Ward:
    """One replica, and who keeps it."""

    def __init__(self, upkeep: Upkeep, fates: list[Any]) -> None:
        self.first = Process(fates)
        self.engines = [self.first.engine]
        self.keeper = Keeper(self, [self.first], upkeep)  # type: ignore[arg-type,list-item]

    def engine(self, index: int) -> Any:
        return self.engines[-1]

    def put(self, index: int, start: Callable[[Any], Any]) -> None:
        assert self.engines[-1].closed, "its end has to be told before another comes"
        self.engines.append(start(None))

    @property
    def counts(self) -> dict[str, int]:
        return dict(self.keeper.restarts[0])


@contextmanager
def ward(upkeep: Upkeep = QUICK, *fates: Any) -> Iterator[Ward]:
    one = Ward(upkeep, list(fates))
    one.keeper.start()
    try:
        yield one
    finally:
        one.keeper.stop(60).cancel()


def until(what: Callable[[], object]) -> None:
    limit = time.monotonic() + 10
    while not what():
        assert time.monotonic() < limit, "it did not come to that"
        time.sleep(0.005)


def test_who_has_ended_is_replaced_and_its_end_told_first(caplog: pytest.LogCaptureFixture) -> None:
    with ward() as one:
        one.first.die("out of memory")
        until(lambda: len(one.engines) == 2)
        assert one.engines[1] is one.first.begun[0].engine and not one.first.begun[0].killed.is_set()
        assert one.counts == {EXITED: 1} and one.keeper.hopeful
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "replica 0 has ended: out of memory (SIGKILL)"
    assert said[1] == "replica 0 is started again in 0.01 s, attempt 1 of 3"
    assert said[2].startswith("replica 0 takes requests again, ")


def test_who_is_silent_with_work_is_killed_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    with ward() as one:
        begun_s = time.monotonic()
        one.first.engine.awaited = True
        until(lambda: one.keeper.doubted(0))
        assert not one.first.killed.is_set()
        until(lambda: len(one.engines) == 2)
        assert time.monotonic() - begun_s > QUICK.hang_after_s
        assert one.first.killed.is_set() and one.counts == {HUNG: 1}
        until(lambda: not one.keeper.doubted(0))
    assert "replica 0 has given no sign of life for 0.3 s: killed" in caplog.text


def test_who_is_idle_or_gives_signs_is_left_alone() -> None:
    with ward() as idle, ward() as busy:
        busy.first.engine.awaited = True
        limit = time.monotonic() + 3 * QUICK.hang_after_s
        while time.monotonic() < limit:
            busy.first.engine.signs += 1
            time.sleep(0.02)
        for one in (idle, busy):
            assert not one.first.killed.is_set() and one.counts == {} and not one.keeper.doubted(0)


def test_who_was_stopped_itself_has_heard_nobody_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead_s = 0.0

    class Jumping:
        @staticmethod
        def monotonic() -> float:
            return time.monotonic() + ahead_s

    monkeypatch.setattr(module, "time", Jumping)
    with ward(Upkeep(hang_after_s=5)) as one:
        one.first.engine.awaited = True
        time.sleep(0.3)
        ahead_s = 3600.0
        time.sleep(0.6)
        assert not one.first.killed.is_set() and not one.keeper.doubted(0)


def test_pauses_double_up_to_a_limit() -> None:
    usual = Upkeep()
    assert [usual.pause_s(n) for n in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]


def test_after_so_many_failures_in_a_row_it_stays_away(caplog: pytest.LogCaptureFixture) -> None:
    no_room = InputError("no room for a KV cache: one block takes 9 bytes")
    with ward(Upkeep(first_s=0.05, restarts=3), *[no_room] * 9) as one:
        one.first.die("it broke")
        until(lambda: not one.keeper.hopeful)
        time.sleep(0.1)
        assert len(one.engines) == 1 and len(one.first.begun) == 3
        assert one.counts == {EXITED: 1, UNREADY: 2}
        moments_s = [process.moment_s for process in one.first.begun]
        assert moments_s[1] - moments_s[0] > 0.1 and moments_s[2] - moments_s[1] > 0.2
        assert all(process.killed.is_set() for process in one.first.begun)
    said = [record.getMessage() for record in caplog.records]
    assert "replica 0 did not start: no room for a KV cache: one block takes 9 bytes" in said
    assert said[-1] == "replica 0 is not started again: 3 restarts in a row have failed"


@pytest.mark.parametrize(("settled_s", "lives"), [(0.0, 6), (60.0, 3)])
def test_who_was_ready_for_long_fails_for_the_first_time(settled_s: float, lives: int) -> None:
    with ward(Upkeep(first_s=0.01, restarts=3, settled_s=settled_s)) as one:
        for number in range(lives):
            until(lambda number=number: len(one.engines) == number + 1)
            (one.first.begun[-1] if number else one.first).die("again")
        if settled_s:
            until(lambda: len(one.engines) == 4)
            one.first.begun[-1].die("again")
            until(lambda: not one.keeper.hopeful)
        else:
            until(lambda: len(one.engines) == lives + 1)
            assert one.keeper.hopeful


def test_a_system_without_room_for_a_process_is_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    with ward() as one:
        begin = one.first.again
        refusals = [BlockingIOError(11, "Resource temporarily unavailable")]

        def again() -> Process:
            if refusals:
                raise refusals.pop()
            return begin()

        one.first.again = again  # type: ignore[method-assign]
        one.first.die("it broke")
        until(lambda: len(one.engines) == 2)
        assert one.counts == {EXITED: 1, UNREADY: 1}
    assert "replica 0 did not start: [Errno 11] Resource temporarily unavailable" in caplog.text


def test_a_start_that_takes_too_long_is_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    with ward(Upkeep(first_s=0.01, start_s=0.15), None) as one:
        one.first.die("it broke")
        until(lambda: len(one.engines) == 2)
        assert one.first.begun[0].killed.is_set() and one.counts == {EXITED: 1, UNREADY: 1}
    assert "replica 0 did not start: not ready after 0.15 s" in caplog.text


@pytest.mark.parametrize("fate", [None, "ready"])
def test_the_end_of_all_ends_a_pause_and_a_start(fate: Any) -> None:
    with ward(Upkeep(first_s=0.01 if fate is None else 60.0), fate) as one:
        one.first.die("it broke")
        until(lambda: one.first.begun if fate is None else one.engines[0].closed)
        begun_s = time.monotonic()
    assert time.monotonic() - begun_s < 2 and len(one.engines) == 1
    assert all(process.killed.is_set() for process in one.first.begun)


def test_who_does_not_end_with_all_is_killed() -> None:
    with ward() as one:
        timer = one.keeper.stop(0.05)
        assert one.first.killed.wait(5)
        timer.join()
