"""Several engines that are one to the gateway: who is given a request, and what becomes of it when one dies.

The router is the policy that a simulated fleet asks. It is told what is in flight here, and the
blocks of each engine's latest report with those added that were sent since. A replica that ends is given
nothing more; what it had goes on at another, with the tokens that were streamed as a part of what
is computed there first, once: a request whose second engine ends too ends with it. With a keeper another
takes its place (`keeper`); with a policy, running requests move between those that live (`moves`). Knows
no process.
"""

from __future__ import annotations

import logging
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from tongyun.cloud.engine.keeper import Keeper
from tongyun.cloud.engine.letters import Arrive, Down, Up
from tongyun.cloud.engine.live import Sink
from tongyun.cloud.engine.moves import Mover
from tongyun.cloud.engine.protocol import EngineStats, ReplicaStats, TokenEvent, summed
from tongyun.cloud.engine.replica import Replica
from tongyun.cloud.sched.freeness import Load
from tongyun.cloud.sched.migrate import MigrationPolicy, Movable, Traveller
from tongyun.cloud.sched.prefix import row
from tongyun.cloud.sched.request import Finish, Request
from tongyun.cloud.sched.router import Remembering, Router
from tongyun.errors import RequestError, ServiceError

_log = logging.getLogger(__name__)


GRACE_S = 10.0
"""For replicas to end when all do; with a keeper, who hangs is killed then."""


@dataclass
class Flight:
    """A request that has come and not ended."""

    request: Request
    at: int
    """The replica that has it."""
    known: array[int]
    """Prompt and tokens streamed."""
    cached_tokens: int = 0
    lives: int = 1
    """How many engines may still end under it before it ends as well."""
    aborted: bool = False

    @property
    def streamed(self) -> int:
        return len(self.known) - len(self.request.prompt)

    @property
    def movable(self) -> Movable:
        return Movable(self.request.id, self.request.priority, self.streamed > 0, len(self.known))


@dataclass
class Seat:
    """What the requests in flight at one replica are, for its load."""

    flights: dict[str, Flight] = field(default_factory=dict)
    prompt_tokens: int = 0
    """Of those without a token."""
    classes: Counter[str] = field(default_factory=Counter)

    def add(self, flight: Flight) -> None:
        self.flights[flight.request.id] = flight
        self._count(flight, 1)

    def remove(self, flight: Flight) -> None:
        del self.flights[flight.request.id]
        self._count(flight, -1)

    def _count(self, flight: Flight, sign: int) -> None:
        if not flight.streamed:
            self.prompt_tokens += sign * len(flight.request.prompt)
        if flight.request.priority_class is not None:
            self.classes[flight.request.priority_class] += sign


class Replicas:
    """A gateway's `Engine`. The sink is called on the threads of the replicas, in order for each request."""

    def __init__(
        self,
        starts: Sequence[Callable[[Sink], Replica]],
        router: Router,
        sink: Sink,
        *,
        policy: MigrationPolicy | None = None,
        keep: Callable[[Replicas], Keeper] | None = None,
    ) -> None:
        """`keep` makes the keeper of these engines, which is started here."""
        self._router, self._sink = router, sink
        # Seats, flights and the router belong to whoever holds it; it is taken before a replica's own.
        self._lock = threading.RLock()
        self._flights: dict[str, Flight] = {}
        self._seats = [Seat() for _ in starts]
        self._buried: set[int] = set()
        self._engines = [start(partial(self._heard, index)) for index, start in enumerate(starts)]
        self._mover: Mover | None = None
        # Who found no place, until the sink is told.
        self._stranded: list[TokenEvent] = []
        self._closing = threading.Event()
        # What was counted by those whose place another has taken.
        self._past: list[EngineStats] = []
        self._keeper = None if keep is None else keep(self)
        if policy is not None:
            self._mover = Mover(self, policy)
            for index, engine in enumerate(self._engines):
                engine.reads = partial(self._read, index)
            watch = partial(self._watch, self._mover, policy.interval_s)
            threading.Thread(target=watch, name="tongyun-moves", daemon=True).start()
        if self._keeper is not None:
            self._keeper.start()

    def submit(self, request: Request) -> None:
        """Give a request to the replica that the router names; RequestError if it could never run or its id
        is in flight, ServiceError where none lives."""
        with self._lock:
            if request.id in self._flights:
                raise RequestError(f"request '{request.id}' is already in flight", param="id")
            self._place(Flight(request, 0, row(request.prompt)))

    def abort(self, request_id: str) -> None:
        """End a request wherever it is; unknown ids are ignored."""
        with self._lock:
            flight = self._flights.get(request_id)
            if flight is not None:
                flight.aborted = True
                self._engines[flight.at].abort(request_id)

    def stats(self) -> EngineStats:
        """Of all together; those that ended keep what they counted and hold nothing."""
        with self._lock:
            whole = summed([*map(self._stats, self._engines), *self._past])
        moves = None if self._mover is None else self._mover.stats
        return replace(whole, moves=moves, replicas=tuple(map(self._state, range(len(self._engines)))))

    def _state(self, index: int) -> ReplicaStats:
        restarts = {} if self._keeper is None else dict(self._keeper.restarts[index])
        return ReplicaStats(up=self._engines[index].failure is None, restarts=restarts)

    @staticmethod
    def _stats(engine: Replica) -> EngineStats:
        stats = engine.stats()
        if engine.failure is None:
            return stats
        return replace(stats, running=0, waiting=0, kv_blocks_total=0, kv_blocks_used=0, kv_blocks_cached=0)

    @property
    def failure(self) -> BaseException | None:
        """What ended the last of them; None while one lives or is to come."""
        failures = [engine.failure for engine in self._engines]
        if self._keeper is not None and self._keeper.hopeful:
            return None
        return None if None in failures else failures[-1]

    def close(self) -> None:
        """Abort what is left and wait for the ends of all."""
        self._closing.set()
        last = None if self._keeper is None else self._keeper.stop(GRACE_S)
        for engine in self._engines:
            engine.close()
        if last is not None:
            last.cancel()

    # ── starting again ───────────────────────────────────────────────────────────────

    def engine(self, index: int) -> Replica:
        """Who has that number now."""
        return self._engines[index]

    def put(self, index: int, start: Callable[[Sink], Replica]) -> None:
        """Let another take the place of one that has ended, and of whose end all are told."""
        with self._lock:
            self.up()
            if self._mover is not None:
                # Moves that it had part in come to nothing before one of its number can begin others.
                self._mover.tick()
            self._past = [summed([self._stats(self._engines[index]), *self._past])]
            engine = start(partial(self._heard, index))
            if self._mover is not None:
                engine.reads = partial(self._read, index)
            self._engines[index] = engine
            self._buried.discard(index)

    # ── giving ───────────────────────────────────────────────────────────────────────

    def up(self) -> list[int]:
        """The replicas that live; what a router counts on at one that has ended is forgotten."""
        up = []
        for index, engine in enumerate(self._engines):
            if engine.failure is None:
                up.append(index)
            elif index not in self._buried:
                self._buried.add(index)
                if self._keeper is None:
                    _log.error("replica %d has ended: %s", index, engine.failure)
                if isinstance(self._router, Remembering):
                    self._router.forget(index)
        return up

    def load(self, index: int) -> Load:
        """What one has to do."""
        seat, engine = self._seats[index], self._engines[index]
        return Load(len(seat.flights), seat.prompt_tokens, engine.room, seat.classes, engine=index)

    def _place(self, flight: Flight) -> None:
        """Give a request to one that is up; another, where that ends at this very moment."""
        request = flight.request
        while up := self._asked():
            flight.at = up[self._router.choose(request, [self.load(index) for index in up])]
            engine = self._engines[flight.at]
            # Its first token may come before the call returns.
            self._enter(flight)
            try:
                if flight.streamed:
                    engine.resume(Traveller(request, flight.known[:], 0, True, flight.cached_tokens))
                else:
                    engine.submit(request)
                return
            except ServiceError:
                self._leave(flight)
                if engine.failure is None:
                    raise
            except RequestError:
                self._leave(flight)
                raise
        if (failure := self.failure) is None:
            raise ServiceError("no replica is up: each has ended and is to be started again")
        raise ServiceError(f"the engine has stopped: {failure}")

    def _asked(self) -> list[int]:
        """The replicas that may be given a request: who is silent is given none while others speak."""
        up, keeper = self.up(), self._keeper
        if keeper is None:
            return up
        return [index for index in up if not keeper.doubted(index)] or up

    def _enter(self, flight: Flight) -> None:
        self._flights[flight.request.id] = flight
        self._seats[flight.at].add(flight)

    def _leave(self, flight: Flight) -> None:
        del self._flights[flight.request.id]
        self._seats[flight.at].remove(flight)

    # ── hearing ──────────────────────────────────────────────────────────────────────

    def _heard(self, index: int, events: Sequence[TokenEvent]) -> None:
        with self._lock:
            told = [event for event in events if self._note(index, event)]
        if told:
            self._sink(told)

    def _note(self, index: int, event: TokenEvent) -> bool:
        """Keep what an event says; false where its reader need not know."""
        flight = self._flights.get(event.request_id)
        if flight is None or flight.at != index:
            return False
        if event.finish is Finish.ERROR and self._engines[index].failure is not None:
            return not self._rescue(flight)
        if event.token is not None:
            if not flight.streamed:
                self._seats[index].prompt_tokens -= len(flight.request.prompt)
            flight.known.append(event.token)
            flight.cached_tokens = event.cached_tokens
        if event.finish is not None:
            self._leave(flight)
        return True

    def _rescue(self, flight: Flight) -> bool:
        """Have a request go on elsewhere whose engine has ended; false where it ends with it."""
        self._leave(flight)
        if flight.aborted or not flight.lives:
            return False
        flight.lives -= 1
        try:
            self._place(flight)
        except (RequestError, ServiceError):
            return False
        return True

    # ── moving ───────────────────────────────────────────────────────────────────────

    def _watch(self, mover: Mover, interval_s: float) -> None:
        """Look at intervals who should give and who take, until the end."""
        while not self._closing.wait(interval_s):
            with self._lock:
                mover.tick()

    def _read(self, index: int, letters: Sequence[Up]) -> None:
        assert self._mover is not None
        with self._lock:
            self._mover.read(index, letters)
            ended, self._stranded = self._stranded, []
        if ended:
            self._sink(ended)

    def head(self, index: int) -> Movable | None:
        """Who is admitted next at one, after its latest report."""
        head = self._engines[index].head
        return None if head is None or head.id not in self._seats[index].flights else head

    def decoding(self, index: int) -> Iterable[Movable]:
        """Those of one that have been given a token."""
        flights = self._seats[index].flights.values()
        return (flight.movable for flight in flights if flight.streamed and not flight.aborted)

    def tell(self, index: int, letter: Down) -> None:
        """Say something of a move to one."""
        self._engines[index].tell(letter)

    def hand_over(self, target: int, letter: Arrive) -> bool:
        """Make a request the target's that has left another; false where it takes nothing, and the request
        goes on elsewhere."""
        request_id = letter.traveller.request.id
        flight = self._flights.get(request_id)
        if flight is None:
            return False
        self._leave(flight)
        flight.at = target
        # Its next token may come before the call returns.
        self._enter(flight)
        try:
            self._engines[target].tell(letter)
        except (RequestError, ServiceError):
            self.take_back(target, request_id)
            return False
        if flight.aborted:
            self._engines[target].abort(request_id)
        return True

    def take_back(self, index: int, request_id: str) -> None:
        """Have a request of one go on wherever there is room for it; with none it ends."""
        flight = self._flights.get(request_id)
        if flight is None or flight.at != index:
            return
        self._leave(flight)
        try:
            if flight.aborted:
                raise ServiceError("aborted on its way")
            self._place(flight)
        except (RequestError, ServiceError) as error:
            finish = Finish.ABORT if flight.aborted else Finish.ERROR
            self._stranded.append(TokenEvent(request_id, None, 0.0, finish, error=str(error)))
