"""Seconds of the experts of a mixture-of-experts layer, under even and skewed routing.

A grouped product is the tile model of `matmul` with one weight matrix for each expert:
tiles are counted expert by expert, so that an expert with three rows occupies whole
tiles, and the weights of experts without a row are not read. A layer is two such
products (gate and up in one, then down), an activation between them and the sum over
the chosen experts, plus the library's launches for routing and sorting.

Routing is given as rows for each local expert, compressed to `BINS` equal shares of the
experts sorted by load: enough to see both the empty and the crowded ones, few enough
for a whole plan in one pass. `balanced_rows` spreads evenly; `power_law_rows` follows
x^-alpha between 1 and 0.8 of the tokens, the skew of the tables it is judged by. It
does not know which token goes where, nor the exchange between ranks (see `exchange`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tongyun.chip.matmul import STREAMED, overlapped, tile_rate_s, waves
from tongyun.chip.silicon import Library, Silicon
from tongyun.units import DType, Number

Array = NDArray[np.float64]

BINS = 32
TILES = ((16, 64), (16, 128), (32, 64), (32, 128), (64, 64), (64, 128), (64, 256), (128, 128), (128, 256))
LARGEST_SHARE = 0.8
"""Most tokens one expert draws before normalising, as a share of all tokens."""
SPARSE = (0.01, 2.0)


def balanced_rows(tokens: Number, chosen: int, experts: int) -> Array:
    """Rows for each bin of experts when `tokens` choose `chosen` of `experts` as evenly as can be.

    With fewer choices than experts some get one row and the rest none. Last axis: bins.
    """
    tokens = np.asarray(tokens, dtype=np.float64)[..., None]
    choices = tokens * chosen
    touched = np.minimum(experts, np.maximum(choices, 1e-12))
    edges = np.arange(BINS + 1) / BINS
    share = np.clip(touched / experts - edges[:-1], 0.0, 1 / BINS) * BINS
    return np.asarray(share * choices / touched)


def power_law_rows(tokens: Number, chosen: int, experts: int, alpha: float) -> Array:
    """Rows for each bin of experts, their loads drawn from x^-alpha between 1 and 0.8 of the tokens.

    Loads are quantiles of that law, scaled to tokens · chosen, none above `tokens`, and
    rounded to whole rows; what rounding lost or added goes one by one to the most crowded
    that have room. With no more choices than experts the law spans `SPARSE` instead. Last
    axis: bins.
    """
    tokens = np.asarray(tokens, dtype=np.float64)
    flat = [_power_law(float(t), chosen, experts, alpha) for t in tokens.reshape(-1)]
    return np.asarray(flat).reshape((*tokens.shape, BINS))


def _power_law(tokens: float, chosen: int, experts: int, alpha: float) -> Array:
    quantile = (np.arange(experts) + 0.5) / experts
    total = tokens * chosen
    low, top = (1.0, LARGEST_SHARE * tokens) if total > experts else SPARSE
    if alpha == 1.0:
        load = low * (top / low) ** quantile
    else:
        ends = low ** (1 - alpha), top ** (1 - alpha)
        load = ((ends[1] - ends[0]) * quantile + ends[0]) ** (1 / (1 - alpha))
    for _ in range(3):
        load = np.minimum(load / load.sum() * total, tokens)
    rows = np.minimum(np.floor(load + 0.5), tokens)
    missing = round(total - float(rows.sum()))
    while missing:
        open_ = np.flatnonzero(rows < tokens if missing > 0 else rows > 0)[-abs(missing) :]
        rows[open_] += np.sign(missing)
        missing -= len(open_) if missing > 0 else -len(open_)
    cumulative = np.concatenate([[0.0], np.cumsum(rows)])
    at = np.interp(np.linspace(0, experts, BINS + 1), np.arange(experts + 1), cumulative)
    return np.asarray(np.diff(at) * BINS / experts)


def grouped_s(
    rows: Array,
    n: Number,
    k: Number,
    silicon: Silicon,
    *,
    experts: Number,
    weight: DType,
    compute: DType,
    efficiency: float,
    stream: float = 1.0,
) -> Array:
    """Seconds of one grouped product without its launch: `rows` (…, bins) of each expert times k × n.

    `efficiency` is the share of the chip's inner-loop rate that the library keeps, `stream`
    the bandwidth it reaches over the chip's figure for matmuls.
    """
    n, k = (np.asarray(x, dtype=np.float64) for x in (n, k))
    each = np.asarray(experts, dtype=np.float64) / BINS
    touched = np.minimum(rows, 1.0).sum(-1) * each
    total = rows.sum(-1) * each
    moved = touched * n * k * weight.bytes + total * (k * compute.bytes + n * 2.0)
    memory_s = moved / min(silicon.stream_bytes_per_s * stream, silicon.memory_bytes_per_s)
    rate = silicon.math_flops_per_s(compute, efficiency)
    best = np.full(np.broadcast_shapes(memory_s.shape, n.shape, k.shape), np.inf)
    for tall, wide in TILES:
        tiles = np.where(rows < 1, rows, np.ceil(rows / tall)).sum(-1) * each * np.ceil(n / wide)
        tile_s = k * tile_rate_s(tall, wide, compute.bytes, rate, silicon) + silicon.fill_s
        body_s = waves(tiles, silicon.cores) * tile_s
        best = np.minimum(best, overlapped(body_s, memory_s, STREAMED))
    return np.asarray(best)


def experts_s(
    rows: Array,
    hidden: Number,
    inner: Number,
    silicon: Silicon,
    *,
    tokens: Number,
    experts: Number,
    weight: DType = DType.BF16,
    compute: DType = DType.BF16,
    gated: bool = True,
    library: Library,
) -> Array:
    """Seconds of a whole expert layer of one rank: route, up, activate, down, sum.

    `rows` (…, bins) of each of the `experts` local experts; `hidden` and `inner` are the
    widths this rank keeps after tensor parallelism; `tokens` are those whose results it
    sums. `weight` narrower than `compute` is unpacked on the way.
    """
    hidden, inner = (np.asarray(x, dtype=np.float64) for x in (hidden, inner))
    up = (2.0 if gated else 1.0) * inner
    kept, launches, passes = library.moe_efficiency, library.moe_launches, library.moe_passes
    if compute is DType.FP8:
        kept, launches = library.moe_fp8_efficiency, library.moe_fp8_launches
        passes = library.moe_fp8_passes
    elif weight.bytes < compute.bytes:
        kept = library.moe_unpack_efficiency
    one, two = (
        grouped_s(
            rows,
            n,
            k,
            silicon,
            experts=experts,
            weight=weight,
            compute=compute,
            efficiency=kept,
            stream=library.moe_stream,
        )
        for n, k in ((up, hidden), (hidden, inner))
    )
    total = rows.sum(-1) * np.asarray(experts, dtype=np.float64) / BINS
    passing = (total * (up + inner) + (total + tokens) * hidden) * 2.0 * passes
    start_s = launches * (library.launch_s + silicon.fill_s)
    return np.asarray(start_s + one + two + passing / silicon.stream_bytes_per_s)
