"""A fleet's engines put together behind their routers, with all that its file lets happen to them.

The same for who plays a load on it and for who answers requests at its pace.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tongyun.cloud.engine.interface import Turn
from tongyun.cloud.front import Front, Fronts
from tongyun.cloud.instance import Simulated
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.migration import Mover, Moving
from tongyun.cloud.prompts import PromptMover
from tongyun.cloud.rebalance import Rebalancing
from tongyun.cloud.relay import Relay
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.router import LeastLoad, Router
from tongyun.cloud.simulate import play
from tongyun.codesign.classes import migration_policy, prompt_policy
from tongyun.codesign.rebalance import rebalancing
from tongyun.codesign.replicas import Engines
from tongyun.codesign.upkeep import Running
from tongyun.specs import Chip

if TYPE_CHECKING:
    from tongyun.codesign.fleet import Fleet

Watch = Callable[[Turn], None] | None


@dataclass(frozen=True, kw_only=True)
class AtWork:
    """Engines that have not begun, and who changes them."""

    front: Fronts
    running: Running | None
    """Where replicas come and go."""
    movers: tuple[Moving, ...]
    """Of each pool whose requests move."""
    changing: Rebalancing | None
    """Where experts do."""

    def play(self, load: Iterable[Request]) -> tuple[RequestRecord, ...]:
        """Every request to its end."""
        if self.running is not None:
            return tuple(self.running.play(load))
        if self.changing is not None:
            return self.changing.play(load)
        return tuple(play(load, self.front))

    def forget(self, but: Collection[str]) -> None:
        """Drop what is remembered of requests that have ended, but for these."""
        self.front.forget(but)
        if self.running is not None:
            self.running.retries.forget(but)
        for mover in self.movers:
            mover.log.clear()

    def results(self) -> list[list[Simulated]]:
        """What each engine of each pool did."""
        return [[one.result() for one in front.instances] for front in self.front.fronts]


def put_to_work(
    fleet: Fleet,
    pools: Sequence[Engines],
    router: Router,
    chip: Chip,
    *,
    seed: int = 0,
    watches: tuple[Watch, Watch] = (None, None),
    told: Callable[[RequestRecord], None] | None = None,
) -> AtWork:
    """The fleet, of these engines for its pools.

    `watches` hear of every step of the first pool, and of the second; `told` of requests that are lost.
    """
    front = _front(fleet, pools, router, chip, watches)
    movers = movers_of(fleet, front, chip)
    running = changing = None
    if fleet.upkeep is not None:
        running = fleet.upkeep.attach(front, fleet.sites(), chip, seed=seed, movers=movers, told=told)
    if fleet.experts is not None and fleet.experts.spec.during:
        changing = rebalancing(fleet.experts, front, pools, chip, fleet.question, seed, running)
    return AtWork(front=front, running=running, movers=movers, changing=changing)


def movers_of(fleet: Fleet, front: Front | Relay, chip: Chip) -> tuple[Moving, ...]:
    """Who moves requests of the fleet's: those that decode, and of two pools prompts, too, if it says so."""
    spec = fleet.migration
    if spec is None:
        return ()
    copy_s = fleet.hand_over(chip, first=-1)
    found: list[Moving] = [Mover(front.fronts[-1], migration_policy(spec, fleet.classes), copy_s)]
    if spec.prompts and len(front.fronts) == 2:
        found.append(PromptMover(front.fronts[0], prompt_policy(spec), copy_s(0)))
    return tuple(found)


def _front(
    fleet: Fleet, pools: Sequence[Engines], router: Router, chip: Chip, watches: tuple[Watch, Watch]
) -> Front | Relay:
    if len(pools) == 1:
        return Front(pools[0].loops, router, watch=watches[0])
    prefill, decode = pools
    hand_over_s = fleet.hand_over(chip)
    return Relay(
        (prefill.loops, decode.loops),
        (router, LeastLoad()),
        lambda request: hand_over_s(len(request.prompt)),
        watches=watches,
    )
