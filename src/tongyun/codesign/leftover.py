"""Chips that replicas of one cut leave over, put to use by replicas of others.

A gap within a domain is filled with the replicas that together give most (a knapsack, solved
exactly); whole domains left over may also take a replica that crosses the network. Every
replica beside the main ones keeps the limits, and gives tokens no slower than a given time
between them. Knows points, their rates and places; prices nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tongyun.codesign.places import Room
from tongyun.model.shard import Shard

Array = NDArray[np.float64]
Index = NDArray[np.intp]
STEPS = 48
"""Times between tokens at which fillings are worked out; one in between gets that of the next shorter."""


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """Points that may fill gaps: allowed ones of all cuts, flattened into one axis."""

    cut: Index
    tpot_s: Array
    tokens_per_s: Array
    """Of one replica."""
    shards: Sequence[Shard]
    """By cut."""


class Leftover:
    """Best fillings of any room, for a ladder of times between tokens."""

    def __init__(self, kinds: Kinds, room: Room, tpot_s: float | None) -> None:
        self._kinds, self._domain = kinds, room.domain
        self._most = max(room.gaps, default=0)
        self.times = self._ladder(tpot_s)
        place = {shard: room.place(shard) for shard in kinds.shards}
        self._places = sorted(set(place.values()))
        known = {each: number for number, each in enumerate(self._places)}
        self._of_cut = np.array([known[place[shard]] for shard in kinds.shards], dtype=np.intp)
        self._rates = self._best_rates()
        self._inside, self._chosen = self._fill_gaps()
        self._whole: list[tuple[Array, Index]] = [(np.zeros(len(self.times)), np.zeros(0, dtype=np.intp))]

    def _ladder(self, tpot_s: float | None) -> Array:
        found = self._kinds.tpot_s
        if not len(found):
            return np.array([np.inf])
        steps = np.geomspace(found.min(), found.max(), STEPS)
        return np.array(sorted({*steps.tolist(), *(() if tpot_s is None else (tpot_s,))}), dtype=np.float64)

    def at(self, tpot_s: Array) -> Index:
        """The rung of the ladder that is no slower than each time; −1 where all are."""
        return np.asarray(np.searchsorted(self.times, tpot_s * (1 + 1e-12), side="right") - 1)

    def _best_rates(self) -> Array:
        """Most tokens per second of a replica of each place, on each rung."""
        rates = np.zeros((len(self._places), len(self.times)))
        rung = np.searchsorted(self.times * (1 + 1e-12), self._kinds.tpot_s)
        rung = np.minimum(rung, len(self.times) - 1)
        np.maximum.at(rates, (self._of_cut[self._kinds.cut], rung), self._kinds.tokens_per_s)
        return np.asarray(np.maximum.accumulate(rates, axis=1))

    def _fill_gaps(self) -> tuple[Array, Index]:
        """Most of a gap of each size, and the place of the replica put in first (−1: a chip stays free)."""
        best = np.zeros((self._most + 1, len(self.times)))
        chosen = np.full(best.shape, -1, dtype=np.intp)
        inside = [
            (n, unit) for n, (unit, many) in enumerate(self._places) if many == 1 and unit <= self._domain
        ]
        for size in range(1, self._most + 1):
            best[size] = best[size - 1]
            for number, unit in inside:
                if unit > size:
                    break
                rate = self._rates[number] + best[size - unit]
                better = (rate > best[size]) & (self._rates[number] > 0)
                best[size] = np.where(better, rate, best[size])
                chosen[size] = np.where(better, number, chosen[size])
        return best, chosen

    def _domains(self, count: int) -> tuple[Array, Index]:
        """Most of so many whole domains, and the place of the wide replica put in first (−1: none)."""
        while len(self._whole) <= count:
            many = len(self._whole)
            best = self._whole[many - 1][0] + self._inside[min(self._domain, self._most)]
            chosen = np.full(len(best), -1, dtype=np.intp)
            for number, place in enumerate(self._places):
                taken = self._wide(place)
                if taken is None or taken[0] > many:
                    continue
                rate = self._rates[number] + self._whole[many - taken[0]][0] + self._of_gaps(taken[1])
                better = (rate > best) & (self._rates[number] > 0)
                best, chosen = np.where(better, rate, best), np.where(better, number, chosen)
            self._whole.append((np.asarray(best), np.asarray(chosen)))
        return self._whole[count]

    def _wide(self, place: tuple[int, int]) -> tuple[int, Room] | None:
        """Whole domains that a replica across the network needs, and what it leaves of them."""
        unit, many = place
        if unit * many <= self._domain:
            return None
        shard = Shard(tp=unit, pp=many)
        count = -(-unit * many // self._domain)
        while not (room := Room.of(count * self._domain, self._domain)).fits(shard):
            count += 1
        return count, room.without(shard, 1)

    def _of_gaps(self, room: Room) -> Array:
        return np.asarray(
            sum((count * self._inside[size] for size, count in room.gaps.items()), np.zeros(len(self.times)))
        )

    def gain(self, room: Room) -> Array:
        """Tokens per second that a room gives, on each rung."""
        parts = {size: count for size, count in room.gaps.items() if size < self._domain}
        whole = self._domains(room.gaps.get(self._domain, 0))[0]
        return np.asarray(whole + self._of_gaps(Room(domain=self._domain, gaps=parts)))

    def picks(self, room: Room, rung: int) -> Counter[int]:
        """The points that fill a room best on one rung, each as often as it is used."""
        found: Counter[int] = Counter()
        whole = room.gaps.get(self._domain, 0)
        gaps = [(size, count) for size, count in room.gaps.items() if size < self._domain]
        while whole:
            number = int(self._domains(whole)[1][rung])
            taken = None if number < 0 else self._wide(self._places[number])
            if taken is None:
                gaps.append((self._domain, 1))
                whole -= 1
            else:
                found[number] += 1
                whole -= taken[0]
                gaps += list(taken[1].gaps.items())
        for size, count in gaps:
            free = size
            while free:
                number = int(self._chosen[free][rung])
                free -= self._places[number][0] if number >= 0 else 1
                if number >= 0:
                    found[number] += count
        return Counter({self._point(number, rung): count for number, count in sorted(found.items())})

    def _point(self, number: int, rung: int) -> int:
        """The point behind the best rate of a place."""
        kinds = self._kinds
        ok = (self._of_cut[kinds.cut] == number) & (kinds.tpot_s <= self.times[rung] * (1 + 1e-12))
        return int(np.argmax(np.where(ok, kinds.tokens_per_s, -1.0)))
