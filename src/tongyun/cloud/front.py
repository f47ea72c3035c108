"""Engines behind a router on virtual time: who is given a request, and what happens at a moment.

Knows no pools that pass requests on, no workload and no price.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

from tongyun.cloud.agenda import Agenda
from tongyun.cloud.engine.interface import Engine, Turn
from tongyun.cloud.instance import Instance, Passage, Torn
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.router import Remembering, Router


class Fronts(Protocol):
    """One front, or several that pass requests on or share nothing but the time."""

    @property
    def fronts(self) -> Sequence[Front]: ...

    @property
    def in_flight(self) -> int:
        """Requests that have come and not ended, wherever they are."""

    def at(self, moment_s: float, action: Callable[[], None]) -> None:
        """Have something happen when every engine has come to `moment_s`, before what arrives then."""

    def send(self, request: Request) -> None:
        """Give a request, in order of arrival."""

    def advance(self, until_s: float) -> None:
        """Every engine to `until_s`, by way of all that happens until then."""

    def next_s(self) -> float | None:
        """When something happens next besides steps; None where nothing does."""

    def check(self, request: Request) -> None:
        """RequestError where nobody could ever run it; reads limits only, so any thread may ask."""

    def goes_on(self, request_id: str) -> bool:
        """Whether a request that ends in one pool goes on in another."""

    def again(self, request: Request) -> None:
        """Give a request that an engine lost to one that is up, at this moment."""

    def lose(self, pool: Front, index: int) -> list[Torn]:
        """Take what is in flight from an engine of a front that failed, and what it was handing over."""

    def whole(self, pool: Front, torn: Torn) -> Torn:
        """What a front has lost, with what others had done for it."""

    def give_up(self) -> list[Torn]:
        """Take back what is held."""

    def abort(self, request_id: str) -> bool:
        """End a request wherever it is; false if it is not in flight."""

    def records(self, names: Iterable[str]) -> list[RequestRecord]:
        """Of these requests, those that ended."""

    def forget(self, but: Collection[str]) -> None:
        """Drop what is remembered of requests that have ended, but for these."""


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
        self._agenda = Agenda()
        self._held: list[Request] = []
        self.between: dict[str, Passage] = {}
        """Requests that have left one of the engines and have not come to another."""
        self.roused: Callable[[float], None] | None = None
        """Told, where somebody wants to know, before an engine is given a request."""

    def at(self, moment_s: float, action: Callable[[], None]) -> None:
        """Have something happen when every engine has come to `moment_s`, before what arrives then.

        The end of a simulation waits for all of them: what repeats itself has to stop by itself.
        """
        if not self._now_s <= moment_s < float("inf"):
            raise ValueError(f"an event at {moment_s} s, when it is {self._now_s} s")
        self._agenda.put(moment_s, action)

    def next_s(self) -> float | None:
        """When something happens next besides steps; None where nothing does."""
        return self._agenda.next_s

    def send(self, request: Request) -> None:
        """Give a request, in order of arrival, to the engine that the router names when it arrives.

        Where none is up, it is held until one is (see `open`).
        """
        if request.arrival_s < self._before_s:
            raise ValueError(f"request '{request.id}' arrives before one that came first")
        self._before_s = request.arrival_s
        self.advance(request.arrival_s)
        self._place(request)

    def check(self, request: Request) -> None:
        """RequestError if its engines, which are equal, could never run it."""
        self.instances[0].loop.check(request)

    def goes_on(self, request_id: str) -> bool:
        """Never: there is one pool."""
        return False

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

    def lose(self, pool: Front, index: int) -> list[Torn]:
        """As `tear`; `pool` is this one."""
        assert pool is self
        return self.tear(index)

    def whole(self, pool: Front, torn: Torn) -> Torn:
        """As it is: nobody else had it."""
        assert pool is self
        return torn

    def again(self, request: Request) -> None:
        """Give a request that an engine lost to one that is up, at this moment."""
        self._place(request)

    def abort(self, request_id: str) -> bool:
        """End a request wherever it is; false if it is not in flight."""
        if any(one.abort(request_id) for one in self.instances):
            return True
        if self.between.pop(request_id, None) is not None:
            return True
        return bool(self.unhold(lambda request: request.id == request_id))

    def unhold(self, wanted: Callable[[Request], bool] = lambda _: True) -> list[Request]:
        """Take back requests that are held."""
        taken = [request for request in self._held if wanted(request)]
        self._held = [request for request in self._held if not wanted(request)]
        return taken

    def give_up(self) -> list[Torn]:
        """Take back what is held."""
        return [handed(request) for request in self.unhold()]

    @property
    def now_s(self) -> float:
        """Up to which moment all has happened."""
        return self._now_s

    @property
    def in_flight(self) -> int:
        """Requests that engines have, those between them, and those held."""
        return len(self._held) + len(self.between) + sum(len(one.in_flight) for one in self.instances)

    @property
    def fronts(self) -> tuple[Front, ...]:
        return (self,)

    def records(self, _names: Iterable[str]) -> list[RequestRecord]:
        """Of all requests that ended, engine after engine."""
        return [record for one in self.instances for record in one.result().records]

    def forget(self, but: Collection[str]) -> None:
        """Drop records of requests that have ended, but for these."""
        for one in self.instances:
            one.forget(but)

    def waiting(self) -> tuple[Request, ...]:
        """Requests that are held, in the order in which they came."""
        return tuple(self._held)

    @property
    def held(self) -> int:
        """Requests that wait for an engine to be up."""
        return len(self._held)

    def advance(self, until_s: float) -> None:
        """Every engine to `until_s`, by way of all that happens until then."""
        self._agenda.advance(until_s, self._all_to)

    def _all_to(self, until_s: float) -> None:
        for one in self.instances:
            one.advance(until_s)
        self._now_s = max(self._now_s, until_s)

    def _place(self, request: Request) -> None:
        if self.roused is not None:
            self.roused(self._now_s)
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
