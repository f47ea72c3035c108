"""Instances that several models share: what each model takes of the memory, and how they change.

Weights of all models lie in host memory, one copy a node. Knows chips and bytes; whose turn
it is and what makes way is decided in `cloud.sched`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tongyun.cloud.engine.shared import SharedLoop, Switching, Tenant
from tongyun.cloud.engine.simulated import LeapingExecutor, SimulatedExecutor
from tongyun.cloud.engine.step_table import StepTable
from tongyun.cloud.instance import Simulated
from tongyun.cloud.latency import Slo
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.residence import Footprint
from tongyun.cloud.sched.scheduler import Scheduler
from tongyun.cloud.sched.turns import Groups, Rounds
from tongyun.codesign.fleet import Fleet
from tongyun.codesign.replicas import Pool
from tongyun.codesign.steady import USABLE_MEMORY, activation_bytes
from tongyun.codesign.upkeep import Site
from tongyun.errors import Infeasible, InputError
from tongyun.model.shard import slice_of
from tongyun.model.steps import kv_bytes, weight_bytes
from tongyun.specs import Chip, SharingSpec
from tongyun.units import GB, Source

Words = Mapping[str, Sequence[int]]
"""By model, the tokens that its engines make up."""
LIMIT_S = 0.1
"""Between tokens, where a model has no limit: what a turn is measured by then (the published system's)."""


@dataclass(frozen=True, kw_only=True)
class SharedPool:
    """Replicas that all models of a part share, put together."""

    pool: Pool
    loops: tuple[SharedLoop, ...]
    executors: tuple[SimulatedExecutor, ...]
    """Of every model on every replica."""

    def busy(self, results: Sequence[Simulated]) -> tuple[float, float]:
        """Joules and chip-seconds of the pool's steps."""
        busy_s = sum(one.stats.busy_s for one in results)
        return sum(one.joules for one in self.executors), busy_s * self.pool.plan.shard.ranks

    def joules(self, chip: Chip, results: Sequence[Simulated], duration_s: float) -> float:
        """Of the pool's chips; those that wait for bytes draw what idle ones do."""
        busy_s = sum(one.stats.busy_s for one in results)
        resting_s = max(duration_s * len(results) - busy_s, 0.0)
        ranks = self.pool.plan.shard.ranks
        return sum(one.joules for one in self.executors) + chip.idle_w * ranks * resting_s


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Models on the same pools: each as the fleet it would be alone, and its limits."""

    fleets: Mapping[str, Fleet]
    slos: Mapping[str, Slo]
    spec: SharingSpec
    chip: Chip

    @property
    def pools(self) -> tuple[Pool, ...]:
        return next(iter(self.fleets.values())).pools

    @property
    def link_bytes_per_s(self) -> float:
        """Of one rank, host to chip; the nominal rate."""
        spec, chip = self.spec, self.chip
        rate = chip.host_bytes_per_s if spec.host_bandwidth is None else spec.host_bandwidth.value
        if rate is None:
            raise InputError(
                f"{chip.name}: no host_link; say how fast host memory is read: sharing.host_bandwidth"
            )
        return rate

    @property
    def host_bytes(self) -> float:
        """Host memory for KV blocks, a chip's share: what the weights, one copy a node, leave of it.

        Infeasible with the bytes that are missing.
        """
        if self.spec.host_gb is None:
            return float("inf")
        chips = min(sum(pool.chips for pool in self.pools), self.chip.chips_per_node)
        shard = self.pools[0].plan.shard
        weights = sum(
            shard.ranks * weight_bytes(one.question.model, shard, one.question.precision)
            for one in self.fleets.values()
        )
        left = self.spec.host_gb * GB - weights / chips
        if left < 0:
            raise Infeasible(
                f"weights of {len(self.fleets)} models do not fit host memory: "
                f"a node of {chips} chips lacks {-left * chips:,.0f} bytes ({-left * chips / GB:.3g} GB)"
            )
        return left

    def sources(self) -> frozenset[Source]:
        """Where the switching costs come from; how turns are measured is assumed."""
        spec = self.spec
        given = spec.host_bandwidth
        found = {Source.ASSUMED, self.chip.provenance["host_link"] if given is None else given.source}
        return frozenset(found | ({spec.start.source} if spec.start is not None else set()))

    def hand_over(self) -> Callable[[Request], float]:
        """Seconds for a prompt's keys and values from one chip to host memory, and then to another.

        The side whose ranks hold more sets the pace. Nothing else waits for them.
        """
        rate = self.link_bytes_per_s
        token_s = {
            name: 2 * max(self._token_bytes(fleet, pool) for pool in fleet.pools) / rate
            for name, fleet in self.fleets.items()
        }
        return lambda request: len(request.prompt) * token_s[request.model or ""]

    def _token_bytes(self, fleet: Fleet, pool: Pool) -> float:
        question = fleet.question
        part = slice_of(question.model, pool.plan.shard)
        return float(kv_bytes(question.model, 1, question.precision, part))

    def footprint(self, fleet: Fleet, pool: Pool) -> Footprint:
        """Bytes of a rank."""
        question, plan = fleet.question, pool.plan
        working = activation_bytes(
            question,
            slice_of(question.model, plan.shard),
            np.array(plan.step_tokens),
            np.array(plan.batch),
        )
        return Footprint(
            weights=weight_bytes(question.model, plan.shard, question.precision),
            block=fleet.block_tokens * self._token_bytes(fleet, pool),
            working=float(working),
        )

    def site(self, shared: SharedPool, label: str) -> Site:
        """A pool as failures and autoscaling see it: a replica starts with weights as it did at first, from a
        host that has those of every model."""
        plan = shared.pool.plan
        models = [(one.question.model, one.question.precision) for one in self.fleets.values()]
        return Site(
            role=f"{label}/{shared.pool.role}",
            replicas=plan.replicas,
            ranks=plan.shard.ranks,
            groups=1,
            rank_bytes=max(loop.begins_bytes for loop in shared.loops),
            host_bytes=sum(weight_bytes(model, plan.shard, precision) for model, precision in models),
        )

    def engines(self, pool: Pool, tables: dict[object, StepTable], words: Words | None = None) -> SharedPool:
        """A pool's replicas, each with a scheduler for every model; equal models share their prices.

        With each model's `words`, every step is taken by itself and can be told.
        """
        replicas = range(pool.plan.replicas)
        tenants = [self._tenants(pool, tables, words) for _ in replicas]
        start, host_bytes = self.spec.start, self.host_bytes
        switching = Switching(
            bytes_per_s=self.link_bytes_per_s,
            start_s=0.0 if start is None else start.value,
            prefetch=self.spec.prefetch,
        )
        memory = USABLE_MEMORY * self.chip.memory_bytes, host_bytes
        return SharedPool(
            pool=pool,
            loops=tuple(
                SharedLoop(
                    {name: tenant for name, (tenant, _) in each.items()},
                    memory,
                    Groups() if pool.role == "prefill" or self.spec.turns == "requests" else Rounds(),
                    switching,
                    first=number,
                )
                for number, each in zip(replicas, tenants, strict=True)
            ),
            executors=tuple(executor for each in tenants for _, executor in each.values()),
        )

    def _tenants(
        self, pool: Pool, tables: dict[object, StepTable], words: Words | None
    ) -> dict[str, tuple[Tenant, SimulatedExecutor]]:
        tenants = {}
        for name, fleet in self.fleets.items():
            question, limits = fleet.question, fleet.limits(self.chip, pool.plan)
            key = question.model, question.precision, pool.plan.shard, limits
            if key not in tables:
                tables[key] = StepTable(
                    question.model,
                    self.chip,
                    question.precision,
                    pool.plan.shard,
                    max_step_tokens=limits.max_step_tokens,
                    max_context_tokens=limits.max_context_tokens,
                )
            kind = LeapingExecutor if words is None else SimulatedExecutor
            own = None if words is None else words[name]
            executor = kind(tables[key], vocabulary=question.model.vocab, words=own)
            slo = self.slos[name]
            tenant = Tenant(
                scheduler=Scheduler(limits),
                executor=executor,
                footprint=self.footprint(fleet, pool),
                prices=tables[key],
                context_tokens=question.isl + question.osl // 2,
                limit_s=LIMIT_S if slo.tpot_s is None else slo.tpot_s,
                # In a pool that only decodes it is there already.
                first_s=float("inf") if slo.ttft_s is None or pool.role == "decode" else slo.ttft_s,
            )
            tenants[name] = tenant, executor
        return tenants
