"""What a pool of replicas does that only prefill, or only decode, and what handing over costs.

Prefill, on steps of C tokens: a prompt takes n = ⌈i / C⌉ steps of its i computed tokens, or k = ⌊C / i⌋
prompts share one. Decode, with D sequences in each attention group, is the mixed replica's step
without prompts. With t the step of the slowest stage:

    prefill   S = n · pp · t         a prompt's time        μ = dp · k / (n · t)     prompts per second
    decode    TPOT = pp · t / e + h / (osl − 1)             μ = dp · D · e / ((osl − 1) · t)
    use       ρ = λ / (x · μ)                               of x prefill replicas, λ requests per second
    TTFT      S · (1 + ρ / 2(1 − ρ))                        the first token comes from the prefill pool
    h         latency + bytes / bandwidth                   of keys and values, once the prompt is computed

Every rank hands over its share at once, and the side whose ranks hold more sets the pace. λ is the
smaller of what both pools carry. It knows one pool of each; which go together is `split`'s matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tongyun.codesign.places import domain_of
from tongyun.codesign.space import Question
from tongyun.codesign.speculate import Drafts
from tongyun.codesign.steady import (
    Holdings,
    Memory,
    Pricing,
    activation_bytes,
    decoding_at,
    distinct_stages,
    largest,
    stage_cost,
)
from tongyun.cost import StepPrices
from tongyun.model.graph import Sequences, StepShape
from tongyun.model.shard import Shard
from tongyun.specs import Chip, Link
from tongyun.units import Source

Array = NDArray[np.float64]
MOST_USE = 0.95
"""Use of a prefill pool beyond which its queue is no longer planned for."""


def hand_over_link(question: Question, chip: Chip) -> Link | None:
    """What keys and values travel over: the domain's links where it holds all chips, else the network."""
    return chip.scale_up if question.chips <= domain_of(chip) else chip.scale_out


@dataclass(frozen=True, kw_only=True)
class Pool:
    """One replica of a pool, each field over the loads asked for."""

    requests_per_s: Array
    """At full use."""
    step_s: Array
    """What a user waits for, without queue and hand-over: the prompt's time S, or TPOT."""
    joules: Array
    """Of a request."""
    hand_over_s: float
    """If this side set the pace."""
    sources: frozenset[Source]


class PoolPrices:
    """Both tasks at a row of loads on one chip, ready for any number of cuts."""

    def __init__(
        self,
        question: Question,
        chip: Chip,
        batch: Array,
        budget: Array,
        *,
        mixed: Pricing | None = None,
    ) -> None:
        """`mixed` has priced the decode steps of these batches, where somebody did already."""
        self.question, self.chip, self.batch, self.budget = question, chip, batch, budget
        computed = question.computed
        self.chunks = np.ceil(computed / budget)
        chunk = computed / self.chunks
        self.prompts = np.maximum(1.0, np.floor(budget / computed))
        cached = question.isl - computed
        group = Sequences(new=chunk, context=cached + chunk * (self.chunks - 1) / 2, count=self.prompts)
        self.prefill_shape = StepShape(prefill=group, sampled=self.prompts / self.chunks)
        positions = 1 + question.draft_tokens
        self.decode_shape = StepShape(decode=decoding_at(question, batch), sampled=positions * batch)
        self._prefill = self._prices(self.prefill_shape)
        self._decode = self._prices(self.decode_shape) if mixed is None else mixed.decode
        self.held = Holdings(question) if mixed is None else mixed.held

    def _prices(self, shape: StepShape) -> tuple[StepPrices, Drafts]:
        question, chip = self.question, self.chip
        return (
            StepPrices(question.model, shape, chip, question.precision),
            Drafts(question, shape, chip),
        )

    def prefill(self, shard: Shard) -> Pool:
        """A replica that only prefills, over the budgets."""
        step_s, joules, sources = self._step(self._prefill, shard)
        done = shard.dp * self.prompts / self.chunks
        return Pool(
            requests_per_s=done / step_s,
            step_s=self.chunks * shard.pp * step_s,
            joules=joules / done,
            hand_over_s=self.hand_over_s(shard),
            sources=sources,
        )

    def decode(self, shard: Shard) -> Pool:
        """A replica that only decodes, over the batches."""
        step_s, joules, sources = self._step(self._decode, shard)
        done = shard.dp * self.batch * self.question.step_tokens / (self.question.osl - 1)
        return Pool(
            requests_per_s=done / step_s,
            step_s=shard.pp * step_s / self.question.step_tokens,
            joules=joules / done,
            hand_over_s=self.hand_over_s(shard),
            sources=sources,
        )

    def _step(
        self, prices: tuple[StepPrices, Drafts], shard: Shard
    ) -> tuple[Array, Array, frozenset[Source]]:
        """Seconds on the slowest stage, joules of all, and their sources."""
        stages = distinct_stages(self.question.model, shard).values()
        costs = [(stage_cost(prices, shard, stage), count) for stage, count in stages]
        return (
            largest([cost.seconds for cost, _ in costs]).reshape(-1),
            np.asarray(sum(count * np.asarray(cost.joules) for cost, count in costs)).reshape(-1),
            frozenset().union(*(cost.sources for cost, _ in costs)),
        )

    def hand_over_s(self, shard: Shard) -> float:
        """Seconds of a request's keys and values, if the ranks of this cut set the pace."""
        link = hand_over_link(self.question, self.chip)
        if link is None:
            return np.inf
        share = max(held.prompt for held in self.held.at(shard))
        return link.latency_s + share / (link.bytes_per_s * link.achieved)

    # ── memory ───────────────────────────────────────────────────────────────────────

    def prefill_bytes(self, shard: Shard) -> Array:
        """Of the fullest rank: weights, prompts being computed and as many being handed over, activations."""
        return _fullest(self.prefill_memories(shard))

    def prefill_memories(self, shard: Shard) -> list[Memory]:
        """Of one rank of each different stage."""
        count = 2 * shard.pp * self.prompts
        return [
            Memory(
                weights=held.weights,
                kv=count * held.prompt,
                activations=activation_bytes(self.question, held.part, self.budget, self.prompts),
            )
            for held in self.held.at(shard)
        ]

    def decode_bytes(self, shard: Shard) -> Array:
        """Of the fullest rank: weights, every sequence at full length, activations."""
        return _fullest(self.decode_memories(shard))

    def decode_memories(self, shard: Shard) -> list[Memory]:
        """Of one rank of each different stage."""
        rows = (1 + self.question.draft_tokens) * self.batch
        return [
            Memory(
                weights=held.weights,
                kv=shard.pp * self.batch * held.sequence,
                activations=activation_bytes(self.question, held.part, rows, rows),
            )
            for held in self.held.at(shard)
        ]


def _fullest(memories: list[Memory]) -> Array:
    return largest([memory.total for memory in memories])


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """So many replicas of a pool, all at one load."""

    pool: Pool
    at: int
    """Which of the pool's loads."""
    shard: Shard
    count: int

    @property
    def requests_per_s(self) -> float:
        """As far as the computing goes."""
        return self.count * float(self.pool.requests_per_s[self.at])

    @property
    def handed_per_s(self) -> float:
        """As far as the links go: an attention group hands over one request after the other."""
        return self.count * self.shard.dp / self.pool.hand_over_s


@dataclass(frozen=True, kw_only=True)
class Paired:
    """What a prefill and a decode pool give together."""

    requests_per_s: float
    ttft_s: float
    tpot_s: float
    joules_per_token: float


def paired(question: Question, chip: Chip, first: Replicas, second: Replicas, most_use: float) -> Paired:
    """`most_use` is what TTFT leaves of the prefill pool. Its chips rest where it is not used."""
    rate = min(
        most_use * first.requests_per_s, second.requests_per_s, first.handed_per_s, second.handed_per_s
    )
    use = rate / first.requests_per_s
    hand_s = max(first.pool.hand_over_s, second.pool.hand_over_s)
    resting = chip.idle_w * first.shard.ranks * first.count * (1 - use) / rate
    busy = sum(float(side.pool.joules[side.at]) for side in (first, second))
    return Paired(
        requests_per_s=rate,
        ttft_s=float(first.pool.step_s[first.at]) * waiting(use),
        tpot_s=float(second.pool.step_s[second.at]) + hand_s / (question.osl - 1),
        joules_per_token=(busy + resting) / question.osl,
    )


def waiting(use: float) -> float:
    """A prompt's time in the system over its own: 1 + ρ / 2(1 − ρ), the mean of an M/D/1 queue."""
    return 1 + use / (2 * (1 - use))


def most_use_s(prompt_s: Array, ttft_s: float | None) -> Array:
    """The use at which a prompt of so many seconds just keeps TTFT; 0 where it never does."""
    if ttft_s is None:
        return np.full_like(prompt_s, MOST_USE)
    room = 2 * np.maximum(ttft_s / prompt_s - 1, 0.0)
    # A hair less, so that rounding does not break the limit.
    return np.asarray(np.minimum(room / (1 + room) * (1 - 1e-9), MOST_USE))
