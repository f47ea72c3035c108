"""Run the engine in a thread of its own and report its tokens.

The thread owns the loop; everybody else speaks to it through a queue. It knows no HTTP
and no text. One call of the sink per step, made on the engine's thread, carries the
events of all requests: an asyncio server hands them over with one `call_soon_threadsafe`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Condition, Thread
from typing import NamedTuple

from tongyun.cloud.engine.carry import Carrier
from tongyun.cloud.engine.interface import StepError
from tongyun.cloud.engine.letters import Arrive, Departed, Down, Up
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.protocol import Advances, EngineStats, TokenEvent
from tongyun.cloud.sched.freeness import Room
from tongyun.cloud.sched.migrate import Movable, Traveller
from tongyun.cloud.sched.request import Finish, Request
from tongyun.errors import RequestError, ServiceError

Sink = Callable[[Sequence[TokenEvent]], None]
"""Called once a step with what happened; with nothing where the engine has failed or has letters alone."""

Item = Request | Traveller | str | Down
"""What an engine is given; a string aborts the request of that name."""

_log = logging.getLogger(__name__)


class Standing(NamedTuple):
    """Where an engine stands after a step, for who shares requests out among several."""

    room: Room
    taken: int
    """Requests that the scheduler has been given since the start: later ones are not in the room yet."""
    head: Movable | None = None
    """Who waits and is admitted next, where requests move."""


class LiveEngine:
    """A running engine. Every method may be called from any thread; the sink may not `drain` or `close`."""

    def __init__(self, loop: EngineLoop, sink: Sink, carrier: Carrier | None = None) -> None:
        """With a `carrier`, requests move to and from other engines."""
        self._loop = loop
        self._sink = sink
        self._carrier = carrier
        self._changed = Condition()
        # All below belong to whoever holds `_changed`.
        self._inbox: deque[Item] = deque()
        self._in_flight: set[str] = set()
        self._draining = False
        self._closing = False
        self._failure: BaseException | None = None
        self._stats = loop.stats()
        self._taken = 0
        self._standing = Standing(loop.room(), self._taken)
        self._letters: list[Up] = []
        self._turns = 0
        self._thread = Thread(target=self._run, name="tongyun-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request; its arrival is now, on the engine's clock.

        RequestError if it can never run or its id is in flight, ServiceError when the
        engine takes nothing new.
        """
        self._loop.check(request)
        self._take(request.id, replace(request, arrival_s=self._loop.clock.now()))

    def resume(self, traveller: Traveller) -> None:
        """As `submit`, for a request that ran elsewhere: what it knows is computed again, and it goes on."""
        self._loop.check(traveller.request)
        self._take(traveller.request.id, traveller)

    def tell(self, letter: Down) -> None:
        """Have a letter read before the next step; as `resume` with a request that arrives."""
        if isinstance(letter, Arrive):
            self._take(letter.traveller.request.id, letter)
            return
        with self._changed:
            self._inbox.append(letter)
            self._changed.notify_all()

    def collect(self) -> list[Up]:
        """What the engine has to say of moves, after what the sink is being told."""
        with self._changed:
            letters, self._letters = self._letters, []
            return letters

    def _take(self, request_id: str, item: Request | Traveller | Arrive) -> None:
        with self._changed:
            if self._failure is not None:
                raise ServiceError(f"the engine has stopped: {self._failure}") from self._failure
            if self._draining or self._closing:
                raise ServiceError("the engine is shutting down")
            if request_id in self._in_flight:
                raise RequestError(f"request '{request_id}' is already in flight", param="id")
            self._in_flight.add(request_id)
            self._inbox.append(item)
            self._changed.notify_all()

    def abort(self, request_id: str) -> None:
        """End a request and free its blocks before the next step; unknown ids are ignored."""
        with self._changed:
            if request_id in self._in_flight:
                self._inbox.append(request_id)
                self._changed.notify_all()

    def stats(self) -> EngineStats:
        """The state after the latest step; requests still in the queue count as waiting."""
        with self._changed:
            queued = sum(isinstance(item, Request | Traveller | Arrive) for item in self._inbox)
            return replace(self._stats, waiting=self._stats.waiting + queued)

    @property
    def standing(self) -> Standing:
        """The engine after the latest step."""
        return self._standing

    @property
    def progress(self) -> tuple[int, int] | None:
        """Turns taken, and layers begun where the executor tells; None where there is nothing to do.

        It grows while the engine goes on, and is read without a lock: one that hangs may hold any.
        """
        if not self._in_flight:
            return None
        executor = self._loop.executor
        return self._turns, executor.layers if isinstance(executor, Advances) else 0

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine before its time; None while it lives."""
        return self._failure

    def drain(self, timeout_s: float | None = None) -> bool:
        """Refuse new requests and wait for those in flight; False if time ran out first."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._in_flight, timeout_s)

    def close(self) -> None:
        """Abort what is left and end the thread; a second call does nothing."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        # A bug in the loop or scheduler: nobody may wait for an engine that is gone.
        except BaseException as error:
            _log.exception("the engine stopped")
            self._give_up(error)

    def _turn(self) -> bool:
        """Wait for work, take in what was queued, run one step; False when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._closing or self._loop.has_work)
            items, closing = list(self._inbox), self._closing
            self._inbox.clear()
            left = sorted(self._in_flight) if closing else []
        events = self._take_in(items)
        for request_id in left:
            events += self._loop.abort(request_id)
        if not closing:
            try:
                events += self._loop.step() or []
            except StepError as error:
                _log.error("%s", error, exc_info=error.__cause__)
                events += error.events
        self._turns += 1
        if self._carrier is not None:
            self._carrier.clear() if closing else self._carrier.work()
        self._report(events)
        return not closing

    def _take_in(self, items: list[Item]) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        for item in items:
            self._taken += isinstance(item, Request | Traveller | Arrive)
            if isinstance(item, str):
                events += self._loop.abort(item)
            elif isinstance(item, Request):
                self._loop.add(item)
            elif isinstance(item, Traveller):
                self._loop.arrive(item)
            elif self._carrier is not None:
                self._carrier.tell(item)
        return events

    def _report(self, events: list[TokenEvent]) -> None:
        carrier = self._carrier
        letters = [] if carrier is None else carrier.collect()
        head = None if carrier is None else self._loop.scheduler.head()
        with self._changed:
            self._stats = self._loop.stats()
            self._standing = Standing(self._loop.room(), self._taken, head)
            self._letters += letters
            self._in_flight -= {one.traveller.request.id for one in letters if isinstance(one, Departed)}
        if not events and not letters and self._failure is None:
            return
        try:
            self._sink(events)
        # A reader that went away (its event loop closed) must not stop the others.
        except Exception:
            _log.exception("the reader of engine events failed")
        # After the sink, so that whoever drained has been told everything.
        with self._changed:
            self._in_flight -= {event.request_id for event in events if event.finish is not None}
            self._changed.notify_all()

    def _give_up(self, error: BaseException) -> None:
        with self._changed:
            self._failure = error
            left = sorted(self._in_flight)
        now_s, message = self._loop.clock.now(), f"the engine has stopped: {error}"
        self._report([TokenEvent(one, None, now_s, Finish.ERROR, error=message) for one in left])
