"""Seconds of the experts of a mixture-of-experts layer, under even and skewed routing.

A grouped product is the tile model of `matmul` with one weight matrix for each expert:
tiles are counted expert by expert, so that an expert with three rows occupies whole
tiles, and the weights of experts without a row are not read. A layer is two such
products (gate and up in one, then down), an activation between them and the sum over
the chosen experts, plus the library's launches for routing and sorting.

Routing is given as rows for each local expert, compressed to equal shares of the
experts, `BINS` of them where all are alike: enough to see both the empty and the crowded
ones, few enough for a whole plan in one pass. `balanced_rows` spreads evenly, `picked_rows`
has a chance for each expert, and `power_law_rows` follows x^-alpha between 1 and 0.8 of the
tokens, the skew of the tables it is judged by. It does not know which token goes where, nor
the exchange between ranks (see `exchange`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tongyun.chip.matmul import STREAMED, overlapped, tile_rate_s, waves
from tongyun.chip.silicon import Library, Silicon
from tongyun.units import DType, Number

Array = NDArray[np.float64]

BINS = 32
CLASSES = 8
"""Groups of experts that are told apart by how often they are picked."""
TILES = ((16, 64), (16, 128), (32, 64), (32, 128), (64, 64), (64, 128), (64, 256), (128, 128), (128, 256))
HEIGHTS = tuple(dict.fromkeys(tall for tall, _ in TILES))
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


def random_rows(tokens: Number, chosen: int, experts: int) -> Array:
    """Rows for each bin of experts, sorted, when every token picks `chosen` of `experts` at random.

    An expert's rows are binomial, B(tokens, chosen / experts); a bin holds the mean over its
    share of that distribution, so that the bins conserve the choices. Fractions of tokens
    lie between whole ones. Last axis: bins.
    """
    return _picked(np.asarray(tokens, dtype=np.float64), chosen / experts)


def picked_rows(tokens: Number, picks: Sequence[float]) -> Array:
    """Rows of experts that a token picks with these chances, each by itself; see `random_rows`.

    Experts fall into at most `CLASSES` of equal size by their chance, an expert on a border
    into both. Last axis: equal shares of the experts, `BINS` where they are alike.
    """
    tokens = np.asarray(tokens, dtype=np.float64)
    chances = np.sort(np.asarray(picks, dtype=np.float64))
    if chances[0] == chances[-1]:
        return _picked(tokens, float(chances[0]))
    classes = min(len(chances), CLASSES)
    edges = np.linspace(0, len(chances), classes + 1)
    below = np.interp(edges, np.arange(len(chances) + 1), np.concatenate([[0.0], np.cumsum(chances)]))
    means = np.diff(below) / np.diff(edges)
    kept = BINS // CLASSES
    bins = [_picked(tokens, float(chance)).reshape((*tokens.shape, kept, -1)).mean(-1) for chance in means]
    return np.concatenate(bins, axis=-1)


def _picked(tokens: Array, share: float) -> Array:
    known, table = _binomial_bins(share)
    place = np.clip(np.searchsorted(known, tokens, side="right") - 1, 0, len(known) - 2)
    part = ((tokens - known[place]) / (known[place + 1] - known[place]))[..., None]
    near = table[place] * (1 - part) + table[place + 1] * part
    many = np.maximum(tokens, known[-1])[..., None]
    return np.where(tokens[..., None] < known[-1], near, _normal_bins(many, share))


FEW_ROWS = 200.0
"""Mean rows beyond which the binomial distribution is as good as normal."""


@lru_cache(maxsize=256)
def _binomial_bins(share: float) -> tuple[Array, Array]:
    """Token counts from 0 up to `FEW_ROWS` a mean expert, and the bins at each."""
    last = max(2.0, math.ceil(FEW_ROWS / share))
    known = np.unique(np.round(np.concatenate([[0.0, 1.0, 2.0], np.geomspace(1.0, last, 48)])))
    return known, np.stack([_binomial_bin(int(tokens), share) for tokens in known])


def _binomial_bin(tokens: int, share: float) -> Array:
    """Mean rows in each of `BINS` equal shares of B(tokens, share), from its quantiles."""
    if share >= 1 or tokens == 0:
        return np.full(BINS, tokens * share)
    rows = np.arange(tokens + 1)
    steps = np.log(np.maximum(tokens - rows[:-1], 1)) - np.log(rows[1:]) + math.log(share / (1 - share))
    logs = np.concatenate([[0.0], np.cumsum(steps)])
    weight = np.exp(logs - logs.max())
    # Where the distribution function passes a bin's edge, the rows up to there are summed.
    below = np.concatenate([[0.0], np.cumsum(weight) / weight.sum()])
    summed = np.concatenate([[0.0], np.cumsum(weight * rows) / weight.sum()])
    at = np.interp(np.arange(BINS + 1) / BINS, below, summed)
    at[-1] = tokens * share
    return np.asarray(np.diff(at) * BINS)


def _normal_bins(tokens: Array, share: float) -> Array:
    spread = np.sqrt(tokens * share * max(1 - share, 0.0))
    return np.asarray(tokens * share + _normal_offsets() * spread)


@lru_cache(maxsize=1)
def _normal_offsets() -> Array:
    """Means of `BINS` equal shares of the standard normal distribution, from its density at their edges."""
    # Dense models need no distribution.
    from statistics import NormalDist

    normal = NormalDist()
    edges = [0.0, *(normal.pdf(normal.inv_cdf(i / BINS)) for i in range(1, BINS)), 0.0]
    return np.asarray(-np.diff(edges) * BINS)


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
    return _products_s(
        _Filled.of(rows, experts),
        ((n, k),),
        silicon,
        weight=weight,
        compute=compute,
        efficiency=efficiency,
        stream=stream,
    )[0]


@dataclass(frozen=True, kw_only=True)
class _Filled:
    """How rows fill experts: shared by all products of a layer."""

    total: Array
    touched: Array
    heights: Array
    """Tiles of rows over all experts, by `HEIGHTS` along the first axis."""

    @classmethod
    def of(cls, rows: Array, experts: Number) -> _Filled:
        each = np.asarray(experts, dtype=np.float64) / rows.shape[-1]
        tall = np.asarray(HEIGHTS, dtype=np.float64).reshape(-1, *(1 for _ in rows.shape))
        # An expert that expects less than a row has a tile as often as it has one.
        heights = np.where(rows < 1, rows, np.ceil(rows / tall)).sum(-1) * each
        touched = np.minimum(rows, 1.0).sum(-1) * each
        return cls(total=rows.sum(-1) * each, touched=touched, heights=heights)


def _products_s(
    filled: _Filled,
    sizes: Sequence[tuple[Number, Number]],
    silicon: Silicon,
    *,
    weight: DType,
    compute: DType,
    efficiency: float,
    stream: float,
) -> list[Array]:
    """`grouped_s` of several (columns, inner) sizes over the same rows."""
    rate = silicon.math_flops_per_s(compute, efficiency)
    bytes_per_s = min(silicon.stream_bytes_per_s * stream, silicon.memory_bytes_per_s)
    found = []
    for size in sizes:
        n, k = (np.asarray(x, dtype=np.float64) for x in size)
        moved = filled.touched * n * k * weight.bytes + filled.total * (k * compute.bytes + n * 2.0)
        bodies = []
        for tall, wide in TILES:
            tiles = filled.heights[HEIGHTS.index(tall)] * np.ceil(n / wide)
            tile_s = k * tile_rate_s(tall, wide, compute.bytes, rate, silicon) + silicon.fill_s
            bodies.append(waves(tiles, silicon.cores) * tile_s)
        found.append(overlapped(np.minimum.reduce(bodies), moved / bytes_per_s, STREAMED))
    return found


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
    one, passing, two, start_s = experts_parts_s(
        rows,
        hidden,
        inner,
        silicon,
        tokens=tokens,
        experts=experts,
        weight=weight,
        compute=compute,
        gated=gated,
        library=library,
    )
    return np.asarray(start_s + one + two + passing)


def experts_launches(compute: DType, library: Library) -> float:
    """Kernels that an expert layer starts."""
    return library.moe_fp8_launches if compute is DType.FP8 else library.moe_launches


def experts_parts_s(
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
) -> tuple[Array, Array, Array, float]:
    """The parts of `experts_s`: first product, what passes over memory, second product, starts."""
    hidden, inner = (np.asarray(x, dtype=np.float64) for x in (hidden, inner))
    up = (2.0 if gated else 1.0) * inner
    kept, passes = library.moe_efficiency, library.moe_passes
    if compute is DType.FP8:
        kept, passes = library.moe_fp8_efficiency, library.moe_fp8_passes
    elif weight.bytes < compute.bytes:
        kept = library.moe_unpack_efficiency
    filled = _Filled.of(rows, experts)
    one, two = _products_s(
        filled,
        ((up, hidden), (hidden, inner)),
        silicon,
        weight=weight,
        compute=compute,
        efficiency=kept,
        stream=library.moe_stream,
    )
    # Bringing operands from bf16 into their type is among these passes, and each product's own.
    narrowed = filled.total * max(2.0 - compute.bytes, 0.0)
    own_s = [narrowed * width / silicon.stream_bytes_per_s for width in (hidden, inner)]
    passing = (filled.total * (up + inner) + (filled.total + tokens) * hidden) * 2.0 * passes
    passing_s = passing / silicon.stream_bytes_per_s - own_s[0] - own_s[1]
    start_s = experts_launches(compute, library) * (library.launch_s + silicon.fill_s)
    return one + own_s[0], np.asarray(passing_s), two + own_s[1], start_s
