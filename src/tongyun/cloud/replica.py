"""One replica of a fleet that comes and goes: its engines, and when it was what.

A replica's engines stand and fall together. Knows neither why it comes nor why it goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from tongyun.cloud.front import Front
from tongyun.cloud.instance import Instance


class State(StrEnum):
    """What a replica is."""

    UP = "up"
    LOADING = "loading"
    """Its weights are on their way, or its engine starts."""
    DRAINING = "draining"
    """Given no further request, at work on those it has."""
    OFF = "off"
    DOWN = "down"
    """One of its chips or nodes has failed and is not back."""


class Replica:
    """Consecutive engines of a pool, on some chips of some nodes."""

    def __init__(
        self,
        name: str,
        pool: Front,
        engines: Sequence[int],
        *,
        nodes: Sequence[int],
        state: State = State.UP,
        scaled: bool = False,
    ) -> None:
        """`nodes`: that of each of its chips, one number a chip; `scaled`: whether a scaler starts it."""
        self.name, self.pool, self.engines, self.nodes = name, pool, tuple(engines), tuple(nodes)
        self.scaled = scaled
        self.broken = 0
        """Failed chips and nodes that it stands on."""
        self.state = state
        self.log: list[tuple[float, State]] = [(0.0, state)]
        """Every state with the moment from which it holds."""
        if state is not State.UP:
            self._close()

    @property
    def chips(self) -> int:
        return len(self.nodes)

    @property
    def instances(self) -> list[Instance]:
        return [self.pool.instances[index] for index in self.engines]

    @property
    def in_flight(self) -> int:
        return sum(len(one.in_flight) for one in self.instances)

    @property
    def moves(self) -> int:
        """Requests on their way to or from one of its engines."""
        return sum(one.moves for one in self.instances)

    @property
    def equipped(self) -> bool:
        """Whether it has its weights: one that drains may serve again with them."""
        return self.state in (State.UP, State.DRAINING)

    @property
    def free_s(self) -> float:
        """When its engines have ended the step they are in."""
        return max(one.loop.clock.now() for one in self.instances)

    def turn(self, state: State, moment_s: float) -> None:
        """Become something else; only one that is up is given requests."""
        self.state = state
        self.log.append((moment_s, state))
        for one in self.instances:
            one.failed = state is State.DOWN
        if state is not State.UP:
            self._close()
            return
        for index in self.engines:
            self.pool.open(index)

    def spent_s(self, states: frozenset[State], begin_s: float, end_s: float) -> float:
        """Seconds from `begin_s` to `end_s` in which it was one of these."""
        spent = 0.0
        ends = [moment_s for moment_s, _ in self.log[1:]] + [float("inf")]
        for (from_s, state), to_s in zip(self.log, ends, strict=True):
            if state in states:
                spent += max(0.0, min(to_s, end_s) - max(from_s, begin_s))
        return spent

    def _close(self) -> None:
        for index in self.engines:
            self.pool.close(index)
