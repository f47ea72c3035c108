"""The price of an operator on a chip.

An accelerator is priced by the kernel models (`kernels`), a calibrated machine by what was
measured on it, and any other chip by

    t = max(flops / (peak · achieved), bytes / (bandwidth · achieved)) + launch

with the fractions of its spec and collectives by its links. Arrays in, arrays out. It knows
one rank: neither the scheduler nor how stages follow each other, and it assumes no
overlap between operators. A host that queues them works beside its device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

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


@dataclass(frozen=True, kw_only=True)
class Laid:
    """The same seconds by operators: Σ repeat · (work + launch) is what `steps_s` says."""

    parts: tuple[tuple[Number, Number], ...]
    """Of one execution of each, work and launch, as far as the step waits for them."""
    beside_s: Mapping[str, Number] = field(default_factory=dict)
    """What `host` or `device` does meanwhile, for which nobody waits."""


@dataclass(frozen=True, kw_only=True)
class _Queue:
    """A step's operators where the host queues them and the device works them off."""

    parts: tuple[tuple[Number, Number], ...]
    """Of one execution of each, the device's work and the host's launch."""
    host_s: Number
    device_s: Number
    """Of all but the last."""
    last_s: Number
    """Of those that the chosen tokens wait for when the host has nothing more to queue."""

    @classmethod
    def of(cls, operators: tuple[Operator, ...], chip: Chip, samples: Measured) -> _Queue:
        footprint_bytes, within = streamed_bytes(operators), samples.one_call(operators)
        parts = []
        host: Number = 0.0
        device: Number = 0.0
        last: Number = 0.0
        for op in operators:
            work, launch = parts_s(op, chip, footprint_bytes)
            if any(op is other for other in within):
                launch = 0.0
            parts.append((work, launch))
            host = host + op.repeat * launch
            if op.name in LAST:
                last = last + op.repeat * work
            else:
                device = device + op.repeat * work
        return cls(parts=tuple(parts), host_s=host, device_s=device, last_s=last)


def steps_s(operators: Iterable[Operator], chip: Chip) -> Timing:
    """Seconds that the operators of one rank take, each `repeat` times, one after the other."""
    operators = tuple(operators)
    samples = measured(chip)
    if samples is not None and samples.queued:
        return _queued_s(operators, chip, samples)
    footprint = streamed_bytes(operators)
    total: Number = 0.0
    busy: Number = 0.0
    for op in operators:
        work, launch = parts_s(op, chip, footprint)
        total = total + op.repeat * (work + launch)
        if op.kind not in COLLECTIVES:
            busy = busy + op.repeat * work
    return Timing(seconds=total, busy_s=busy)


def _queued_s(operators: tuple[Operator, ...], chip: Chip, samples: Measured) -> Timing:
    """Seconds where the host queues a step's operators and the device works them off.

        t = max(Σ host, Σ device of all but the last) + Σ device of the last

    Of a captured step the host queues nothing: it takes what the device does, and what is between.
    """
    queue = _Queue.of(operators, chip, samples)
    busy = queue.device_s + queue.last_s
    if samples.replayed(operators):
        gaps = sum(op.repeat * samples.gap_s(op) for op in operators)
        return Timing(seconds=busy + gaps, busy_s=busy)
    return Timing(seconds=np.maximum(queue.host_s, queue.device_s) + queue.last_s, busy_s=busy)


def laid_s(operators: Iterable[Operator], chip: Chip) -> Laid:
    """What each operator of a step adds to its seconds; `steps_s` has them in all.

    Where the host queues operators for the device, the step waits for one of both: if for the
    host, an operator's work is done beside the launches of others and adds nothing, unless it is
    one of the last; if for the device, its launch adds nothing.
    """
    operators = tuple(operators)
    samples = measured(chip)
    if samples is None or not samples.queued:
        footprint = streamed_bytes(operators)
        return Laid(parts=tuple(parts_s(op, chip, footprint) for op in operators))
    queue = _Queue.of(operators, chip, samples)
    pairs = list(zip(operators, queue.parts, strict=True))
    if samples.replayed(operators):
        return Laid(parts=tuple((work, samples.gap_s(op)) for op, (work, _) in pairs))
    hosts = np.where(np.asarray(queue.host_s) > queue.device_s, 1.0, 0.0)
    devices = 1.0 - hosts
    return Laid(
        parts=tuple(
            (work * (1.0 if op.name in LAST else devices), launch * hosts) for op, (work, launch) in pairs
        ),
        beside_s={"host": queue.host_s * devices, "device": queue.device_s * hosts},
    )


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
