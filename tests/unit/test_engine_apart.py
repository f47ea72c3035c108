"""An engine in another process: the same events, and nobody left waiting whatever ends it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial

import pytest

from tongyun.cloud.engine.apart import Distant, attend
from tongyun.cloud.engine.clock import WallClock
from tongyun.cloud.engine.cores import aside
from tongyun.cloud.engine.live import LiveEngine, Standing
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.process import EngineProcess, Outbox, told
from tongyun.cloud.engine.protocol import TokenEvent
from tongyun.cloud.engine.simulated import SimulatedExecutor, StepLoad
from tongyun.cloud.sched.request import Finish, Request
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig
from tongyun.errors import InputError, RequestError, ServiceError
from tongyun.units import Cost, Source

CONFIG = SchedulerConfig(
    blocks=64, block_tokens=4, max_context_tokens=200, max_sequences=8, max_step_tokens=64
)


class Reader:
    def __init__(self) -> None:
        self.events: dict[str, list[TokenEvent]] = defaultdict(list)
        self._changed = threading.Condition()

    def __call__(self, events) -> None:
        with self._changed:
            for event in events:
                self.events[event.request_id].append(event)
            self._changed.notify_all()

    def wait(self, request_id: str, tokens: int | None = None) -> list[TokenEvent]:
        """Events of a request once it has ended, or has produced so many tokens."""

        def done() -> bool:
            events = self.events[request_id]
            return len(events) >= tokens if tokens else any(event.finish for event in events)

        with self._changed:
            assert self._changed.wait_for(done, 20), f"{request_id}: {self.events[request_id]}"
            return self.events[request_id]


class Stopped(WallClock):
    def wait_until(self, moment_s: float) -> None:
        raise OSError("clock is gone")


def cost(load: StepLoad, seconds: float) -> Cost:
    return Cost(seconds=seconds, joules=0.0, sources=frozenset({Source.ASSUMED}))


def build(seconds: float = 0.0, clock: type[WallClock] = WallClock) -> EngineLoop:
    return EngineLoop(Scheduler(CONFIG), SimulatedExecutor(partial(cost, seconds=seconds)), clock())


def refuse() -> EngineLoop:
    raise InputError("--context 7: accepted: 2 … 5")


def die() -> EngineLoop:
    os._exit(3)


def request(name: str, prompt: int = 5, output: int = 6, **more) -> Request:
    return Request(id=name, prompt=tuple(range(prompt)), output_tokens=output, **more)


@pytest.fixture
def near() -> Iterator[tuple[Distant, Reader]]:
    """A line whose far end is a thread of this process."""
    yield from connected(build())


def connected(loop: EngineLoop, beat_s: float | None = None) -> Iterator[tuple[Distant, Reader]]:
    here, there = multiprocessing.Pipe()
    far = threading.Thread(target=attend, args=(there, partial(LiveEngine, loop), beat_s))
    far.start()
    reader = Reader()
    engine = Distant(here, CONFIG, loop.stats(), Standing(loop.room(), 0), reader)
    yield engine, reader
    engine.close()
    far.join(10)
    assert not far.is_alive()


def test_tokens_arrive_in_order_and_the_state_with_them(near) -> None:
    engine, reader = near
    for n in range(12):
        engine.submit(request(f"r{n}"))
    for n in range(12):
        events = reader.wait(f"r{n}")
        assert [event.finish for event in events] == [None] * 5 + [Finish.LENGTH]
        moments = [event.moment_s for event in events]
        assert moments == sorted(moments)
    stats = engine.stats()
    assert stats.output_tokens == 72 and stats.kv_blocks_used == 0 and stats.finished == {Finish.LENGTH: 12}


def test_what_can_never_run_is_refused_at_once(near) -> None:
    engine, reader = near
    with pytest.raises(RequestError, match="the context holds at most 200"):
        engine.submit(request("long", prompt=190, output=20))
    engine.submit(request("once", output=150))
    with pytest.raises(RequestError, match="already in flight"):
        engine.submit(request("once"))
    assert reader.wait("once")[-1].finish is Finish.LENGTH
    engine.submit(request("once"))


def test_an_abort_ends_a_request_and_an_unknown_one_nothing() -> None:
    for engine, reader in connected(build(0.01)):
        engine.abort("nobody")
        engine.submit(request("r", output=150))
        reader.wait("r", tokens=2)
        engine.abort("r")
        assert reader.wait("r")[-1].finish is Finish.ABORT
        assert engine.stats().kv_blocks_used == 0


def test_closing_aborts_what_runs_and_refuses_more() -> None:
    for engine, reader in connected(build(0.01)):
        engine.submit(request("r", output=150))
        reader.wait("r", tokens=1)
        engine.close()
        assert reader.events["r"][-1].finish is Finish.ABORT
        with pytest.raises(ServiceError, match="shutting down"):
            engine.submit(request("s"))
        assert engine.failure is None


def test_a_broken_loop_is_told_across_the_line() -> None:
    for engine, reader in connected(build(clock=Stopped)):
        engine.submit(request("r"))
        assert "clock is gone" in str(reader.wait("r")[-1].error)
        with pytest.raises(ServiceError, match="clock is gone"):
            engine.submit(request("s"))


def test_a_process_serves_and_ends_with_its_gateway() -> None:
    process, reader = EngineProcess(build), Reader()
    assert process.ready() == CONFIG
    engine = process.connect(reader)
    engine.submit(request("r"))
    assert len(reader.wait("r")) == 6
    engine.close()
    assert process.ended(10)


def test_a_process_that_is_killed_leaves_nobody_waiting() -> None:
    process, reader = EngineProcess(partial(build, 0.01)), Reader()
    process.ready()
    engine = process.connect(reader)
    engine.submit(request("r", output=150))
    reader.wait("r", tokens=1)
    os.kill(process.pid, signal.SIGKILL)
    assert reader.wait("r")[-1].finish is Finish.ERROR
    assert "process ended" in str(engine.failure)
    with pytest.raises(ServiceError, match="the engine has stopped"):
        engine.submit(request("s"))
    engine.close()
    assert process.ended(10)


def small(limits: SchedulerConfig) -> partial[EngineLoop]:
    assert limits == CONFIG
    return partial(build, 0.0)


def test_a_stopped_process_is_killed_and_another_takes_its_place_on_its_cores() -> None:
    process, reader = EngineProcess(partial(build, 0.01), beat_s=0.05, like=small), Reader()
    process.ready()
    engine = process.connect(reader)
    engine.submit(request("r", output=150))
    reader.wait("r", tokens=1)
    os.kill(process.pid, signal.SIGSTOP)
    # More than the line holds: nobody waits to be heard.
    for n in range(40):
        engine.submit(request(f"more{n}", prompt=100, sampling="x" * 10_000))
    signs = engine.signs
    time.sleep(0.3)
    assert engine.signs <= signs + 5 and engine.awaited
    assert process.kill() == "SIGKILL"
    engine.outlive()
    assert reader.wait("more39")[-1].finish is Finish.ERROR and not engine.awaited
    with aside():
        begun_s = time.monotonic()
        other = process.again()
        assert os.sched_getaffinity(0) != os.sched_getaffinity(other.pid) == process._cores
    while not other.built(0.1):
        assert time.monotonic() - begun_s < 30
    other.ready()
    again = other.connect(reader)
    again.submit(request("s"))
    assert len(reader.wait("s")) == 6
    again.close()
    engine.close()
    assert other.ended(10)


class Slow(SimulatedExecutor):
    """One step that takes many seconds, with layers that are seen to begin; or that hangs in one."""

    layers = 0

    def __init__(self, layers: int, hung: threading.Event | None = None) -> None:
        super().__init__(partial(cost, seconds=0.0))
        self._most, self._hung = layers, hung

    def execute(self, batch):
        for _ in range(self._most):
            self.layers += 1
            time.sleep(0.02)
        if self._hung is not None:
            self._hung.wait(20)
        return super().execute(batch)


@pytest.mark.parametrize("hangs", [False, True])
def test_signs_of_life_come_with_every_layer_and_not_from_one_that_hangs(hangs: bool) -> None:
    freed = threading.Event()
    loop = EngineLoop(Scheduler(CONFIG), Slow(50, freed if hangs else None), WallClock())
    for engine, reader in connected(loop, beat_s=0.05):
        engine.submit(request("r", output=1))
        time.sleep(0.5)
        # Twenty layers into the only step.
        assert engine.signs >= 3 and not reader.events["r"]
        time.sleep(0.9)
        signs = engine.signs
        time.sleep(0.3)
        if hangs:
            assert engine.awaited and engine.signs == signs
            freed.set()
        reader.wait("r")
        assert not engine.awaited
        time.sleep(0.1)
        signs = engine.signs
        time.sleep(0.3)
        assert engine.signs == signs, "who is idle is quiet"


def test_words_that_find_no_room_are_said_later_and_in_turn() -> None:
    here, there = multiprocessing.Pipe()
    outbox = Outbox(here)
    said = [("small", 0), ("large", "x" * 100_000)] + [(n, "y" * (5_000 * n)) for n in range(20)] + ["last"]
    for item in said:
        outbox.send(item)
    heard = [there.recv() for _ in said]
    assert heard == said
    before, limit = outbox._put, time.monotonic() + 10
    while outbox._said < before:
        assert time.monotonic() < limit
        time.sleep(0.001)
    outbox.send("at once")
    assert outbox._put == before > 2 and there.recv() == "at once"
    there.close()
    with pytest.raises(BrokenPipeError):
        outbox.send("too late")
    outbox.send(None)


def test_how_a_process_ended_is_told_in_words() -> None:
    assert [told(code) for code in (3, -9, -11, -77)] == ["exit code 3", "SIGKILL", "SIGSEGV", "signal 77"]


def test_what_is_wrong_with_an_engine_is_raised_by_who_waits_for_it() -> None:
    with pytest.raises(InputError, match="--context 7: accepted: 2 … 5"):
        EngineProcess(refuse).ready()
    with pytest.raises(ServiceError, match="ended with 3 before it was ready"):
        EngineProcess(die).ready()
