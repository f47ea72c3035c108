"""What every engine and every request of a simulated run did when, as far as a bound goes.

Takes down stretches of steps and the phases of requests: waiting, prefill, decode, and between pools
the hand-over, between engines the move. What an engine lost waits elsewhere from then on. A window
says which part of the run; a bound on the entries ends it sooner, for all engines at one moment. Knows
no file format; `perfetto` writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from tongyun.cloud.engine.protocol import Stretch
from tongyun.cloud.sched.migrate import Traveller
from tongyun.cloud.sched.request import Finish, Piece, Request
from tongyun.errors import InputError

MOST = 250_000
"""Entries: some 100 MB in memory, and half as much in a file."""
WAITING, PREFILL, DECODE, AGAIN = "waiting", "prefill", "decode", "recompute"
HAND_OVER, MOVING = "hand-over", "moving"


class Phase(NamedTuple):
    """A part of a request's life in one engine."""

    request_id: str
    name: str
    begin_s: float
    end_s: float
    note: str
    """What ended it; empty where the next phase says so, or nobody knows yet."""


class Hand(NamedTuple):
    """A request's keys and values, from one engine to another."""

    request_id: str
    name: str
    """Of the phase in which they went."""
    source: int
    source_s: float
    target: int
    target_s: float


class Schedule:
    """Takes down a run; one for each."""

    def __init__(self, begin_s: float = 0.0, end_s: float = float("inf"), *, most: int = MOST) -> None:
        if not 0 <= begin_s < end_s:
            raise InputError(
                f"a window from {begin_s:g} to {end_s:g} s: accepted: from 0 on, and its end after"
            )
        self.begin_s, self.end_s = begin_s, end_s
        """Of the window; the end comes sooner once there are too many entries."""
        self.engines: list[EngineSchedule] = []
        self.hands: list[Hand] = []
        self._left = most
        self._cut = False
        # Where the first part of a request that goes on elsewhere ended.
        self._prefilled: dict[str, tuple[int, float]] = {}
        # Who was taken from an engine and has not come to another: which, and when.
        self._gone: dict[str, tuple[int, float]] = {}

    @property
    def cut(self) -> bool:
        """Whether the bound came before the window's end."""
        return self._cut

    def pool(self, role: str, engines: int, blocks: int, model: str = "") -> Sequence[EngineSchedule]:
        """A tape for each engine of a pool, which is `model`'s alone where that is said."""
        fresh = [EngineSchedule(self, len(self.engines) + i, role, i, blocks, model) for i in range(engines)]
        self.engines += fresh
        return fresh

    def takes(self, begin_s: float, end_s: float) -> bool:
        """Whether an entry of this time is kept; it counts then."""
        if begin_s >= self.end_s or end_s < self.begin_s:
            return False
        if not self._left:
            self.end_s, self._cut = begin_s, True
            return False
        self._left -= 1
        return True

    def prefilled(self, request_id: str, engine: int, moment_s: float) -> None:
        """A request's prompt is computed, in a pool that only prefills."""
        self._prefilled[request_id] = engine, moment_s

    def left(self, request_id: str, engine: int, moment_s: float) -> None:
        """A request was taken from an engine, to go on at another or nowhere."""
        self._gone[request_id] = engine, moment_s

    def lost_s(self, request_id: str) -> float | None:
        """A request is sent again: when the engine or the way was lost on which it was; None at first."""
        found = self._gone.pop(request_id, None) or self._prefilled.pop(request_id, None)
        return None if found is None else found[1]

    def handed(self, request_id: str, engine: int, moment_s: float) -> float | None:
        """A request has come from another pool; since when it was on its way, None where nobody saw."""
        return self._came(HAND_OVER, self._prefilled.pop(request_id, None), request_id, engine, moment_s)

    def moved(self, request_id: str, engine: int, moment_s: float) -> float | None:
        """The same from another engine of the pool, where it had begun."""
        return self._came(MOVING, self._gone.pop(request_id, None), request_id, engine, moment_s)

    def _came(
        self, name: str, found: tuple[int, float] | None, request_id: str, engine: int, moment_s: float
    ) -> float | None:
        if found is None:
            return None
        if self.takes(found[1], moment_s):
            self.hands.append(Hand(request_id, name, *found, engine, moment_s))
        return found[1]


class EngineSchedule:
    """One engine's part of a schedule."""

    def __init__(
        self, whole: Schedule, number: int, role: str, place: int, blocks: int, model: str = ""
    ) -> None:
        self.number, self.role, self.place, self.blocks, self.model = number, role, place, blocks, model
        self._whole = whole
        self._stretches: list[Stretch] = []
        self._phases: list[Phase] = []
        self.turns: list[tuple[float, bool]] = []
        """Moments from which on the engine is given requests, or is not."""
        self.moves: list[tuple[float, float, bool]] = []
        """Times in which experts went to other ranks, and whether steps stood still for it."""
        self._changes: list[tuple[str, float, float]] = []
        # In flight: the phase it is in, since when, and whether it was preempted before.
        self._live: dict[str, tuple[str, float, bool]] = {}

    def stretches(self) -> Iterator[Stretch]:
        """Steps that begin within the window or reach into it."""
        return (one for one in self._stretches if one.begin_s < self._whole.end_s)

    def changes(self) -> Iterator[tuple[str, float, float]]:
        """Models whose bytes the engine waited for, where several share it, and from when until when."""
        return (one for one in self._changes if one[1] < self._whole.end_s)

    def phases(self) -> Iterator[Phase]:
        """In the order in which they ended; last those under way, up to the end of window or steps."""
        whole = self._whole
        last_s = min(whole.end_s, self._stretches[-1].end_s if self._stretches else whole.begin_s)
        for phase in self._phases:
            if phase.begin_s < whole.end_s:
                yield phase if phase.end_s <= whole.end_s else phase._replace(end_s=whole.end_s, note="")
        for request_id, (name, begin_s, _) in self._live.items():
            if begin_s < last_s and last_s > whole.begin_s:
                yield Phase(request_id, name, begin_s, last_s, "")

    def queued(self, request: Request) -> None:
        lost_s = None if request.handed_tokens else self._whole.lost_s(request.id)
        begin_s = request.arrival_s if lost_s is None else lost_s
        if begin_s >= self._whole.end_s:
            return
        if request.handed_tokens:
            since_s = self._whole.handed(request.id, self.number, request.arrival_s)
            if since_s is not None:
                self._keep(Phase(request.id, HAND_OVER, since_s, request.arrival_s, ""))
        self._live[request.id] = WAITING, begin_s, False

    def arrived(self, traveller: Traveller, moment_s: float, decodes: bool) -> None:
        request_id = traveller.request.id
        since_s = self._whole.moved(request_id, self.number, moment_s)
        if since_s is not None:
            self._keep(Phase(request_id, MOVING, since_s, moment_s, ""))
        if moment_s < self._whole.end_s:
            self._live[request_id] = DECODE if decodes else WAITING, moment_s, traveller.admitted

    def note(self, stretch: Stretch, pieces: Sequence[Piece], ended: Mapping[str, Finish]) -> None:
        begin_s, end_s = stretch.begin_s, stretch.end_s
        if begin_s >= self._whole.end_s:
            return
        if self._whole.takes(begin_s, end_s):
            self._stretches.append(stretch)
        for piece in pieces:
            request_id = piece.request.id
            phase, _, again = self._live.get(request_id, (None, 0.0, False))
            if phase == WAITING:
                phase = AGAIN if again else PREFILL
                self._turn(request_id, phase, begin_s)
            if piece.samples and phase in (PREFILL, AGAIN):
                self._turn(request_id, DECODE, end_s)
        for request_id, finish in ended.items():
            if self.role == "prefill" and finish is Finish.LENGTH:
                self._whole.prefilled(request_id, self.number, end_s)
            self._end(request_id, end_s, finish.value)

    def preempted(self, request_id: str, moment_s: float) -> None:
        if request_id in self._live:
            self._turn(request_id, WAITING, moment_s, "preempted")

    def left(self, request_id: str, moment_s: float) -> None:
        self._end(request_id, moment_s, "taken away")
        self._whole.left(request_id, self.number, moment_s)

    def turned(self, up: bool, moment_s: float) -> None:
        if self._whole.takes(moment_s, moment_s):
            self.turns.append((moment_s, up))

    def moved(self, begin_s: float, end_s: float, standing: bool) -> None:
        if self._whole.takes(begin_s, end_s):
            self.moves.append((begin_s, end_s, standing))

    def changed(self, model: str, begin_s: float, end_s: float) -> None:
        """The engine waited for what a model needs to work."""
        if self._whole.takes(begin_s, end_s):
            self._changes.append((model, begin_s, end_s))

    def _turn(self, request_id: str, name: str, moment_s: float, note: str = "") -> None:
        before, begin_s, again = self._live[request_id]
        self._keep(Phase(request_id, before, begin_s, moment_s, note))
        self._live[request_id] = name, moment_s, again or note == "preempted"

    def _end(self, request_id: str, moment_s: float, note: str) -> None:
        found = self._live.pop(request_id, None)
        if found is not None:
            self._keep(Phase(request_id, found[0], found[1], moment_s, note))

    def _keep(self, phase: Phase) -> None:
        # The token of a prompt alone ends with its prefill: no decode follows.
        if phase.end_s > phase.begin_s and self._whole.takes(phase.begin_s, phase.end_s):
            self._phases.append(phase)
