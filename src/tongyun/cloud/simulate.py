"""Play requests through one engine on virtual time and record what each one felt.

The scheduler, the loop and the records are those of the live engine; only the executor
and the clock differ. Knows no workload and no price: both come in ready.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from tongyun.cloud.engine.clock import VirtualClock
from tongyun.cloud.engine.loop import EngineLoop, Turn
from tongyun.cloud.engine.protocol import EngineStats, Executor
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.sched.prefix import row
from tongyun.cloud.sched.request import Finish, Piece, Request
from tongyun.cloud.sched.router import Load, Router
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig
from tongyun.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """One record per request, in the order given, and the engine's counters at the end."""

    records: tuple[RequestRecord, ...]
    stats: EngineStats


class _Progress:
    """What has come back of one request so far; `count` misses the tokens of steps foreseen."""

    __slots__ = ("cached", "count", "first_s", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.first_s: float | None = None
        self.count = 0
        self.cached = 0


class Instance:
    """An engine, its requests in flight and the records of those that ended."""

    def __init__(
        self,
        loop: EngineLoop,
        *,
        watch: Callable[[Turn], None] | None = None,
        ended: Callable[[RequestRecord], None] | None = None,
    ) -> None:
        """`watch` is told of every single step, `ended` of every request that is over."""
        self.loop = loop
        self._watch, self._ended = watch, ended
        self.records: dict[str, RequestRecord | None] = {}
        self.in_flight: dict[str, _Progress] = {}
        self.prompt_tokens_due = 0
        """Of requests in flight that have no first token yet."""

    def send(self, request: Request) -> None:
        """Give a request to the engine; one it refuses is recorded with the reason."""
        if request.id in self.records:
            raise ValueError(f"two requests are called '{request.id}'")
        # Holds the place: records keep the order of sending.
        self.records[request.id] = None
        try:
            self.loop.add(request)
        except RequestError as error:
            self.records[request.id] = _record(_Progress(request), request.arrival_s, None, str(error))
        else:
            self.in_flight[request.id] = _Progress(request)
            self.prompt_tokens_due += len(request.prompt)

    def abort(self, request_id: str) -> bool:
        """End a request between two steps; false if it is not in flight."""
        progress = self.in_flight.get(request_id)
        if progress is None:
            return False
        progress.count = self.loop.produced(request_id)
        self.loop.abort(request_id)
        if progress.first_s is None:
            self.prompt_tokens_due -= len(progress.request.prompt)
        self._end(progress, self.loop.clock.now(), Finish.ABORT)
        return True

    def forget(self) -> None:
        """Drop the records of requests that have ended."""
        self.records = dict.fromkeys(self.in_flight)

    @property
    def load(self) -> Load:
        return Load(len(self.in_flight), self.prompt_tokens_due)

    def advance(self, until_s: float) -> None:
        """Work until `until_s` or, in the midst of a step then, until it ends; idle time is let pass."""
        clock = self.loop.clock
        while self.in_flight and clock.now() < until_s:
            self.move(until_s)
        if not self.in_flight and until_s < float("inf"):
            clock.wait_until(until_s)

    def move(self, until_s: float = float("inf")) -> None:
        """One step, or as many as nothing is decided in, up to the first that ends at `until_s` or later."""
        leap = self.loop.leap(until_s)
        if leap is None:
            self._step()
            return
        for piece in leap.pieces:
            if piece.samples:
                self._begun(piece, leap.moment_s)
        for request_id, finish in leap.ended.items():
            self._end(self.in_flight[request_id], leap.moment_s, finish)

    def _step(self) -> None:
        done = self.loop.turn()
        if done is None:
            return
        if self._watch is not None:
            self._watch(done)
        for piece in done.batch.pieces:
            if piece.samples:
                self.in_flight[piece.request.id].count += 1
                self._begun(piece, done.moment_s)
        for request_id, finish in done.ended.items():
            self._end(self.in_flight[request_id], done.moment_s, finish)

    def _begun(self, piece: Piece, moment_s: float) -> None:
        """Note a request's first token; a later one changes nothing."""
        progress = self.in_flight[piece.request.id]
        if progress.first_s is None:
            progress.first_s = moment_s
            progress.cached = piece.cached_tokens
            self.prompt_tokens_due -= len(piece.request.prompt)

    def result(self) -> Simulated:
        """Records in the order of sending, and the engine's counters."""
        records = tuple(record for record in self.records.values() if record is not None)
        return Simulated(records=records, stats=self.loop.stats())

    def _end(self, progress: _Progress, moment_s: float, finish: Finish) -> None:
        request_id = progress.request.id
        if finish is Finish.LENGTH:
            progress.count = progress.request.output_tokens
        del self.in_flight[request_id]
        self.records[request_id] = record = _record(progress, moment_s, finish, None)
        if self._ended is not None:
            self._ended(record)


def simulate(
    requests: Iterable[Request],
    scheduler_config: SchedulerConfig,
    executor: Executor,
    *,
    users: int | None = None,
) -> Simulated:
    """Every request from its arrival to its end, in virtual seconds.

    Requests come in order of `arrival_s` (open loop) and are taken one by one, so they may
    be generated. With `users`, a closed loop instead: that many are in flight at a time
    and the next arrives when one ends. A request the engine refuses is recorded as failed;
    an executor that fails ends the simulation.
    """
    run = Instance(EngineLoop(Scheduler(scheduler_config), executor, VirtualClock()))
    if users is None:
        _play_open(run, iter(requests))
    else:
        _play_closed(run, iter(requests), users)
    return run.result()


class Front:
    """Engines behind a router, taken as far as somebody says and no further.

    Engines share nothing but the arrivals. The router sees one in the midst of a step as it
    will be when the step ends. Loops have virtual clocks that start together.
    """

    def __init__(
        self,
        loops: Iterable[EngineLoop],
        router: Router,
        *,
        watch: Callable[[Turn], None] | None = None,
        ended: Callable[[RequestRecord], None] | None = None,
    ) -> None:
        self.instances = [Instance(loop, watch=watch, ended=ended) for loop in loops]
        self._router = router
        self._before_s = 0.0

    def send(self, request: Request) -> None:
        """Give a request, in order of arrival, to the engine that the router names when it arrives."""
        if request.arrival_s < self._before_s:
            raise ValueError(f"request '{request.id}' arrives before one that came first")
        self._before_s = request.arrival_s
        self.advance(request.arrival_s)
        self.instances[self._router.choose(request, [one.load for one in self.instances])].send(request)

    def advance(self, until_s: float) -> None:
        for one in self.instances:
            one.advance(until_s)


class Relay:
    """A pool that prefills and a pool that decodes the rest.

    The first token leaves where the prompt was computed; its keys and values are at the
    other engine `hand_over_s` seconds later. Prefill never waits for decoding, so that the
    second pool follows the first: whatever reaches it by a moment has left the first before.
    """

    def __init__(
        self,
        pools: tuple[Iterable[EngineLoop], Iterable[EngineLoop]],
        routers: tuple[Router, Router],
        hand_over_s: Callable[[Request], float],
        *,
        watches: tuple[Callable[[Turn], None] | None, Callable[[Turn], None] | None] = (None, None),
    ) -> None:
        self.first = Front(pools[0], routers[0], watch=watches[0], ended=self._hand_over)
        self.second = Front(pools[1], routers[1], watch=watches[1])
        self._hand_over_s = hand_over_s
        self._whole: dict[str, Request] = {}
        # A heap of what is under way between the pools; the number keeps the order of equal moments.
        self._under_way: list[tuple[float, int, Request]] = []
        self._serial = 0

    def send(self, request: Request) -> None:
        """Give a request, in order of arrival."""
        self._whole[request.id] = request
        self.first.send(prefill_part(request))
        self._pass_on(request.arrival_s)

    def advance(self, until_s: float) -> None:
        self.first.advance(until_s)
        self._pass_on(until_s)
        self.second.advance(until_s)

    def abort(self, request_id: str) -> None:
        """End a request wherever it is."""
        self._whole.pop(request_id, None)
        fronts = (self.first, self.second)
        if not any(one.abort(request_id) for front in fronts for one in front.instances):
            self._under_way = sorted(entry for entry in self._under_way if entry[2].id != request_id)

    def next_s(self) -> float | None:
        """When the next request reaches the second pool; None where none is under way."""
        return self._under_way[0][0] if self._under_way else None

    def _hand_over(self, record: RequestRecord) -> None:
        request = self._whole.pop(record.id, None)
        if request is not None and record.ok and request.output_tokens > 1:
            moment_s = record.ended_s + self._hand_over_s(request)
            self._serial += 1
            heappush(self._under_way, (moment_s, self._serial, decode_part(request, moment_s)))

    def _pass_on(self, until_s: float) -> None:
        while self._under_way and self._under_way[0][0] <= until_s:
            self.second.send(heappop(self._under_way)[2])


def play_fleet(requests: Iterable[Request], loops: Iterable[EngineLoop], router: Router) -> list[Simulated]:
    """Every request through the engine that `router` gives it to; one result per engine."""
    front = Front(loops, router)
    for request in requests:
        front.send(request)
    front.advance(float("inf"))
    return [one.result() for one in front.instances]


def play_pools(
    requests: Iterable[Request],
    pools: tuple[Iterable[EngineLoop], Iterable[EngineLoop]],
    routers: tuple[Router, Router],
    hand_over_s: Callable[[Request], float],
) -> tuple[tuple[RequestRecord, ...], tuple[list[Simulated], list[Simulated]]]:
    """Every request through an engine that prefills it and another that decodes the rest (see `Relay`).

    Returns a record for each request in order of arrival, and what happened in each pool.
    """
    relay, names = Relay(pools, routers, hand_over_s), []
    for request in requests:
        names.append(request.id)
        relay.send(request)
    relay.advance(float("inf"))
    first, second = ([one.result() for one in front.instances] for front in (relay.first, relay.second))
    prefilled = {record.id: record for one in first for record in one.records}
    decoded = {record.id: record for one in second for record in one.records}
    return tuple(_joined(prefilled[name], decoded.get(name)) for name in names), (first, second)


def prefill_part(request: Request) -> Request:
    """What the first pool does: the prompt and the token it yields."""
    return replace(request, output_tokens=1)


def decode_part(request: Request, arrival_s: float) -> Request:
    """What the second pool does from when the prompt's keys and values have come: all but the first token."""
    prompt = row(request.prompt)
    # The first token: made up as the others are.
    prompt.append(prompt[-1])
    return replace(
        request,
        prompt=prompt,
        output_tokens=request.output_tokens - 1,
        arrival_s=arrival_s,
        handed_tokens=len(request.prompt),
    )


def _joined(first: RequestRecord, rest: RequestRecord | None) -> RequestRecord:
    """One request's record from those of both pools; the end of the second decides."""
    if rest is None:
        return first
    return replace(
        first,
        ended_s=rest.ended_s,
        last_token_s=rest.last_token_s,
        output_tokens=first.output_tokens + rest.output_tokens,
        finish=rest.finish,
        error=rest.error,
    )


def _play_open(run: Instance, requests: Iterator[Request]) -> None:
    clock = run.loop.clock
    coming = next(requests, None)
    while coming is not None or run.in_flight:
        if coming is not None and not run.in_flight:
            clock.wait_until(coming.arrival_s)
        now_s = clock.now()
        while coming is not None and coming.arrival_s <= now_s:
            run.send(coming)
            sent, coming = coming, next(requests, None)
            if coming is not None and coming.arrival_s < sent.arrival_s:
                raise ValueError(f"request '{coming.id}' arrives before '{sent.id}', which came first")
        run.move(coming.arrival_s if coming is not None else float("inf"))


def _play_closed(run: Instance, requests: Iterator[Request], users: int) -> None:
    if users < 1:
        raise ValueError(f"a closed loop needs at least one user, not {users}")
    coming = next(requests, None)
    while coming is not None or run.in_flight:
        # A refused request leaves its place to the next at once.
        while coming is not None and len(run.in_flight) < users:
            run.send(replace(coming, arrival_s=run.loop.clock.now()))
            coming = next(requests, None)
        if run.in_flight:
            run.move()


def _record(progress: _Progress, ended_s: float, finish: Finish | None, error: str | None) -> RequestRecord:
    request = progress.request
    return RequestRecord(
        id=request.id,
        arrival_s=request.arrival_s,
        ended_s=ended_s,
        prompt_tokens=len(request.prompt),
        output_tokens=progress.count,
        first_token_s=progress.first_s,
        last_token_s=None if progress.first_s is None else ended_s,
        cached_tokens=progress.cached,
        finish=finish,
        error=error,
        model=request.model,
        priority_class=request.priority_class,
    )
