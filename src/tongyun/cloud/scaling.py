"""Start and stop the replicas of a pool as its policy wants, look by look.

What is stopped drains first; what is started loads its weights. Decides which replica
comes and which goes, not how many: that is `sched.autoscale`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from tongyun.cloud.cold_start import ColdStarts
from tongyun.cloud.front import Fronts
from tongyun.cloud.replica import Replica, State
from tongyun.cloud.sched.autoscale import Autoscaler, Seen


class Scaling:
    """The replicas of one pool under one policy, looked at every `interval_s`."""

    def __init__(
        self,
        fleet: Fronts,
        replicas: Sequence[Replica],
        policy: Autoscaler,
        starts: ColdStarts,
        *,
        rank_bytes: float,
        interval_s: float,
        over: Callable[[], bool] = lambda: False,
    ) -> None:
        self._fleet, self._replicas, self._policy, self._starts = fleet, tuple(replicas), policy, starts
        self._pool = replicas[0].pool
        self._rank_bytes, self._interval_s, self._over = rank_bytes, interval_s, over
        fleet.at(0.0, partial(self._look, 0.0))

    def _look(self, now_s: float) -> None:
        for replica in self._are(State.DRAINING):
            self._off(replica, now_s)
        if self._over():
            return
        up, coming = self._are(State.UP), self._are(State.LOADING)
        wanted = self._policy.decide(now_s, self._seen(len(up), len(coming), now_s))
        have = len(up) + len(coming)
        if wanted > have:
            self._start(wanted - have, now_s)
        elif wanted < have:
            self._stop(have - wanted, now_s)
        self._fleet.at(now_s + self._interval_s, partial(self._look, now_s + self._interval_s))

    def _seen(self, up: int, coming: int, now_s: float) -> Seen:
        pool = self._pool
        waits = [one.oldest_s() for one in pool.instances]
        waits += [request.arrival_s for request in pool.waiting()]
        oldest_s = min((moment_s for moment_s in waits if moment_s is not None), default=now_s)
        due = sum(one.prompt_tokens_due for one in pool.instances)
        due += sum(len(request.prompt) for request in pool.waiting())
        return Seen(up, coming, pool.in_flight, due, max(0.0, now_s - oldest_s))

    def _are(self, state: State) -> list[Replica]:
        return [replica for replica in self._replicas if replica.state is state]

    def _start(self, count: int, now_s: float) -> None:
        """Those that drain first: they have the weights."""
        for replica in (*self._are(State.DRAINING), *self._are(State.OFF))[:count]:
            if replica.state is State.DRAINING:
                replica.turn(State.UP, now_s)
            else:
                self._starts.begin(replica, self._rank_bytes, now_s)

    def _stop(self, count: int, now_s: float) -> None:
        """Those that are not up yet, then those with the least to finish; of equals, the last."""
        leaving, serving = self._are(State.LOADING)[::-1], self._are(State.UP)[::-1]
        leaving += sorted(serving, key=lambda replica: replica.in_flight)
        for replica in leaving[:count]:
            if replica.state is State.LOADING:
                self._starts.cancel(replica, now_s)
                replica.turn(State.OFF, now_s)
            else:
                replica.turn(State.DRAINING, now_s)
                self._off(replica, now_s)

    def _off(self, replica: Replica, now_s: float) -> None:
        """Off since its last request ended or had moved away, if all have; what was cached is gone."""
        if replica.in_flight or replica.moves or replica.free_s > now_s:
            return
        closed_s = max(replica.log[-1][0], *(one.ended_s for one in replica.instances))
        for index in replica.engines:
            replica.pool.tear(index)
        replica.turn(State.OFF, closed_s)
