"""A twin does what the simulation of its arrivals does, in wall time."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from tongyun.cloud.engine.clock import VirtualClock
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.protocol import TokenEvent
from tongyun.cloud.engine.simulated import LeapingExecutor, SimulatedExecutor, StepLoad
from tongyun.cloud.front import Front
from tongyun.cloud.gateway.filler import WORDS, Filler
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.relay import Relay
from tongyun.cloud.sched.request import Finish, Request
from tongyun.cloud.sched.router import LeastLoad, Router
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig
from tongyun.cloud.simulate import play_fleet, play_pools
from tongyun.cloud.twin import Lost, Twin, Watch
from tongyun.codesign.at_work import AtWork
from tongyun.errors import RequestError, ServiceError
from tongyun.units import Cost, Source

CONFIG = SchedulerConfig(
    blocks=200, block_tokens=4, max_context_tokens=120, max_sequences=6, max_step_tokens=48
)
HAND_OVER_S = 0.013


class Price:
    """Steps of some 5 to 15 ms, with every bit in use."""

    def __call__(self, load: StepLoad) -> Cost:
        seconds = 0.005 + 1e-4 * float(load.new_tokens.sum()) / 3 + 1e-5 * float(load.context.sum()) / 7
        return Cost(seconds=seconds, joules=1.0, sources=frozenset({Source.ASSUMED}))

    def mixed(
        self, decoding: int, context_tokens: int, chunks: Sequence[tuple[int, int]], samples: int
    ) -> tuple[float, float]:
        new = decoding + sum(new for new, _ in chunks)
        context = context_tokens + sum(cached for _, cached in chunks)
        return 0.005 + 1e-4 * float(new) / 3 + 1e-5 * float(context) / 7, 1.0

    def decode(self, sequences: int, context_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        seconds = 0.005 + 1e-4 * sequences / 3 + 1e-5 * context_tokens / 7
        return np.stack((seconds, np.ones_like(seconds)))


def loops(count: int, kind: type[SimulatedExecutor] = SimulatedExecutor) -> list[EngineLoop]:
    return [EngineLoop(Scheduler(CONFIG), kind(Price()), VirtualClock()) for _ in range(count)]


def at_work(pools: int, watches: tuple[Watch, Watch]) -> AtWork:
    """Two engines for each pool, and nothing that changes them."""
    front: Front | Relay = Front(loops(2), LeastLoad(), watch=watches[0])
    if pools == 2:
        relayed = loops(2), loops(2)
        front = Relay(relayed, (LeastLoad(), LeastLoad()), lambda _: HAND_OVER_S, watches=watches)
    return AtWork(front=front, running=None, movers=(), changing=None)


def one_engine(engine: EngineLoop, router: Router) -> Callable[[tuple[Watch, Watch], Lost], AtWork]:
    """For a twin of a single engine."""
    return lambda watches, _: AtWork(
        front=Front([engine], router, watch=watches[0]), running=None, movers=(), changing=None
    )


class Reader:
    """What the sink was told, and when the last word came."""

    def __init__(self) -> None:
        self.events: dict[str, list[TokenEvent]] = defaultdict(list)
        self.late_s: list[float] = []
        self.begun_s = time.perf_counter()
        self._heard = threading.Condition()

    def __call__(self, events: Sequence[TokenEvent]) -> None:
        with self._heard:
            for event in events:
                self.events[event.request_id].append(event)
                self.late_s.append(time.perf_counter() - self.begun_s - event.moment_s)
            self._heard.notify_all()

    def wait(self, *names: str) -> None:
        with self._heard:
            ended = self._heard.wait_for(
                lambda: all(self.events[one] and self.events[one][-1].finish for one in names), 20
            )
        assert ended, names


class Running:
    """A twin, its reader, and what was sent."""

    def __init__(self, pools: int, grace_s: float, client_s: float = 0.0) -> None:
        self.client_s = client_s
        self.reader = Reader()
        self.sent: list[Request] = []
        self.twin = Twin(
            lambda watches, _: at_work(pools, watches), self.reader, grace_s=grace_s, client_s=client_s
        )

    def send(self, name: str, prompt: int = 20, output: int = 8) -> None:
        """As the gateway would: the moment of arrival comes with the request."""
        moment_s = time.perf_counter()
        request = Request(
            id=name,
            prompt=tuple(range(len(self.sent), len(self.sent) + prompt)),
            output_tokens=output,
            arrival_s=moment_s,
            stop_token_ids=frozenset(range(50)),
        )
        self.twin.submit(request)
        came_s = moment_s - self.twin._origin_s - self.client_s / 2
        self.sent.append(replace(request, arrival_s=came_s))

    def expected(self) -> Sequence[RequestRecord]:
        plain = [replace(request, stop_token_ids=frozenset()) for request in self.sent]
        if len(self.twin._fleet.fronts) == 1:
            results = play_fleet(plain, loops(2, LeapingExecutor), LeastLoad())
            return [record for one in results for record in one.records]
        pools = loops(2, LeapingExecutor), loops(2, LeapingExecutor)
        return play_pools(plain, pools, (LeastLoad(), LeastLoad()), lambda _: HAND_OVER_S)[0]


@pytest.fixture(params=[1, 2], ids=["one pool", "two pools"])
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    # Time enough to hand a request over, however busy the machine: moments stay exact.
    one = Running(request.param, grace_s=0.25)
    yield one
    one.twin.close()


def test_moments_are_those_of_the_simulation_to_the_last_bit(running: Running) -> None:
    rng = np.random.default_rng(3)
    for i in range(40):
        running.send(f"r{i}", int(rng.integers(1, 70)), int(rng.integers(1, 40)))
        time.sleep(float(rng.exponential(0.015)))
    running.reader.wait(*(request.id for request in running.sent))
    expected = running.expected()
    assert len(expected) == 40
    for record in expected:
        told = running.reader.events[record.id]
        assert len(told) == record.output_tokens
        assert told[0].moment_s == record.first_token_s
        assert told[-1].moment_s == record.last_token_s
        assert [event.finish for event in told] == [None] * (len(told) - 1) + [Finish.LENGTH]
    stats = running.twin.stats()
    assert stats.running == stats.waiting == stats.kv_blocks_used == 0


def test_accepted_drafts_are_told_with_their_step() -> None:
    def engine() -> EngineLoop:
        executor = SimulatedExecutor(Price())
        executor.acceptance = 0.7
        return EngineLoop(Scheduler(replace(CONFIG, draft_tokens=3)), executor, VirtualClock())

    reader = Reader()
    twin = Twin(one_engine(engine(), LeastLoad()), reader, grace_s=0.25)
    try:
        begun_s = time.perf_counter()
        sent = [
            Request(id=f"r{i}", prompt=tuple(range(20 + i)), output_tokens=40, arrival_s=begun_s)
            for i in range(4)
        ]
        for request in sent:
            twin.submit(request)
        reader.wait(*(request.id for request in sent))
        arrived = [replace(request, arrival_s=begun_s - twin._origin_s) for request in sent]
    finally:
        twin.close()
    for record in play_fleet(arrived, [engine()], LeastLoad())[0].records:
        told = reader.events[record.id]
        assert len(told) == record.output_tokens == 40
        assert told[-1].moment_s == record.last_token_s
        assert [event.finish for event in told] == [None] * 39 + [Finish.LENGTH]
        assert len({event.moment_s for event in told}) < 30


def test_a_request_is_taken_to_have_come_half_of_the_clients_time_earlier() -> None:
    one = Running(1, grace_s=0.25, client_s=0.1)
    # Nothing arrives before the twin began.
    time.sleep(0.1)
    try:
        for i in range(4):
            one.send(f"r{i}")
        one.reader.wait(*(f"r{i}" for i in range(4)))
    finally:
        one.twin.close()
    for record in one.expected():
        assert one.reader.events[record.id][0].moment_s == record.first_token_s


def test_tokens_leave_the_other_half_before_their_time() -> None:
    one = Running(1, grace_s=0.0, client_s=0.004)
    try:
        one.send("r", output=60)
        one.reader.wait("r")
    finally:
        one.twin.close()
    # The reader was there a moment before the twin.
    assert -0.002 <= min(one.reader.late_s) < 0


def test_nothing_is_told_before_its_time(running: Running) -> None:
    for i in range(5):
        running.send(f"r{i}")
    running.reader.wait(*(f"r{i}" for i in range(5)))
    # The reader was there a moment before the twin.
    assert min(running.reader.late_s) >= 0


def test_an_aborted_request_gives_its_blocks_back_and_is_not_heard_again(running: Running) -> None:
    running.send("gone", output=90)
    running.send("stays", output=20)
    running.send("late", prompt=30)
    running.twin.abort("late")
    time.sleep(0.4)
    running.twin.abort("gone")
    running.twin.abort("nobody")
    running.reader.wait("gone", "stays", "late")
    heard = len(running.reader.events["gone"])
    assert running.reader.events["gone"][-1].finish is Finish.ABORT
    assert [event.finish for event in running.reader.events["late"]] == [Finish.ABORT]
    assert heard < 90
    time.sleep(0.1)
    assert len(running.reader.events["gone"]) == heard
    assert len(running.reader.events["stays"]) == 20
    assert running.twin.stats().kv_blocks_used == 0


def test_what_can_never_run_is_refused_at_the_door(running: Running) -> None:
    with pytest.raises(RequestError, match="context"):
        running.send("long", prompt=100, output=100)
    assert running.sent == []


def test_closing_ends_everybody(running: Running) -> None:
    running.send("r0", output=90)
    running.twin.close()
    assert running.reader.events["r0"][-1].finish is Finish.ABORT
    with pytest.raises(ServiceError, match="shutting down"):
        running.send("r1")


def test_a_router_that_fails_ends_everybody_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    class Astray:
        def choose(self, request: Request, loads: object) -> int:
            raise KeyError("no such engine")

    reader = Reader()
    twin = Twin(one_engine(loops(1)[0], Astray()), reader)
    twin.submit(Request(id="r0", prompt=(1,), output_tokens=1, arrival_s=time.perf_counter()))
    reader.wait("r0")
    assert "no such engine" in (reader.events["r0"][-1].error or "")
    assert isinstance(twin.failure, KeyError)
    with pytest.raises(ServiceError, match="no such engine"):
        twin.submit(Request(id="r1", prompt=(1,), output_tokens=1, arrival_s=time.perf_counter()))
    twin.close()


def test_a_twin_that_falls_behind_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class Slow(SimulatedExecutor):
        def execute(self, batch):  # type: ignore[no-untyped-def]
            time.sleep(0.05)
            return super().execute(batch)

    reader = Reader()
    engine = EngineLoop(Scheduler(CONFIG), Slow(Price()), VirtualClock())
    twin = Twin(one_engine(engine, LeastLoad()), reader)
    with caplog.at_level(logging.WARNING):
        twin.submit(Request(id="r0", prompt=(1,), output_tokens=4, arrival_s=time.perf_counter()))
        reader.wait("r0")
    twin.close()
    assert sum("behind its fleet" in one.message for one in caplog.records) == 1


# ── its text ─────────────────────────────────────────────────────────────────────────


def test_filler_is_read_back_as_the_tokens_it_was() -> None:
    filler = Filler(32_000)
    answer = [filler.words[i % len(filler.words)] for i in range(7, 90)]
    assert filler.encode(filler.decode(answer)) == answer
    assert len(set(filler.encode(" ".join(("", *WORDS))))) == len(WORDS)


def test_equal_text_has_equal_tokens_and_about_as_many_as_elsewhere() -> None:
    filler = Filler(32_000)
    text = "The scheduler and the router know no clock, no tensor and no chip; 42 tests say so.\n"
    tokens = filler.encode(text)
    assert tokens == filler.encode(text)
    assert all(0 <= token < 32_000 for token in tokens)
    # The usual rule of thumb for English is four characters a token.
    assert 3 < len(text) / len(tokens) < 5
    assert filler.encode(text + text)[: len(tokens)] == tokens
    chat = [{"role": "user", "content": text}]
    assert filler.chat(chat) == filler.chat(chat) != filler.chat([{"role": "system", "content": text}])


def test_a_vocabulary_smaller_than_the_words_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        Filler(10)
