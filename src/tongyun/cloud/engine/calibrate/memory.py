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

FOOTPRINTS = tuple(MIB * size for size in (1, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256))
ROWS = (2, 4, 5, 6, 8, 12, 16, 32, 128)
ROWS_FOOTPRINTS = tuple(MIB * size for size in (1, 8, 24, 48, 128))
"""Products of more than one row are measured at these alone, to save time."""
MATRIX_BYTES = MIB
"""The footprint is cut into matrices of this size, as a model is into layers."""
COLUMNS = 1024


def bandwidth(bench: Bench) -> Iterator[Probe[MemorySample]]:
    """Reading weights round and round, by the footprint they have together.

    The reader is `ops.linear`: the engine's own way to stream a matrix.
    """
    sizes = FOOTPRINTS if not bench.quick else FOOTPRINTS[:3]
    outputs = int(MATRIX_BYTES / (COLUMNS * bench.weight_type.bytes))
    matrices = [bench.weight(outputs, COLUMNS) for _ in range(sizes[-1] // MATRIX_BYTES)]
    for rows in (1, *ROWS) if not bench.quick else (1, *ROWS[::4]):
        x_TD = bench.activation(rows, COLUMNS)
        for footprint in sizes:
            if rows > 1 and footprint not in ROWS_FOOTPRINTS:
                continue
            part = matrices[: footprint // MATRIX_BYTES]
            yield Probe(
                call=partial(_stream, bench.ops.linear, x_TD, part), sample=partial(_sample, footprint, rows)
            )


def _stream(linear: Callable[[Tensor, Tensor], Tensor], x_TD: Tensor, matrices: list[Tensor]) -> None:
    for matrix in matrices:
        linear(x_TD, matrix)


def _sample(footprint: int, rows: int, seconds: float) -> MemorySample:
    return MemorySample(footprint_bytes=footprint, rows=rows, bytes_per_s=footprint / seconds)
