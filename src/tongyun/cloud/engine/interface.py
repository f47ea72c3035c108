"""What an engine is asked to do, and what it says of its turns.

A turn is one step that ran, a leap are steps foreseen; either says who ended and when. Whoever
drives an engine, or stands behind one, needs no more of it than this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from tongyun.cloud.engine.protocol import Clock, EngineStats, StepResult, Tape, TokenEvent
from tongyun.cloud.sched.freeness import Room
from tongyun.cloud.sched.request import Batch, Finish, Piece, Request
from tongyun.errors import ServiceError


class StepError(ServiceError):
    """An executor failed; the requests of its batch have ended, and `events` says so."""

    def __init__(self, message: str, events: list[TokenEvent]) -> None:
        super().__init__(message)
        self.events = events


class Turn(NamedTuple):
    """One step: what ran, what came of it, who ended, and when that was."""

    batch: Batch
    result: StepResult
    ended: dict[str, Finish]
    moment_s: float

    def events(self) -> list[TokenEvent]:
        """What the step did to each request of its batch."""
        tokens, scores, further = self.result.tokens, self.result.scores or {}, self.result.further
        ended, now_s = self.ended, self.moment_s
        events = []
        for request, _, _, samples, _, _, cached_tokens, *_ in self.batch.pieces:
            if samples:
                one, finish = request.id, ended.get(request.id)
                more = further.get(one, ())
                events.append(
                    TokenEvent(
                        one, tokens[one], now_s, None if more else finish, scores.get(one), cached_tokens
                    )
                )
                for left, token in enumerate(more, 1 - len(more)):
                    events.append(
                        TokenEvent(one, token, now_s, None if left else finish, None, cached_tokens)
                    )
        return events


class Leap(NamedTuple):
    """Steps foreseen: how many, the prompts' pieces where it is one, who ended with the last, and when."""

    steps: int
    pieces: Sequence[Piece]
    ended: dict[str, Finish]
    moment_s: float


class Engine(Protocol):
    """What a simulated instance drives: an `EngineLoop`, or several behind one clock."""

    tape: Tape | None

    @property
    def clock(self) -> Clock: ...

    @property
    def models(self) -> tuple[tuple[str, int, float], ...]:
        """What there is to do by model, where there are several (see `Load`)."""

    def room(self) -> Room:
        """Blocks and places there are, and those that are asked for."""

    def check(self, request: Request) -> None: ...

    def add(self, request: Request) -> None: ...

    def produced(self, request_id: str) -> int: ...

    def abort(self, request_id: str) -> list[TokenEvent]: ...

    def evict(self, request_id: str) -> Sequence[int]: ...

    def clear(self) -> None: ...

    def leap(self, until_s: float = float("inf")) -> Leap | None: ...

    def turn(self) -> Turn | None: ...

    def stats(self) -> EngineStats: ...
