"""Measure how fast weights are read, from the caches to DRAM, by products of one row and of many.

A product of few rows waits for its weights and one of many hides some of the wait behind
its arithmetic, but not all: how much is left is measured, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from tongyun.cloud.engine.calibrate.bench import Bench, Probe
from tongyun.specs.samples import MemorySample
from tongyun.units import MIB

FOOTPRINTS = tuple(MIB * size for size in (1, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024))
ROWS = (2, 4, 5, 6, 8, 12, 16, 32, 128)
ROWS_FOOTPRINTS = tuple(MIB * size for size in (1, 8, 24, 48, 128, 512, 1024))
"""Products of more than one row are measured at these alone, to save time. The largest is more than most
processors' outer caches hold."""
MATRIX_BYTES = MIB
"""The footprint is cut into matrices of this size, as a model is into layers."""
COLUMNS = 1024
QUEUED_FOOTPRINT, QUEUED_MATRIX = 1024 * MIB, 64 * MIB
"""On a GPU one footprint far beyond its caches: products there are measured so as well. Smaller matrices
would tell how quickly kernels start."""


def bandwidth(bench: Bench) -> Iterator[Probe[MemorySample]]:
    """Reading weights round and round, by the footprint they have together.

    The reader is `ops.linear`: the engine's own way to stream a matrix.
    """
    if bench.queued:
        yield _of(bench, 1, QUEUED_FOOTPRINT, _matrices(bench, QUEUED_FOOTPRINT, QUEUED_MATRIX))
        return
    sizes = FOOTPRINTS if not bench.quick else FOOTPRINTS[:3]
    matrices = _matrices(bench, sizes[-1], MATRIX_BYTES)
    for rows in (1, *ROWS) if not bench.quick else (1, *ROWS[::4]):
        for footprint in sizes:
            if rows == 1 or footprint in ROWS_FOOTPRINTS:
                yield _of(bench, rows, footprint, matrices[: footprint // MATRIX_BYTES])


def _matrices(bench: Bench, footprint: int, each: int) -> list[Tensor]:
    outputs = int(each / (COLUMNS * bench.weight_type.bytes))
    return [bench.weight(outputs, COLUMNS) for _ in range(footprint // each)]


def _of(bench: Bench, rows: int, footprint: int, matrices: list[Tensor]) -> Probe[MemorySample]:
    return Probe(
        call=partial(_stream, bench.ops.linear, bench.activation(rows, COLUMNS), matrices),
        sample=partial(_sample, footprint, rows),
    )


def _stream(linear: Callable[[Tensor, Tensor], Tensor], x_TD: Tensor, matrices: list[Tensor]) -> None:
    for matrix in matrices:
        linear(x_TD, matrix)


def _sample(footprint: int, rows: int, seconds: float) -> MemorySample:
    return MemorySample(footprint_bytes=footprint, rows=rows, bytes_per_s=footprint / seconds)
