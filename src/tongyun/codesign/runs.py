"""Pools at work for one model, or for several that share them, and what happened there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tongyun.cloud.engine.loop import Engine
from tongyun.cloud.engine.protocol import EngineStats
from tongyun.cloud.engine.shared import SharedLoop
from tongyun.cloud.engine.step_table import StepTable
from tongyun.cloud.front import Front
from tongyun.cloud.instance import Simulated
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.relay import Relay, joined
from tongyun.cloud.sched.affinity import ByModel
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.router import LeastLoad, Router
from tongyun.cloud.schedule import Schedule
from tongyun.codesign.fleet import Fleet
from tongyun.codesign.sharing import Sharing
from tongyun.specs import Chip
from tongyun.units import Source

Joules = Callable[[Sequence[Sequence[Simulated]], float], float]
"""Of chips, given what happened in each of their pools and the time of the whole run."""


class Run:
    """Requests in, as they arrive; what came of them, when it is finished."""

    def __init__(
        self,
        models: tuple[str, ...],
        chips: int,
        front: Front | Relay,
        joules: Joules,
        sources: frozenset[Source],
        *,
        shared: bool = False,
    ) -> None:
        self.models, self.chips, self.front, self.sources, self.shared = models, chips, front, sources, shared
        self.joules = joules
        self._sent: list[str] = []

    def tell(self, schedule: Schedule) -> None:
        """Let a schedule know what the engines do."""
        fronts = (self.front,) if isinstance(self.front, Front) else (self.front.first, self.front.second)
        roles = ("mixed",) if len(fronts) == 1 else ("prefill", "decode")
        for role, front in zip(roles, fronts, strict=True):
            loops = [one.loop for one in front.instances]
            blocks = loops[0].stats().kv_blocks_total
            model = "shared" if self.shared else self.models[0]
            for loop, tape in zip(loops, schedule.pool(role, len(loops), blocks, model), strict=True):
                loop.tape = tape
                if isinstance(loop, SharedLoop):
                    loop.told = tape.changed

    def send(self, request: Request) -> None:
        """Give a request, in order of arrival."""
        self._sent.append(request.id)
        self.front.send(request)

    def finish(self) -> None:
        self.front.advance(float("inf"))

    def ended(self) -> Ended:
        if isinstance(self.front, Relay):
            first, second = self.front.results()
            return Ended(self, joined(self._sent, first, second), (first, second))
        results = [one.result() for one in self.front.instances]
        return Ended(self, tuple(record for one in results for record in one.records), (results,))


@dataclass(frozen=True)
class Ended:
    """What happened in a run: a record for each request, and in each pool."""

    run: Run
    records: tuple[RequestRecord, ...]
    results: tuple[Sequence[Simulated], ...]

    @property
    def stats(self) -> tuple[EngineStats, ...]:
        return tuple(one.stats for result in self.results for one in result)

    def joules(self, duration_s: float) -> float:
        return self.run.joules(self.results, duration_s)


def dedicated(name: str, fleet: Fleet, router: Callable[[], Router], chip: Chip) -> Run:
    """A model on pools of its own."""
    engines = [fleet.engines(pool, chip) for pool in fleet.pools]
    hand_over_s = fleet.hand_over(chip) if len(engines) == 2 else None

    def handed_s(request: Request) -> float:
        return 0.0 if hand_over_s is None else hand_over_s(len(request.prompt))

    def joules(results: Sequence[Sequence[Simulated]], duration_s: float) -> float:
        return sum(
            one.joules(chip, [each.stats.busy_s for each in result], duration_s)
            for one, result in zip(engines, results, strict=True)
        )

    return Run(
        (name,),
        fleet.question.chips,
        _front(
            [one.loops for one in engines],
            (router(), LeastLoad()),
            handed_s,
        ),
        joules,
        frozenset().union(*(one.table.sources for one in engines)),
    )


def shared(sharing: Sharing) -> Run:
    """Models that take turns on the same pools."""
    tables: dict[object, StepTable] = {}
    engines = [sharing.engines(pool, tables) for pool in sharing.pools]

    def joules(results: Sequence[Sequence[Simulated]], duration_s: float) -> float:
        return sum(
            one.joules(sharing.chip, result, duration_s) for one, result in zip(engines, results, strict=True)
        )

    return Run(
        tuple(sharing.fleets),
        sum(pool.chips for pool in sharing.pools),
        _front(
            [one.loops for one in engines],
            (ByModel(), ByModel()),
            sharing.hand_over(),
        ),
        joules,
        frozenset().union(sharing.sources(), *(table.sources for table in tables.values())),
        shared=True,
    )


def _front(
    pools: Sequence[Sequence[Engine]],
    routers: tuple[Router, Router],
    hand_over_s: Callable[[Request], float],
) -> Front | Relay:
    if len(pools) == 1:
        return Front(pools[0], routers[0])
    return Relay((pools[0], pools[1]), routers, hand_over_s)
