"""Chips and nodes that fail and return: when, and which replicas they take with them.

Every part lives and dies by itself: up and down times are exponential, drawn from a stream
of its own, so that neither the load nor another part moves them. Or a script says when what
fails. A step under way when its replica fails still ends, and its tokens leave. Knows no
policy for the requests: see `retries`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from tongyun.cloud.front import Fronts
from tongyun.cloud.replica import Replica, State
from tongyun.cloud.retries import Retries


@dataclass(frozen=True, kw_only=True)
class Part:
    """A chip or a node, and the replicas that stand on it."""

    name: str
    replicas: tuple[Replica, ...]
    mtbf_s: float
    """Mean time from being back to the next failure."""
    repair_s: float
    """Mean time until it is back."""
    seed: tuple[int, ...]


class Outage(NamedTuple):
    """A failure that a script wants; without an end, for good."""

    at_s: float
    replicas: tuple[Replica, ...]
    for_s: float | None


class Failures:
    """Lets parts of a fleet fail until `over` says that nobody is served any more."""

    def __init__(
        self,
        fleet: Fronts,
        retries: Retries,
        *,
        over: Callable[[], bool] = lambda: False,
        changed: Callable[[Replica, float], None] = lambda _replica, _moment_s: None,
        struck: Callable[[Sequence[Replica], float], None] = lambda _replicas, _moment_s: None,
    ) -> None:
        """`changed` hears of every replica that is down or whole again, `struck` of all that went down at
        once, when they are.

        One that is whole again serves at once; where a scaler has it, it is off, to be started.
        """
        self._fleet, self._retries, self._over = fleet, retries, over
        self._changed, self._struck = changed, struck
        self.count = 0
        """Failures of parts so far."""

    def script(self, outages: Sequence[Outage]) -> None:
        for outage in outages:
            self._fleet.at(outage.at_s, partial(self._begin, outage))

    def draw(self, parts: Sequence[Part]) -> None:
        for part in parts:
            self._live(part, np.random.default_rng(part.seed), 0.0)

    def _begin(self, outage: Outage) -> None:
        if self._over():
            return
        self._fail(outage.replicas, outage.at_s)
        if outage.for_s is not None:
            back_s = outage.at_s + outage.for_s
            self._fleet.at(back_s, partial(self._mend, outage.replicas, back_s))

    def _live(self, part: Part, rng: np.random.Generator, now_s: float) -> None:
        fails_s = now_s + rng.exponential(part.mtbf_s)
        self._fleet.at(fails_s, partial(self._die, part, rng, fails_s))

    def _die(self, part: Part, rng: np.random.Generator, now_s: float) -> None:
        if self._over():
            return
        self._fail(part.replicas, now_s)
        back_s = now_s + rng.exponential(part.repair_s)
        self._fleet.at(back_s, partial(self._return, part, rng, back_s))

    def _return(self, part: Part, rng: np.random.Generator, now_s: float) -> None:
        self._mend(part.replicas, now_s)
        if not self._over():
            self._live(part, rng, now_s)

    def _fail(self, replicas: Sequence[Replica], now_s: float) -> None:
        self.count += 1
        struck = [replica for replica in replicas if not replica.broken]
        for replica in replicas:
            replica.broken += 1
        # All of them, before what one had is sent to another.
        for replica in struck:
            replica.turn(State.DOWN, now_s)
            self._changed(replica, now_s)
        self._struck(struck, now_s)
        for replica in struck:
            for index in replica.engines:
                # In the midst of a step an engine is ahead of the others.
                ends_s = max(now_s, replica.pool.instances[index].loop.clock.now())
                self._fleet.at(ends_s, partial(self._retries.tear, replica, index, ends_s))

    def _mend(self, replicas: Sequence[Replica], now_s: float) -> None:
        for replica in replicas:
            # Not before its last step has ended and its requests are gone.
            if replica.free_s > now_s:
                self._fleet.at(replica.free_s, partial(self._mend, (replica,), replica.free_s))
                continue
            replica.broken -= 1
            if not replica.broken:
                replica.turn(State.OFF if replica.scaled else State.UP, now_s)
                self._changed(replica, now_s)
