"""The analytic price of an operator on a chip.

    t = max(flops / (peak · achieved), bytes / (bandwidth · achieved)) + launch

with the fractions of the spec, or measured curves where the chip was calibrated. A
collective is priced by its links. Arrays in, arrays out. It knows one rank: neither
the scheduler nor how stages follow each other, and it assumes no overlap between
operators.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tongyun.chip.calibrated import measured
from tongyun.chip.collective import collective_s
from tongyun.errors import Infeasible
from tongyun.model.graph import COLLECTIVES, Kind, Operator
from tongyun.specs import Chip
from tongyun.units import DType, Number

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


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of a whole step: in all, and those in which compute or memory is at work."""

    seconds: Number
    busy_s: Number


def steps_s(operators: Iterable[Operator], chip: Chip) -> Timing:
    """Seconds that the operators of one rank take, each `repeat` times, one after the other."""
    operators = tuple(operators)
    footprint = streamed_bytes(operators)
    total: Number = 0.0
    busy: Number = 0.0
    for op in operators:
        if op.kind in COLLECTIVES:
            total = total + op.repeat * (collective_s(op, chip) + chip.kernel_launch_s)
            continue
        work = work_s(op, chip, footprint)
        busy = busy + op.repeat * work
        total = total + op.repeat * (work + chip.kernel_launch_s)
    return Timing(seconds=total, busy_s=busy)


def streamed_bytes(operators: Iterable[Operator]) -> Number:
    """Weights and KV that a step goes through once: the footprint that decides which memory serves them."""
    total: Number = 0.0
    for op in operators:
        kv = op.read_bytes if op.kind is Kind.ATTENTION else 0.0
        total = total + op.repeat * (op.weight_bytes + kv)
    return total


def work_s(op: Operator, chip: Chip, footprint_bytes: Number) -> Number:
    """Seconds of one execution without its launch: the slower of computing and moving."""
    moving = _moving_s(op, chip, footprint_bytes)
    if op.kind not in PRODUCTS:
        return moving
    return np.maximum(_computing_s(op, chip), moving)


def _moving_s(op: Operator, chip: Chip, footprint_bytes: Number) -> Number:
    """Weights and KV at the bandwidth of the step's footprint, activations at that of their own."""
    ceiling = chip.memory_bytes_per_s * chip.achieved_memory
    curves = measured(chip)
    if curves is None or curves.memory is None:
        return op.moved_bytes / ceiling
    kv = op.read_bytes if op.kind is Kind.ATTENTION else 0.0
    streamed, passing = op.weight_bytes + kv, op.moved_bytes - op.weight_bytes - kv
    return streamed / curves.memory(footprint_bytes) + passing / curves.memory(passing)


def _computing_s(op: Operator, chip: Chip) -> Number:
    dtype = rate_dtype(chip, op.compute)
    peak = chip.peak_flops_per_s[dtype]
    rate = _measured_rate(op, chip, dtype)
    if rate is not None:
        return op.flops / np.minimum(rate, peak)
    achieved = chip.achieved_attention if op.kind is Kind.ATTENTION else _achieved(chip, dtype)
    return op.flops / (peak * achieved)


def _achieved(chip: Chip, dtype: DType) -> float:
    """The fraction for this type, else the least of those given."""
    return chip.achieved_matmul.get(dtype, min(chip.achieved_matmul.values(), default=1.0))


def _measured_rate(op: Operator, chip: Chip, dtype: DType) -> Number | None:
    """FLOPs per second from samples, or None where the spec's fraction has to do."""
    curves = measured(chip)
    if curves is None:
        return None
    if op.kind is Kind.ATTENTION:
        rows = np.maximum(op.m, 1e-12)
        # Both follow from what the operator counts: pairs = flops / 4·heads·width.
        queries = rows / np.maximum(op.n * np.asarray(op.groups), 1e-12)
        keys = op.flops / (4 * rows * op.k)
        return curves.attention_flops_per_s(queries, keys)
    if op.kind is Kind.GROUPED_MATMUL:
        surface = curves.grouped.get(dtype) or curves.matmul.get(dtype)
        rows_each = op.m / np.maximum(op.groups, 1e-12)
        return surface(op.n * op.k, rows_each) if surface else None
    surface = curves.matmul.get(dtype)
    return surface(op.n * op.k, op.m) if surface else None
