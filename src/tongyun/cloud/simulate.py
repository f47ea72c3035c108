"""Play requests through one engine on virtual time and record what each one felt.

The scheduler, the loop and the records are those of the live engine; only the executor
and the clock differ. Knows no workload and no price: both come in ready.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from heapq import heappop, heappush

from tongyun.cloud.engine.clock import VirtualClock
from tongyun.cloud.engine.loop import Engine, EngineLoop, Turn
from tongyun.cloud.engine.protocol import Executor, Tape
from tongyun.cloud.instance import Instance, Simulated, Torn
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.sched.prefix import row
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.router import Remembering, Router
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig


def simulate(
    requests: Iterable[Request],
    scheduler_config: SchedulerConfig,
    executor: Executor,
    *,
    users: int | None = None,
    tape: Tape | None = None,
) -> Simulated:
    """Every request from its arrival to its end, in virtual seconds.

    Requests come in order of `arrival_s` (open loop) and are taken one by one, so they may
    be generated. With `users`, a closed loop instead: that many are in flight at a time
    and the next arrives when one ends. A request the engine refuses is recorded as failed;
    an executor that fails ends the simulation. A `tape` is told of every step.
    """
    run = Instance(EngineLoop(Scheduler(scheduler_config), executor, VirtualClock()))
    run.loop.tape = tape
    if users is None:
        _play_open(run, iter(requests))
    else:
        _play_closed(run, iter(requests), users)
    return run.result()


class Front:
    """Engines behind a router, taken as far as somebody says and no further.

    Engines share the arrivals and what happens `at` a moment, nothing else. The router sees
    one in the midst of a step as it will be when the step ends, and none that is not up.
    Loops have virtual clocks that start together.
    """

    def __init__(
        self,
        loops: Iterable[Engine],
        router: Router,
        *,
        watch: Callable[[Turn], None] | None = None,
        ended: Callable[[RequestRecord], None] | None = None,
    ) -> None:
        self.instances = [Instance(loop, watch=watch, ended=ended) for loop in loops]
        self._router = router
        self._before_s = self._now_s = 0.0
        # A heap of what is to happen; the number keeps the order of equal moments.
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._held: list[Request] = []

    def at(self, moment_s: float, action: Callable[[], None]) -> None:
        """Have something happen when every engine has come to `moment_s`, before what arrives then.

        The end of a simulation waits for all of them: what repeats itself has to stop by itself.
        """
        if not self._now_s <= moment_s < float("inf"):
            raise ValueError(f"an event at {moment_s} s, when it is {self._now_s} s")
        self._serial += 1
        heappush(self._events, (moment_s, self._serial, action))

    def send(self, request: Request) -> None:
        """Give a request, in order of arrival, to the engine that the router names when it arrives.

        Where none is up, it is held until one is (see `open`).
        """
        if request.arrival_s < self._before_s:
            raise ValueError(f"request '{request.id}' arrives before one that came first")
        self._before_s = request.arrival_s
        self.advance(request.arrival_s)
        self._place(request)

    def open(self, index: int) -> None:
        """Let an engine be given requests, those held first."""
        self._turn(index, True)
        held, self._held = self._held, []
        for request in held:
            self._place(request)

    def close(self, index: int) -> None:
        """Give an engine no further request; those it has go on."""
        self._turn(index, False)

    def _turn(self, index: int, up: bool) -> None:
        one = self.instances[index]
        one.up = up
        if one.loop.tape is not None:
            one.loop.tape.turned(up, self._now_s)

    def tear(self, index: int) -> list[Torn]:
        """Take what is in flight from an engine that failed; its caches are empty from then on."""
        if isinstance(self._router, Remembering):
            self._router.forget(index)
        return self.instances[index].fail()

    def again(self, request: Request) -> None:
        """Give a request that an engine lost to one that is up, at this moment."""
        self._place(request)

    def unhold(self, wanted: Callable[[Request], bool] = lambda _: True) -> list[Request]:
        """Take back requests that are held."""
        taken = [request for request in self._held if wanted(request)]
        self._held = [request for request in self._held if not wanted(request)]
        return taken

    def give_up(self) -> list[Torn]:
        """Take back what is held."""
        return [_handed(request) for request in self.unhold()]

    @property
    def in_flight(self) -> int:
        """Requests that engines have, and those held."""
        return len(self._held) + sum(len(one.in_flight) for one in self.instances)

    @property
    def fronts(self) -> tuple[Front, ...]:
        return (self,)

    def records(self, _names: Iterable[str]) -> list[RequestRecord]:
        """Of all requests that ended, engine after engine."""
        return [record for one in self.instances for record in one.result().records]

    def waiting(self) -> tuple[Request, ...]:
        """Requests that are held, in the order in which they came."""
        return tuple(self._held)

    @property
    def held(self) -> int:
        """Requests that wait for an engine to be up."""
        return len(self._held)

    def advance(self, until_s: float) -> None:
        """Every engine to `until_s`, by way of all that happens until then."""
        while self._events and self._events[0][0] <= until_s:
            moment_s, _, action = heappop(self._events)
            self._all_to(moment_s)
            action()
        self._all_to(until_s)

    def _all_to(self, until_s: float) -> None:
        for one in self.instances:
            one.advance(until_s)
        self._now_s = max(self._now_s, until_s)

    def _place(self, request: Request) -> None:
        everyone = self.instances
        up = [index for index, one in enumerate(everyone) if one.up]
        if len(up) == len(everyone):
            everyone[self._router.choose(request, [one.load for one in everyone])].send(request)
        elif up:
            loads = [everyone[index].load._replace(engine=index) for index in up]
            everyone[up[self._router.choose(request, loads)]].send(request)
        else:
            self._held.append(request)


class Relay:
    """A pool that prefills and a pool that decodes the rest.

    The first token leaves where the prompt was computed; its keys and values are at the
    other engine `hand_over_s` seconds later. Prefill never waits for decoding, so that the
    second pool follows the first: whatever reaches it by a moment has left the first before.
    """

    def __init__(
        self,
        pools: tuple[Iterable[Engine], Iterable[Engine]],
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
        # What is to happen to both pools, in order; likewise.
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0

    def at(self, moment_s: float, action: Callable[[], None]) -> None:
        """Have something happen when both pools have come to `moment_s` (see `Front.at`)."""
        self._serial += 1
        heappush(self._events, (moment_s, self._serial, action))

    @property
    def fronts(self) -> tuple[Front, ...]:
        return self.first, self.second

    @property
    def in_flight(self) -> int:
        """Requests in either pool, between them, and held before them."""
        return self.first.in_flight + self.second.in_flight + len(self._under_way)

    def send(self, request: Request) -> None:
        """Give a request, in order of arrival."""
        if self._events:
            self.advance(request.arrival_s)
        self._whole[request.id] = request = replace(request, keys={})
        self.first.send(prefill_part(request))
        self._pass_on(request.arrival_s)

    def advance(self, until_s: float) -> None:
        """Both pools to `until_s`, by way of all that happens until then."""
        while self._events and self._events[0][0] <= until_s:
            moment_s, _, action = heappop(self._events)
            self._all_to(moment_s)
            action()
        self._all_to(until_s)

    def _all_to(self, until_s: float) -> None:
        self.first.advance(until_s)
        self._pass_on(until_s)
        self.second.advance(until_s)

    def again(self, request: Request) -> None:
        """Give what is left of a request to the first pool, at this moment."""
        self._whole[request.id] = request = replace(request, keys={})
        self.first.again(prefill_part(request))

    def tear(self, pool: Front, index: int) -> list[Torn]:
        """Take what is in flight from an engine that failed, with what it was handing over."""
        torn = pool.tear(index)
        if pool is self.second:
            return [self._from_first(one) for one in torn]
        # Ended there, not yet arrived: keys and values that are gone before they were read.
        sent = {name for name, record in pool.instances[index].records.items() if record is not None}
        leaving = [request for _, _, request in self._under_way if request.id in sent]
        self._under_way = sorted(entry for entry in self._under_way if entry[2].id not in sent)
        leaving += self.second.unhold(lambda request: request.id in sent)
        whole = [one._replace(request=self._whole.pop(one.request.id)) for one in torn]
        return whole + [self._from_first(_handed(request)) for request in leaving]

    def give_up(self) -> list[Torn]:
        """Take back what is held before either pool."""
        first = [_handed(self._whole.pop(request.id)) for request in self.first.unhold()]
        return first + [self._from_first(_handed(request)) for request in self.second.unhold()]

    def _from_first(self, torn: Torn) -> Torn:
        """What the second pool lost, with what the first had done for it, whose record goes."""
        for one in self.first.instances:
            record = one.records.get(torn.request.id)
            if record is not None:
                del one.records[record.id]
                return Torn(
                    replace(torn.request, arrival_s=record.arrival_s, handed_tokens=0),
                    torn.tokens + record.output_tokens,
                    record.first_token_s,
                    record.cached_tokens,
                    record.prompt_tokens,
                )
        # Who has no use for records forgets those that have ended.
        return torn._replace(request=replace(torn.request, handed_tokens=0))

    def records(self, names: Iterable[str]) -> list[RequestRecord]:
        """Of these requests in their order, those that ended: one record for both pools."""
        return list(joined(names, *self.results()))

    def abort(self, request_id: str) -> None:
        """End a request wherever it is."""
        self._whole.pop(request_id, None)
        fronts = (self.first, self.second)
        if not any(one.abort(request_id) for front in fronts for one in front.instances):
            self._under_way = sorted(entry for entry in self._under_way if entry[2].id != request_id)

    def results(self) -> tuple[list[Simulated], list[Simulated]]:
        """What happened in each pool."""
        first, second = ([one.result() for one in front.instances] for front in (self.first, self.second))
        return first, second

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


def play_fleet(requests: Iterable[Request], loops: Iterable[Engine], router: Router) -> list[Simulated]:
    """Every request through the engine that `router` gives it to; one result per engine."""
    front = Front(loops, router)
    for request in requests:
        front.send(request)
    front.advance(float("inf"))
    return [one.result() for one in front.instances]


def play_pools(
    requests: Iterable[Request],
    pools: tuple[Iterable[Engine], Iterable[Engine]],
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
    first, second = relay.results()
    return joined(names, first, second), (first, second)


def joined(
    names: Iterable[str], first: Iterable[Simulated], second: Iterable[Simulated]
) -> tuple[RequestRecord, ...]:
    """A record for each of these requests that ended, from those of both pools."""
    prefilled = {record.id: record for one in first for record in one.records}
    decoded = {record.id: record for one in second for record in one.records}
    return tuple(_joined(prefilled[name], decoded.get(name)) for name in names if name in prefilled)


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
        keys=None if request.keys is None else {size: keys[:] for size, keys in request.keys.items()},
    )


def _handed(request: Request) -> Torn:
    """A request that no engine has at this moment."""
    return Torn(request, 0, None, 0, len(request.prompt))


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
