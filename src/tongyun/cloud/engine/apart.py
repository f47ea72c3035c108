"""An engine and those who ask it, in two processes with a line between them.

Threads of one process take turns at the interpreter: a gateway that sends the tokens of a
step would hold up the next. What goes over the line is a request, an abort or a letter about a
request that moves one way, and a step's events and letters with the engine's state the other, one
message a step. Where a gateway wants to know who hangs, an engine with work also says at intervals that it
goes on: a step of a long prompt may take longer than one should wait. Knows no HTTP, no text and no process.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any, NamedTuple, Protocol

from tongyun.cloud.engine.letters import Arrive, Departed, Down, Up
from tongyun.cloud.engine.live import Item, LiveEngine, Sink, Standing
from tongyun.cloud.engine.protocol import EngineStats, TokenEvent
from tongyun.cloud.sched.freeness import Room
from tongyun.cloud.sched.limits import SchedulerConfig
from tongyun.cloud.sched.migrate import Movable, Traveller
from tongyun.cloud.sched.request import Finish, Request
from tongyun.errors import RequestError, ServiceError, TongyunError

Start = Callable[[Sink], LiveEngine]


class _Report(NamedTuple):
    """What the engine says after a step."""

    events: Sequence[tuple[object, ...]]
    """Of `TokenEvent`s, plain: named ones take three times as long to send."""
    stats: EngineStats
    room: tuple[int, ...]
    """Of a `Room`, plain as well."""
    taken: int
    head: Movable | None
    failure: str | None
    letters: Sequence[Up]
    """Said after the events."""


# ── at the engine ────────────────────────────────────────────────────────────────────


class Attendant:
    """An engine at the far end of a line: does with it what comes, and says what it reports."""

    def __init__(self, line: Connection, start: Start) -> None:
        self._line = line
        # The engine's thread reports, and the line's does where the engine takes nothing any more.
        self._speaking = threading.Lock()
        self._progress: tuple[int, int] | None = None
        # A report may come before the name below is bound: the first work arrives after it.
        self.engine = start(lambda events: self._report(events, self.engine.collect()))

    def give(self, item: Item) -> None:
        """Give the engine what came over the line."""
        try:
            if isinstance(item, str):
                self.engine.abort(item)
            elif isinstance(item, Request):
                self.engine.submit(item)
            elif isinstance(item, Traveller):
                self.engine.resume(item)
            else:
                self.engine.tell(item)
        # The other end checked it, so it is the engine that takes nothing any more.
        except TongyunError as error:
            if isinstance(item, Arrive):
                item = item.traveller
            request = item.request if isinstance(item, Traveller) else item
            assert isinstance(request, Request)
            self._report([TokenEvent(request.id, None, 0.0, Finish.ERROR, error=str(error))])

    def beat(self, interval_s: float, ended: threading.Event) -> None:
        """Say until the end that the engine goes on, as often as it has since the last time."""
        while not ended.wait(interval_s):
            progress = self.engine.progress
            if progress is not None and progress != self._progress:
                with self._speaking:
                    tell(self._line, None)
            self._progress = progress

    def _report(self, events: Sequence[TokenEvent], letters: Sequence[Up] = ()) -> None:
        engine = self.engine
        failure = None if engine.failure is None else str(engine.failure)
        room, taken, head = engine.standing
        plain = [tuple(event) for event in events]
        with self._speaking:
            self._line.send(_Report(plain, engine.stats(), tuple(room), taken, head, failure, letters))


def attend(line: Connection, start: Start, beat_s: float | None = None) -> None:
    """Run an engine for the other end of the line, until that closes it or is gone.

    With `beat_s`, it also gives signs of life that often between reports.
    """
    attendant, ended = Attendant(line, start), threading.Event()
    if beat_s is not None:
        Thread(target=attendant.beat, args=(beat_s, ended), name="tongyun-beat", daemon=True).start()
    try:
        while (item := line.recv()) is not None:
            attendant.give(item)
    except (EOFError, OSError):
        pass
    attendant.engine.close()
    ended.set()
    # Its end tells the other side that nothing more will come.
    line.close()


def tell(line: Line, what: object) -> bool:
    """Say something to the other end; False where it is gone."""
    try:
        line.send(what)
    except OSError:
        return False
    return True


# ── at those who ask ─────────────────────────────────────────────────────────────────


class Line(Protocol):
    """The near end of one (`Connection`)."""

    def send(self, item: Any, /) -> None: ...

    def recv(self) -> Any: ...


class Distant:
    """The near end of a line to an engine: to its users what a `LiveEngine` is.

    Requests are checked here, so that a refusal is told at once. The sink is called on a
    thread that waits for reports.
    """

    def __init__(
        self, line: Line, limits: SchedulerConfig, stats: EngineStats, standing: Standing, sink: Sink
    ) -> None:
        """`stats` and `standing` are those at its start."""
        self._line, self._limits, self._stats, self._sink = line, limits, stats, sink
        # What follows belongs to whoever holds the lock, as does writing to the line.
        self._lock = threading.Lock()
        self._in_flight: set[str] = set()
        self._standing = standing
        # Blocks of those that were sent and are not among the `taken`, the first one's first.
        self._sent: deque[int] = deque()
        self._sends = 0
        self._closing = False
        self._failure: ServiceError | None = None
        self.reads: Callable[[Sequence[Up]], None] | None = None
        """Who is told the letters, on the thread of the sink and after it."""
        self.signs = 0
        """Signs of life: whatever came over the line."""
        self._hearing = False
        self._thread = Thread(target=self._listen, name="tongyun-line", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request; RequestError if it can never run or its id is in flight, ServiceError when the
        engine takes nothing new."""
        self._send(request, request, len(request.prompt))

    def resume(self, traveller: Traveller) -> None:
        """As `submit`, for a request that ran elsewhere: what it knows is computed again, and it goes on."""
        self._send(traveller.request, traveller, len(traveller.history))

    def tell(self, letter: Down) -> None:
        """Say something of a move; as `resume` where that is a request that arrives."""
        if isinstance(letter, Arrive):
            traveller = letter.traveller
            self._send(traveller.request, letter, len(traveller.history))
            return
        with self._lock:
            self._say(letter)

    def _send(self, request: Request, item: Request | Traveller | Arrive, known: int) -> None:
        self._limits.check(request)
        with self._lock:
            if self._failure is not None:
                raise ServiceError(f"the engine has stopped: {self._failure}") from self._failure
            if self._closing:
                raise ServiceError("the engine is shutting down")
            if request.id in self._in_flight:
                raise RequestError(f"request '{request.id}' is already in flight", param="id")
            self._in_flight.add(request.id)
            self._sends += 1
            self._sent.append(-(-known // self._limits.block_tokens))
            self._say(item)

    def abort(self, request_id: str) -> None:
        """End a request and free its blocks before the next step; unknown ids are ignored."""
        with self._lock:
            if request_id in self._in_flight:
                self._say(request_id)

    def stats(self) -> EngineStats:
        """The state after the latest step."""
        return self._stats

    def room(self) -> Room:
        """Blocks and places after the latest step, with those waiting that were sent since."""
        with self._lock:
            room, sent = self._standing.room, self._sent
            if not sent:
                return room
            return room._replace(
                waiting=room.waiting + len(sent),
                head_blocks=room.head_blocks if room.waiting else sent[0],
                waiting_blocks=room.waiting_blocks + sum(sent),
            )

    @property
    def head(self) -> Movable | None:
        """Who waits and is admitted next, after the latest step; told where requests move."""
        return self._standing.head

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine before its time; None while it lives."""
        return self._failure

    @property
    def awaited(self) -> bool:
        """Whether a sign of life is due: there is work, and nobody here is still at the last report."""
        return bool(self._in_flight) and not self._hearing

    def outlive(self) -> None:
        """Wait until it has ended by itself and everybody was told."""
        self._thread.join()

    def close(self) -> None:
        """Abort what is left and wait for the engine's end; a second call does nothing."""
        with self._lock:
            if not self._closing:
                self._closing = True
                self._say(None)
        self._thread.join()

    def _say(self, item: Item | None) -> None:
        # Of an engine that is gone the listener learns as well, and it tells everybody.
        tell(self._line, item)

    def _listen(self) -> None:
        try:
            while True:
                said = self._line.recv()
                self.signs += 1
                if said is not None:
                    self._hearing = True
                    self._hear(said)
                    self._hearing = False
        except (EOFError, OSError):
            self._ended()

    def _hear(self, report: _Report) -> None:
        self._stats = report.stats
        with self._lock:
            self._standing = Standing(Room._make(report.room), report.taken, report.head)
            while len(self._sent) > self._sends - report.taken:
                self._sent.popleft()
        self._pass_on([TokenEvent._make(event) for event in report.events], report.failure)
        if report.letters and self.reads is not None:
            gone = {one.traveller.request.id for one in report.letters if isinstance(one, Departed)}
            with self._lock:
                self._in_flight -= gone
            self.reads(report.letters)

    def _pass_on(self, events: Sequence[TokenEvent], failure: str | None) -> None:
        if failure is not None:
            self._failure = ServiceError(failure)
        if events:
            self._sink(events)
        ended = {event.request_id for event in events if event.finish is not None}
        if ended:
            with self._lock:
                self._in_flight -= ended

    def _ended(self) -> None:
        """The line is closed: as asked for, or because the engine's process died."""
        with self._lock:
            left = sorted(self._in_flight)
            if not self._closing and self._failure is None:
                self._failure = ServiceError("the engine's process ended")
        message = f"the engine has stopped: {self._failure or 'closed'}"
        self._pass_on([TokenEvent(one, None, 0.0, Finish.ERROR, error=message) for one in left], None)
