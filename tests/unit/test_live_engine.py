from __future__ import annotations

import itertools
import threading
import time
from collections import defaultdict

import pytest

from tongyun.cloud.engine.clock import WallClock
from tongyun.cloud.engine.live import LiveEngine
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.protocol import StepResult, TokenEvent
from tongyun.cloud.engine.simulated import SimulatedExecutor, StepLoad
from tongyun.cloud.sched.request import Batch, Finish, Request
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig
from tongyun.errors import RequestError, ServiceError
from tongyun.units import Cost, Source

CONFIG = SchedulerConfig(
    blocks=64, block_tokens=4, max_context_tokens=200, max_sequences=8, max_step_tokens=64
)


class Reader:
    """Collects events and lets a test wait for the end of a request."""

    def __init__(self) -> None:
        self.events: dict[str, list[TokenEvent]] = defaultdict(list)
        self.calls = 0
        self._ended = threading.Condition()

    def __call__(self, events) -> None:
        with self._ended:
            self.calls += 1
            for event in events:
                self.events[event.request_id].append(event)
            self._ended.notify_all()

    def wait(self, request_id: str, finish: Finish) -> list[TokenEvent]:
        def done() -> bool:
            return any(e.finish for e in self.events[request_id])

        with self._ended:
            assert self._ended.wait_for(done, 10), f"{request_id} did not end"
            assert self.events[request_id][-1].finish is finish
            return self.events[request_id]


def free_step(load: StepLoad) -> Cost:
    return Cost(seconds=0.0, joules=0.0, sources=frozenset({Source.ASSUMED}))


def slow_step(load: StepLoad) -> Cost:
    return Cost(seconds=0.005, joules=0.0, sources=frozenset({Source.ASSUMED}))


def request(name: str, prompt: int = 5, output: int = 6, **more) -> Request:
    return Request(id=name, prompt=tuple(range(prompt)), output_tokens=output, **more)


@pytest.fixture
def start():
    engines: list[LiveEngine] = []

    def make(step_cost=free_step, executor=None, sink=None, **loop) -> tuple[LiveEngine, Reader]:
        reader = Reader()
        runner = executor or SimulatedExecutor(step_cost)
        engine = LiveEngine(EngineLoop(Scheduler(CONFIG), runner, WallClock(), **loop), sink or reader)
        engines.append(engine)
        return engine, reader

    yield make
    for engine in engines:
        engine.close()


def test_tokens_arrive_in_order_and_blocks_come_back(start):
    engine, reader = start()
    for n in range(20):
        engine.submit(request(f"r{n}", prompt=5 + n))
    for n in range(20):
        events = reader.wait(f"r{n}", Finish.LENGTH)
        assert len(events) == 6 and all(e.token is not None for e in events)
        assert [e.finish for e in events[:-1]] == [None] * 5
    assert engine.drain(5)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    assert stats.output_tokens == 120 and stats.finished == {Finish.LENGTH: 20}
    assert stats.prompt_tokens == sum(5 + n for n in range(20))


def test_one_call_of_the_sink_per_step(start):
    engine, reader = start(slow_step)
    for n in range(8):
        engine.submit(request(f"r{n}", output=20))
    for n in range(8):
        reader.wait(f"r{n}", Finish.LENGTH)
    assert reader.calls <= engine.stats().steps


def test_abort_frees_blocks_and_says_so(start):
    engine, reader = start(slow_step)
    engine.submit(request("long", output=150))
    engine.submit(request("other", output=30))
    while not reader.events["long"]:
        time.sleep(0.001)
    engine.abort("long")
    engine.abort("nobody")
    events = reader.wait("long", Finish.ABORT)
    assert events[-1].token is None and len(events) < 150
    reader.wait("other", Finish.LENGTH)
    assert engine.drain(5) and engine.stats().kv_blocks_used == 0


def test_abort_before_the_first_step(start):
    engine, reader = start(slow_step)
    engine.submit(request("a", output=40))
    engine.submit(request("b"))
    engine.abort("b")
    assert reader.wait("b", Finish.ABORT)[-1].token is None
    reader.wait("a", Finish.LENGTH)


@pytest.mark.parametrize(
    ("prompt", "output", "param"),
    [(0, 1, "prompt"), (5, 0, "max_tokens"), (5, 196, "max_tokens"), (200, 1, "prompt")],
)
def test_impossible_requests_are_refused_at_once(start, prompt, output, param):
    engine, _ = start()
    with pytest.raises(RequestError) as caught:
        engine.submit(request("r", prompt=prompt, output=output))
    assert caught.value.param == param


def test_an_id_in_flight_is_refused(start):
    engine, _ = start(slow_step)
    engine.submit(request("r", output=50))
    with pytest.raises(RequestError, match="in flight"):
        engine.submit(request("r"))


def test_end_of_text_and_stop_tokens_end_a_request(start):
    plain, reader = start()
    plain.submit(request("r"))
    tokens = [e.token for e in reader.wait("r", Finish.LENGTH)]
    assert len(set(tokens)) == len(tokens)

    engine, reader = start(eos_token_ids=frozenset({tokens[2]}))
    engine.submit(request("eos"))
    engine.submit(request("deaf", ignore_eos=True))
    engine.submit(request("stop", stop_token_ids=frozenset({tokens[1]})))
    assert [e.token for e in reader.wait("eos", Finish.STOP)] == tokens[:3]
    assert [e.token for e in reader.wait("deaf", Finish.LENGTH)] == tokens
    assert [e.token for e in reader.wait("stop", Finish.STOP)] == tokens[:2]


class Fragile:
    """Fails on any batch that holds a request called bad."""

    def __init__(self) -> None:
        self._good = SimulatedExecutor(free_step)

    def execute(self, batch: Batch) -> StepResult:
        if any(piece.request.id == "bad" for piece in batch.pieces):
            raise MemoryError("no room")
        return self._good.execute(batch)


class Forgetful:
    def execute(self, batch: Batch) -> StepResult:
        return StepResult(tokens={}, duration_s=0.0)


@pytest.mark.parametrize(
    ("executor", "why"), [(Fragile(), "MemoryError: no room"), (Forgetful(), "KeyError")]
)
def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(start, executor, why):
    engine, reader = start(executor=executor)
    engine.submit(request("bad"))
    assert why in str(reader.wait("bad", Finish.ERROR)[-1].error)
    if isinstance(executor, Fragile):
        engine.submit(request("good"))
        reader.wait("good", Finish.LENGTH)
    assert engine.drain(5) and engine.stats().kv_blocks_used == 0


def test_a_broken_loop_tells_everybody_and_refuses_more(start):
    class Stopped(WallClock):
        def wait_until(self, moment_s: float) -> None:
            raise OSError("clock is gone")

    reader = Reader()
    engine = LiveEngine(EngineLoop(Scheduler(CONFIG), SimulatedExecutor(free_step), Stopped()), reader)
    engine.submit(request("r"))
    assert "clock is gone" in str(reader.wait("r", Finish.ERROR)[-1].error)
    with pytest.raises(ServiceError, match="stopped"):
        engine.submit(request("s"))
    assert engine.drain(1)
    engine.close()


def test_a_sink_that_fails_stops_nobody(start):
    seen = []

    def sink(events) -> None:
        seen.extend(events)
        raise RuntimeError("event loop is closed")

    engine, _ = start(sink=sink)
    engine.submit(request("r"))
    assert engine.drain(5)
    assert seen[-1].finish is Finish.LENGTH


def test_draining_refuses_new_work_and_finishes_the_old(start):
    engine, reader = start(slow_step)
    engine.submit(request("r", output=40))
    assert not engine.drain(0.01)
    with pytest.raises(ServiceError, match="shutting down"):
        engine.submit(request("s"))
    assert engine.drain(10)
    reader.wait("r", Finish.LENGTH)


def test_close_aborts_what_is_left(start):
    engine, reader = start(slow_step)
    engine.submit(request("r", output=190))
    engine.close()
    reader.wait("r", Finish.ABORT)
    assert engine.stats().kv_blocks_used == 0
    engine.close()


def test_an_idle_engine_burns_no_cpu(start):
    engine, reader = start()
    engine.submit(request("r"))
    reader.wait("r", Finish.LENGTH)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


def test_a_priced_step_on_a_wall_clock_takes_its_time(start):
    engine, reader = start(slow_step)
    engine.submit(request("r", output=10))
    moments = [e.moment_s for e in reader.wait("r", Finish.LENGTH)]
    assert all(b - a >= 0.005 for a, b in itertools.pairwise(moments))
