"""The steady state of continuous batching with chunked prefill, for a whole grid of loads.

Equal requests of `isl` input and `osl` output tokens, of the input i = isl · (1 − hits) to be
computed. Each attention group keeps D sequences decoding; a step runs v = 1 + draft positions
of each, of which e become tokens (`speculate`; v = e = 1 without), and up to C − v · D tokens
of prefill, C being the step's budget. With n chunks a prompt, c = i / n:

    p     = e · D · i / (osl − 1)      prefill tokens a step has to take on average
    q     = max(c, p)                  prefill tokens of a step that has any
    f     = p / q                      share of steps that have any
    t     = (1 − f) · t_decode(D) + f · t_mixed(D, q)
    TPOT  = pp · t / e                 a token passes every stage; pp batches take turns
    rate  = dp · D · e · osl / ((osl − 1) · t)     output tokens per second of a replica
    ρ     = p / (C − v · D)            use of the prefill budget; ρ ≥ 1 cannot last
    TTFT  = S · (1 + ρ / 2(1 − ρ)) + pp · t / 2,  S = n · pp · t_mixed

S is the prefill of a prompt beside D decoding sequences, its factor the mean wait of
an M/D/1 queue behind other prompts (Poisson arrivals), and pp · t / 2 what is left of
the running step. All requests are alike, so tails are not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tongyun.codesign.space import Question
from tongyun.codesign.speculate import Drafts, draft_bytes
from tongyun.cost import StepPrices
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Sequences, StepShape
from tongyun.model.shard import Shard, Slice, slice_of
from tongyun.model.steps import kv_bytes, weight_bytes
from tongyun.specs import Chip
from tongyun.units import Cost, DType, Number, Source

Array = NDArray[np.float64]

USABLE_MEMORY = 0.92
"""Share of a chip's memory that weights, KV and activations may take (assumed; the rest is the
runtime's and fragmentation's)."""


@dataclass(frozen=True, kw_only=True)
class Steady:
    """What a replica on one cut does, each field over the grid of batches and budgets."""

    ttft_s: Array
    tpot_s: Array
    tokens_per_s: Array
    """Output tokens per second of one replica."""
    joules_per_token: Array
    """Of the replica's chips, per output token."""
    prefill_use: Array
    """ρ: below 1, or prefill falls behind."""
    sources: frozenset[Source]


@dataclass(frozen=True, kw_only=True)
class Load:
    """The two kinds of step at a grid of loads, and how often each comes."""

    decode: StepShape
    mixed: StepShape
    share: Array
    """f: share of steps that carry prefill."""
    chunks: Array
    """n: steps a prompt takes."""
    use: Array
    """ρ."""
    prompts: Array
    """Prompts in a mixed step."""


def load_at(question: Question, batch: Array, budget: Array) -> Load:
    """The load of an attention group that keeps `batch` sequences decoding on steps of `budget` tokens."""
    isl, positions = question.computed, 1 + question.draft_tokens
    room = np.maximum(budget - positions * batch, 0.0)
    due = question.step_tokens * batch * isl / (question.osl - 1)
    use = np.where(room > 0, due / np.maximum(room, 1.0), np.inf)
    # Where no room is left the load cannot last and is cut by `use`; one chunk keeps it finite.
    chunks = np.ceil(isl / np.clip(room, 1.0, isl))
    chunk = isl / chunks
    prompts = np.maximum(1.0, due / chunk)
    decoding = decoding_at(question, batch)
    # Attention is linear in context, so that the mean over a prompt's chunks is exact.
    cached = question.isl - isl
    prefill = Sequences(new=chunk, context=cached + chunk * (chunks - 1) / 2, count=prompts)
    return Load(
        decode=StepShape(decode=decoding, sampled=positions * batch),
        mixed=StepShape(decode=decoding, prefill=prefill, sampled=positions * batch + prompts / chunks),
        share=due / (prompts * chunk),
        chunks=chunks,
        use=use,
        prompts=prompts,
    )


def decoding_at(question: Question, batch: Array) -> Sequences:
    """Sequences half way through their output, each with the positions that a step verifies."""
    context = question.isl + question.osl / 2
    return Sequences(new=1 + question.draft_tokens, context=context, count=batch)


class Pricing:
    """A grid of loads on one chip, ready for any number of cuts."""

    def __init__(self, question: Question, chip: Chip, batch: Array, budget: Array) -> None:
        self.question, self.chip, self.batch, self.budget = question, chip, batch, budget
        self.load = load_at(question, batch, budget)
        self.decode, self.mixed = (
            (StepPrices(question.model, shape, chip, question.precision), Drafts(question, shape, chip))
            for shape in (self.load.decode, self.load.mixed)
        )

    def steady(self, shard: Shard) -> Steady:
        """Latencies, rate and energy of a replica on this cut."""
        load, steps, each = self.load, self.question.osl - 1, self.question.step_tokens
        stages = distinct_stages(self.question.model, shard)
        costs = [self._stage(shard, stage) for stage, _ in stages.values()]
        step_s = largest([cost.seconds for _, cost in costs])
        mixed_s = largest([mixed.seconds for mixed, _ in costs])
        joules = sum(
            count * cost.joules for (_, cost), (_, count) in zip(costs, stages.values(), strict=True)
        )
        tpot_s = shard.pp * step_s / each
        tokens = shard.dp * self.batch * each * self.question.osl
        with np.errstate(divide="ignore", invalid="ignore"):
            wait = np.where(load.use < 1, load.use / (2 * (1 - load.use)), np.inf)
            ttft_s = load.chunks * shard.pp * mixed_s * (1 + wait) + shard.pp * step_s / 2
        return Steady(
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            tokens_per_s=tokens / (steps * step_s),
            joules_per_token=joules * steps / tokens,
            prefill_use=load.use,
            sources=frozenset().union(*(cost.sources for _, cost in costs)),
        )

    def _stage(self, shard: Shard, stage: int) -> tuple[Cost, Cost]:
        """Cost of a mixed step, and of the mean step."""
        share = self.load.share
        decode, mixed = (stage_cost(prices, shard, stage) for prices in (self.decode, self.mixed))
        mean = Cost(
            seconds=(1 - share) * decode.seconds + share * mixed.seconds,
            joules=(1 - share) * decode.joules + share * mixed.joules,
            sources=decode.sources | mixed.sources,
        )
        return mixed, mean

    def memory_bytes(self, shard: Shard) -> Array:
        """What the fullest rank of this cut holds; see `memory_bytes`."""
        return largest([memory.total for memory in self.memory_by_stage(shard)])

    def memory_by_stage(self, shard: Shard) -> list[Memory]:
        """The memory of one rank of each different stage."""
        model, precision = self.question.model, self.question.precision
        sequences = self.batch + self.load.prompts
        rows = (1 + self.question.draft_tokens) * self.batch + self.load.prompts
        length = self.question.isl + self.question.osl
        found = []
        for part, (stage, _) in distinct_stages(model, shard).items():
            drafting, drafted = draft_bytes(self.question, part, length)
            each = float(kv_bytes(model, length, precision, part)) + drafted
            found.append(
                Memory(
                    weights=weight_bytes(model, shard, precision, stage=stage) + drafting,
                    kv=shard.pp * sequences * each,
                    activations=activation_bytes(self.question, part, self.budget, rows),
                )
            )
        return found


def stage_cost(prices: tuple[StepPrices, Drafts], shard: Shard, stage: int) -> Cost:
    """Cost of one step on one stage, with what drafts the next one's tokens on the last."""
    step, drafts = prices
    cost = step.at(shard, stage)
    return cost + drafts.at(shard) if drafts.are_made and stage == shard.pp - 1 else cost


def steady(question: Question, chip: Chip, shard: Shard, batch: Array, budget: Array) -> Steady:
    """Latencies, rate and energy of a replica; `batch` and `budget` broadcast to the grid."""
    return Pricing(question, chip, batch, budget).steady(shard)


def largest(arrays: Sequence[Number]) -> Array:
    """The slowest or fullest stage, point by point."""
    return np.asarray(np.max(np.stack([np.asarray(array) for array in arrays]), axis=0))


@lru_cache(maxsize=4096)
def distinct_stages(model: ModelConfig, shard: Shard) -> dict[Slice, tuple[int, int]]:
    """Each different stage once, as its first index and how often it comes."""
    found: dict[Slice, tuple[int, int]] = {}
    for stage in range(shard.pp):
        part = slice_of(model, shard, stage)
        first, count = found.get(part, (stage, 0))
        found[part] = (first, count + 1)
    return found


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What one rank of a stage holds, each field in bytes over the grid."""

    weights: float
    kv: Array
    """Of every sequence, decoding or in prefill, at full length."""
    activations: Array

    @property
    def total(self) -> Array:
        return np.asarray(self.weights + self.kv + self.activations)


def memory_bytes(question: Question, shard: Shard, batch: Array, budget: Array) -> Array:
    """Weights, KV of every sequence at full length, and activations, on the fullest rank."""
    return Pricing(question, question.at(), batch, budget).memory_bytes(shard)


def memory_by_stage(question: Question, shard: Shard, batch: Array, budget: Array) -> list[Memory]:
    """The memory of one rank of each different stage."""
    return Pricing(question, question.at(), batch, budget).memory_by_stage(shard)


def activation_bytes(question: Question, part: Slice, budget: Array, sequences: Array) -> Array:
    """Widest moment of a step: residual, normalised input and a layer's inner tensors, or the logits."""
    model, act = question.model, question.precision.activations.bytes
    heads = (part.heads + 2 * part.kv_heads) * model.head_dim
    inner = max(heads, 3 * part.dense_width)
    rows = budget * act * (3 * model.hidden + inner)
    if model.experts is not None and part.sparse_layers:
        routed = part.shard.dp * model.experts.per_token / part.shard.ep
        rows = rows + budget * act * routed * (2 * model.hidden + 3 * part.expert_width)
    logits = sequences * model.vocab * (act + DType.F32.bytes) if part.last else 0.0
    return rows + logits
