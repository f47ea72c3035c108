"""Drive one scheduler and one executor, a step at a time, on any clock.

A step is: propose a batch, execute it, let its duration pass, decide who stops, commit,
report. On a wall clock with the real executor the duration has already passed; with
priced steps the wait is what makes a twin. The loop decides when a request stops by
itself; it knows no thread, no text and no tensor.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from tongyun.cloud.engine.drafts import shortened
from tongyun.cloud.engine.interface import Leap, StepError, Turn
from tongyun.cloud.engine.protocol import (
    Clock,
    EngineStats,
    Executor,
    Foresight,
    Stretch,
    Tape,
    TokenEvent,
    Verifies,
)
from tongyun.cloud.sched.freeness import Room
from tongyun.cloud.sched.migrate import Traveller
from tongyun.cloud.sched.request import Batch, Finish, Piece, Request
from tongyun.cloud.sched.scheduler import Scheduler
from tongyun.errors import InputError


class EngineLoop:
    """One engine. Not thread-safe: whoever calls it owns scheduler and executor."""

    models: tuple[tuple[str, int, float], ...] = ()

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        clock: Clock,
        *,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        """InputError where the scheduler has drafts verified and the executor cannot."""
        if scheduler.config.draft_tokens and not isinstance(executor, Verifies):
            raise InputError(
                f"scheduler: draft_tokens: {type(executor).__name__} has no draft model; accepted: 0"
            )
        self.clock = clock
        self._scheduler = scheduler
        self._executor = executor
        self._foresight = executor if isinstance(executor, Foresight) else None
        self._eos = eos_token_ids
        self._steps = 0
        self._busy_s = 0.0
        self._chip_s, self._chip_joules = 0.0, 0.0
        self._finished: Counter[Finish] = Counter()
        # In flight with stop tokens: what they produce has to be looked at.
        self._watched: set[str] = set()
        self._tape: Tape | None = None
        # Since the last step that was told.
        self._preempted: list[str] = []

    @property
    def tape(self) -> Tape | None:
        """Told of every step, where somebody wants to know."""
        return self._tape

    @tape.setter
    def tape(self, tape: Tape | None) -> None:
        self._tape = tape
        self._scheduler.watch_preempted(None if tape is None else self._preempted)

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def check(self, request: Request) -> None:
        """RequestError if `request` could never run; reads limits only, so any thread may ask."""
        self._scheduler.check(request)

    def add(self, request: Request) -> None:
        """Queue a request; RequestError if it cannot be served."""
        self._scheduler.add(request)
        if request.stop_token_ids:
            self._watched.add(request.id)
        if self._tape is not None:
            self._tape.queued(request)

    @property
    def scheduler(self) -> Scheduler:
        """For who moves requests between engines, between two steps."""
        return self._scheduler

    @property
    def executor(self) -> Executor:
        return self._executor

    def room(self) -> Room:
        """Blocks and places there are, and those that are asked for."""
        return self._scheduler.room()

    def depart(self, request_id: str) -> Traveller:
        """Let a request go that the scheduler calls movable, between two steps."""
        self._watched.discard(request_id)
        if self.tape is not None:
            self.tape.left(request_id, self.clock.now())
        return self._scheduler.depart(request_id)

    def arrive(self, traveller: Traveller) -> bool:
        """Go on with a request that departed elsewhere (see `Scheduler.arrive`)."""
        if traveller.request.stop_token_ids:
            self._watched.add(traveller.request.id)
        decodes = self._scheduler.arrive(traveller)
        if self.tape is not None:
            self.tape.arrived(traveller, self.clock.now(), decodes)
        return decodes

    def produced(self, request_id: str) -> int:
        """How many tokens a request in flight has produced."""
        return self._scheduler.produced(request_id)

    def abort(self, request_id: str) -> list[TokenEvent]:
        """End a request between two steps; no event if it is not in flight."""
        if not self._scheduler.abort(request_id):
            return []
        self._finished[Finish.ABORT] += 1
        self._watched.discard(request_id)
        if self._tape is not None:
            self._tape.left(request_id, self.clock.now())
        return [TokenEvent(request_id, None, self.clock.now(), Finish.ABORT)]

    def evict(self, request_id: str) -> Sequence[int]:
        """Take out a request in flight, which goes on elsewhere or nowhere; returns its tokens known here.

        It counts as neither finished nor aborted.
        """
        self._watched.discard(request_id)
        if self._tape is not None:
            self._tape.left(request_id, self.clock.now())
        return self._scheduler.evict(request_id)

    def clear(self) -> None:
        """Forget what is cached, as an engine does that is started anew; nothing may be in flight."""
        self._scheduler.clear()

    def step(self) -> list[TokenEvent] | None:
        """Run one step and report it; None when there is nothing to run.

        StepError if the executor failed: the loop itself can go on.
        """
        done = self.turn()
        return None if done is None else done.events()

    def turn(self) -> Turn | None:
        """`step`, reported as a whole: for who has no use for an event of each token."""
        begin_s = self.clock.now()
        batch = self._scheduler.next_batch(begin_s)
        if batch is None:
            return None
        try:
            result = self._executor.execute(batch)
            stopped = self._stopped(batch, result.tokens)
            if result.further:
                result = shortened(result, batch, self._ends, stopped)
        # An executor may fail in any way (out of memory, a kernel, a bug): the batch must end.
        except Exception as error:
            raise self._fail(batch, error) from error
        self.clock.wait_until(begin_s + result.duration_s)
        now_s = self.clock.now()
        tape = self._tape
        stretch = None if tape is None else self._stretch(batch, begin_s, now_s, result.further)
        ended = self._scheduler.commit(batch, result.tokens, stopped, result.further)
        if tape is not None and stretch is not None:
            self._note(tape, stretch, batch.pieces, ended)
        self._watched.difference_update(ended)
        self._count(1, now_s - begin_s, ended)
        if result.chip_s is not None:
            self._chip_s += result.chip_s
            self._chip_joules += result.joules or 0.0
        return Turn(batch, result, ended, now_s)

    def leap(self, until_s: float = float("inf"), at_most: int = sys.maxsize) -> Leap | None:
        """Take the next step, or up to `at_most` of the steps ahead in which nothing is decided, up to the
        first that ends at `until_s` or later.

        None where there is nothing to run or a step cannot be foreseen: the executor has no
        `Foresight`, a token could end a request by itself, or blocks have run out. The outcome
        is that of `turn` to the last bit, without an event for each token.
        """
        executor, scheduler = self._foresight, self._scheduler
        if executor is None or self._eos or self._watched:
            return None
        ahead = scheduler.ahead(executor)
        if ahead is None:
            return self._glide(executor)
        begin_s = self.clock.now()
        context_tokens = ahead.context_tokens[:at_most]
        foreseen = len(context_tokens)
        each_s = executor.coming_s(ahead.decoding, context_tokens)
        # Summed one after the other, as the clock would.
        moments_s = np.empty(foreseen + 1)
        moments_s[0], moments_s[1:] = begin_s, each_s
        np.add.accumulate(moments_s, out=moments_s)
        steps = min(foreseen, int(moments_s[1:].searchsorted(until_s)) + 1)
        executor.went(steps)
        spent_s = np.empty(steps + 1)
        spent_s[0] = self._busy_s
        np.subtract(moments_s[1 : steps + 1], moments_s[:steps], out=spent_s[1:])
        self._busy_s = float(np.add.accumulate(spent_s)[-1])
        self.clock.wait_until(float(moments_s[steps]))
        pool, running, waiting = scheduler.pool, scheduler.running, scheduler.waiting
        used, taken, accepted = pool.used, pool.taken, scheduler.counters.accepted_tokens
        ended = scheduler.leap(steps)
        self._count(steps, 0.0, ended)
        if self._tape is not None:
            most = used + pool.taken - taken
            accepted = scheduler.counters.accepted_tokens - accepted
            behind = context_tokens.item(0)
            numbers = (ahead.decoding, behind, 0, running, waiting, used, most, accepted)
            self._note(self._tape, Stretch(begin_s, self.clock.now(), steps, *numbers), (), ended)
        return Leap(steps, (), ended, self.clock.now())

    def _glide(self, executor: Foresight) -> Leap | None:
        """One step, with those that decode only counted."""
        begin_s = self.clock.now()
        step = self._scheduler.next_step(begin_s, executor)
        if step is None:
            return None
        result = executor.beside(*step)
        self.clock.wait_until(begin_s + result.duration_s)
        now_s = self.clock.now()
        tape, stretch = self._tape, None
        if tape is not None:
            computed = sum(piece.length for piece in step.pieces)
            stretch = self._gauged(begin_s, now_s, step.decoding, step.context_tokens, computed)
        accepted = self._scheduler.counters.accepted_tokens
        ended = self._scheduler.commit_step(step, result.tokens)
        self._count(1, now_s - begin_s, ended)
        if tape is not None and stretch is not None:
            accepted = self._scheduler.counters.accepted_tokens - accepted
            self._note(tape, stretch._replace(accepted_tokens=accepted), step.pieces, ended)
        return Leap(1, step.pieces, ended, now_s)

    def _note(
        self, tape: Tape, stretch: Stretch, pieces: Sequence[Piece], ended: Mapping[str, Finish]
    ) -> None:
        for request_id in self._preempted:
            tape.preempted(request_id, stretch.begin_s)
        self._preempted.clear()
        tape.note(stretch, pieces, ended)

    def _stretch(
        self, batch: Batch, begin_s: float, end_s: float, further: Mapping[str, Sequence[int]]
    ) -> Stretch:
        """The step of a batch that is proposed and not committed yet."""
        decodes = [piece.start for piece in batch.pieces[: self._scheduler.decoding]]
        computed = sum(piece.length for piece in batch.pieces) - len(decodes)
        found = self._gauged(begin_s, end_s, len(decodes), sum(decodes), computed)
        accepted = sum(map(len, further.values()))
        return found._replace(accepted_tokens=accepted) if accepted else found

    def _gauged(
        self, begin_s: float, end_s: float, decoding: int, context_tokens: int, computed: int
    ) -> Stretch:
        """A step with the scheduler's gauges as they are while it runs."""
        scheduler = self._scheduler
        used = scheduler.pool.used
        gauges = (scheduler.running, scheduler.waiting, used, used)
        return Stretch(begin_s, end_s, 1, decoding, context_tokens, computed, *gauges)

    def _count(self, steps: int, busy_s: float, ended: dict[str, Finish]) -> None:
        self._steps += steps
        self._busy_s += busy_s
        if ended:
            self._finished.update(ended.values())

    def stats(self) -> EngineStats:
        scheduler, pool = self._scheduler, self._scheduler.pool
        counters = scheduler.counters
        return EngineStats(
            running=scheduler.running,
            waiting=scheduler.waiting,
            kv_blocks_total=pool.total,
            kv_blocks_used=pool.used,
            kv_blocks_cached=pool.idle,
            prompt_tokens=counters.prompt_tokens,
            prefix_hit_tokens=counters.prefix_hit_tokens,
            tier_hit_tokens=tuple(counters.tier_hit_tokens),
            computed_tokens=counters.computed_tokens,
            output_tokens=counters.output_tokens,
            preemptions=counters.preemptions,
            verifications=counters.verifications,
            accepted_tokens=counters.accepted_tokens,
            steps=self._steps,
            busy_s=self._busy_s,
            finished=dict(self._finished),
            chip_s=self._chip_s,
            chip_joules=self._chip_joules,
        )

    def _stopped(self, batch: Batch, tokens: dict[str, int]) -> dict[str, Finish]:
        """Who produced a token that ends it; KeyError if a sampling piece has no token."""
        stopped = {}
        for piece in batch.pieces:
            if piece.samples:
                request = piece.request
                if self._ends(tokens[request.id], request):
                    stopped[request.id] = Finish.STOP
        return stopped

    def _ends(self, token: int, request: Request) -> bool:
        return (token in self._eos and not request.ignore_eos) or token in request.stop_token_ids

    def _fail(self, batch: Batch, error: Exception) -> StepError:
        message = f"the step failed: {type(error).__name__}: {error}"
        events = []
        for piece in batch.pieces:
            self._scheduler.abort(piece.request.id)
            self._finished[Finish.ERROR] += 1
            self._watched.discard(piece.request.id)
            events.append(TokenEvent(piece.request.id, None, self.clock.now(), Finish.ERROR, error=message))
        self._scheduler.commit(batch, {}, {})
        return StepError(message, events)
