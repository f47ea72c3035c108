"""Play a load on a simulated fleet: equal replicas of one plan behind a router.

The production scheduler runs for every attention group of every replica, on virtual time,
with steps priced by the chip's spec. Decides how much KV cache a group has; knows no
flags. All that comes out is simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tongyun.cloud.engine.clock import VirtualClock
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.protocol import EngineStats
from tongyun.cloud.engine.simulated import LeapingExecutor
from tongyun.cloud.engine.step_table import StepTable
from tongyun.cloud.latency import LatencyReport, Slo, summarise
from tongyun.cloud.sched.router import LeastLoad, Router
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig
from tongyun.cloud.simulate import play_fleet, play_pools
from tongyun.cloud.workload import Arrival, requests
from tongyun.codesign.plan import Plan
from tongyun.codesign.space import Question
from tongyun.codesign.steady import USABLE_MEMORY, activation_bytes
from tongyun.cost import usd_per_mtoken
from tongyun.errors import Infeasible, InputError
from tongyun.model.shard import slice_of
from tongyun.model.steps import kv_bytes, weight_bytes
from tongyun.specs import Chip
from tongyun.units import GB, Source

BLOCK_TOKENS = 64
"""Tokens of a KV block: several of an engine's 16 at a time, so that a long prompt is named quickly."""


@dataclass(frozen=True, kw_only=True)
class Played:
    """A load as a fleet would have served it, at one corner of the chip's ranges."""

    report: LatencyReport
    engines: tuple[EngineStats, ...]
    """One for each attention group, a replica's together."""
    joules: float
    """Of all chips from the first arrival to the last end, idle ones included."""
    usd_per_mtoken: float | None
    """Of output tokens, all chips asked for paid over that time."""
    sources: frozenset[Source]

    @property
    def use(self) -> float:
        """Share of the time in which an engine was in a step, the mean of all."""
        return sum(one.busy_s for one in self.engines) / (len(self.engines) * self.report.duration_s)

    @property
    def prefix_hits(self) -> float:
        """Share of the prompt tokens that were found in a cache."""
        return self.report.cached_tokens / self.report.prompt_tokens if self.report.prompt_tokens else 0.0


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Replicas of `plan` for a model and chips as in `question`, whose lengths only size activations."""

    question: Question
    plan: Plan
    prefill_replicas: int = 0
    """Of the plan's, those that only prefill; the others then only decode."""
    prefix_caching: bool = True
    block_tokens: int = BLOCK_TOKENS

    def __post_init__(self) -> None:
        if self.plan.shard.pp > 1:
            raise InputError(
                f"pp {self.plan.shard.pp}: pipeline stages are not simulated request by request; accepted: 1"
            )

        if not 0 <= self.prefill_replicas < max(self.plan.replicas, 1):
            raise InputError(
                f"{self.prefill_replicas} of {self.plan.replicas} replicas for prefill: accepted: "
                f"0 … {self.plan.replicas - 1}, the rest decodes"
            )

    def limits(self, chip: Chip) -> SchedulerConfig:
        """An attention group's scheduler: the plan's limits, and the KV blocks that fit the memory.

        Infeasible with the bytes that are missing, where weights and activations leave no room
        for one request of the longest context.
        """
        question, plan = self.question, self.plan
        model, precision, part = question.model, question.precision, slice_of(question.model, plan.shard)
        room = USABLE_MEMORY * chip.memory_bytes - weight_bytes(model, plan.shard, precision)
        tokens, sequences = np.array(plan.step_tokens), np.array(plan.batch)
        room -= float(activation_bytes(question, part, tokens, sequences))
        each = self.block_tokens * float(kv_bytes(model, 1, precision, part))
        longest = -(-(question.isl + question.osl) // self.block_tokens)
        if room < longest * each:
            lacking = (longest * each - room) / GB
            raise Infeasible(
                f"{model.name} does not fit: a rank of {chip.name} lacks {lacking:.3g} GB "
                f"for weights, activations and the keys and values of one request"
            )
        blocks = int(room // each)
        return SchedulerConfig(
            blocks=blocks,
            block_tokens=self.block_tokens,
            max_context_tokens=min(model.max_positions, blocks * self.block_tokens),
            max_sequences=plan.batch,
            max_step_tokens=max(plan.step_tokens, plan.batch),
            prefix_caching=self.prefix_caching,
        )

    def _hand_over(self, chip: Chip) -> Callable[[int], float]:
        """Seconds for the keys and values of so many tokens from one replica to another.

        Every rank sends its share to its counterpart at once, when the prompt is computed:
        latency + bytes / (achieved · bandwidth), over the scale-up links where the fleet is
        one node and over the network else.
        """
        link = chip.scale_up if self.question.chips <= chip.chips_per_node else chip.scale_out
        if link is None:
            raise InputError(f"{chip.name}: no links between replicas; keys and values cannot be handed over")
        model, precision = self.question.model, self.question.precision
        part = slice_of(model, self.plan.shard)
        rate = link.bytes_per_s * link.achieved
        return lambda tokens: link.latency_s + float(kv_bytes(model, tokens, precision, part)) / rate

    def play(
        self,
        arrivals: Sequence[Arrival],
        router: Router,
        *,
        chip: Chip,
        seed: int = 0,
        slo: Slo | None = None,
    ) -> Played:
        """Send `arrivals` through `router`; the same arguments give the same result to the last bit."""
        if not arrivals:
            raise InputError("the load is empty: nothing to simulate")
        question, plan, limits = self.question, self.plan, self.limits(chip)
        model, shard = question.model, plan.shard
        table = StepTable(
            model,
            chip,
            question.precision,
            shard,
            max_step_tokens=limits.max_step_tokens,
            max_context_tokens=limits.max_context_tokens,
        )
        groups = plan.replicas * shard.dp
        executors = [LeapingExecutor(table, vocabulary=model.vocab) for _ in range(groups)]
        loops = [EngineLoop(Scheduler(limits), executor, VirtualClock()) for executor in executors]
        load = requests(arrivals, vocabulary=model.vocab, seed=seed)
        if self.prefill_replicas:
            cut = self.prefill_replicas * shard.dp
            pools, hand_over_s = (loops[:cut], loops[cut:]), self._hand_over(chip)
            routers = router, LeastLoad()
            records, played = play_pools(
                load, pools, routers, lambda request: hand_over_s(len(request.prompt))
            )
            results = [*played[0], *played[1]]
        else:
            results = play_fleet(load, loops, router)
            records = tuple(record for result in results for record in result.records)
        report = summarise(records, slo)
        # A step's joules are those of all ranks of the replica, which its groups share.
        busy = sum(executor.joules for executor in executors) / shard.dp
        resting_s = sum(max(report.duration_s - result.stats.busy_s, 0.0) for result in results)
        idle = chip.idle_w * (shard.ranks / shard.dp * resting_s + plan.idle_chips * report.duration_s)
        price = question.price
        return Played(
            report=report,
            engines=tuple(result.stats for result in results),
            joules=busy + idle,
            usd_per_mtoken=None
            if price is None or not report.output_tokens
            else float(usd_per_mtoken(report.output_tokens_per_s, question.chips, price.chip_hour.value)),
            sources=table.sources,
        )
