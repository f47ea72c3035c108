"""One engine on virtual time, and the record of what each of its requests felt.

The scheduler, the loop and the records are those of the live engine. Knows no router
and no other engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from tongyun.cloud.engine.interface import Engine, Turn
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.protocol import EngineStats
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.sched.migrate import Traveller
from tongyun.cloud.sched.request import Finish, Piece, Request
from tongyun.cloud.sched.router import Load
from tongyun.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """One record per request, in the order given, and the engine's counters at the end."""

    records: tuple[RequestRecord, ...]
    stats: EngineStats


class Torn(NamedTuple):
    """A request taken from an engine before its end."""

    request: Request
    """What is left of it: what was streamed has become part of the prompt. It arrived when it arrived."""
    tokens: int
    """Streamed since it was sent."""
    first_s: float | None
    cached_tokens: int
    prompt_tokens: int
    """Of the prompt that it was sent with."""


class _Progress:
    """What has come back of one request so far; `count` misses the tokens of steps foreseen."""

    __slots__ = ("cached", "count", "first_s", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.first_s: float | None = None
        self.count = 0
        self.cached = 0


class Passage(NamedTuple):
    """A request between two engines: what the scheduler knows of it, and what came back of it so far."""

    traveller: Traveller
    progress: _Progress


class Instance:
    """An engine, its requests in flight and the records of those that ended."""

    def __init__(
        self,
        loop: Engine,
        *,
        watch: Callable[[Turn], None] | None = None,
        ended: Callable[[RequestRecord], None] | None = None,
    ) -> None:
        """`watch` is told of every single step, `ended` of every request that is over."""
        self.loop = loop
        self.up = True
        """Whether it is given requests; one that is not still works on those it has."""
        self.failed = False
        """Whether what it has is lost when the step it is in ends."""
        self.moves = 0
        """Requests on their way to or from it, those included that work there meanwhile."""
        self._watch, self._ended = watch, ended
        self.records: dict[str, RequestRecord | None] = {}
        self.in_flight: dict[str, _Progress] = {}
        self._classes: Counter[str] = Counter()
        self.prompt_tokens_due = 0
        """Of requests in flight that have no first token yet."""
        self.ended_s = 0.0
        """When a request last ended, or a move to or from it."""

    def send(self, request: Request) -> None:
        """Give a request to the engine; one it refuses is recorded with the reason."""
        if request.id in self.records:
            raise ValueError(f"two requests are called '{request.id}'")
        # Holds the place: records keep the order of sending.
        self.records[request.id] = None
        try:
            self.loop.add(request)
        except RequestError as error:
            self.records[request.id] = _record(_Progress(request), request.arrival_s, None, str(error))
        else:
            self._take(_Progress(request))

    def depart(self, request_id: str) -> Passage:
        """Let a request that the scheduler calls movable go to another engine, between two steps."""
        passage = Passage(self.single.depart(request_id), self.in_flight[request_id])
        self._drop(passage.progress)
        del self.records[request_id]
        return passage

    def arrive(self, passage: Passage) -> bool:
        """Go on with a request from another engine; whether it decodes at once (see `Scheduler.arrive`)."""
        self.records[passage.progress.request.id] = None
        self._take(passage.progress)
        return self.single.arrive(passage.traveller)

    def _take(self, progress: _Progress) -> None:
        request = progress.request
        self.in_flight[request.id] = progress
        if progress.first_s is None:
            self.prompt_tokens_due += len(request.prompt)
        if request.priority_class is not None:
            self._classes[request.priority_class] += 1

    def _drop(self, progress: _Progress) -> None:
        request = progress.request
        del self.in_flight[request.id]
        if progress.first_s is None:
            self.prompt_tokens_due -= len(request.prompt)
        if request.priority_class is not None:
            self._classes[request.priority_class] -= 1

    def abort(self, request_id: str) -> bool:
        """End a request between two steps; false if it is not in flight."""
        progress = self.in_flight.get(request_id)
        if progress is None:
            return False
        progress.count = self.loop.produced(request_id)
        self.loop.abort(request_id)
        self._end(progress, self.loop.clock.now(), Finish.ABORT)
        return True

    def fail(self) -> list[Torn]:
        """Lose every request in flight, in the order of sending, and all that is cached."""
        torn = []
        for request_id, progress in self.in_flight.items():
            torn.append(_torn(progress, self.loop.evict(request_id)))
            del self.records[request_id]
        self.in_flight.clear()
        self._classes.clear()
        self.prompt_tokens_due = 0
        self.loop.clear()
        return torn

    def forget(self, but: Collection[str]) -> None:
        """Drop the records of requests that have ended, but for these."""
        self.records = {
            name: record for name, record in self.records.items() if record is None or name in but
        }

    def oldest_s(self) -> float | None:
        """When the longest-waiting request without a first token arrived; None where none waits."""
        waiting = (one.request.arrival_s for one in self.in_flight.values() if one.first_s is None)
        return min(waiting, default=None)

    @property
    def single(self) -> EngineLoop:
        """The loop of one model, between whose like requests may move; several that share one have none."""
        assert isinstance(self.loop, EngineLoop)
        return self.loop

    @property
    def load(self) -> Load:
        loop = self.loop
        return Load(
            len(self.in_flight), self.prompt_tokens_due, loop.room, self._classes, self.up, loop.models
        )

    def advance(self, until_s: float) -> None:
        """Work until `until_s` or, in the midst of a step then, until it ends; idle time is let pass."""
        clock = self.loop.clock
        while self.in_flight and clock.now() < until_s:
            self.move(until_s)
        if not self.in_flight and until_s < float("inf"):
            clock.wait_until(until_s)

    def move(self, until_s: float = float("inf")) -> None:
        """One step, or as many as nothing is decided in, up to the first that ends at `until_s` or later."""
        leap = self.loop.leap(until_s)
        if leap is None:
            self._step()
            return
        for piece in leap.pieces:
            if piece.samples:
                self._begun(piece, leap.moment_s)
        for request_id, finish in leap.ended.items():
            self._end(self.in_flight[request_id], leap.moment_s, finish)

    def _step(self) -> None:
        done = self.loop.turn()
        if done is None:
            return
        if self._watch is not None:
            self._watch(done)
        further = done.result.further
        for piece in done.batch.pieces:
            if piece.samples:
                self.in_flight[piece.request.id].count += 1 + len(further.get(piece.request.id, ()))
                self._begun(piece, done.moment_s)
        for request_id, finish in done.ended.items():
            self._end(self.in_flight[request_id], done.moment_s, finish)

    def _begun(self, piece: Piece, moment_s: float) -> None:
        """Note a request's first token; a later one changes nothing."""
        progress = self.in_flight[piece.request.id]
        if progress.first_s is None:
            progress.first_s = moment_s
            progress.cached = piece.cached_tokens
            self.prompt_tokens_due -= len(piece.request.prompt)

    def result(self) -> Simulated:
        """Records in the order of sending, and the engine's counters."""
        records = tuple(record for record in self.records.values() if record is not None)
        return Simulated(records=records, stats=self.loop.stats())

    def _end(self, progress: _Progress, moment_s: float, finish: Finish) -> None:
        request_id = progress.request.id
        self.ended_s = moment_s
        if finish is Finish.LENGTH:
            progress.count = progress.request.output_tokens
        self._drop(progress)
        self.records[request_id] = record = _record(progress, moment_s, finish, None)
        if self._ended is not None:
            self._ended(record)


def lost(passage: Passage) -> Torn:
    """A request that was between two engines and comes to neither."""
    return _torn(passage.progress, passage.traveller.history)


def _torn(progress: _Progress, known: Sequence[int]) -> Torn:
    """What is left of a request of which so many tokens are known."""
    request, prompt_tokens = progress.request, len(progress.request.prompt)
    tokens = len(known) - prompt_tokens
    if tokens or request.handed_tokens:
        left = request.output_tokens - tokens
        request = replace(request, prompt=known, output_tokens=left, handed_tokens=0)
    return Torn(request, tokens, progress.first_s, progress.cached, prompt_tokens)


def _record(progress: _Progress, ended_s: float, finish: Finish | None, error: str | None) -> RequestRecord:
    request = progress.request
    return RequestRecord(
        id=request.id,
        arrival_s=request.arrival_s,
        ended_s=ended_s,
        prompt_tokens=len(request.prompt),
        output_tokens=progress.count,
        first_token_s=progress.first_s,
        last_token_s=None if progress.first_s is None else ended_s,
        cached_tokens=progress.cached,
        finish=finish,
        error=error,
        model=request.model,
        priority_class=request.priority_class,
    )
