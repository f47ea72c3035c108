"""Move running requests between living engines, and count what it took.

The gateway's part in a move: the policy that a simulated fleet asks is asked here at intervals, letters
of one engine go on to the other, and whose a request is changes the moment it is told to have departed.
Whatever ends a move early leaves the request where it is, or with who it was given to: the other side
forgets it. An engine has part in one move at a time. Knows no thread and no line; whoever calls it sees to
it that nobody else does.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tongyun.cloud.engine.letters import (
    Arrive,
    Departed,
    Down,
    Expect,
    Give,
    Landed,
    Ready,
    Refused,
    Release,
    Slice,
    Stay,
    Stayed,
    Taken,
    Up,
)
from tongyun.cloud.engine.protocol import PAUSES_S, MoveStats
from tongyun.cloud.sched.freeness import Load
from tongyun.cloud.sched.migrate import MigrationPolicy, Movable

OUTCOMES = ("migrated", "rescheduled", "recomputed", "called off")
"""The words of `cloud.migration.Move`; no copy is torn, for the memory outlives the source."""

_log = logging.getLogger(__name__)


class Fleet(Protocol):
    """The engines, and whose each request is (`replicas.Replicas`)."""

    def up(self) -> list[int]:
        """Engines that live."""

    def load(self, index: int) -> Load:
        """What one has to do."""

    def head(self, index: int) -> Movable | None:
        """Who is admitted next there, of those that are its own."""

    def decoding(self, index: int) -> Iterable[Movable]:
        """Who has had a token of it."""

    def tell(self, index: int, letter: Down) -> None: ...

    def hand_over(self, target: int, letter: Arrive) -> bool:
        """Make a request the target's; false where that takes nothing, and it goes on elsewhere or ends."""

    def take_back(self, index: int, request_id: str) -> None:
        """Have a request of this engine go on somewhere that has left it and is awaited by no other."""


@dataclass
class _Move:
    request_id: str
    source: int
    target: int
    stages: int = 0
    left_s: float | None = None
    """When its last step at the source had ended, once it has left."""
    computed: int = 0
    """Tokens with keys and values that it left with."""


class Mover:
    """Carries a policy out."""

    def __init__(self, fleet: Fleet, policy: MigrationPolicy) -> None:
        self._fleet, self._policy = fleet, policy
        self._moves: dict[int, _Move] = {}
        self._serial = 0
        self._outcomes: Counter[str] = Counter()
        self._nbytes, self._downtime_s = 0, 0.0
        self._downtimes = [0] * (len(PAUSES_S) + 1)

    @property
    def stats(self) -> MoveStats:
        """What became of moves since the start."""
        return MoveStats(
            outcomes={name: self._outcomes[name] for name in OUTCOMES},
            nbytes=self._nbytes,
            downtime_s=self._downtime_s,
            downtimes=tuple(sum(self._downtimes[: end + 1]) for end in range(len(self._downtimes))),
        )

    def tick(self) -> None:
        """Look who should give and who take, and who has ended."""
        up = set(self._fleet.up())
        for number, move in list(self._moves.items()):
            if move.target not in up or (move.source not in up and move.left_s is None):
                self._call_off(number, move)
        self._reschedule()
        for source, target in self._pairs():
            loads = self._fleet.load(source), self._fleet.load(target)
            chosen = self._policy.choose(self._fleet.decoding(source), *loads)
            if chosen is not None:
                self._begin(chosen, source, target)

    def read(self, index: int, letters: Sequence[Up]) -> None:
        """What an engine says of moves, in order."""
        for letter in letters:
            move = self._moves.get(letter.move)
            if move is not None:
                self._heed(letter, move)
            elif isinstance(letter, Departed):
                # Called off, and told too late.
                self._fleet.take_back(index, letter.traveller.request.id)

    # ── who ──────────────────────────────────────────────────────────────────────────

    def _pairs(self) -> list[tuple[int, int]]:
        """Engines that give and those that take; without those that already have part in a move."""
        busy = {index for move in self._moves.values() for index in (move.source, move.target)}
        up = self._fleet.up()
        pairs = self._policy.pairs([self._fleet.load(index) for index in up])
        named = [(up[source], up[target]) for source, target in pairs]
        return [(source, target) for source, target in named if not busy & {source, target}]

    def _reschedule(self) -> None:
        """Send on, from engines that give, those that they would admit next."""
        for source, target in self._pairs():
            head = self._fleet.head(source)
            if head is None:
                continue
            if self._policy.fits(head, self._fleet.load(source), self._fleet.load(target)):
                self._begin(head, source, target)

    def _begin(self, one: Movable, source: int, target: int) -> None:
        self._serial += 1
        self._moves[self._serial] = _Move(one.id, source, target)
        block_tokens = self._fleet.load(target).room().block_tokens
        blocks = -(-(one.tokens + 1) // block_tokens)
        self._fleet.tell(target, Expect(self._serial, one.id, blocks))

    # ── what becomes of it ───────────────────────────────────────────────────────────

    def _heed(self, letter: Up, move: _Move) -> None:
        match letter:
            case Ready():
                stages, last_tokens = self._policy.stages, self._policy.last_tokens
                asked = Give(letter.move, move.request_id, letter.granted, stages, last_tokens)
                self._fleet.tell(move.source, asked)
            case Slice():
                move.stages += 1
                self._nbytes += letter.nbytes
                self._fleet.tell(move.target, letter)
            case Taken():
                self._fleet.tell(move.source, letter)
            case Departed():
                self._hand_over(letter, move)
            case Landed():
                self._land(letter, move)
            case Stayed():
                self._fleet.tell(move.target, Release(letter.move))
                self._end(letter.move, move, "called off")
            case Refused():
                self._fleet.tell(move.source, Stay(letter.move))
                self._end(letter.move, move, f"called off: {letter.why}")

    def _hand_over(self, letter: Departed, move: _Move) -> None:
        if letter.last is not None:
            move.stages += 1
            self._nbytes += letter.last.nbytes
        move.left_s, move.computed = letter.moment_s, letter.traveller.computed
        if not self._fleet.hand_over(move.target, Arrive(letter.move, letter.traveller, letter.last)):
            self._fleet.tell(move.target, Release(letter.move))
            self._end(letter.move, move, "recomputed" if move.computed else "called off")

    def _land(self, letter: Landed, move: _Move) -> None:
        pause_s = 0.0 if move.left_s is None else letter.moment_s - move.left_s
        if letter.decodes:
            self._downtime_s += pause_s
            self._downtimes[bisect_left(PAUSES_S, pause_s)] += 1
        outcome = "migrated" if letter.decodes else "recomputed" if move.computed else "rescheduled"
        self._end(letter.move, move, outcome, pause_s)
        if outcome == "rescheduled":
            # Many may wait, and each takes a moment.
            self._reschedule()

    def _call_off(self, number: int, move: _Move) -> None:
        """Tell both sides that nothing comes of it, where they live to hear it."""
        self._fleet.tell(move.source, Stay(number))
        self._fleet.tell(move.target, Release(number))
        self._end(number, move, "recomputed" if move.computed else "called off")

    def _end(self, number: int, move: _Move, what: str, pause_s: float = 0.0) -> None:
        del self._moves[number]
        outcome = what.partition(":")[0]
        self._outcomes[outcome] += 1
        _log.debug(
            "request %s, %d to %d: %s; %d tokens in %d slices, pause %.1f ms",
            *(move.request_id, move.source, move.target, what, move.computed, move.stages, pause_s * 1e3),
        )
