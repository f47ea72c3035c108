"""One group of a plan, played request by request with the production scheduler.

Steps take what the price door says, read off a table over sequences and prompt tokens that
was priced in one pass; between its entries a step's time is linear. All groups of a
deployment are alike and get an equal share of the demand. Filling and draining
are left out of the percentiles.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tongyun.cloud.engine.simulated import SimulatedExecutor, StepLoad
from tongyun.cloud.latency import Percentiles, RequestRecord
from tongyun.cloud.sched.scheduler import SchedulerConfig
from tongyun.cloud.simulate import simulate
from tongyun.cloud.workload import Arrival, requests
from tongyun.codesign.demand import Demand
from tongyun.codesign.plan import Plan, Tails
from tongyun.codesign.space import Question
from tongyun.codesign.steady import USABLE_MEMORY, distinct_stages, load_at, memory_by_stage
from tongyun.cost import StepPrices
from tongyun.errors import Infeasible
from tongyun.model.graph import Sequences, StepShape
from tongyun.model.shard import Shard
from tongyun.units import Cost, Source

Array = NDArray[np.float64]
TOKENS_PLAYED = 150_000
"""Output tokens a play is long, within `LEAST` and `MOST` requests."""
LEAST, MOST = 150, 1000
BLOCK_TOKENS = 16
EDGES = 0.15
"""Share of the requests at either end that do not count."""


@dataclass(frozen=True, kw_only=True)
class Played:
    """What the requests of a play felt."""

    ttft_s: float
    tpot_s: float
    tails: Tails

    def beside(self, other: Tails) -> list[tuple[float, float]]:
        """Pairs of another's percentiles and these."""
        names = ("ttft_p50_s", "ttft_p99_s", "tpot_p99_s")
        return [(getattr(other, name), getattr(self.tails, name)) for name in names]


def play(question: Question, demand: Demand, plan: Plan) -> Played:
    """Play one attention group of the plan under its share of the demand."""
    shard = plan.shard
    groups = shard.dp * shard.pp
    limit = max(1, plan.batch // groups)
    count = int(np.clip(TOKENS_PLAYED // demand.osl, LEAST, MOST))
    arrivals = demand.played(count, 1 / (plan.replicas * groups))
    longest = max(arrival.prompt_tokens + arrival.output_tokens for arrival in arrivals)
    tokens = max(limit * (question.isl + question.osl), longest)
    config = SchedulerConfig(
        blocks=math.ceil(1.05 * tokens / BLOCK_TOKENS) + 1,
        block_tokens=BLOCK_TOKENS,
        max_context_tokens=longest + 1,
        max_sequences=limit,
        max_step_tokens=max(plan.step_tokens, limit),
    )
    return _play(question, shard, config, arrivals, None)


def play_users(question: Question, shard: Shard, users: int, step_tokens: int, rounds: int) -> Played:
    """`users` of a replica, each asking again when answered, `rounds` times on average; all count.

    The cache is what weights and activations leave of the usable memory; Infeasible where
    that holds no request.
    """
    groups = shard.dp * shard.pp
    each = math.ceil(users / groups)
    whole = question.isl + question.osl
    batch, budget = np.ones(1), np.full(1, float(step_tokens))
    stages = memory_by_stage(question, shard, batch, budget)
    room = USABLE_MEMORY * question.at().memory_bytes
    # `kv` is that of the load's own sequences, at full length and in every pipeline stage's turn.
    sequences = 1 + float(load_at(question, batch, budget).prompts[0])
    left = min(
        (room - stage.weights - float(stage.activations[0])) / (float(stage.kv[0]) / sequences)
        for stage in stages
    )
    if left < 1:
        raise Infeasible(f"{question.model.name} on {shard}: no room for one request of {whole} tokens")
    config = SchedulerConfig(
        blocks=math.floor(left * whole / BLOCK_TOKENS),
        block_tokens=BLOCK_TOKENS,
        max_context_tokens=whole + 1,
        max_sequences=each,
        max_step_tokens=max(step_tokens, each),
    )
    arrivals = [Arrival(0.0, question.isl, question.osl)] * (rounds * each)
    return _play(question, shard, config, arrivals, each)


def _play(
    question: Question, shard: Shard, config: SchedulerConfig, arrivals: Sequence[Arrival], users: int | None
) -> Played:
    executor = SimulatedExecutor(_StepTable(question, shard, config.max_sequences, config.max_step_tokens))
    played = simulate(requests(arrivals, vocabulary=32_000), config, executor, users=users)
    rest = 0 if users is not None else round(EDGES * len(arrivals))
    return _felt([record for record in played.records[rest : len(arrivals) - rest] if record.ok])


def _felt(records: list[RequestRecord]) -> Played:
    first = Percentiles.of(record.ttft_s for record in records)
    between = Percentiles.of(record.tpot_s for record in records)
    if first is None or between is None:
        raise Infeasible("no request of the play came to its end: they do not fit one group's cache")
    return Played(
        ttft_s=first.mean,
        tpot_s=between.mean,
        tails=Tails(ttft_p50_s=first.p50, ttft_p90_s=first.p90, ttft_p99_s=first.p99, tpot_p99_s=between.p99),
    )


class _StepTable:
    """Seconds of any step of one group, from steps priced at a few sizes."""

    def __init__(self, question: Question, shard: Shard, most: int, budget: int) -> None:
        self.question, self.shard = question, shard
        self.counts = np.unique(np.round(np.geomspace(1, max(most, 2), 24)))
        self.chunks = np.unique(np.round(np.geomspace(16, max(budget, 32), 24)))
        self.contexts = np.asarray([0.0, float(question.isl + question.osl)])
        whole = self._priced(self.counts[:, None], self.contexts[None, :], None)
        # Every number of sequences, so that a step is one look-up.
        self.most = int(self.counts[-1])
        every = np.arange(self.most + 1)
        self.decode = [np.interp(every, self.counts, whole[:, i]).tolist() for i in range(2)]
        alone, beside = self._prompts()
        rows = [np.interp(every, [0.0, *self.counts], [alone[i], *beside[:, i]]) for i in range(alone.size)]
        self.mixed = [row.tolist() for row in rows]

    def _prompts(self) -> tuple[Array, Array]:
        """Steps with a chunk of each size at both ends of the context, alone and beside decoding."""
        middle = self.question.isl + self.question.osl / 2
        new, cached = (axis.ravel() for axis in np.meshgrid(self.chunks, self.contexts, indexing="ij"))
        alone = self._priced(None, middle, (new, cached))
        beside = self._priced(self.counts[:, None], middle, (new[None, :], cached[None, :]))
        return alone, beside

    def _priced(
        self, count: Array | None, context: Array | float, prompt: tuple[Array, Array] | None
    ) -> Array:
        q = self.question
        decode = None if count is None else Sequences(new=1, context=context, count=count)
        prefill = None if prompt is None else Sequences(new=prompt[0], context=prompt[1], count=1)
        sampled = 1.0 if count is None else count + (prompt is not None)
        shape = StepShape(decode=decode, prefill=prefill, sampled=sampled)
        prices = StepPrices(q.model, shape, q.at(), q.precision)
        stages = [first for first, _ in distinct_stages(q.model, self.shard).values()]
        seconds = [np.asarray(prices.at(self.shard, stage).seconds) for stage in stages]
        return np.asarray(self.shard.pp * np.max(np.stack(seconds), axis=0))

    def __call__(self, load: StepLoad) -> Cost:
        one = load.new_tokens == 1
        decoding = min(int(one.sum()), self.most)
        context = float(load.context[one].mean()) if decoding else 0.0
        far = self.contexts[1]
        part = context / far
        seconds = (1 - part) * self.decode[0][decoding] + part * self.decode[1][decoding] if decoding else 0.0
        if not one.all():
            seconds += self._prompt_s(load, ~one, decoding)
        return Cost(seconds=seconds, joules=0.0, sources=frozenset({Source.SIMULATED}))

    def _prompt_s(self, load: StepLoad, many: NDArray[np.bool_], decoding: int) -> float:
        """What prompts add to the step: one chunk of as many tokens, and of as many pairs, as they have."""
        new, cached = load.new_tokens[many].astype(float), load.context[many]
        tokens = float(new.sum())
        behind = float((new * (cached + new / 2)).sum()) / tokens - tokens / 2
        place = min(max(bisect_left(self.chunks, tokens), 1), len(self.chunks) - 1)
        low, high = self.chunks[place - 1], self.chunks[place]
        part, deep = (tokens - low) / (high - low), behind / self.contexts[1]
        at = [self.mixed[2 * p + i][decoding] for p in (place - 1, place) for i in range(2)]
        whole = (1 - part) * ((1 - deep) * at[0] + deep * at[1]) + part * ((1 - deep) * at[2] + deep * at[3])
        if not decoding:
            return max(whole, 0.0)
        middle = (self.question.isl + self.question.osl / 2) / self.contexts[1]
        plain = (1 - middle) * self.decode[0][decoding] + middle * self.decode[1][decoding]
        return max(whole - plain, 0.0)
