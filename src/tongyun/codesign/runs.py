"""Pools at work for one model, or for several that share them, and what happened there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from tongyun.cloud.engine.interface import Engine
from tongyun.cloud.engine.protocol import EngineStats
from tongyun.cloud.engine.shared import SharedLoop
from tongyun.cloud.engine.step_table import StepTable
from tongyun.cloud.front import Front
from tongyun.cloud.instance import Simulated
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.migration import Move, Moves, Moving
from tongyun.cloud.relay import Relay
from tongyun.cloud.sched.affinity import ByModel
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.router import LeastLoad, Router
from tongyun.cloud.schedule import Schedule
from tongyun.codesign.at_work import Watch, movers_of
from tongyun.codesign.fleet import Fleet
from tongyun.codesign.sharing import Sharing, Words
from tongyun.codesign.upkeep import Kept, Site
from tongyun.specs import Chip
from tongyun.units import Source

Results = Sequence[Sequence[Simulated]]
Joules = Callable[[Results, float], float]
"""Of chips, given what happened in each of their pools and the time of the whole run."""
Busy = Callable[[Results], tuple[float, float]]
"""Joules and chip-seconds of steps alone."""


@dataclass(frozen=True, kw_only=True)
class ToldTo:
    """Who hears of every step, which is taken by itself then."""

    words: Words
    watches: tuple[Watch, Watch]
    """Of first pools, and of second ones."""
    lost: Callable[[RequestRecord], None]
    """And of requests that are."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """Pools at work, and what to know of them beside their requests."""

    models: tuple[str, ...]
    front: Front | Relay
    sites: tuple[Site, ...]
    joules: Joules
    busy: Busy
    sources: frozenset[Source]
    shortest_s: float
    """Seconds of a step in which one request decodes its first token."""
    shared: bool = False
    movers: tuple[Moving, ...] = ()
    """Who moves requests between the engines of a pool."""
    moved_token_bytes: float = 0.0
    """Keys and values of a token that moves, all ranks'."""

    @property
    def moves(self) -> Moves | None:
        """Of requests between the engines, where any are moved."""
        return Moves.total(self.logs) if self.movers else None

    @property
    def logs(self) -> list[tuple[list[Move], float]]:
        """All moves, with the bytes of a token."""
        return [(mover.log, self.moved_token_bytes) for mover in self.movers]

    @property
    def chips(self) -> int:
        return sum(site.replicas * site.ranks for site in self.sites)

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

    def ended(self, records: Sequence[RequestRecord], kept: Kept | None, chip: Chip) -> Ended:
        """What came of it, with a record for each request; where replicas come and go, `kept` says how."""
        results = tuple([one.result() for one in front.instances] for front in self.front.fronts)
        held = None if kept is None else sum(kept.held[site.role] for site in self.sites)
        return Ended(self, tuple(records), results, held, chip.idle_w)


@dataclass(frozen=True)
class Ended:
    """What happened in a run: a record for each request, and in each pool."""

    run: Run
    records: tuple[RequestRecord, ...]
    results: tuple[Sequence[Simulated], ...]
    held_chip_s: float | None
    """Chips paid for, over the time; None where all are, always."""
    idle_w: float

    @property
    def stats(self) -> tuple[EngineStats, ...]:
        return tuple(one.stats for result in self.results for one in result)

    def chips(self, duration_s: float) -> float:
        """Paid for, the mean."""
        return self.run.chips if self.held_chip_s is None else self.held_chip_s / duration_s

    def joules(self, duration_s: float) -> float:
        if self.held_chip_s is None:
            return self.run.joules(self.results, duration_s)
        joules, busy_s = self.run.busy(self.results)
        return joules + self.idle_w * max(self.held_chip_s - busy_s, 0.0)


def dedicated(
    name: str, fleet: Fleet, router: Callable[[], Router], chip: Chip, told: ToldTo | None = None
) -> Run:
    """A model on pools of its own."""
    words = None if told is None else told.words[name]
    engines = [fleet.engines(pool, chip, words=words) for pool in fleet.pools]
    hand_over_s = fleet.hand_over(chip) if len(engines) == 2 else None

    def handed_s(request: Request) -> float:
        return 0.0 if hand_over_s is None else hand_over_s(len(request.prompt))

    def joules(results: Results, duration_s: float) -> float:
        return sum(
            one.joules(chip, [each.stats.busy_s for each in result], duration_s)
            for one, result in zip(engines, results, strict=True)
        )

    front = _front([one.loops for one in engines], (router(), LeastLoad()), handed_s, told)
    return Run(
        models=(name,),
        front=front,
        sites=tuple(replace(site, role=f"{name}/{site.role}") for site in fleet.sites()),
        joules=joules,
        busy=lambda results: _both(one.busy(each) for one, each in zip(engines, results, strict=True)),
        sources=frozenset().union(*(one.table.sources for one in engines)),
        shortest_s=min(one.table.shortest_s for one in engines),
        movers=movers_of(fleet, front, chip),
        moved_token_bytes=fleet.moved_token_bytes,
    )


def shared(sharing: Sharing, label: str, told: ToldTo | None = None) -> Run:
    """Models that take turns on the same pools, which go by `label`."""
    tables: dict[object, StepTable] = {}
    words = None if told is None else told.words
    engines = [sharing.engines(pool, tables, words) for pool in sharing.pools]

    def joules(results: Results, duration_s: float) -> float:
        return sum(
            one.joules(sharing.chip, result, duration_s) for one, result in zip(engines, results, strict=True)
        )

    return Run(
        models=tuple(sharing.fleets),
        front=_front([one.loops for one in engines], (ByModel(), ByModel()), sharing.hand_over(), told),
        sites=tuple(sharing.site(one, label) for one in engines),
        joules=joules,
        busy=lambda results: _both(one.busy(each) for one, each in zip(engines, results, strict=True)),
        sources=frozenset().union(sharing.sources(), *(table.sources for table in tables.values())),
        shortest_s=min(table.shortest_s for table in tables.values()),
        shared=True,
    )


def _both(parts: Iterable[tuple[float, float]]) -> tuple[float, float]:
    joules, seconds = zip(*parts, strict=True)
    return sum(joules), sum(seconds)


def _front(
    pools: Sequence[Sequence[Engine]],
    routers: tuple[Router, Router],
    hand_over_s: Callable[[Request], float],
    told: ToldTo | None,
) -> Front | Relay:
    watches = (None, None) if told is None else told.watches
    if len(pools) == 1:
        return Front(pools[0], routers[0], watch=watches[0])
    return Relay((pools[0], pools[1]), routers, hand_over_s, watches=watches)
