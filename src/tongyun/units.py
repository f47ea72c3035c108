"""SI units, data types, and the two values that travel with their source.

Inside Tongyun a number is SI and its unit stands in its name (`step_s`,
`payload_bytes`, `flops_per_s`). GB, ms and TFLOPS exist only in the files people
write and the reports people read; the factors between them live here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Number = float | NDArray[np.float64]

KB, MB, GB, TB = 1e3, 1e6, 1e9, 1e12
KIB, MIB, GIB = 2**10, 2**20, 2**30
MS, US = 1e-3, 1e-6
HOUR_S = 3600.0


class Source(StrEnum):
    """Where a number comes from, weakest last."""

    MEASURED = "measured"
    SIMULATED = "simulated"
    ANALYTIC = "analytic"
    VENDOR = "vendor"
    DERIVED = "derived"
    ASSUMED = "assumed"

    @staticmethod
    def mix(sources: Iterable[Source]) -> str:
        """`analytic+assumed`: the distinct sources of a sum, strongest first."""
        present = set(sources)
        return "+".join(s for s in Source if s in present)


class DType(StrEnum):
    """A storage or arithmetic type, by its usual short name."""

    F32 = "f32"
    BF16 = "bf16"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"
    FP4 = "fp4"

    @property
    def bytes(self) -> float:
        """Bytes one element takes; scales of block formats are not counted."""
        return _DTYPE_BYTES[self]


_DTYPE_BYTES = {
    DType.F32: 4.0,
    DType.BF16: 2.0,
    DType.FP8: 1.0,
    DType.INT8: 1.0,
    DType.INT4: 0.5,
    DType.FP4: 0.5,
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What something takes: seconds and joules, with the source of both.

    Seconds and joules are scalars, or arrays of one shape when a whole grid of
    steps was priced in one pass.
    """

    seconds: Number
    joules: Number
    sources: frozenset[Source]

    def __add__(self, other: Cost) -> Cost:
        """One after the other."""
        return Cost(
            seconds=self.seconds + other.seconds,
            joules=self.joules + other.joules,
            sources=self.sources | other.sources,
        )

    @property
    def source(self) -> str:
        return Source.mix(self.sources)
