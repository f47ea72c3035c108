"""Move running requests between the engines of a simulated fleet, and record what it took.

A request decodes on while its keys and values are copied, in stages: all there are, then what came
about meanwhile, until little is left. Only for the last copy it pauses. Blocks are reserved at the
target first; where they run out or go to others, or the request ends or is preempted, the move is called
off and nothing has changed. Copying takes no time of a step. An engine that is given no more requests gives
all it has, one after the other. One that fails takes along what it was sending; what was on its way to
it goes back, to be computed again. In a pool that only decodes, who waits takes along what was handed
over. Whether to move is the policy's to say; knows no price but the function it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Series
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.front import Front
from tongyun.cloud.instance import Instance, Simulated, Torn, lost
from tongyun.cloud.latency import Percentiles
from tongyun.cloud.sched.migrate import MigrationPolicy, Movable
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.router import Router
from tongyun.cloud.ticks import Ticks

OUTCOMES = ("migrated", "rescheduled", "prompt", "recomputed", "called off", "torn")


class Move(NamedTuple):
    """What became of one decision to move a request, in order of its end."""

    moment_s: float
    request_id: str
    source: int
    target: int
    outcome: str
    """`migrated` while it decoded; `rescheduled` while it waited, a `prompt` to be computed where others
    decode; `called off`, and it stayed; `recomputed`:
    its blocks at the target were given to others during the last copy, or the target failed and it went
    back; `torn`: the source failed during the last copy."""
    tokens: int
    """Keys and values copied, in tokens, those of moves called off included."""
    stages: int
    downtime_s: float
    """From the end of its last step at the source to the beginning of its next at the target."""


@dataclass(frozen=True, kw_only=True)
class Moves:
    """All moves of a run."""

    migrated: int
    rescheduled: int
    prompts: int
    """Waiting, from one engine that only prefills to another."""
    recomputed: int
    called_off: int
    torn: int
    """Of those that then were sent again or lost."""
    moved_bytes: float
    """Keys and values of all ranks."""
    downtime_s: Percentiles | None
    """Of those migrated."""

    @classmethod
    def of(cls, log: Iterable[Move], token_bytes: float) -> Moves:
        """Those of one pool, with so many bytes of keys and values a token."""
        return cls.total([(log, token_bytes)])

    @classmethod
    def total(cls, logs: Iterable[tuple[Iterable[Move], float]]) -> Moves:
        """Those of several pools, each with the bytes of its tokens."""
        moves: list[Move] = []
        moved_bytes = 0.0
        for log, token_bytes in logs:
            own = list(log)
            moves += own
            moved_bytes += token_bytes * sum(move.tokens for move in own)
        counts = dict.fromkeys(OUTCOMES, 0)
        for move in moves:
            counts[move.outcome] += 1
        return cls(
            migrated=counts["migrated"],
            rescheduled=counts["rescheduled"],
            prompts=counts["prompt"],
            recomputed=counts["recomputed"],
            called_off=counts["called off"],
            torn=counts["torn"],
            moved_bytes=moved_bytes,
            downtime_s=Percentiles.of(move.downtime_s for move in moves if move.outcome == "migrated"),
        )


class Moving(Protocol):
    """Who moves the requests of one pool."""

    log: list[Move]
    front: Front

    def strike(self, engines: Collection[int], now_s: float) -> list[tuple[int, Torn]]:
        """These have failed: moves to and from them end. Returns who left one of them and comes nowhere."""


@dataclass
class _Flight:
    """A move under way."""

    request_id: str
    source: int
    target: int
    copied: int = 0
    """Tokens whose keys and values are at the target by the end of the stage under way."""
    stages: int = 0
    blocks: tuple[Series[int], Series[int]] = ((), ())
    """Those copied from and those copied to: lists that change while they are the request's."""
    left_s: float = 0.0
    """When it left the source, once it has."""


class Mover:
    """Carries a policy out on the engines behind a front, which may be one of several."""

    def __init__(self, front: Front, policy: MigrationPolicy, copy_s: Callable[[int], float]) -> None:
        """`copy_s`: seconds for the keys and values of so many tokens from one engine to another."""
        self.log: list[Move] = []
        self.front, self._policy, self._copy_s = front, policy, copy_s
        self._flights: dict[str, _Flight] = {}
        self._ticks = Ticks(front, policy.interval_s, self._look)

    def strike(self, engines: Collection[int], now_s: float) -> list[tuple[int, Torn]]:
        """These have failed: moves to and from them end. Returns who left one of them and comes nowhere."""
        found = []
        for flight in list(self._flights.values()):
            if flight.source not in engines and flight.target not in engines:
                continue
            self._engines[flight.target].single.scheduler.give_up(flight.request_id)
            passage = self.front.between.pop(flight.request_id, None)
            if passage is None:
                self._end(flight, "called off", now_s, 0.0)
            elif flight.source in engines:
                found.append((flight.source, lost(passage)))
                self._end(flight, "torn", now_s, 0.0)
            else:
                self._engines[flight.source].arrive(passage)
                outcome = "recomputed" if passage.traveller.computed else "called off"
                self._end(flight, outcome, now_s, now_s - flight.left_s)
        return found

    def _look(self, now_s: float) -> bool:
        while self._reschedule(now_s):
            pass
        for source, target in self._pairs():
            if self._idle(source, target):
                self._migrate(source, target, now_s)
        return any(one.in_flight for one in self._engines) or bool(self._flights)

    @property
    def _engines(self) -> list[Instance]:
        return self.front.instances

    def _pairs(self) -> list[tuple[int, int]]:
        """Who gives and who takes; from one that has failed nothing can be had."""
        alive = [index for index, one in enumerate(self._engines) if not one.failed]
        pairs = self._policy.pairs([self._engines[index].load for index in alive])
        return [(alive[source], alive[target]) for source, target in pairs]

    # ── those who wait ───────────────────────────────────────────────────────────────

    def _reschedule(self, now_s: float) -> bool:
        """Send on, from each engine that gives, the request it would admit next; whether any went."""
        went = False
        for source, target in self._pairs():
            head = self._engines[source].single.scheduler.head()
            if head is not None and self._fits(head, source, target):
                went |= self._send_on(head, source, target, now_s)
        return went

    def _fits(self, one: Movable, source: int, target: int) -> bool:
        return self._policy.fits(one, self._engines[source].load, self._engines[target].load)

    def _send_on(self, head: Movable, source: int, target: int, now_s: float) -> bool:
        if head.id in self._flights or not self._reserve(target, head.id, head.tokens):
            return False
        flight = self._begin(head.id, source, target)
        flight.copied = head.handed
        self._depart(flight, head.handed, max(now_s, self._clock_s(source)))
        return True

    # ── those who decode ─────────────────────────────────────────────────────────────

    def _migrate(self, source: int, target: int, now_s: float) -> None:
        engines = self._engines
        decoding = engines[source].single.scheduler.movables()
        chosen = self._policy.choose(decoding, engines[source].load, engines[target].load)
        if chosen is None or not self._reserve(target, chosen.id, chosen.tokens):
            return
        flight = self._begin(chosen.id, source, target)
        self._copy(flight, chosen.tokens - 1, max(now_s, self._clock_s(source)))

    def _copy(self, flight: _Flight, computed: int, from_s: float) -> None:
        """A stage: what is computed and not copied, while the request decodes on."""
        missing = computed - flight.copied
        flight.stages += 1
        flight.copied = computed
        flight.blocks = self._blocks(flight)
        moment_s = from_s + self._copy_s(missing)
        self.front.at(moment_s, lambda: self._copied(flight, moment_s))

    def _copied(self, flight: _Flight, now_s: float) -> None:
        if not self._under_way(flight):
            return
        one = self._engines[flight.source].single.scheduler.movable(flight.request_id)
        if (
            one is None
            or not one.decoding
            or one.tokens <= flight.copied
            or not self._engines[flight.target].up
            or not self._in_place(flight)
            or not self._reserve(flight.target, one.id, one.tokens)
        ):
            self._engines[flight.target].single.scheduler.give_up(flight.request_id)
            self._end(flight, "called off", now_s, 0.0)
            return
        now_s = max(now_s, self._clock_s(flight.source))
        missing = one.tokens - 1 - flight.copied
        if missing > self._policy.last_tokens and flight.stages < self._policy.stages:
            self._copy(flight, one.tokens - 1, now_s)
            return
        flight.stages += 1
        flight.copied += missing
        self._depart(flight, missing, now_s)

    def _blocks(self, flight: _Flight) -> tuple[Series[int], Series[int]]:
        source, target = (self._engines[index].single.scheduler for index in (flight.source, flight.target))
        return source.held(flight.request_id), target.reserved(flight.request_id)

    def _in_place(self, flight: _Flight) -> bool:
        """Whether the last stage's blocks are the request's still: what is taken after all were given away,
        by a request that was preempted or by those who run at the target, makes another list."""
        return all(now is then for now, then in zip(self._blocks(flight), flight.blocks, strict=True))

    def _depart(self, flight: _Flight, missing: int, now_s: float) -> None:
        """Take the request from its engine, and let it arrive when the last tokens are copied."""
        flight.left_s = now_s
        self.front.between[flight.request_id] = self._engines[flight.source].depart(flight.request_id)
        moment_s = now_s + self._copy_s(missing)
        self.front.at(moment_s, lambda: self._land(flight, moment_s))

    def _land(self, flight: _Flight, now_s: float) -> None:
        if not self._under_way(flight):
            return
        passage = self.front.between.pop(flight.request_id, None)
        if passage is None:
            # Its reader has gone.
            self._engines[flight.target].single.scheduler.give_up(flight.request_id)
            self._end(flight, "called off", now_s, 0.0)
            return
        decodes = self._engines[flight.target].arrive(passage)
        arrived_s = self._clock_s(flight.target)
        outcome = "migrated" if decodes else "recomputed" if passage.traveller.computed else "rescheduled"
        self._end(flight, outcome, arrived_s, arrived_s - flight.left_s)

    def _drain(self, source: int, now_s: float) -> None:
        """The next one at once, where an engine is given no more requests and gives all it has."""
        one = self._engines[source]
        if one.up or one.failed or not one.in_flight:
            return
        for giver, target in self._pairs():
            if giver == source and self._idle(source, target):
                self._migrate(source, target, now_s)

    # ── both ─────────────────────────────────────────────────────────────────────────

    def _reserve(self, index: int, request_id: str, tokens: int) -> bool:
        scheduler = self._engines[index].single.scheduler
        block_tokens = scheduler.config.block_tokens
        return scheduler.reserve(request_id, -(-(tokens + 1) // block_tokens))

    def _clock_s(self, index: int) -> float:
        return self._engines[index].loop.clock.now()

    def _idle(self, *engines: int) -> bool:
        """Whether no keys and values are on their way to or from any of these."""
        return not any(self._engines[index].moves for index in engines)

    def _begin(self, request_id: str, source: int, target: int) -> _Flight:
        for index in (source, target):
            self._engines[index].moves += 1
        flight = self._flights[request_id] = _Flight(request_id, source, target)
        return flight

    def _under_way(self, flight: _Flight) -> bool:
        """False once it has ended; another move of the request may have begun since."""
        return self._flights.get(flight.request_id) is flight

    def _end(self, flight: _Flight, outcome: str, moment_s: float, downtime_s: float) -> None:
        del self._flights[flight.request_id]
        for index in (flight.source, flight.target):
            one = self._engines[index]
            one.moves -= 1
            one.ended_s = max(one.ended_s, self.front.now_s)
        self.log.append(
            Move(
                moment_s,
                flight.request_id,
                flight.source,
                flight.target,
                outcome,
                flight.copied,
                flight.stages,
                downtime_s,
            )
        )
        if outcome != "called off":
            self._drain(flight.source, self.front.now_s)


def play_migrating(
    requests: Iterable[Request],
    loops: Iterable[EngineLoop],
    router: Router,
    policy: MigrationPolicy,
    copy_s: Callable[[int], float],
) -> tuple[list[Simulated], list[Move]]:
    """As `play_fleet`, with requests moved between engines as `policy` says; and all moves."""
    front = Front(loops, router)
    mover = Mover(front, policy, copy_s)
    for request in requests:
        front.send(request)
    front.advance(float("inf"))
    return [one.result() for one in front.instances], mover.log
