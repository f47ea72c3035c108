"""The price of an operator on a chip.

An accelerator is priced by the kernel models (`kernels`), a calibrated machine by what was
measured on it, and any other chip by

    t = max(flops / (peak · achieved), bytes / (bandwidth · achieved)) + launch

with the fractions of its spec and collectives by its links. Arrays in, arrays out. It knows
one rank: neither the scheduler nor how stages follow each other, and it assumes no
overlap between operators.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tongyun.chip.calibrated import Measured, measured
from tongyun.chip.collective import collective_s
from tongyun.chip.kernels import kernels
from tongyun.chip.rates import PRODUCTS, rate_dtype
from tongyun.model.graph import COLLECTIVES, Kind, Operator
from tongyun.specs import Chip
from tongyun.units import DType, Number

LAST = ("head", "logits_gather", "sample")
"""Of a step: what is between the last layer and the chosen tokens."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of a whole step: in all, and those in which compute or memory is at work."""

    seconds: Number
    busy_s: Number


def steps_s(operators: Iterable[Operator], chip: Chip) -> Timing:
    """Seconds that the operators of one rank take, each `repeat` times, one after the other."""
    operators = tuple(operators)
    footprint = streamed_bytes(operators)
    samples = measured(chip)
    if samples is not None and samples.queued:
        return _queued_s(operators, chip, samples, footprint)
    total: Number = 0.0
    busy: Number = 0.0
    for op in operators:
        work, launch = parts_s(op, chip, footprint)
        total = total + op.repeat * (work + launch)
        if op.kind not in COLLECTIVES:
            busy = busy + op.repeat * work
    return Timing(seconds=total, busy_s=busy)


def _queued_s(
    operators: tuple[Operator, ...], chip: Chip, samples: Measured, footprint_bytes: Number
) -> Timing:
    """Seconds where the host queues a step's operators and the device works them off.

        t = max(Σ host, Σ device of all but the last) + Σ device of the last

    The last are those that the chosen tokens wait for when the host has nothing more to queue. Of a
    captured step the host queues nothing: it takes what the device does.
    """
    host: Number = 0.0
    device: Number = 0.0
    last: Number = 0.0
    within = samples.one_call(operators)
    for op in operators:
        work, launch = parts_s(op, chip, footprint_bytes)
        host = host + (0.0 if any(op is other for other in within) else op.repeat * launch)
        if op.name in LAST:
            last = last + op.repeat * work
        else:
            device = device + op.repeat * work
    if samples.replayed(operators):
        return Timing(seconds=device + last + samples.gaps_s(operators), busy_s=device + last)
    return Timing(seconds=np.maximum(host, device) + last, busy_s=device + last)


def parts_s(op: Operator, chip: Chip, footprint_bytes: Number) -> tuple[Number, Number]:
    """Seconds of one execution, as its work (or way over the links) and its launch."""
    modelled = kernels(chip)
    if modelled is not None:
        return modelled.parts_s(op)
    if op.kind in COLLECTIVES:
        return collective_s(op, chip), chip.kernel_launch_s
    return work_s(op, chip, footprint_bytes), launch_s(op, chip)


def launch_s(op: Operator, chip: Chip) -> Number:
    """What an operator costs however small it is."""
    samples = measured(chip)
    return chip.kernel_launch_s if samples is None else samples.launch_s(op, chip.kernel_launch_s)


def streamed_bytes(operators: Iterable[Operator]) -> Number:
    """Weights and KV that a step goes through once: the footprint that decides which memory serves them."""
    total: Number = 0.0
    for op in operators:
        kv = op.read_bytes if op.kind is Kind.ATTENTION else 0.0
        total = total + op.repeat * (op.weight_bytes + kv)
    return total


def work_s(op: Operator, chip: Chip, footprint_bytes: Number) -> Number:
    """Seconds of one execution without its launch: as modelled or measured, or the slower of
    computing and moving."""
    modelled = kernels(chip)
    if modelled is not None:
        return modelled.parts_s(op)[0]
    samples = measured(chip)
    if samples is not None:
        known = samples.work_s(op, rate_dtype(chip, op.compute), footprint_bytes)
        if known is not None:
            return known
    moving = op.moved_bytes / (chip.memory_bytes_per_s * chip.achieved_memory)
    return np.maximum(_computing_s(op, chip), moving) if op.kind in PRODUCTS else moving


def _computing_s(op: Operator, chip: Chip) -> Number:
    dtype = rate_dtype(chip, op.compute)
    achieved = chip.achieved_attention if op.kind is Kind.ATTENTION else _achieved(chip, dtype)
    return op.flops / (chip.peak_flops_per_s[dtype] * achieved)


def _achieved(chip: Chip, dtype: DType) -> float:
    """The fraction for this type, else the least of those given."""
    return chip.achieved_matmul.get(dtype, min(chip.achieved_matmul.values(), default=1.0))
