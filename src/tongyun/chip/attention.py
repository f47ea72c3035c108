"""Seconds of attention on a data-centre chip: prompts, decoding, grouped and latent heads.

One core takes a tile of query rows (the query heads that share a key head are packed
into it) through the keys it may see, in blocks. A block costs its two products and one
exponential for each query-key pair, one after the other, since the softmax stands
between them; at head width 128 the exponentials take a third of the time on Hopper
and a fifth on Ampere, which is the well-known gap between attention and matmul rates.
Keys and values are read once, and that is added, not overlapped: the tables the model
is judged by show both costs one after the other in every library.

    t = launches · (launch + fill) + waves · (tile_s + fills · fill) + bytes / bandwidth (+ joining)

Decoding may cut the keys over several cores (flash decoding); the fastest cut counts.
Latent attention (MLA) is the same with one shared key head of 576 numbers whose first
512 serve as values. A sliding window bounds the keys. The form follows FlashAttention-2
and -3 (arXiv 2307.08691, 2407.08608). It does not know ragged batches: every sequence
of a call is as long as the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tongyun.chip.matmul import waves
from tongyun.chip.silicon import Library, Silicon
from tongyun.units import DType, Number

Array = NDArray[np.float64]

PREFILL_ROWS = 128
DECODE_ROWS = 64
BLOCK = 128
"""Keys a tile walks at a time."""
SPLITS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The attention heads of one rank; counts may be arrays of one shape with the batch."""

    query: Number
    key: Number
    """Key heads; each is shared by query / key query heads."""
    width: Number
    """Numbers of a query-key product."""
    value_width: Number
    cached_width: Number
    """Numbers kept for a token and key head: keys and values, or the latent vector."""

    @classmethod
    def grouped(cls, query: Number, key: Number, width: Number) -> Heads:
        """Multi-head (query = key), grouped-query and multi-query attention."""
        return cls(query=query, key=key, width=width, value_width=width, cached_width=2.0 * width)

    @classmethod
    def latent(cls, query: Number, latent: int = 512, rotary: int = 64) -> Heads:
        """Decoding over a compressed cache: all query heads share one vector of latent + rotary."""
        return cls(
            query=query, key=1.0, width=latent + rotary, value_width=latent, cached_width=latent + rotary
        )

    @classmethod
    def latent_expanded(cls, query: Number, width: int = 192, value_width: int = 128) -> Heads:
        """A prompt in latent attention: keys and values are unpacked, one for each query head."""
        return cls(
            query=query, key=query, width=width, value_width=value_width, cached_width=width + value_width
        )


def prefill_s(
    batch: Number,
    queries: Number,
    context: Number,
    heads: Heads,
    silicon: Silicon,
    *,
    compute: DType = DType.BF16,
    cache: DType = DType.BF16,
    window: Number | None = None,
    library: Library,
) -> Array:
    """Seconds of causal attention of `queries` new tokens behind `context` cached ones, for each of `batch`.

    Rows of a tile see on average context + half of the queries, rounded up to the tile.
    """
    batch, queries, context = (np.asarray(x, dtype=np.float64) for x in (batch, queries, context))
    group = np.asarray(heads.query) / heads.key
    packed = np.maximum(queries * group, 1.0)
    tiles = np.ceil(packed / PREFILL_ROWS)
    reach = np.maximum(PREFILL_ROWS / group, 1.0)
    seen = context + np.minimum(0.5 * (queries + reach), np.maximum(queries, reach))
    if window is not None:
        seen = np.minimum(seen, np.asarray(window) + reach)
    tile_s = PREFILL_ROWS * seen * _pair_s(heads, silicon, compute, library.prefill_efficiency)
    body_s = waves(batch * heads.key * tiles, silicon.cores) * tile_s
    fresh = batch * queries
    passing = fresh * heads.query * (heads.width + np.asarray(heads.value_width)) * 2.0
    kept = batch * (context + queries if window is None else np.minimum(context + queries, queries + window))
    cached = kept * heads.key * heads.cached_width * cache.bytes
    extra = fresh * heads.key * heads.cached_width * 2.0 * library.prefill_passes
    start_s = library.prefill_launches * (library.launch_s + silicon.fill_s)
    return np.asarray(start_s + body_s + (passing + cached + extra) / silicon.stream_bytes_per_s)


def decode_s(
    batch: Number,
    context: Number,
    heads: Heads,
    silicon: Silicon,
    *,
    cache: DType = DType.BF16,
    window: Number | None = None,
    library: Library,
) -> Array:
    """Seconds of one new token over `context` cached ones, for each of `batch` sequences."""
    batch, context = (np.asarray(x, dtype=np.float64) for x in (batch, context))
    keys = context + 1.0
    if window is not None:
        keys = np.minimum(keys, window)
    rows = np.maximum(np.ceil(np.asarray(heads.query) / heads.key / DECODE_ROWS), 1.0) * DECODE_ROWS
    pair_s = _pair_s(heads, silicon, DType.BF16, library.decode_efficiency)
    token_bytes = np.asarray(heads.cached_width) * cache.bytes
    passing = batch * heads.query * (heads.width + np.asarray(heads.value_width)) * 2.0
    memory_s = (passing + batch * heads.key * keys * token_bytes) / silicon.stream_bytes_per_s
    best: Array = np.full(np.broadcast_shapes(memory_s.shape, rows.shape), np.inf)
    for split in SPLITS:
        chunk = np.ceil(keys / split / BLOCK) * BLOCK
        walk_s = chunk * np.maximum(rows * pair_s, token_bytes / silicon.core_load_bytes_per_s)
        items = batch * heads.key * split
        body_s = waves(items, silicon.cores) * (walk_s + library.decode_fill * silicon.fill_s)
        if split > 1:
            partial = batch * heads.query * split * np.asarray(heads.value_width) * 8.0
            body_s = body_s + library.split_s + partial / silicon.stream_bytes_per_s
        best = np.minimum(best, body_s)
    start_s = library.decode_launches * (library.launch_s + silicon.fill_s)
    return np.asarray(start_s + best + memory_s)


def _pair_s(heads: Heads, silicon: Silicon, compute: DType, efficiency: float) -> Array:
    """Core seconds of one query-key pair: two products, then one exponential."""
    products = 2.0 * (np.asarray(heads.width) + heads.value_width)
    rate = min(silicon.math_efficiency * efficiency, 1.0) / silicon.math_efficiency
    return np.asarray(
        products / (silicon.math_flops_per_s(compute) * rate)
        + 1.0 / (silicon.exponentials_per_cycle * silicon.clock_hz)
    )
