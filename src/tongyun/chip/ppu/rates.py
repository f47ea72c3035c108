"""A chip's figures in the simulators' unit of time, as one row of numbers. Knows no programs.

Time is counted in parts of a second and not of a cycle: were it cycles, a faster clock would round what
takes seconds (memory, links, barriers) anew, and now and then up. A better figure makes no number of ticks
here larger, and so nothing longer that sums, products and maxima of them say.
"""

from __future__ import annotations

from math import ceil

import numpy as np
from numpy.typing import NDArray

from tongyun.chip.ppu.isa import Type
from tongyun.specs.ppu import Ppu

TICKS = 10**14
"""Parts of a second."""
CYCLE, TILES, PORTS = 20, 21, 37
"""Places of a cycle, of the smallest products by type, and of the ports that no switch joins."""


def rates(ppu: Ppu) -> NDArray[np.float64]:
    """0 cores, 1 to 3 the smallest product's m n k, 13 the L2's bytes, 17 an attention tile's rows; in ticks:

    4 latency of the tensor unit, 5 6 7 an element of plain and of special lanes and their latency, 8 9 10 a
    byte at port and L2 and the L2's latency, 11 12 a byte of HBM and its latency, 14 a barrier, 15 16 a byte
    of the links and their latency, 18 a pair's softmax, 20 a cycle, from 21 on a smallest product of each
    type, -1 where the chip has none. 19 is the part of the shorter of products and softmax that shows, 37
    how many ports there are of which a peer has one, 0 where a switch gives it all.
    """
    cycle = cycle_ticks(ppu)
    tensor = [ppu.cores, ppu.tile_m, ppu.tile_n, ppu.tile_k, ppu.tensor_latency_s * TICKS]
    vector = [cycle / ppu.vector_lanes, cycle / ppu.special_lanes, ppu.vector_latency_s * TICKS]
    l2 = [cycle / ppu.port_bytes, cycle / ppu.l2_rate, ppu.l2_latency_s * TICKS]
    hbm = [TICKS / ppu.hbm_bytes_per_s, ppu.hbm_latency_s * TICKS]
    link = [TICKS / ppu.icn_bytes_per_s if ppu.icn_bytes_per_s else 0.0, ppu.icn_latency_s * TICKS]
    tile = [ppu.attention_rows, cycle / ppu.softmax_lanes, 1 - ppu.softmax_hidden]
    shared = [ppu.l2_bytes, ppu.barrier_s * TICKS, *link, *tile, cycle]
    ports = 0 if ppu.icn_is_switched else ppu.icn_ports
    return np.array([*tensor, *vector, *l2, *hbm, *shared, *_tiles(ppu), ports])


def cycle_ticks(ppu: Ppu) -> int:
    """Ticks of a cycle, rounded up."""
    return ceil(TICKS / ppu.clock_hz)


def _tiles(ppu: Ppu) -> list[float]:
    """By data type: ticks of the smallest product of the tensor unit, -1 where it has no rate."""
    ticks = [-1.0] * 16
    for kind in Type:
        if kind.rate in ppu.tensor_flops:
            work = 2 * ppu.tile_m * ppu.tile_n * ppu.tile_k
            ticks[kind] = float(ceil(work / ppu.tensor_flops[kind.rate] * cycle_ticks(ppu)))
    return ticks
