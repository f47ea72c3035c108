"""Seconds of a collective inside one scale-up domain, by payload and algorithm.

    ring      start + steps · hop + wire/b + sqrt(wire/b · ramp)
    direct    start + hops · hop + wire/b            (every rank reads its peers at once)

`wire` is what a rank sends, b the achieved bandwidth. A ring is cut into chunks: few
large ones leave links idle at both ends, many small ones pay a step each; at the best
cut both together cost the square root. The direct algorithms (one pass for small
payloads, reduce-scatter and all-gather for larger ones) are those engines use between
captured kernels up to `DIRECT_BYTES`; a communication library uses rings and, where
the switch adds, the switch. Domains joined by a network are composed by the caller.

Sizes follow nccl-tests: the payload is what a rank puts into an all-reduce or an
all-to-all, and the whole result of an all-gather or the whole input of a reduce-scatter.
It does not know contention between groups, nor overlap with computing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tongyun.chip.silicon import Library, Silicon
from tongyun.units import Number

Array = NDArray[np.float64]

DIRECT_BYTES = 8 * 2**20
SWITCH_RANKS = 5
"""Fewest ranks for which the communication library lets the switch add."""


def all_reduce_s(
    payload_bytes: Number, ranks: int, silicon: Silicon, *, direct: bool = True, library: Library
) -> Array:
    """Seconds until all ranks hold the sum of what each put in; one rank: zero.

    Ring: 2(n−1) steps, each of payload/n. `direct` also considers the one-pass and
    two-pass kernels of serving engines and takes the fastest; without it the price is
    that of the communication library.
    """
    payload = np.asarray(payload_bytes, dtype=np.float64)
    if ranks == 1:
        return np.zeros_like(payload)
    wire = payload * 2 * (ranks - 1) / ranks
    if silicon.switch_reduces and ranks >= SWITCH_RANKS:
        wire = np.maximum(wire / library.switch_gain, payload * silicon.link_efficiency)
    best = _ring_s(wire, 2 * (ranks - 1), silicon, library)
    if not direct:
        return best
    start_s = library.launch_s + silicon.fill_s + silicon.hop_s
    one = start_s + payload * (ranks - 1) / silicon.wire_bytes_per_s
    two = start_s + 2 * silicon.hop_s + payload * 2 * (ranks - 1) / ranks / silicon.wire_bytes_per_s
    small = np.where(payload <= DIRECT_BYTES, np.minimum(one, two), np.inf)
    return np.minimum(best, small)


def all_gather_s(total_bytes: Number, ranks: int, silicon: Silicon, *, library: Library) -> Array:
    """Seconds until all ranks hold all `total_bytes`, each having put in its share; one rank: zero."""
    total = np.asarray(total_bytes, dtype=np.float64)
    if ranks == 1:
        return np.zeros_like(total)
    return _ring_s(total * (ranks - 1) / ranks, ranks - 1, silicon, library)


def reduce_scatter_s(total_bytes: Number, ranks: int, silicon: Silicon, *, library: Library) -> Array:
    """Seconds until each rank holds its share of the sum over `total_bytes`: an all-gather backwards."""
    return all_gather_s(total_bytes, ranks, silicon, library=library)


def all_to_all_s(payload_bytes: Number, ranks: int, silicon: Silicon, *, library: Library) -> Array:
    """Seconds until each rank has sent payload/n to every other; all pairs at once, so one step."""
    payload = np.asarray(payload_bytes, dtype=np.float64)
    if ranks == 1:
        return np.zeros_like(payload)
    return _ring_s(payload * (ranks - 1) / ranks, 1, silicon, library)


def send_s(payload_bytes: Number, silicon: Silicon, *, library: Library) -> Array:
    """Seconds of one transfer between two chips of the domain."""
    return _ring_s(np.asarray(payload_bytes, dtype=np.float64), 1, silicon, library)


def _ring_s(wire_bytes: Array, steps: int, silicon: Silicon, library: Library) -> Array:
    moving_s = wire_bytes / silicon.wire_bytes_per_s
    start_s = library.launch_s + library.start_fills * silicon.fill_s
    return np.asarray(start_s + steps * silicon.hop_s + moving_s + np.sqrt(moving_s * library.ramp_s))
