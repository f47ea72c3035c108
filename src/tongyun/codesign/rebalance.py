"""What it takes to place a pool's experts anew while it serves: who goes where, over which links, how long.

Counts are drawn from the picks for the tokens that were computed, so that a short window sees them
blurred. Every rank takes in and sends at once; the one with most to take in or to send over a link sets
the pace. Moments are the simulation's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tongyun.cloud.engine.step_table import StepTable
from tongyun.cloud.front import Front
from tongyun.cloud.rebalance import Placed, Rebalanced, Rebalancing
from tongyun.cloud.relay import Relay
from tongyun.cloud.replica import Replica
from tongyun.cloud.sched.experts import Placement, moves, placed_anew
from tongyun.codesign.experts import ExpertLoads, busiest
from tongyun.codesign.places import domain_of
from tongyun.codesign.replicas import Engines, Pool
from tongyun.codesign.space import Question
from tongyun.codesign.upkeep import Running
from tongyun.errors import InputError
from tongyun.model.steps import weight_bytes
from tongyun.specs import Chip

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Experts on their way between the ranks of a replica: how many each rank takes in, and sends."""

    near: Ints
    """[2, ranks], within a scale-up domain."""
    far: Ints
    """Beyond it, over the network."""

    @classmethod
    def of(cls, before: Sequence[Placement], after: Sequence[Placement], near: Sequence[int]) -> Traffic:
        """Of all layers; `near` is the domain of each rank."""
        counts = np.zeros((2, 2, len(near)), dtype=np.int64)
        for old, new in zip(before, after, strict=True):
            for source, target in moves(old, new, near):
                apart = int(near[source] != near[target])
                counts[apart, 0, target] += 1
                counts[apart, 1, source] += 1
        return cls(near=counts[0], far=counts[1])

    @property
    def experts(self) -> int:
        return int(self.near[0].sum() + self.far[0].sum())

    def seconds(self, expert_bytes: float, chip: Chip, share: float) -> float:
        """The slower of both links: latency + most of a rank · bytes / (share · achieved · bandwidth)."""
        found = 0.0
        for counts, link in ((self.near, chip.scale_up), (self.far, chip.scale_out)):
            if counts.any():
                if link is None:
                    raise InputError(f"{chip.name}: no links between ranks; experts cannot move")
                rate = share * link.achieved * link.bytes_per_s
                found = max(found, link.latency_s + int(counts.max()) * expert_bytes / rate)
        return found


class PoolBalance:
    """The experts of one pool through a run (see `cloud.rebalance.Balance`)."""

    def __init__(
        self, loads: ExpertLoads, pool: Pool, table: StepTable, chip: Chip, question: Question, seed: int
    ) -> None:
        self._loads, self._pool, self._chip = loads, pool, chip
        shard = pool.plan.shard
        self._placed, self._now = loads.placed(shard.ep), loads.first()
        self._coming: list[Placement] | None = None
        self._counts = np.zeros(self._now.shape, dtype=np.int64)
        self._drifts = 0
        self._rng = np.random.default_rng([seed, 3])
        share = loads.spec.move_share
        self._share, self._standing = (1.0, True) if share is None else (share.value, False)
        # An expert's bytes on one chip and one layer of those that the picks tell of.
        more = replace(shard, expert_picks=(*shard.expert_picks, 1.0))
        held = [weight_bytes(question.model, one, question.precision) for one in (shard, more)]
        self._expert_bytes = (held[1] - held[0]) / len(self._placed)
        self._near = [rank * shard.expert_tp // domain_of(chip) for rank in range(shard.ep)]
        self._first, self._table = table, table
        self._priced: tuple[tuple[float, ...], bool] = shard.expert_picks, False

    def count(self, tokens: int) -> None:
        """Picks of so many tokens, drawn."""
        if tokens and self._loads.spec.window_s is not None:
            chances = self._now / self._now.sum(axis=1, keepdims=True)
            self._counts += self._rng.multinomial(tokens * self._loads.per_token, chances)

    def drift(self) -> None:
        self._drifts += 1
        self._now = self._loads.drifted(self._now, self._drifts)

    def place(self, moment_s: float, replicas: int) -> Rebalanced | None:
        """Send experts; nothing while others are still on their way, or where nothing was counted or
        nobody has any."""
        counts, self._counts = self._counts, np.zeros_like(self._counts)
        if self._coming is not None or not counts.any() or not replicas:
            return None
        copies = self._loads.spec.redundant or 0
        after = [
            placed_anew(where, each.tolist(), copies)
            for where, each in zip(self._placed, counts, strict=True)
        ]
        if after == self._placed:
            return None
        shard, traffic = self._pool.plan.shard, Traffic.of(self._placed, after, self._near)
        self._coming = after
        return Rebalanced(
            moment_s=moment_s,
            role=self._pool.role,
            experts=traffic.experts,
            moved_bytes=traffic.experts * self._expert_bytes * shard.expert_tp * replicas,
            seconds=traffic.seconds(self._expert_bytes, self._chip, self._share),
            standing=self._standing,
            crowding_before=self._crowding(self._placed),
            crowding_after=self._crowding(after),
        )

    def arrived(self) -> None:
        assert self._coming is not None
        self._placed, self._coming = self._coming, None

    def price(self) -> StepTable:
        """By the busiest rank, over what weights on their way leave of the links."""
        narrow = self._coming is not None
        asked = busiest(self._placed, self._now), narrow
        if asked != self._priced:
            chip = _narrowed(self._chip, 1 - self._share) if narrow else self._chip
            self._table, self._priced = self._first.crowded(asked[0], chip), asked
        return self._table

    def _crowding(self, placed: Sequence[Placement]) -> float:
        return sum(busiest(placed, self._now)) * self._pool.plan.shard.ep / self._loads.per_token


def _narrowed(chip: Chip, share: float) -> Chip:
    """With so much of its links' bandwidth."""
    up, out = chip.scale_up, chip.scale_out
    return replace(
        chip,
        scale_up=None if up is None else replace(up, bytes_per_s=share * up.bytes_per_s),
        scale_out=None if out is None else replace(out, bytes_per_s=share * out.bytes_per_s),
    )


def rebalancing(
    loads: ExpertLoads,
    fleet: Front | Relay,
    pools: Sequence[Engines],
    chip: Chip,
    question: Question,
    seed: int,
    running: Running | None = None,
) -> Rebalancing:
    """A fleet that has not begun, with experts that change as its file says; `running` are its replicas,
    where they come and go."""
    placed = [
        Placed(
            balance=PoolBalance(loads, one.pool, one.table, chip, question, seed),
            loops=one.loops,
            executors=one.executors,
            groups=one.pool.plan.shard.dp,
            there=_always if running is None else _equipped(running.of(front)),
        )
        for one, front in zip(pools, fleet.fronts, strict=True)
    ]
    return Rebalancing(
        fleet,
        placed,
        drift_s=loads.spec.drift_s,
        window_s=loads.spec.window_s,
        ending=None if running is None else running.ending,
    )


def _always(_number: int) -> bool:
    return True


def _equipped(replicas: Sequence[Replica]) -> Callable[[int], bool]:
    return lambda number: replicas[number].equipped
