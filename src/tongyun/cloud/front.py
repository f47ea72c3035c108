"""Engines behind a router on virtual time: who is given a request, and what happens at a moment.

Knows no pools that pass requests on, no workload and no price.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heappop, heappush

from tongyun.cloud.engine.loop import Engine, Turn
from tongyun.cloud.instance import Instance, Torn
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.router import Remembering, Router


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
        return [handed(request) for request in self.unhold()]

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


def handed(request: Request) -> Torn:
    """A request that no engine has at this moment."""
    return Torn(request, 0, None, 0, len(request.prompt))
