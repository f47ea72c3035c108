"""Measure how fast weights are read, from the caches to DRAM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from tongyun.cloud.engine.calibrate.bench import Bench, Probe
from tongyun.specs.samples import MemorySample
from tongyun.units import MIB

FOOTPRINTS = tuple(int(MIB * size) for size in (0.25, 1, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256))
MATRIX_BYTES = MIB
"""The footprint is cut into matrices of this size, as a model is into layers."""
COLUMNS = 1024


def bandwidth(bench: Bench) -> Iterator[Probe[MemorySample]]:
    """Reading weights round and round, by the footprint they have together.

    The reader is `ops.linear` with one row: the engine's own way to stream a matrix.
    """
    size = FOOTPRINTS if not bench.quick else FOOTPRINTS[:3]
    rows = int(MATRIX_BYTES / (COLUMNS * bench.weight_type.bytes))
    matrices = [bench.weight(rows, COLUMNS) for _ in range(-(-size[-1] // MATRIX_BYTES))]
    x_TD = bench.activation(1, COLUMNS)
    for footprint in size:
        if footprint < MATRIX_BYTES:
            part = [matrices[0][: rows * footprint // MATRIX_BYTES]]
        else:
            part = matrices[: footprint // MATRIX_BYTES]
        yield Probe(call=partial(_stream, bench.ops.linear, x_TD, part), sample=partial(_sample, footprint))


def _stream(linear: Callable[[Tensor, Tensor], Tensor], x_TD: Tensor, matrices: list[Tensor]) -> None:
    for matrix in matrices:
        linear(x_TD, matrix)


def _sample(footprint: int, seconds: float) -> MemorySample:
    return MemorySample(footprint_bytes=footprint, bytes_per_s=footprint / seconds)
