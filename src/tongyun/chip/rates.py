"""In which type a chip takes the products it is asked for.

Decides the type only; what a product costs is for `roofline` and the kernel models.
"""

from __future__ import annotations

from tongyun.errors import Infeasible
from tongyun.model.graph import Kind
from tongyun.specs import Chip
from tongyun.units import DType

PRODUCTS = frozenset({Kind.MATMUL, Kind.GROUPED_MATMUL, Kind.ATTENTION})

WIDER: dict[DType, tuple[DType, ...]] = {
    DType.FP4: (DType.FP4, DType.FP8, DType.BF16, DType.F32),
    DType.FP8: (DType.FP8, DType.BF16, DType.F32),
    DType.INT4: (DType.INT4, DType.INT8, DType.BF16, DType.F32),
    DType.INT8: (DType.INT8, DType.BF16, DType.F32),
    DType.BF16: (DType.BF16, DType.F32),
    DType.F32: (DType.F32,),
}
"""Where a chip has no rate for a type, products are taken in the next wider one it has."""


def rate_dtype(chip: Chip, wanted: DType) -> DType:
    """The type in which this chip takes products asked for in `wanted`."""
    for dtype in WIDER[wanted]:
        if dtype in chip.peak_flops_per_s:
            return dtype
    known = ", ".join(sorted(chip.peak_flops_per_s))
    raise Infeasible(f"{chip.name}: no rate for {wanted} or anything wider (has {known})")
