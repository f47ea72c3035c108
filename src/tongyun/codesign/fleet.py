"""Play a load on a simulated fleet: pools of equal replicas behind a router.

The production scheduler runs for every attention group of every replica, on virtual time,
with steps priced by the chip's spec. Decides how much KV cache a group has; knows no
flags. All that comes out is simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tongyun.cloud.engine.clock import VirtualClock
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.protocol import EngineStats
from tongyun.cloud.engine.simulated import LeapingExecutor, SimulatedExecutor
from tongyun.cloud.engine.step_table import StepTable
from tongyun.cloud.instance import Simulated
from tongyun.cloud.latency import Group, LatencyReport, Slo, grouped, summarise
from tongyun.cloud.migration import Moves
from tongyun.cloud.rebalance import Rebalanced
from tongyun.cloud.record import Recorder, Recording
from tongyun.cloud.sched.router import Router
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig
from tongyun.cloud.workload import Arrival, requests
from tongyun.codesign.answer import Plan
from tongyun.codesign.at_work import put_to_work
from tongyun.codesign.classes import own_limits, priorities
from tongyun.codesign.experts import ExpertLoads
from tongyun.codesign.fit import check_fit
from tongyun.codesign.pools import hand_over_link
from tongyun.codesign.replicas import Engines, Pool
from tongyun.codesign.space import Question
from tongyun.codesign.speculate import draft_bytes
from tongyun.codesign.tiers import CacheTiers
from tongyun.codesign.upkeep import Kept, Site, Upkeep
from tongyun.cost import usd_per_mtoken
from tongyun.errors import InputError
from tongyun.model.shard import slice_of
from tongyun.model.steps import kv_bytes, weight_bytes
from tongyun.specs import Chip
from tongyun.specs.classes import ClassSpec, MigrationSpec
from tongyun.units import Source

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
    """Of output tokens, all chips asked for paid over that time; where replicas are scaled, while held."""
    sources: frozenset[Source]
    classes: Mapping[str, Group] = field(default_factory=dict)
    """By class of service; empty where no request names one, as are `models`."""
    models: Mapping[str, Group] = field(default_factory=dict)
    kept: Kept | None = None
    """Where replicas come and go: what that did."""
    recording: Recording | None = None
    """Over time, where it was asked for."""
    moves: Moves | None = None
    """Of running requests between engines, where the fleet moves any."""
    rebalanced: tuple[Rebalanced, ...] | None = None
    """Where experts are placed anew during a run: each time that some moved."""

    def joules_per_token(self, group: Group) -> float | None:
        """Of a group's output tokens, its share of all chips' energy; None without output."""
        return group.share * self.joules / group.report.output_tokens if group.report.output_tokens else None

    def usd_per_mtoken_of(self, group: Group) -> float | None:
        """Of a group's output tokens, its share of what all chips cost; None without output or price."""
        tokens = group.report.output_tokens
        if self.usd_per_mtoken is None or not tokens:
            return None
        return group.share * self.usd_per_mtoken * self.report.output_tokens / tokens

    @property
    def use(self) -> float:
        """Share of the time in which an engine was in a step, the mean of all."""
        return sum(one.busy_s for one in self.engines) / (len(self.engines) * self.report.duration_s)

    @property
    def prefix_hits(self) -> float:
        """Share of the prompt tokens that were found in a cache."""
        return self.report.cached_tokens / self.report.prompt_tokens if self.report.prompt_tokens else 0.0

    @property
    def accepted(self) -> float | None:
        """Drafts that were right in a request's step, the mean; a token more is what it got. None without."""
        steps = sum(one.verifications for one in self.engines)
        return sum(one.accepted_tokens for one in self.engines) / steps if steps else None

    @property
    def tier_hits(self) -> tuple[float, ...]:
        """Share of the prompt tokens that came back from each memory behind the cache."""
        tokens = zip(*(one.tier_hit_tokens for one in self.engines), strict=True)
        return tuple(sum(each) / max(self.report.prompt_tokens, 1) for each in tokens)


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Pools for a model and chips as in `question`, whose lengths are those that have to fit.

    One mixed pool, or one that prefills before one that decodes.
    """

    question: Question
    pools: tuple[Pool, ...]
    prefix_caching: bool = True
    block_tokens: int = BLOCK_TOKENS
    tiers: CacheTiers | None = None
    """Memories behind the KV cache."""
    classes: tuple[ClassSpec, ...] = ()
    """Classes of service that have a priority or limits of their own."""
    aging_s: float | None = None
    """Seconds of waiting that outweigh one step of priority; None: strict."""
    migration: MigrationSpec | None = None
    """How running requests move between the replicas of the pool that decodes, if they do."""
    upkeep: Upkeep | None = None
    """Failures and autoscaling."""
    experts: ExpertLoads | None = None
    """How unevenly experts are picked; the pools' cuts know it already."""
    acceptance_source: Source = Source.ASSUMED
    """Where the question's acceptance of drafts comes from, if there are any."""

    def __post_init__(self) -> None:
        if [pool.role for pool in self.pools] not in (["mixed"], ["prefill", "decode"]):
            raise ValueError("a fleet is one mixed pool, or a prefill and a decode pool in this order")
        for pool in self.pools:
            if pool.plan.shard.pp > 1:
                raise InputError(
                    f"pp {pool.plan.shard.pp}: pipeline stages are not simulated request by request; "
                    "accepted: 1"
                )
        if self.idle_chips < 0:
            raise InputError(f"{self.question.chips} chips: the pools take {-self.idle_chips} more")

    @property
    def idle_chips(self) -> int:
        """Chips there are that no pool takes."""
        return self.question.chips - sum(pool.chips for pool in self.pools)

    def limits(self, chip: Chip, plan: Plan, role: str = "mixed") -> SchedulerConfig:
        """An attention group's scheduler: the plan's limits, and the KV blocks that fit the memory.

        A pool that only prefills verifies no drafts; that its prompts pass the draft module is priced.

        Infeasible with the bytes that are missing, where weights and activations leave no room
        for one request of the question's lengths.
        """
        held = check_fit(self.question, chip, plan, self.block_tokens)
        drafts = 0 if role == "prefill" else self.question.draft_tokens
        return SchedulerConfig(
            blocks=held.blocks,
            block_tokens=self.block_tokens,
            max_context_tokens=min(self.question.model.max_positions, held.blocks * self.block_tokens),
            max_sequences=plan.batch,
            max_step_tokens=max(plan.step_tokens, (1 + drafts) * plan.batch),
            draft_tokens=drafts,
            prefix_caching=self.prefix_caching,
            tiers=None if self.tiers is None else self.tiers.blocks(held.block_bytes),
            aging_s=self.aging_s,
        )

    def engines(self, pool: Pool, chip: Chip, *, words: Sequence[int] | None = None) -> Engines:
        """A pool's engines, every one on a virtual clock of its own.

        With `words`, the tokens they make up, every step is taken by itself and can be told.
        """
        question, limits = self.question, self.limits(chip, pool.plan, pool.role)
        table = StepTable(
            question.model,
            chip,
            question.precision,
            pool.plan.shard,
            max_step_tokens=limits.max_step_tokens,
            max_context_tokens=limits.max_context_tokens,
            draft_tokens=question.draft_tokens,
        )
        groups = range(pool.plan.replicas * pool.plan.shard.dp)
        kind = LeapingExecutor if words is None else SimulatedExecutor
        executors = tuple(kind(table, vocabulary=question.model.vocab, words=words) for _ in groups)
        for executor in executors:
            executor.acceptance = question.acceptance
        if self.tiers is not None:
            each = self.block_tokens * self._token_bytes(pool)
            restore = self.tiers.restore(chip, each, pool.plan.shard.ranks)
            for executor in executors:
                executor.restore = restore
        return Engines(
            pool=pool,
            loops=tuple(EngineLoop(Scheduler(limits), executor, VirtualClock()) for executor in executors),
            executors=executors,
            table=table,
        )

    @property
    def moved_token_bytes(self) -> float:
        """Keys and values of a token where requests move, all ranks'."""
        return self._token_bytes(self.pools[-1]) * self.pools[-1].plan.shard.tp

    def _token_bytes(self, pool: Pool) -> float:
        """KV of a token on a rank of the pool, the draft module's among it."""
        question, part = self.question, slice_of(self.question.model, pool.plan.shard)
        return float(kv_bytes(question.model, 1, question.precision, part)) + draft_bytes(question, part)[1]

    def sites(self) -> list[Site]:
        """The pools as failures and autoscaling see them."""
        model, precision = self.question.model, self.question.precision
        return [
            Site(
                role=pool.role,
                replicas=pool.plan.replicas,
                ranks=pool.plan.shard.ranks,
                groups=pool.plan.shard.dp,
                rank_bytes=weight_bytes(model, pool.plan.shard, precision)
                + draft_bytes(self.question, slice_of(model, pool.plan.shard))[0],
            )
            for pool in self.pools
        ]

    def hand_over(self, chip: Chip, *, first: int = 0) -> Callable[[int], float]:
        """Seconds for the keys and values of so many tokens from one replica to another, of the pools from
        the `first` on.

        Every rank sends its share at once, when the prompt is computed, and the side whose
        ranks hold more sets the pace: latency + bytes / (achieved · bandwidth), over the
        scale-up links where one domain holds the fleet and over the network else.
        """
        question = self.question
        link = hand_over_link(question, chip)
        if link is None:
            raise InputError(f"{chip.name}: no links between replicas; keys and values cannot be handed over")
        model, precision = question.model, question.precision
        parts = [slice_of(model, pool.plan.shard) for pool in self.pools[first:]]
        rate = link.bytes_per_s * link.achieved

        def seconds(tokens: int) -> float:
            share = max(
                float(kv_bytes(model, tokens, precision, part)) + tokens * draft_bytes(question, part)[1]
                for part in parts
            )
            return link.latency_s + share / rate

        return seconds

    def play(
        self,
        arrivals: Sequence[Arrival],
        router: Router,
        *,
        chip: Chip,
        seed: int = 0,
        slo: Slo | None = None,
        recorder: Recorder | None = None,
    ) -> Played:
        """Send `arrivals` through `router`; the same arguments give the same result to the last bit.

        A `recorder` takes down what happens over time, and changes nothing of it.
        """
        if not arrivals:
            raise InputError("the load is empty: nothing to simulate")
        question = self.question
        pools = [self.engines(pool, chip) for pool in self.pools]
        if recorder is not None:
            for pool in pools:
                pool.tell(recorder)
        limits = own_limits(self.classes, slo)
        load = requests(
            arrivals,
            vocabulary=question.model.vocab,
            seed=seed,
            priorities=priorities(self.classes, arrivals),
        )
        work = put_to_work(self, pools, router, chip, seed=seed)
        records = work.play(load)
        results = work.results()
        kept = None if work.running is None else work.running.kept(records)
        report = summarise(records, limits)
        chips, joules = self._spent(pools, results, kept, chip, report.duration_s)
        price = question.price
        return Played(
            report=report,
            engines=tuple(one.stats for result in results for one in result),
            joules=joules,
            usd_per_mtoken=None
            if price is None or not report.output_tokens
            else float(usd_per_mtoken(report.output_tokens_per_s, chips, price.chip_hour.value)),
            kept=kept,
            sources=frozenset().union(
                frozenset() if self.upkeep is None else self.upkeep.sources(chip),
                frozenset() if self.tiers is None else self.tiers.sources(chip),
                frozenset() if self.experts is None else self.experts.sources,
                frozenset({self.acceptance_source} if question.draft_tokens else ()),
                *(pool.table.sources for pool in pools),
            ),
            classes=grouped(records, lambda record: record.priority_class, limits),
            models=grouped(records, lambda record: record.model, limits),
            moves=Moves.total((one.log, self.moved_token_bytes) for one in work.movers)
            if work.movers
            else None,
            rebalanced=None if work.changing is None else work.changing.placements,
            recording=None if recorder is None else recorder.recording(records),
        )

    def _spent(
        self,
        pools: Sequence[Engines],
        results: Sequence[Sequence[Simulated]],
        kept: Kept | None,
        chip: Chip,
        duration_s: float,
    ) -> tuple[float, float]:
        """Chips paid for over that time, their mean where they come and go, and joules of all of these."""
        if kept is None:
            return self.question.chips, chip.idle_w * self.idle_chips * duration_s + sum(
                pool.joules(chip, [one.stats.busy_s for one in result], duration_s)
                for pool, result in zip(pools, results, strict=True)
            )
        busy = [pool.busy(result) for pool, result in zip(pools, results, strict=True)]
        chips = self.idle_chips + kept.held_chip_s / duration_s
        resting_s = chips * duration_s - sum(busy_s for _, busy_s in busy)
        return chips, sum(joules for joules, _ in busy) + chip.idle_w * max(resting_s, 0.0)
