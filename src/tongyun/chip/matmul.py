"""Seconds of one matrix product on a data-centre chip.

The result is cut into tiles, a tile runs on one core, and the inner dimension may be
split over several cores whose sums are joined afterwards:

    items    tiles · splits
    tile_s   max(2·rows·columns·k / core rate, (rows + columns)·k·bytes / core load) + fill
    body_s   waves(items) · tile_s
    memory_s compulsory bytes / (bandwidth · efficiency)
    t        launch + (body² + memory²)^½ + joining

and the library is taken to pick the fastest of a menu of tiles and splits, which is
what an autotuned or heuristic one approaches. Computing and streaming overlap but not
perfectly near the ridge, hence the root of squares, never less than the larger of both.
A wave is counted half as a whole number (the last one runs on as long as a full one)
and half as a fraction (persistent kernels and cores that started earlier take over).

The form follows the tile and wave analysis of NVIDIA's matrix multiplication guide and
of LLMCompass (ISCA 2024); the numbers are fitted, see `silicon.toml`. It does not know
layouts, alignment, clocks that fall under load, or a cache that keeps weights from one
call to the next: every call reads its operands from memory once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tongyun.chip.silicon import Library, Silicon
from tongyun.units import DType, Number

Array = NDArray[np.float64]

TILES = ((16, 32), (16, 128), (64, 32), (64, 64), (64, 128), (128, 128), (128, 256), (256, 128))
"""Rows and columns of the tiles a library may choose from."""

SPLITS = (1, 2, 4, 8, 16)
INNER = 64
"""The inner dimension is walked in steps of this many elements."""
OVERLAP = 2.0
"""Exponent of the mean of computing and streaming in one product; kernels that walk a long
stream (a cache, many experts) overlap better, see `STREAMED`."""
STREAMED = 3.0


def waves(items: Number, cores: float) -> Array:
    """How many times a tile's duration passes until `items` of them are done: at least items/cores and 1."""
    ratio = np.asarray(items, dtype=np.float64) / cores
    return np.asarray(0.5 * np.ceil(ratio) + 0.5 * np.maximum(ratio, 1.0))


def overlapped(a: Number, b: Number, exponent: float) -> Array:
    """(a^p + b^p)^(1/p): two activities side by side that disturb each other."""
    larger = np.maximum(np.maximum(a, b), 1e-30)
    if exponent == 2.0:
        return np.asarray(larger * np.sqrt((a / larger) ** 2 + (b / larger) ** 2))
    return np.asarray(larger * ((a / larger) ** exponent + (b / larger) ** exponent) ** (1 / exponent))


def matmul_s(
    m: Number,
    n: Number,
    k: Number,
    silicon: Silicon,
    *,
    dtype: DType = DType.BF16,
    weight: DType | None = None,
    block_scales: bool = False,
    quantised: bool = False,
    library: Library,
) -> Array:
    """Seconds of (m × k) · (k × n), activations given in bf16 and the result in bf16.

    Products are taken in `dtype`; weights are stored in `weight`, or in the same type. In
    an 8-bit type the activations are quantised first, by the library's own passes:
    `block_scales` chooses one scale for each 128 elements instead of one for a row or a
    tensor, `quantised` says that this has happened before. The library's efficiency in
    that type multiplies the chip's. Rows, columns or inner size of zero cost one launch.
    """
    m, n, k = (np.asarray(x, dtype=np.float64) for x in (m, n, k))
    rate = silicon.math_flops_per_s(dtype)
    quantise_s: Number = 0.0
    if dtype.bytes <= 1:
        launches = quantising_launches(dtype, library, block_scales=block_scales)
        pass_bytes = library.block_pass_bytes if block_scales else library.fp8_pass_bytes
        share = library.block_efficiency if block_scales else library.fp8_efficiency
        rate = silicon.math_flops_per_s(dtype, share)
        if not quantised:
            passing_s = m * k * pass_bytes / silicon.stream_bytes_per_s
            quantise_s = launches * library.launch_s + passing_s
    moved = m * k * dtype.bytes + n * k * (weight or dtype).bytes + m * n * 2.0
    memory_s = moved / silicon.stream_bytes_per_s
    shape = np.broadcast_shapes(m.shape, n.shape, k.shape)
    tall, wide = (np.asarray(side, dtype=np.float64) for side in zip(*TILES, strict=True))
    each = np.asarray([tile_rate_s(*tile, dtype.bytes, rate, silicon) for tile in TILES])
    along = (-1, *(1 for _ in shape))
    tiles = np.ceil(m / tall.reshape(along)) * np.ceil(n / wide.reshape(along))
    best = np.full(shape, np.inf)
    for split in SPLITS:
        inner = np.ceil(k / split / INNER) * INNER
        join_s = 0.0 if split == 1 else _join_s(m * n, split, silicon, library)
        bodies = waves(tiles * split, silicon.cores) * (inner * each.reshape(along) + silicon.fill_s)
        # Overlapping keeps the order, so that the quickest body is the quickest kernel.
        best = np.minimum(best, overlapped(bodies.min(axis=0), memory_s, OVERLAP) + join_s)
    return np.asarray(library.launch_s + quantise_s + best)


def quantising_launches(dtype: DType, library: Library, *, block_scales: bool) -> float:
    """Kernels that bring the activations of a product into its type: none above 8 bits."""
    if dtype.bytes > 1:
        return 0.0
    return library.block_launches if block_scales else library.fp8_launches


def tile_rate_s(rows: int, columns: int, operand_bytes: float, rate: float, silicon: Silicon) -> float:
    """Seconds a core spends on one step of the inner dimension: the slower of multiplying and loading."""
    multiply = 2.0 * max(rows, silicon.math_rows) * columns / rate
    load = (rows + columns) * operand_bytes / silicon.core_load_bytes_per_s
    return max(multiply, load)


def _join_s(results: Array, split: int, silicon: Silicon, library: Library) -> Array:
    """Partial sums are written and read once in 32 bits through the cache."""
    return library.split_s + results * split * 8.0 / (silicon.core_load_bytes_per_s * silicon.cores)
