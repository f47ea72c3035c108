"""Measure how fast memory is read, from the caches to DRAM, and how much of it there is."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tongyun.cloud.engine.calibrate.bench import Bench
from tongyun.specs.samples import MemorySample
from tongyun.units import MIB

FOOTPRINTS = tuple(int(MIB * size) for size in (0.25, 1, 4, 8, 16, 24, 32, 48, 64, 128, 256))
MATRIX_BYTES = MIB
"""The footprint is cut into matrices of this size, as a model is into layers."""


def bandwidth(bench: Bench) -> Iterator[MemorySample]:
    """Bytes per second of reading weights, by the footprint that is read round and round.

    The reader is `ops.linear` with one row: the engine's own way to stream a matrix.
    """
    columns = 1024
    for footprint in FOOTPRINTS if not bench.quick else FOOTPRINTS[:3]:
        size = min(footprint, MATRIX_BYTES)
        rows = max(1, int(size / (columns * bench.weight_type.bytes)))
        matrices = [bench.weight(rows, columns) for _ in range(footprint // size)]
        x_TD = bench.activation(1, columns)

        def stream(matrices: list[torch.Tensor] = matrices, x_TD: torch.Tensor = x_TD) -> None:
            for matrix in matrices:
                bench.ops.linear(x_TD, matrix)

        yield MemorySample(footprint_bytes=footprint, bytes_per_s=footprint / bench.seconds(stream))
