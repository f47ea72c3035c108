"""Joules of a run, by component and as a range, and what the power envelope makes of its time.

Counts come from the simulated run, joules per count from the spec at its corners. A kernel that would draw
more than the envelope is stretched until it does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tongyun.chip.ppu.rates import TICKS
from tongyun.chip.ppu.timing import COUNTERS, Timing
from tongyun.specs.figure import Corner
from tongyun.specs.ppu import Ppu, PpuSpec

COMPONENTS = ("tensor", "vector", "sram", "l2", "hbm", "icn", "static")


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Joules of a run by component, at the corners of the spec, and the seconds inside the envelope."""

    joules: dict[str, tuple[float, float, float]]
    """Component to (low, nominal, high)."""
    seconds: float
    """At nominal energies, stretched where the envelope binds."""

    @property
    def total(self) -> tuple[float, float, float]:
        low, nominal, high = (sum(values[i] for values in self.joules.values()) for i in range(3))
        return low, nominal, high


def energy(timing: Timing, spec: PpuSpec) -> Energy:
    """What a simulated run costs in joules, and its time within the envelope."""
    corners = [spec.at(corner) for corner in (Corner.FAST, Corner.NOMINAL, Corner.SLOW)]
    at_corner = [_by_kernel(timing, ppu) for ppu in corners]
    plain = timing.ticks / TICKS
    nominal = corners[1]
    dynamic = at_corner[1].sum(axis=1)
    stretched = np.maximum(plain, dynamic / (nominal.limit_w - nominal.static_w))
    seconds = float(stretched @ timing.times)
    joules = {}
    for place, name in enumerate(COMPONENTS[:-1]):
        low, middle, high = (float(table[:, place] @ timing.times) for table in at_corner)
        joules[name] = (low, middle, high)
    low, middle, high = (ppu.static_w * seconds for ppu in corners)
    joules["static"] = (low, middle, high)
    return Energy(joules=joules, seconds=seconds)


def _by_kernel(timing: Timing, ppu: Ppu) -> NDArray[np.float64]:
    """Dynamic joules, shape (kernels, components without static)."""
    names = ("flops", "vector_elements", "sram_bytes", "l2_bytes", "hbm_bytes", "icn_bytes")
    counts = timing.counters[:, [COUNTERS.index(name) for name in names]]
    beside = [ppu.vector_j, ppu.sram_byte_j, ppu.l2_byte_j, ppu.hbm_byte_j, ppu.icn_byte_j]
    joules: NDArray[np.float64] = counts * np.array([[ppu.flop_j[rate], *beside] for rate in timing.rates])
    return joules
