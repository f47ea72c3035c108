"""Answer requests at the pace of a simulated fleet: virtual time that keeps step with the wall's.

The engines, their routers, their prices and all that changes them are those of a simulation; only
arrivals are real. A step is simulated a little after it begins and what it yields is told when it ends,
so that neither this process's own work nor a late wake-up adds to the fleet's time: given
the moments of arrival, the twin does what the simulation of them does. Knows no HTTP,
text or price.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from heapq import heappop, heappush
from threading import Condition, Lock, Thread
from typing import Protocol

from tongyun.cloud.engine.interface import Turn
from tongyun.cloud.engine.live import Sink
from tongyun.cloud.engine.protocol import EngineStats, TokenEvent, summed
from tongyun.cloud.front import Fronts
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.sched.request import Finish, Request
from tongyun.errors import ServiceError

LATE_S, SAID_EACH_S = 0.02, 10.0
"""Behind its fleet by more than this, the twin says so in its log, this often at most."""
KEPT = 64
"""Records of ended requests that an engine may have: nobody asks for them here."""
LOOKS_S = 3600.0
"""The longest that the twin sleeps: a failure may be due in more years than a lock can wait."""

_log = logging.getLogger(__name__)


Watch = Callable[[Turn], None]
Lost = Callable[[RequestRecord], None]


class Paced(Protocol):
    """What a twin keeps pace with: engines behind their routers, and who changes them."""

    @property
    def front(self) -> Fronts: ...

    def forget(self, but: Collection[str]) -> None:
        """Drop what is remembered of requests that have ended, but for these."""


class Twin:
    """A gateway's `Engine`: a simulated fleet in wall time."""

    def __init__(
        self,
        start: Callable[[tuple[Watch, Watch], Lost], Paced],
        sink: Sink,
        *,
        grace_s: float = 0.0,
        client_s: float = 0.0,
    ) -> None:
        """`start` puts the fleet together, whose engines tell every step to the watch of first pools or of
        second ones, and who is lost to the third.

        A step waits `grace_s` before it is simulated, for requests that had arrived when it
        began and are still being read. `client_s` is what a client and HTTP take for a first
        token by themselves: half of it a request is taken to have come earlier, and by the other
        half its tokens leave before their time. Grace and client together are less than the
        shortest step, or tokens come late. Loops have virtual clocks at zero, which is now, and
        executors without foresight: what is leapt over could not be told.
        """
        self._origin_s = time.perf_counter()
        self._sink, self._way_s = sink, client_s / 2
        self._grace_s = grace_s + self._way_s
        # Held by whoever moves the engines or looks at them.
        self._moving = Lock()
        self._paced = start((self._first, self._rest), self._lost)
        self._fleet = self._paced.front
        self._coming: list[tuple[float, int, Request]] = []
        self._done_s = 0.0
        """Every step that begins before is simulated."""
        self._due: list[tuple[float, int, list[TokenEvent]]] = []
        self._serial = 0
        self._said_s = -SAID_EACH_S
        self._changed = Condition()
        # All below belong to whoever holds `_changed`. A string in the inbox is an abort.
        self._inbox: list[Request | str] = []
        self._in_flight: set[str] = set()
        self._closing = False
        self._failure: BaseException | None = None
        self._thread = Thread(target=self._run, name="tongyun-twin", daemon=True)
        self._thread.start()

    def now(self) -> float:
        """Seconds since the start, the engines' and the wall's."""
        return time.perf_counter() - self._origin_s

    def submit(self, request: Request) -> None:
        """Let a request arrive; RequestError if the fleet could never run it.

        Its `arrival_s` is when it reached this process, by `time.perf_counter`.
        """
        # Made-up tokens end nothing.
        request = replace(request, stop_token_ids=frozenset())
        self._fleet.check(request)
        with self._changed:
            if self._failure is not None:
                raise ServiceError(f"the twin has stopped: {self._failure}") from self._failure
            if self._closing:
                raise ServiceError("the twin is shutting down")
            self._in_flight.add(request.id)
            sent_s = request.arrival_s - self._origin_s - self._way_s
            self._inbox.append(replace(request, arrival_s=sent_s))
            self._changed.notify_all()

    def abort(self, request_id: str) -> None:
        with self._changed:
            if request_id in self._in_flight:
                self._inbox.append(request_id)
                self._changed.notify_all()

    def stats(self) -> EngineStats:
        """Of all engines together; what the step in progress will have done counts as done."""
        with self._moving:
            return summed([one.loop.stats() for front in self._fleet.fronts for one in front.instances])

    @property
    def failure(self) -> BaseException | None:
        """What ended the twin before its time; None while it lives."""
        return self._failure

    def close(self) -> None:
        """Abort what is left and end the thread; a second call does nothing."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    # ── the thread ───────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        # A bug in here or in a policy: nobody may wait for a twin that is gone.
        except BaseException as error:
            _log.exception("the twin stopped")
            with self._changed:
                self._failure = error
            self._end_all(Finish.ERROR, f"the twin has stopped: {error}")

    def _turn(self) -> bool:
        """Wait for a moment or a request, tell what is due, simulate what begins; False when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._closing, self._wait_s())
            items, closing = self._inbox, self._closing
            self._inbox = []
            now_s = self.now()
        self._tell(now_s)
        if closing:
            self._end_all(Finish.ABORT, None)
            return False
        with self._moving:
            for item in items:
                if isinstance(item, str):
                    self._abort(item)
                else:
                    self._serial += 1
                    # What is simulated stays: a request that took too long to read comes late.
                    arrival_s = max(item.arrival_s, self._done_s)
                    heappush(self._coming, (arrival_s, self._serial, replace(item, arrival_s=arrival_s)))
            self._simulate(max(now_s - self._grace_s, self._done_s))
        return True

    def _wait_s(self) -> float | None:
        """Until something is to be told or simulated; None where nothing is under way."""
        moments = [self._due[0][0]] if self._due else []
        begins = [self._coming[0][0]] if self._coming else []
        if (next_s := self._fleet.next_s()) is not None:
            begins.append(next_s)
        begins += [
            one.loop.clock.now() for front in self._fleet.fronts for one in front.instances if one.in_flight
        ]
        if begins:
            moments.append(min(begins) + self._grace_s)
        return min(max(0.0, min(moments) - self.now()), LOOKS_S) if moments else None

    def _tell(self, now_s: float) -> None:
        """Hand the sink what has come to pass."""
        told: list[TokenEvent] = []
        while self._due and self._due[0][0] <= now_s:
            moment_s, _, events = heappop(self._due)
            self._judge(now_s - moment_s, now_s)
            told += events
        self._report(told)

    def _judge(self, late_s: float, now_s: float) -> None:
        if late_s > LATE_S and now_s - self._said_s > SAID_EACH_S:
            self._said_s = now_s
            _log.warning(
                "the twin is %.0f ms behind its fleet: this machine is too slow or too busy for the load, "
                "and what is measured on it is too long",
                late_s * 1e3,
            )

    def _simulate(self, until_s: float) -> None:
        """Every arrival up to that moment, and every step that begins before it."""
        while self._coming and self._coming[0][0] <= until_s:
            self._fleet.send(heappop(self._coming)[2])
        self._fleet.advance(until_s)
        self._done_s = until_s
        most = 2 * len(self._in_flight) + KEPT
        if any(len(one.records) > most for front in self._fleet.fronts for one in front.instances):
            with self._changed:
                left = frozenset(self._in_flight)
            self._paced.forget(left)

    def _first(self, done: Turn) -> None:
        """A step of a first pool: what ends there goes on in the second, if there is one and one token was
        not all."""
        self._push(done.moment_s, [self._going_on(event) for event in done.events()])

    def _going_on(self, event: TokenEvent) -> TokenEvent:
        if event.finish is None or not self._fleet.goes_on(event.request_id):
            return event
        return event._replace(finish=None)

    def _rest(self, done: Turn) -> None:
        self._push(done.moment_s, done.events())

    def _lost(self, record: RequestRecord) -> None:
        """A request has no engine any more, and gets none."""
        end = TokenEvent(record.id, None, record.ended_s, Finish.ERROR, error=record.error)
        self._push(record.ended_s, [end])

    def _push(self, moment_s: float, events: list[TokenEvent]) -> None:
        self._serial += 1
        heappush(self._due, (moment_s - self._way_s, self._serial, events))

    def _abort(self, request_id: str) -> None:
        """A step that has begun still takes its time; what it yields for the request is nobody's."""
        self._coming = sorted(entry for entry in self._coming if entry[2].id != request_id)
        self._fleet.abort(request_id)
        self._report([TokenEvent(request_id, None, self.now(), Finish.ABORT)])

    def _end_all(self, finish: Finish, error: str | None) -> None:
        with self._changed:
            left = sorted(self._in_flight)
        self._report([TokenEvent(one, None, self.now(), finish, error=error) for one in left])

    def _report(self, events: list[TokenEvent]) -> None:
        with self._changed:
            events = [event for event in events if event.request_id in self._in_flight]
            ended = {event.request_id for event in events if event.finish is not None}
            self._in_flight -= ended
        if not events:
            return
        try:
            self._sink(events)
        # A reader that went away (its event loop closed) must not stop the others.
        except Exception:
            _log.exception("the reader of the twin's events failed")
