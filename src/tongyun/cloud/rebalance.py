"""Take the experts of a simulated fleet through a run: picks drift, are counted, and experts move.

At the end of every window a pool's experts are placed anew by what was counted in it, on all of its
replicas alike. Their weights take time: steps stand still for it, or go on beside it at a price of
their own. A step under way ends at the old price, and no leap crosses a moment at which the price
changes. A replica that has no weights at that moment gets them later where they then belong, with all
others that it starts with. Decides when; who goes where and what it takes are a `Balance`'s to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from tongyun.cloud.ending import Ending
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.simulated import DecodeCosts, SimulatedExecutor
from tongyun.cloud.front import Fronts
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.sched.request import Request


@dataclass(frozen=True, kw_only=True)
class Rebalanced:
    """A window's end at which a pool's experts went to other ranks."""

    moment_s: float
    role: str
    experts: int
    """Copies that went to a rank without one, over layers and ranks of a replica."""
    moved_bytes: float
    """Of all replicas that had weights."""
    seconds: float
    """Until the last weights had come."""
    standing: bool
    """Whether steps waited for them."""
    crowding_before: float
    """Tokens of the busiest rank over the mean one's, by the picks of that moment."""
    crowding_after: float


class Balance(Protocol):
    """The experts of a pool's replicas, which all have the same."""

    def count(self, tokens: int) -> None:
        """So many tokens were computed since the last call."""

    def drift(self) -> None:
        """Other experts are picked from now on."""

    def place(self, moment_s: float, replicas: int) -> Rebalanced | None:
        """A window ends: send experts where its counts say, on so many replicas; None where all stay."""

    def arrived(self) -> None:
        """All that was sent is there, and computes."""

    def price(self) -> DecodeCosts:
        """Of steps as experts and picks are now."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A pool's engines, so many a replica, and its experts."""

    balance: Balance
    loops: Sequence[EngineLoop]
    executors: Sequence[SimulatedExecutor]
    groups: int
    there: Callable[[int], bool] = lambda _: True
    """Whether the replica of that number has its weights."""

    @property
    def replicas(self) -> int:
        """That have their weights."""
        return sum(1 for _ in self._held())

    def stand(self, seconds: float) -> None:
        """A replica's engines end their steps, wait for one another and then for so long."""
        for replica in self._held():
            begin_s = max(loop.clock.now() for loop in replica)
            for loop in replica:
                loop.clock.wait_until(begin_s + seconds)
                if loop.tape is not None:
                    loop.tape.moved(begin_s, begin_s + seconds, True)

    def go_on(self, begin_s: float, seconds: float) -> None:
        """Steps go on beside weights on their way, at a price of their own."""
        self.reprice()
        for replica in self._held():
            for loop in replica:
                if loop.tape is not None:
                    loop.tape.moved(begin_s, begin_s + seconds, False)

    def reprice(self) -> None:
        price = self.balance.price()
        for executor in self.executors:
            executor.reprice(price)

    def _held(self) -> Iterator[Sequence[EngineLoop]]:
        for number, first in enumerate(range(0, len(self.loops), self.groups)):
            if self.there(number):
                yield self.loops[first : first + self.groups]

    @property
    def computed(self) -> int:
        """Tokens so far."""
        return sum(loop.scheduler.counters.computed_tokens for loop in self.loops)


class Rebalancing:
    """Pools whose experts change during a run; `log` says when and how."""

    def __init__(
        self,
        fleet: Fronts,
        pools: Sequence[Placed],
        *,
        drift_s: float | None,
        window_s: float | None,
        ending: Ending | None = None,
    ) -> None:
        """`ending` is said by who plays, where somebody else than this does."""
        self.log: list[Rebalanced] = []
        self._ending = Ending(fleet) if ending is None else ending
        self._over = self._ending.watch()
        self._fleet, self._pools = fleet, tuple(pools)
        self._counted = [0] * len(self._pools)
        self._places = window_s is not None
        for every_s, action in ((drift_s, self._drift), (window_s, self._place)):
            if every_s is not None:
                self._again(every_s, 1, action)

    def play(self, requests: Iterable[Request]) -> tuple[RequestRecord, ...]:
        """Every request to its end."""
        names = []
        for request in requests:
            names.append(request.id)
            self._fleet.send(request)
        self._ending.closing = True
        self._fleet.advance(float("inf"))
        return tuple(self._fleet.records(names))

    @property
    def placements(self) -> tuple[Rebalanced, ...] | None:
        """Times that experts went elsewhere; None where they are never placed anew."""
        return tuple(self.log) if self._places else None

    def _again(self, every_s: float, number: int, action: Callable[[float], None]) -> None:
        self._fleet.at(number * every_s, partial(self._act, every_s, number, action))

    def _act(self, every_s: float, number: int, action: Callable[[float], None]) -> None:
        if self._over():
            return
        # Picks and counts are of the tokens before this moment.
        for index, pool in enumerate(self._pools):
            computed = pool.computed
            pool.balance.count(computed - self._counted[index])
            self._counted[index] = computed
        action(number * every_s)
        self._again(every_s, number + 1, action)

    def _drift(self, _: float) -> None:
        for pool in self._pools:
            pool.balance.drift()
            pool.reprice()

    def _place(self, now_s: float) -> None:
        for pool in self._pools:
            done = pool.balance.place(now_s, pool.replicas)
            if done is None:
                continue
            self.log.append(done)
            if done.standing:
                pool.stand(done.seconds)
                self._arrived(pool)
            else:
                pool.go_on(now_s, done.seconds)
                self._fleet.at(now_s + done.seconds, partial(self._arrived, pool))

    def _arrived(self, pool: Placed) -> None:
        pool.balance.arrived()
        pool.reprice()
