"""Pools of equal replicas: cut from a plan, and put together as engines whose steps have a price.

Knows no load and no router.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.simulated import SimulatedExecutor
from tongyun.cloud.engine.step_table import StepTable
from tongyun.cloud.instance import Simulated
from tongyun.cloud.record import Recorder
from tongyun.codesign.answer import Plan
from tongyun.errors import InputError
from tongyun.specs import Chip


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Equal replicas with one task: `mixed`, `prefill` or `decode`."""

    role: str = "mixed"
    plan: Plan

    @property
    def chips(self) -> int:
        return self.plan.replicas * self.plan.shard.ranks

    def __str__(self) -> str:
        """`4 × prefill (tp4 ep8 dp2), batch 64, 2048 tokens a step`; a mixed pool goes without its role."""
        plan, shard = self.plan, self.plan.shard
        role = "" if self.role == "mixed" else f"{self.role} "
        return (
            f"{plan.replicas} × {role}(tp{shard.tp} ep{shard.ep} dp{shard.dp}), "
            f"batch {plan.batch}, {plan.step_tokens} tokens a step"
        )


@dataclass(frozen=True, kw_only=True)
class Engines:
    """A pool put together: an engine for each attention group of each replica, a replica's together."""

    pool: Pool
    loops: tuple[EngineLoop, ...]
    executors: tuple[SimulatedExecutor, ...]
    table: StepTable

    def tell(self, recorder: Recorder) -> None:
        """Let a recorder know what the engines do."""
        blocks = self.loops[0].stats().kv_blocks_total
        for loop, tape in zip(
            self.loops, recorder.pool(self.pool.role, len(self.loops), blocks), strict=True
        ):
            loop.tape = tape

    def joules(self, chip: Chip, busy_s: Sequence[float], duration_s: float) -> float:
        """Of the pool's chips over that time, of which its engines spent `busy_s` in steps."""
        shard = self.pool.plan.shard
        # A step's joules are those of all ranks of the replica, which its groups share.
        busy = sum(executor.joules for executor in self.executors) / shard.dp
        resting_s = sum(max(duration_s - each_s, 0.0) for each_s in busy_s)
        return busy + chip.idle_w * shard.ranks / shard.dp * resting_s

    def busy(self, results: Sequence[Simulated]) -> tuple[float, float]:
        """Joules and chip-seconds of the pool's steps."""
        shard = self.pool.plan.shard
        busy_s = sum(one.stats.busy_s for one in results)
        return sum(one.joules for one in self.executors) / shard.dp, busy_s * shard.ranks / shard.dp


def of_a_group(plan: Plan) -> Plan:
    """A plan of the search with the batch of an attention group, which is what a fleet's engines have.

    A prefill replica may hold as many prompts again as it computes, those being handed over.
    """
    batch = max(1, plan.batch // plan.shard.dp)
    first = plan.prefill
    if first is not None:
        first = replace(first, batch=max(2, 2 * first.batch // first.shard.dp))
    return replace(plan, batch=batch, prefill=first)


def pools_of(plan: Plan, prefill_replicas: int = 0) -> tuple[Pool, ...]:
    """A plan's replicas as one pool, or so many that only prefill and a pool of the others, which decode;
    or the two pools that the plan has."""
    if plan.others:
        raise InputError(f"{plan}: replicas of several kinds are not simulated request by request")
    if plan.prefill is not None:
        if prefill_replicas:
            raise InputError(f"{plan} has its pools already: leave prefill replicas out")
        pools = {"prefill": plan.prefill, "decode": replace(plan, prefill=None)}
        return tuple(Pool(role=role, plan=replace(each, idle_chips=0)) for role, each in pools.items())
    if not 0 <= prefill_replicas < max(plan.replicas, 1):
        raise InputError(
            f"{prefill_replicas} of {plan.replicas} replicas for prefill: accepted: "
            f"0 … {plan.replicas - 1}, the rest decodes"
        )
    if not prefill_replicas:
        return (Pool(plan=plan),)
    counts = {"prefill": prefill_replicas, "decode": plan.replicas - prefill_replicas}
    return tuple(
        Pool(role=role, plan=replace(plan, replicas=count, idle_chips=0)) for role, count in counts.items()
    )
