"""The operators of one step of a model, as data.

A graph is a tuple of `Operator`s: what is computed and moved, with no notion of the
chip that does it. Shapes and counts may be NumPy arrays, so that one pass prices a
whole grid of batch sizes and context lengths.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike

from tongyun.errors import InputError, unknown
from tongyun.model.config import Experts
from tongyun.units import DType, Number


class Kind(StrEnum):
    """What an operator does, which decides how a chip prices it."""

    EMBED = "embed"
    MATMUL = "matmul"
    GROUPED_MATMUL = "grouped_matmul"
    ATTENTION = "attention"
    NORM = "norm"
    ELEMENTWISE = "elementwise"
    SAMPLE = "sample"
    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    SEND = "send"


COLLECTIVES = frozenset({Kind.ALL_REDUCE, Kind.ALL_GATHER, Kind.REDUCE_SCATTER, Kind.ALL_TO_ALL, Kind.SEND})


@dataclass(frozen=True, kw_only=True)
class Attends:
    """What an attention operator needs beyond its counts to be priced as a kernel."""

    group: Sequences
    key_heads: int
    width: int
    """Numbers of a query-key product."""
    value_width: int
    cached_width: int
    """Numbers kept for a token and key head: keys and values, or the latent vector."""
    cache: DType
    is_latent: bool = False
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class Routed:
    """The expert layer that a grouped product or its activation belongs to, as one rank sees it."""

    tokens: Number
    """Tokens routed, those of all attention groups together."""
    mine: Number
    """Tokens whose results this rank sums."""
    per_token: int
    count: int
    """Experts of the layer on all ranks."""
    local: int
    """Experts on this rank."""
    picks: tuple[float, ...]
    """For each of these, the chance that a token is computed there; empty where all are alike."""
    hidden: int
    inner: int
    compute: DType
    """The type its products are taken in, which decides what passes between them."""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator of one rank, executed `repeat` times in a step (once a layer, usually).

    All counts are for one execution on one rank. `m`, `n`, `k` are the matmul's rows,
    columns and inner size (for a grouped matmul `m` is the rows over all groups; for
    attention `m` is query rows over all heads, `n` heads, `k` head width, `groups` sequences;
    for a norm or an activation `m` is rows and `n` their width).
    """

    name: str
    kind: Kind
    repeat: int = 1
    m: Number = 0
    n: int = 0
    k: int = 0
    groups: Number = 1
    """Weight matrices touched: experts that receive at least one token, as an expectation."""
    compute: DType = DType.BF16
    """The type in which products are taken; it selects the peak rate."""
    stored: DType = DType.BF16
    """The type in which its weights are kept."""
    block_scales: bool = False
    """8-bit weights with a scale for each block of 128 × 128."""
    is_fused: bool = False
    """Part of its neighbour's kernel: it moves bytes but starts nothing."""
    joins: tuple[int, ...] = ()
    """Columns of the weights that stand side by side in a product, where it is several in one."""
    is_gated: bool = False
    """Its two halves are a gate and what that lets through."""
    is_normed: bool = False
    """A norm that the products behind it can take in, or such a product."""
    is_summed: bool = False
    """The residual is added to what it gives."""
    attends: Attends | None = None
    routed: Routed | None = None
    flops: Number = 0
    """Multiplications and additions of products; norms and element-wise work count bytes only."""
    read_bytes: Number = 0
    """Activations and KV read; weights are counted apart."""
    weight_bytes: Number = 0
    """Weights read in this execution; for experts only those touched."""
    write_bytes: Number = 0
    resident_bytes: Number = 0
    """Weights this operator keeps on the rank, over all `repeat`s."""
    axis: str = ""
    """Collectives only: the parallel axis (tp, ep, dp, pp)."""
    ranks: int = 1
    """Collectives only: consecutive ranks that take part; for a send, those of the whole replica."""
    payload_bytes: Number = 0
    """Collectives only: bytes each rank puts in (all-reduce, all-to-all, send) or holds
    once the collective is over (all-gather) or before it (reduce-scatter)."""
    experts: Experts | None = None
    """All-to-alls only: those to which tokens go, one copy for each rank that has any of a token's."""

    @property
    def moved_bytes(self) -> Number:
        return self.read_bytes + self.weight_bytes + self.write_bytes


@dataclass(frozen=True, kw_only=True)
class Precision:
    """In which types a model is stored and computed.

    Embedding, head, router, norms and biases stay in the type of the activations, as in
    published quantised checkpoints, unless `exact` names another for the first three (an
    engine that keeps bf16 weights and computes in f32). Scales of block formats are not counted.
    """

    weights: DType = DType.BF16
    experts: DType = DType.BF16
    compute: DType = DType.BF16
    """Type of the products of attention and feed-forward projections."""
    expert_compute: DType = DType.BF16
    activations: DType = DType.BF16
    kv: DType = DType.BF16
    block_scales: bool = False
    """8-bit weights have a scale for each block of 128 × 128, as in the checkpoints of DeepSeek and
    Qwen3, instead of one for a row or a tensor."""
    exact: DType | None = None
    """Type in which embedding, head and router are stored; None: that of the activations."""

    @classmethod
    def of(cls, dtype: str = "bf16", kv: str | None = None) -> Precision:
        """The usual recipe behind a short name; `kv` defaults to bf16 (f32 for f32).

        `int4` is weight-only: products stay in bf16. `mxfp4` is gpt-oss's release format:
        experts in 4 bits with bf16 products, the rest in bf16.
        """
        if dtype not in RECIPES:
            raise InputError(unknown("dtype", dtype, RECIPES))
        if kv is not None and kv not in KV_DTYPES:
            raise InputError(unknown("KV dtype", kv, KV_DTYPES))
        recipe = RECIPES[dtype]
        return recipe if kv is None else replace(recipe, kv=DType(kv))

    @classmethod
    def _uniform(cls, weights: DType, compute: DType, activations: DType = DType.BF16) -> Precision:
        return cls(
            weights=weights,
            experts=weights,
            compute=compute,
            expert_compute=compute,
            activations=activations,
            kv=activations,
        )


RECIPES: dict[str, Precision] = {
    "f32": Precision._uniform(DType.F32, DType.F32, DType.F32),
    "bf16": Precision(),
    "fp8": Precision._uniform(DType.FP8, DType.FP8),
    "fp8_block": replace(Precision._uniform(DType.FP8, DType.FP8), block_scales=True),
    "int8": Precision._uniform(DType.INT8, DType.INT8),
    "int4": Precision._uniform(DType.INT4, DType.BF16),
    "fp4": Precision._uniform(DType.FP4, DType.FP4),
    "mxfp4": Precision(experts=DType.FP4),
}
KV_DTYPES = ("f32", "bf16", "fp8", "int8")


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """`count` sequences that each compute `new` tokens behind `context` cached ones.

    Arrays describe a grid of independent steps, unless `ragged` is set: then the last
    axis runs over the sequences of one step and every count below is summed over it.
    """

    new: Number
    context: Number = 0
    count: Number = 1
    ragged: bool = False

    def _sum(self, each: Number) -> Number:
        total = self.count * each
        # The method of arrays takes twice as long for the few chunks of a step.
        return np.add.reduce(total, axis=-1, dtype=np.float64) if self.ragged else total

    @property
    def sequences(self) -> Number:
        return self._sum(np.ones_like(self.new) if self.ragged else 1)

    @property
    def tokens(self) -> Number:
        """New tokens over all sequences."""
        return self._sum(self.new)

    def pairs(self, window: int | None = None) -> Number:
        """Query-key pairs of causal attention, Σ over new tokens of the keys each sees.

        Token i of n behind c sees c+i+1 keys: n·c + n(n+1)/2. A window of w keys (the
        token itself among them) caps each term at w.
        """
        if window is None:
            return self._sum(self.new * self.context + self.new * (self.new + 1) / 2)
        growing = np.clip(window - self.context, 0, self.new)
        return self._sum(growing * self.context + growing * (growing + 1) / 2 + (self.new - growing) * window)

    def keys(self, window: int | None = None) -> Number:
        """Distinct keys read, Σ over sequences: context and new, or what the window reaches."""
        if window is None:
            return self._sum(self.context + self.new)
        return self._sum(np.minimum(self.context, window - 1) + self.new)


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What one attention group computes in one step: decode, prefill, or both mixed.

    `decode` sequences add one token each and use the decode form of attention (absorbed
    for MLA); `prefill` sequences add a chunk. `sampled` rows go through the head.
    """

    decode: Sequences | None = None
    prefill: Sequences | None = None
    sampled: Number

    @classmethod
    def decoding(cls, batch: Number, context: Number) -> StepShape:
        """`batch` sequences, each producing the token behind `context` cached ones."""
        return cls(decode=Sequences(new=1, context=context, count=batch), sampled=batch)

    @classmethod
    def prefilling(cls, tokens: Number, context: Number = 0, count: Number = 1) -> StepShape:
        """`count` prompts of `tokens` new tokens behind `context` cached ones; one row each is sampled."""
        return cls(prefill=Sequences(new=tokens, context=context, count=count), sampled=count)

    @classmethod
    def ragged(cls, pieces: Iterable[tuple[int, int]], *, sampled: int | None = None) -> StepShape:
        """An engine's batch, from its pieces as (new tokens, cached tokens).

        One new token is decoding, more is prefill. `sampled` defaults to the number of pieces.
        """
        rows = np.asarray(list(pieces), dtype=np.float64).reshape(-1, 2)
        one = rows[:, 0] == 1
        return cls(
            decode=_ragged(rows[one]),
            prefill=_ragged(rows[~one]),
            sampled=len(rows) if sampled is None else sampled,
        )

    @property
    def groups(self) -> tuple[Sequences, ...]:
        return tuple(group for group in (self.decode, self.prefill) if group is not None)

    @property
    def tokens(self) -> Number:
        """New tokens of the step: the rows of every matmul before the head."""
        return sum((group.tokens for group in self.groups), start=0.0)

    @property
    def sequences(self) -> Number:
        return sum((group.sequences for group in self.groups), start=0.0)


def _ragged(rows: ArrayLike) -> Sequences | None:
    table = np.asarray(rows, dtype=np.float64)
    return Sequences(new=table[:, 0], context=table[:, 1], ragged=True) if len(table) else None
