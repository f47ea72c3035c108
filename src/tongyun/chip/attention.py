"""Seconds of attention on a data-centre chip: prompts, decoding, grouped and latent heads.

A prompt: one core takes a tile of 128 query rows of one head through the keys they may
see. A query-key pair costs its two products and one exponential, one after the other,
since the softmax stands between the products; at head width 128 that is the well-known
gap between attention and matmul rates, wider on Hopper, whose exponentials did not
grow with its products, although asynchronous products hide some of it. What is read
and written is added, not overlapped: the measured tables show both costs in full in
every library.

    t = launches · launch + waves · tile_s + bytes / bandwidth

Decoding: the query heads of a key head share a tile, the cache streams while the
products of the block before it run (cubic mean), and the keys may be cut over several
cores that are joined afterwards (flash decoding); the fastest cut counts. Between two
blocks of keys a tile waits: load, product, softmax and product depend on each other.

Latent attention (MLA) decodes over one shared key head of 576 numbers whose first 512
serve as values, and unpacks a prompt into a key and a value for each head; before
Hopper no library cuts its keys. A sliding window bounds the keys. The form follows
FlashAttention-2 and -3 (arXiv 2307.08691, 2407.08608). It does not know ragged batches:
every sequence of a call is as long as the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tongyun.chip.matmul import STREAMED, overlapped, waves
from tongyun.chip.silicon import Library, Silicon
from tongyun.units import DType, Number

Array = NDArray[np.float64]

PREFILL_ROWS = 128
DECODE_ROWS = 16
LATENT_ROWS = 64
BLOCK = 128
"""Keys a tile walks at a time."""
SPLITS = (1, 2, 4, 8, 16, 32, 64)
HIDDEN = 0.5
"""Two tiles of a core take turns: each one's softmax runs while the other's products do, but
neither is ever ready just when the other ends."""


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
    is_latent: bool = False

    @classmethod
    def grouped(cls, query: Number, key: Number, width: Number) -> Heads:
        """Multi-head (query = key), grouped-query and multi-query attention."""
        return cls(query=query, key=key, width=width, value_width=width, cached_width=2.0 * width)

    @classmethod
    def latent(cls, query: Number, latent: int = 512, rotary: int = 64) -> Heads:
        """Decoding over a compressed cache: all query heads share one vector of latent + rotary."""
        return cls(
            query=query,
            key=1.0,
            width=latent + rotary,
            value_width=latent,
            cached_width=latent + rotary,
            is_latent=True,
        )

    @classmethod
    def latent_expanded(cls, query: Number, width: int = 192, value_width: int = 128) -> Heads:
        """A prompt in latent attention: keys and values are unpacked, one for each query head."""
        return cls(
            query=query,
            key=query,
            width=width,
            value_width=value_width,
            cached_width=width + value_width,
            is_latent=True,
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

    Rows of a tile see on average the context and half of the queries and the tile; a tile
    is charged whole.
    """
    batch, queries, context = (np.asarray(x, dtype=np.float64) for x in (batch, queries, context))
    tiles = np.ceil(np.maximum(queries, 1.0) / PREFILL_ROWS)
    seen = context + np.where(queries < PREFILL_ROWS, queries, 0.5 * (queries + PREFILL_ROWS))
    kept = context + queries
    if window is not None:
        seen = np.minimum(seen, np.asarray(window) + PREFILL_ROWS)
        kept = np.minimum(kept, queries + window)
    share = library.prefill_fp8_efficiency if compute is DType.FP8 else library.prefill_efficiency
    share = library.latent_prefill_efficiency if heads.is_latent else share
    pair_s = _pair_s(heads, silicon, compute) / share
    tile_s = PREFILL_ROWS * seen * pair_s + library.prefill_tile_s
    # Whatever a library's share, the products alone stay below the chip's peak.
    peak_s = _products_s(heads, silicon, compute, 1.0 / silicon.math_efficiency)
    tile_s = np.maximum(tile_s, PREFILL_ROWS * seen * peak_s)
    body_s = waves(batch * heads.query * tiles, silicon.cores) * tile_s
    fresh = batch * queries
    passing = fresh * heads.query * (heads.width + np.asarray(heads.value_width)) * 2.0
    cached = batch * kept * heads.key * heads.cached_width * cache.bytes
    extra = fresh * heads.key * heads.cached_width * 2.0 * library.prefill_passes
    start_s = library.prefill_launches * library.launch_s
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
    tall, share, block_s = DECODE_ROWS, 1.0, library.decode_block_s
    if heads.is_latent:
        tall, share, block_s = LATENT_ROWS, library.latent_decode_efficiency, 0.0
    elif cache is DType.FP8:
        block_s = library.decode_fp8_block_s
    rows = np.ceil(np.asarray(heads.query) / heads.key / tall) * tall
    tiles = np.asarray(heads.key, dtype=np.float64)
    if heads.is_latent:
        # All heads share one vector: tiles of heads go to different cores.
        tiles, rows = rows / tall, np.minimum(rows, tall)
    splits = SPLITS if silicon.asynchronous or not heads.is_latent else (1,)
    pair_s = np.maximum(_products_s(heads, silicon, DType.BF16, share), _exponential_s(silicon))
    boost = library.decode_stream if silicon.asynchronous else library.decode_plain_stream
    boost = library.latent_stream if heads.is_latent else boost
    token_bytes = np.asarray(heads.cached_width) * cache.bytes
    load_s = token_bytes / silicon.core_load_bytes_per_s
    stream = min(silicon.stream_bytes_per_s * boost, silicon.memory_bytes_per_s)
    passing = batch * heads.query * (heads.width + np.asarray(heads.value_width)) * 2.0
    memory_s = (passing + batch * heads.key * keys * token_bytes) / stream
    best: Array = np.full(np.broadcast_shapes(memory_s.shape, rows.shape), np.inf)
    for split in splits:
        chunk = np.ceil(keys / split / BLOCK) * BLOCK
        walk_s = chunk * np.maximum(np.maximum(rows * pair_s, load_s), block_s / BLOCK)
        items = batch * tiles * split
        body_s = waves(items, silicon.cores) * (walk_s + library.decode_tile_s)
        whole_s = overlapped(body_s, memory_s, STREAMED)
        if split > 1:
            partial = batch * heads.query * split * np.asarray(heads.value_width) * 8.0
            whole_s = whole_s + library.decode_join * silicon.fill_s + partial / stream
        best = np.minimum(best, whole_s)
    return np.asarray(library.decode_launches * (library.launch_s + silicon.fill_s) + best)


def _pair_s(heads: Heads, silicon: Silicon, compute: DType) -> Array:
    """Core seconds of one query-key pair: products, then one exponential, half of the shorter hidden
    behind the longer where the matrix units run asynchronously."""
    products, exponential = _products_s(heads, silicon, compute), _exponential_s(silicon)
    hidden = HIDDEN * np.minimum(products, exponential) if silicon.asynchronous else 0.0
    return np.asarray(products + exponential - hidden)


def _products_s(heads: Heads, silicon: Silicon, compute: DType, share: float = 1.0) -> Array:
    """Core seconds of the two products of one query-key pair."""
    products = 2.0 * (np.asarray(heads.width) + heads.value_width)
    return np.asarray(products / silicon.math_flops_per_s(compute, share))


def _exponential_s(silicon: Silicon) -> float:
    return 1.0 / (silicon.exponentials_per_cycle * silicon.clock_hz)
