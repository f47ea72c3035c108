"""Bring weights to replicas that start: how fast, where several load at once.

A load is a latency, the bytes of one rank at a rate that follows who else loads, and the
start of the engine. Rates are decided by a `Way`; knows no chip and no file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from tongyun.cloud.front import Fronts
from tongyun.cloud.replica import Replica, State


class Way(Protocol):
    """From where the weights are to the chips."""

    @property
    def latency_s(self) -> float: ...

    def rate(self, replica: Replica, loading: Sequence[Replica], senders: int) -> float:
        """Bytes a second into each rank of `replica`, one of those `loading`.

        `senders`: ranks that serve, and so have the weights.
        """


@dataclass(frozen=True, kw_only=True)
class FromHost:
    """Each chip over its own link to the memory of its host, which keeps the weights."""

    link_bytes_per_s: float
    latency_s: float = 0.0

    def rate(self, replica: Replica, loading: Sequence[Replica], senders: int) -> float:
        return self.link_bytes_per_s


@dataclass(frozen=True, kw_only=True)
class FromNeighbour:
    """From the host memory of nodes whose replicas serve, a link for each rank.

    rate = link · min(1, sending / loading ranks): who has loaded sends. Where nobody serves,
    one node keeps the weights for one replica's ranks.
    """

    link_bytes_per_s: float
    """Of the network and the host's link the slower."""
    latency_s: float

    def rate(self, replica: Replica, loading: Sequence[Replica], senders: int) -> float:
        wanted = sum(one.chips for one in loading)
        return self.link_bytes_per_s * min(1.0, max(senders, replica.chips) / wanted)


@dataclass(frozen=True, kw_only=True)
class FromStorage:
    """A file system read by nodes as clients.

    rate = min(host link, client / ranks that load on the node, whole / ranks that load),
    of the slowest node a replica is on.
    """

    link_bytes_per_s: float
    client_bytes_per_s: float
    """Of one node."""
    whole_bytes_per_s: float
    """Of all nodes together."""
    latency_s: float

    def rate(self, replica: Replica, loading: Sequence[Replica], senders: int) -> float:
        ranks: dict[int, int] = {}
        for one in loading:
            for node in one.nodes:
                ranks[node] = ranks.get(node, 0) + 1
        most = max(ranks[node] for node in replica.nodes)
        return min(
            self.link_bytes_per_s,
            self.client_bytes_per_s / most,
            self.whole_bytes_per_s / sum(ranks.values()),
        )


@dataclass(slots=True)
class _Load:
    replica: Replica
    begun_s: float
    left_bytes: float
    rate: float = 0.0


class ColdStarts:
    """Replicas that load over one way; rates change whenever one begins, ends or gives up."""

    def __init__(
        self,
        fleet: Fronts,
        way: Way,
        *,
        start_s: float,
        senders: Callable[[], int],
        up: Callable[[Replica, float], None],
    ) -> None:
        """`start_s`: from the last byte to the first request. `up` hears of every replica that is ready."""
        self._fleet, self._way, self._start_s = fleet, way, start_s
        self._senders, self._up = senders, up
        self._under_way: dict[str, _Load] = {}
        self._loading: dict[str, _Load] = {}
        self._now_s = 0.0
        self._plan = 0
        """Number of the last reckoning: an end foreseen by an earlier one is void."""
        self.took_s: list[float] = []
        """Seconds of each start that came to its end."""

    def begin(self, replica: Replica, rank_bytes: float, now_s: float) -> None:
        replica.turn(State.LOADING, now_s)
        load = self._under_way[replica.name] = _Load(replica, now_s, rank_bytes)
        self._fleet.at(now_s + self._way.latency_s, partial(self._join, load, now_s + self._way.latency_s))

    def cancel(self, replica: Replica, now_s: float) -> None:
        """It failed or is wanted no more; nothing if it does not load."""
        self._under_way.pop(replica.name, None)
        if replica.name in self._loading:
            self._spend(now_s)
            del self._loading[replica.name]
            self._reckon()

    def _join(self, load: _Load, now_s: float) -> None:
        if self._under_way.get(load.replica.name) is load:
            self._spend(now_s)
            self._loading[load.replica.name] = load
            self._reckon()

    def _spend(self, now_s: float) -> None:
        for load in self._loading.values():
            load.left_bytes -= load.rate * (now_s - self._now_s)
        self._now_s = now_s

    def _reckon(self) -> None:
        """New rates, and the end that comes first by them."""
        self._plan += 1
        loads = list(self._loading.values())
        if not loads:
            return
        everyone, senders = [load.replica for load in loads], self._senders()
        for load in loads:
            load.rate = self._way.rate(load.replica, everyone, senders)
        first = min(loads, key=lambda load: load.left_bytes / load.rate)
        ends_s = self._now_s + max(0.0, first.left_bytes / first.rate)
        self._fleet.at(ends_s, partial(self._loaded, first, self._plan, ends_s))

    def _loaded(self, load: _Load, plan: int, now_s: float) -> None:
        if plan != self._plan:
            return
        self._spend(now_s)
        del self._loading[load.replica.name]
        self._fleet.at(now_s + self._start_s, partial(self._started, load, now_s + self._start_s))
        self._reckon()

    def _started(self, load: _Load, now_s: float) -> None:
        if self._under_way.get(load.replica.name) is load:
            del self._under_way[load.replica.name]
            self.took_s.append(now_s - load.begun_s)
            self._up(load.replica, now_s)
