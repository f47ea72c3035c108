"""Where a step's time, bytes and joules go: by kind of kernel, by layer, by operator of a layer.

Sums over the kernels of a simulated run, so that every way of cutting adds up to the same whole.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from tongyun.chip.ppu.energy import energy
from tongyun.chip.ppu.program import Kernel, Program
from tongyun.chip.ppu.timing import COUNTERS, Timing
from tongyun.errors import InputError, unknown
from tongyun.specs.ppu import PpuSpec

CUTS = ("kind", "layer", "operator")
OUTSIDE = "outside layers"


@dataclass(frozen=True, kw_only=True)
class Share:
    """What some kernels take; simulated."""

    kernels: int
    seconds: float
    """Without the power envelope."""
    cycles: float
    flops: int
    hbm_bytes: int
    l2_bytes: int
    roofline_s: float
    """The longer of products at the peak of their types and bytes at that of the memory."""
    joules: float
    """At nominal energies, static power of its time within the envelope included."""


def shares(timing: Timing, spec: PpuSpec, names: list[str]) -> dict[str, Share]:
    """By name, in the order in which names first come; `names` has one for each kernel."""
    found = {}
    for name in dict.fromkeys(names):
        mine = np.array([other == name for other in names])
        part = replace(timing, times=np.where(mine, timing.times, 0))
        flops, hbm, l2 = (part.total(counter) for counter in ("flops", "hbm_bytes", "l2_bytes"))
        found[name] = Share(
            kernels=int(part.times.sum()), seconds=part.seconds, cycles=part.total_cycles, flops=flops,
            hbm_bytes=hbm, l2_bytes=l2,
            roofline_s=max(_products_s(part), hbm / timing.ppu.hbm_peak_bytes_per_s),
            joules=energy(part, spec).total[1],
        )  # fmt: skip
    return found


def _products_s(timing: Timing) -> float:
    peaks = np.array([timing.ppu.peak_flops_per_s(rate) for rate in timing.rates])
    return float(timing.counters[:, COUNTERS.index("flops")] / peaks @ timing.times)


def names_by(cut: str, program: Program) -> list[str]:
    """What each kernel of a program counts for. InputError for a cut that is none."""
    if cut not in CUTS:
        raise InputError(unknown("cut", cut, CUTS))
    if cut == "kind":
        return [kernel.kind for kernel in program.kernels]
    if cut == "layer":
        return [OUTSIDE if k.layer is None else f"layer {k.layer}" for k in program.kernels]
    return _operators(program)


def _operators(program: Program) -> list[str]:
    """Kind and, where a layer has several of a kind, which of them it is."""
    seen: Counter[tuple[int | None, str]] = Counter()
    names = []
    for kernel in program.kernels:
        seen[kernel.layer, kernel.kind] += 1
        place = seen[kernel.layer, kernel.kind]
        names.append(_numbered(kernel, place))
    return names


def _numbered(kernel: Kernel, place: int) -> str:
    if kernel.layer is None:
        return f"{kernel.kind}, {OUTSIDE}"
    return f"{kernel.kind} {place}"
