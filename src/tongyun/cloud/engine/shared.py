"""Several models on one instance, one at work at a time, changing between two steps.

To whoever drives it, it is an engine like any other: it takes requests, and steps. Beneath are
an `EngineLoop` and a scheduler for each model on one clock, a policy that says whose turn it is,
and the memory, which says what has to come and go. A change takes as long as the bytes
take on the host link: both directions at once, behind what a prefetch still brings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tongyun.cloud.engine.clock import VirtualClock
from tongyun.cloud.engine.interface import Leap, Turn
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.protocol import EngineStats, Executor, Switched, Tape, TokenEvent, summed
from tongyun.cloud.engine.simulated import DecodeCosts
from tongyun.cloud.sched.freeness import EMPTY, Room
from tongyun.cloud.sched.request import Finish, Request
from tongyun.cloud.sched.residence import Footprint, Residence
from tongyun.cloud.sched.scheduler import Scheduler
from tongyun.cloud.sched.turns import Turns, Work
from tongyun.errors import RequestError, unknown

PATIENCE = 0.75
"""Share of the limit on its first token after which a prompt goes before others' turns."""


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """A model as an instance has it."""

    scheduler: Scheduler
    executor: Executor
    footprint: Footprint
    prices: DecodeCosts
    context_tokens: int
    """Of a request half done, by which a turn is measured."""
    limit_s: float
    """The most mean time between tokens."""
    first_s: float = float("inf")
    """The most time to a first token."""


@dataclass(frozen=True, kw_only=True)
class Switching:
    """What a change of models takes."""

    bytes_per_s: float
    """Host to chip, and as much back at the same time."""
    start_s: float
    """Of the engine itself, each time weights come."""
    prefetch: bool
    """Whether the next model's weights may come while this one works."""


class SharedLoop:
    """One instance of several models. Not thread-safe, as `EngineLoop` is not."""

    def __init__(
        self,
        tenants: Mapping[str, Tenant],
        memory: tuple[float, float],
        turns: Turns,
        switching: Switching,
        *,
        first: int = 0,
    ) -> None:
        """`memory`: bytes of a rank, and of host memory for KV blocks. Starts with weights from the
        model number `first` on, as many as fit."""
        self.clock = VirtualClock()
        self._tenants, self._turns, self._switching = dict(tenants), turns, switching
        self._loops = {
            name: EngineLoop(one.scheduler, one.executor, self.clock) for name, one in tenants.items()
        }
        self.residence = Residence(
            *memory,
            {name: one.footprint for name, one in tenants.items()},
            {name: one.scheduler.pool for name, one in tenants.items()},
            lambda name: tenants[name].scheduler.surrender(),
        )
        self.told: Callable[[str, float, float], None] | None = None
        """Told of every model that comes to work, and from when until when its bytes came."""
        self._whose: dict[str, str] = {}
        # Without a first token.
        self._waiting: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._active: str | None = None
        # When fetched weights are here, and when the link is free again.
        self._ready_s: dict[str, float] = {}
        self._link_s = 0.0
        self._switched = dict.fromkeys(tenants, Switched())
        self._steps_s: dict[tuple[str, int], float] = {}
        names = list(tenants)
        self._begins_with = names[first % len(names) :] + names[: first % len(names)]
        self._fill()

    # ── as any engine ────────────────────────────────────────────────────────────────

    @property
    def tape(self) -> Tape | None:
        """Told of every step of every model."""
        return next(iter(self._loops.values())).tape

    @tape.setter
    def tape(self, tape: Tape | None) -> None:
        for loop in self._loops.values():
            loop.tape = tape

    @property
    def has_work(self) -> bool:
        return bool(self._whose)

    @property
    def models(self) -> tuple[tuple[str, int, float], ...]:
        """Requests in flight by model, those included whose weights lie ready for none (see `Load`)."""
        names = dict.fromkeys([*self._counts, *self.residence.resident])
        return tuple((name, self._counts[name], self._share(name)) for name in names)

    def room(self) -> Room:
        """Nobody's: models share memory by turns, and their requests do not move between engines."""
        return EMPTY

    def check(self, request: Request) -> None:
        """RequestError if `request` could never run."""
        self._loop_of(request).check(request)

    def add(self, request: Request) -> None:
        """Queue a request at its model; RequestError if it cannot be served."""
        self._loop_of(request).add(request)
        name = request.model or ""
        self._whose[request.id] = name
        self._counts[name] += 1
        self._turns.arrived(name, request.arrival_s + PATIENCE * self._tenants[name].first_s)
        self._waiting.add(request.id)

    def produced(self, request_id: str) -> int:
        """How many tokens a request in flight has produced."""
        return self._loops[self._whose[request_id]].produced(request_id)

    def abort(self, request_id: str) -> list[TokenEvent]:
        """End a request between two steps; no event if it is not in flight."""
        name = self._whose.get(request_id)
        if name is None:
            return []
        events = self._loops[name].abort(request_id)
        self._left([request_id])
        return events

    def evict(self, request_id: str) -> Sequence[int]:
        """Take out a request in flight; returns its tokens known here."""
        known = self._loops[self._whose[request_id]].evict(request_id)
        self._left([request_id])
        return known

    def clear(self) -> None:
        """Be as it was at first, as an instance is that is started anew; nothing may be in flight."""
        for loop in self._loops.values():
            loop.clear()
        self.residence.clear()
        self._active, self._link_s = None, 0.0
        self._ready_s.clear()
        self._fill()

    @property
    def begins_bytes(self) -> float:
        """Weights of a rank that are there when it starts."""
        return sum(self._tenants[name].footprint.weights for name in self._at_first)

    def leap(self, until_s: float = float("inf")) -> Leap | None:
        """A change of models where one is due, else as `EngineLoop.leap`, but not beyond the turn."""
        begin_s = self.clock.now()
        turn = self._turns.choose(begin_s, self._work)
        if turn is None:
            return None
        if turn.model != self._active:
            self._switch(turn.model)
            return Leap(0, (), {}, self.clock.now())
        scheduler = self._tenants[turn.model].scheduler
        most = scheduler.steps_within(self.residence.slack(turn.model))
        leap = self._loops[turn.model].leap(min(until_s, turn.end_s), most)
        if leap is not None:
            if leap.pieces:
                self._turns.extend(leap.moment_s - begin_s)
            for piece in leap.pieces:
                if piece.samples:
                    self._begun(piece.request.id, turn.model)
            self._after(leap.ended)
        return leap

    def turn(self) -> Turn | None:
        """One step of the model at work; `leap` comes before and has said that it cannot do it."""
        if self._active is None:
            return None
        begin_s, decoding = self.clock.now(), self._tenants[self._active].scheduler.decoding
        done = self._loops[self._active].turn()
        if done is not None:
            if len(done.batch.pieces) > decoding:
                self._turns.extend(done.moment_s - begin_s)
            for piece in done.batch.pieces:
                if piece.samples:
                    self._begun(piece.request.id, self._active)
            self._after(done.ended)
        return done

    def stats(self) -> EngineStats:
        """Sums over the models."""
        whole = summed([loop.stats() for loop in self._loops.values()])
        return replace(whole, switched=dict(self._switched))

    def _fill(self) -> None:
        """Weights, as many as fit."""
        for name in self._begins_with:
            self.residence.fetch(name, ())
        self._at_first = tuple(self.residence.resident)

    # ── what turns are made of ───────────────────────────────────────────────────────

    def _loop_of(self, request: Request) -> EngineLoop:
        loop = self._loops.get(request.model or "")
        if loop is None:
            raise RequestError(unknown("model", request.model or "", self._loops), param="model")
        return loop

    def _begun(self, request_id: str, name: str) -> None:
        if request_id in self._waiting:
            self._waiting.remove(request_id)
            self._turns.begun(name)

    def _left(self, ended: list[str]) -> None:
        for request_id in ended:
            name = self._whose.pop(request_id)
            self._counts[name] -= 1
            if not self._counts[name]:
                del self._counts[name]
            self._begun(request_id, name)
            self._turns.left(name)

    def _after(self, ended: Mapping[str, Finish]) -> None:
        """Requests that ended leave; blocks that were taken are made room for."""
        if ended:
            self._left(list(ended))
        name = self._active
        if name is None:
            return
        out_bytes = self.residence.settle(self._turns.order, self._tenants[name].scheduler.running)
        if out_bytes:
            self._wait(name, self.clock.now() + out_bytes / self._switching.bytes_per_s)
            self._count(name, out_bytes=out_bytes)

    def _switch(self, name: str) -> None:
        """Bring `name` to the chip and let it work; then fetch the next one's weights, if there is room."""
        way, now_s = self._switching, self.clock.now()
        running = self._tenants[name].scheduler.running
        moved = self.residence.enter(name, self._turns.order, running)
        ready_s = self._ready_s.pop(name, now_s)
        if moved.in_bytes:
            # Behind what is under way; weights that were fetched come before their blocks.
            self._link_s = max(self._link_s, now_s) + moved.in_bytes / way.bytes_per_s
            ready_s = max(ready_s, self._link_s)
        ready_s = max(ready_s, now_s + moved.out_bytes / way.bytes_per_s)
        if moved.loaded:
            ready_s += way.start_s
        self._active = name
        self._count(
            name, count=1, loads=int(moved.loaded), in_bytes=moved.in_bytes, out_bytes=moved.out_bytes
        )
        self._wait(name, ready_s)
        if way.prefetch:
            self._fetch()

    def _fetch(self) -> None:
        order = self._turns.order
        coming = order[1] if len(order) > 1 else None
        if coming is not None and self.residence.fetch(coming, order):
            wanted = self._tenants[coming].footprint.weights
            self._link_s = max(self._link_s, self.clock.now()) + wanted / self._switching.bytes_per_s
            self._ready_s[coming] = self._link_s + self._switching.start_s
            self._count(coming, loads=1, in_bytes=wanted)

    def _wait(self, name: str, until_s: float) -> None:
        begin_s = self.clock.now()
        waited_s = max(until_s - begin_s, 0.0)
        self.clock.wait_until(until_s)
        if self.told is not None:
            self.told(name, begin_s, self.clock.now())
        self._turns.extend(waited_s)
        self._count(name, seconds=waited_s)

    def _count(self, name: str, **more: float) -> None:
        self._switched[name] = self._switched[name].plus(**more)

    def _share(self, name: str) -> float:
        """Of the instance's time, that keeps the model's time between tokens."""
        return self._step_s(name) / self._tenants[name].limit_s if self._counts[name] else 0.0

    def _step_s(self, name: str) -> float:
        """Seconds of a step of a model's requests, all decoding and each half done."""
        tenant = self._tenants[name]
        running = min(self._counts[name], tenant.scheduler.config.max_sequences)
        key = name, running
        if key not in self._steps_s:
            self._steps_s[key] = tenant.prices.mixed(running, running * tenant.context_tokens, (), running)[0]
        return self._steps_s[key]

    def _work(self, name: str) -> Work:
        """What a model asks of a round."""
        missing_s = self.residence.missing_bytes(name) / self._switching.bytes_per_s
        if name not in self.residence.resident:
            missing_s += self._switching.start_s
        return Work(self._step_s(name), self._tenants[name].limit_s, missing_s)
