"""For how many of a chip's cores a program is best compiled; the others are left idle.

A program takes the same time on a chip of more cores than it is for. Of the programs for one to n cores the
quickest is therefore never slower than that of a chip of fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from numpy.typing import ArrayLike

from tongyun.chip.ppu.program import Program
from tongyun.chip.ppu.timing import simulate_repeated
from tongyun.specs.ppu import Ppu


def quickest(compiled: Callable[[Ppu], Program], ppu: Ppu, symbols: Mapping[str, ArrayLike]) -> int:
    """The cores for which what `compiled` makes is simulated to take least; of equal numbers the largest.

    Tried from all cores downwards, until so few could not do the FLOPs in the least time found.
    """
    best, least = ppu.cores, float("inf")
    for cores in range(ppu.cores, 0, -1):
        timing = simulate_repeated(compiled(replace(ppu, cores=cores)), ppu, symbols)
        if timing.seconds < least:
            best, least = cores, timing.seconds
        if (cores - 1) * least * ppu.clock_hz * max(ppu.tensor_flops.values()) <= timing.total("flops"):
            break
    return best
