"""Decide which rank computes which expert, from how often each is picked.

Two moves: experts that are picked most get copies, then copies go to the rank with least
to do. While experts serve, what counts are sure of is mended, and the rest stays where it is.
Knows neither what a token costs nor how weights get to where they belong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
SURE = 3.0
"""Standard deviations of a rank's count beyond which it is not chance."""


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


def placed_anew(before: Placement, counts: Sequence[float], redundant: int = 0) -> Placement:
    """Experts where tokens counted say that they belong, with few of them on other ranks than before.

    Copies that nobody misses make room for those that are wanted, then the busiest rank swaps experts
    with others as long as it is above the mean by more than chance: a count of n has a standard
    deviation of √n. All stay where they were unless the busiest rank surely gets less to do.
    """
    loads, table = np.asarray(counts, dtype=np.float64), np.asarray(before.ranks)
    busiest = before.picks(counts).sum(axis=1).max()
    copies = np.asarray(_copies(counts, redundant))
    table = _swapped(_recopied(table, loads / copies, copies), loads / copies)
    after = Placement(ranks=tuple(tuple(sorted(rank)) for rank in table.tolist()))
    gain = busiest - after.picks(counts).sum(axis=1).max()
    return after if gain > SURE * busiest**0.5 else before


def _recopied(table: Ints, each: Array, copies: Ints) -> Ints:
    """[ranks, slots] with so many copies of every expert; those with most to do lose theirs first."""
    table, load_of = table.copy(), each[table].sum(axis=1)
    missing = copies - np.bincount(table.ravel(), minlength=len(copies))
    for expert in np.flatnonzero(missing < 0).tolist():
        for _ in range(-missing[expert]):
            places = np.argwhere(table == expert)
            rank, slot = max(places.tolist(), key=lambda place: (load_of[place[0]], -place[0]))
            table[rank, slot] = -1
            load_of[rank] -= each[expert]
    wanted = np.repeat(np.arange(len(copies)), np.maximum(missing, 0))
    for expert in sorted(wanted.tolist(), key=lambda one: (-each[one], one)):
        room, twice = (table < 0).any(axis=1), (table == expert).any(axis=1)
        rank = min(np.flatnonzero(room).tolist(), key=lambda r: (bool(twice[r]), float(load_of[r]), r))
        table[rank, int(np.argmax(table[rank] < 0))] = expert
        load_of[rank] += each[expert]
    return table


def _swapped(table: Ints, each: Array) -> Ints:
    """Experts of the busiest rank traded for others' while it is surely above the mean and gets less."""
    loads = each[table]
    load_of = loads.sum(axis=1)
    mean = float(load_of.mean())
    # Every trade lowers the busiest rank; as many as there are experts are enough.
    for _ in range(table.size):
        busiest = int(load_of.argmax())
        if load_of[busiest] - mean <= SURE * mean**0.5:
            break
        given = loads[busiest][:, None, None] - loads[None, :, :]
        both = np.maximum(load_of[busiest] - given, load_of[None, :, None] + given)
        both[:, busiest, :] = np.inf
        slot, rank, other = (int(one) for one in np.unravel_index(both.argmin(), both.shape))
        if both[slot, rank, other] >= load_of[busiest]:
            break
        for held in (table, loads):
            held[busiest, slot], held[rank, other] = held[rank, other], held[busiest, slot]
        load_of[[busiest, rank]] = loads[[busiest, rank]].sum(axis=1)
    return table


def moves(before: Placement, after: Placement, near: Sequence[int]) -> list[tuple[int, int]]:
    """Source and target rank of every expert that a rank needs and does not hold.

    It comes from a rank that holds it: one with the same number in `near` if there is any, and of
    these the one that has sent least.
    """
    holders: dict[int, list[int]] = {}
    for rank, experts in enumerate(before.ranks):
        for expert in dict.fromkeys(experts):
            holders.setdefault(expert, []).append(rank)
    sent = [0] * len(near)
    found = []
    for target, experts in enumerate(after.ranks):
        # A second copy on one rank shares the weights of the first on their way.
        for expert in sorted(set(experts) - set(before.ranks[target])):
            source = min(holders[expert], key=lambda r: (near[r] != near[target], sent[r], r))
            sent[source] += 1
            found.append((source, target))
    return found


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
