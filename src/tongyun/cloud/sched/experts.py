"""Decide which rank computes which expert, from how often each is picked.

Two moves: experts that are picked most get copies, then copies go to the rank with least
to do. Knows neither what a token costs nor how weights get to where they belong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The experts of each rank, as many on every one; an expert's copies share its tokens evenly."""

    ranks: tuple[tuple[int, ...], ...]

    def picks(self, chances: Sequence[float]) -> Array:
        """[ranks, slots]: the chance that a token is computed there, from that of each expert."""
        table = np.asarray(self.ranks)
        copies = np.bincount(table.ravel(), minlength=len(chances))
        return np.asarray((np.asarray(chances) / copies)[table])

    def busiest(self, chances: Sequence[float]) -> tuple[float, ...]:
        """The picks of the rank that computes most tokens, its most crowded expert first."""
        picks = self.picks(chances)
        return tuple(sorted(picks[int(picks.sum(axis=1).argmax())].tolist(), reverse=True))


def in_order(experts: int, ranks: int) -> Placement:
    """Each rank gets the next experts by their number, whoever picks them."""
    each = _slots(experts, ranks)
    return Placement(ranks=tuple(tuple(range(r * each, (r + 1) * each)) for r in range(ranks)))


def balanced(loads: Sequence[float], ranks: int, redundant: int = 0) -> Placement:
    """Experts and so many copies beside them, such that no rank has much more to do than another.

    Copies go one by one to the expert whose copies are picked most, and then, the most picked first,
    to the least loaded rank that has room and no copy of it yet. Where no rank without one has
    room, a second copy lies beside the first. The busiest rank has at most the mean and
    the most picked copy.
    """
    slots = _slots(len(loads) + redundant, ranks)
    copies = _copies(loads, redundant)
    each = [(load / count, expert) for expert, (load, count) in enumerate(zip(loads, copies, strict=True))]
    held: list[list[int]] = [[] for _ in range(ranks)]
    load_of = [0.0] * ranks
    for load, expert in sorted(each, key=lambda one: (-one[0], one[1])):
        for _ in range(copies[expert]):
            rank = min(
                (r for r in range(ranks) if len(held[r]) < slots),
                key=lambda r: (expert in held[r], load_of[r], r),
            )
            held[rank].append(expert)
            load_of[rank] += load
    return Placement(ranks=tuple(tuple(sorted(one)) for one in held))


def _copies(loads: Sequence[float], redundant: int) -> list[int]:
    copies = [1] * len(loads)
    heap = [(-load, expert) for expert, load in enumerate(loads)]
    heapify(heap)
    for _ in range(redundant):
        expert = heap[0][1]
        copies[expert] += 1
        heapreplace(heap, (-loads[expert] / copies[expert], expert))
    return copies


def _slots(experts: int, ranks: int) -> int:
    each, left = divmod(experts, ranks)
    if left or not each:
        raise ValueError(f"{experts} experts do not fill {ranks} ranks evenly")
    return each
