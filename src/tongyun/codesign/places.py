"""Where replicas fit: chips come in scale-up domains, and what talks over the fast links stays in one.

A replica no larger than a domain lies within one. A larger one crosses the network, but each of its
pipeline stages still lies in one domain, or takes whole domains and a part of another. Counts what
fits and what is left over; prices nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tongyun.model.shard import Shard
from tongyun.specs import Chip


def domain_of(chip: Chip) -> int:
    """Chips of a scale-up domain."""
    return 1 if chip.scale_up is None else chip.scale_up.domain


@dataclass(frozen=True, kw_only=True)
class Room:
    """Free chips as gaps: how many gaps there are of each size, a domain at most."""

    domain: int
    gaps: Mapping[int, int]

    @classmethod
    def of(cls, chips: int, domain: int, *, behind: int = 0) -> Room:
        """`chips` in a row, behind as many others; one domain is filled after the other."""
        first = min(chips, -behind % domain)
        whole, rest = divmod(chips - first, domain)
        return cls._of(domain, [(first, 1), (domain, whole), (rest, 1)])

    @classmethod
    def _of(cls, domain: int, gaps: Iterable[tuple[int, int]]) -> Room:
        found: dict[int, int] = {}
        for size, count in gaps:
            if size and count:
                found[size] = found.get(size, 0) + count
        return cls(domain=domain, gaps=dict(sorted(found.items())))

    @property
    def chips(self) -> int:
        return sum(size * count for size, count in self.gaps.items())

    def fits(self, shard: Shard) -> int:
        """Replicas of this cut that find a place."""
        unit = self._unit(shard)
        if unit <= self.domain:
            slots = sum(count * (size // unit) for size, count in self.gaps.items())
            return slots // (shard.ranks // unit)
        whole, rest = divmod(unit, self.domain)
        full = self.gaps.get(self.domain, 0)
        if not rest:
            return full // whole // shard.pp
        # Each needs whole domains, and a part of one that it may share or that is left over.
        parts = sum(count * (size // rest) for size, count in self.gaps.items() if size < self.domain)
        shared, stages = self.domain // rest, 0
        while (stages + 1) * whole + math.ceil(max(0, stages + 1 - parts) / shared) <= full:
            stages += 1
        return stages // shard.pp

    def without(self, shard: Shard, replicas: int) -> Room:
        """What is left when so many have taken their places, the smallest gaps first."""
        unit = self._unit(shard)
        units = replicas * (shard.ranks // unit)
        whole, rest = divmod(unit, self.domain)
        gaps = dict(self.gaps)
        if unit >= self.domain:
            gaps[self.domain] = gaps.get(self.domain, 0) - units * whole
            unit = rest
        if not unit:
            return self._of(self.domain, gaps.items())
        left: list[tuple[int, int]] = []
        for size, count in sorted(gaps.items()):
            each = size // unit
            full = min(count, units // each) if each else 0
            units -= full * each
            left.append((size - each * unit, full))
            if each and units and full < count:
                left.append((size - units * unit, 1))
                full, units = full + 1, 0
            left.append((size, count - full))
        return self._of(self.domain, left)

    def beside(self, other: Room) -> Room:
        """Both rooms; a gap of one does not join a gap of the other."""
        return self._of(self.domain, [*self.gaps.items(), *other.gaps.items()])

    def place(self, shard: Shard) -> tuple[int, int]:
        """Ranks that have to lie together, and how many such units a replica has: itself, or its
        stages where no domain holds it. Cuts alike in this fit alike."""
        unit = self._unit(shard)
        return unit, shard.ranks // unit

    def _unit(self, shard: Shard) -> int:
        return shard.ranks if shard.ranks <= self.domain else shard.stage_ranks


def counts(
    places: Sequence[tuple[int, int]], chips: NDArray[np.intp], domain: int, *, behind: NDArray[np.intp]
) -> NDArray[np.intp]:
    """Replicas of each place (columns) that find room on so many chips in a row (rows): what
    `Room.of(chips, domain, behind=behind).fits` gives, for all at once."""
    first = np.minimum(chips, -behind % domain)[:, None]
    whole, rest = np.divmod(chips[:, None] - first, domain)
    units = np.array([unit for unit, _ in places], dtype=np.intp)
    many = np.array([count for _, count in places], dtype=np.intp)
    slots = first // units + whole * (domain // units) + rest // units
    found: NDArray[np.intp] = np.asarray(slots // many, dtype=np.intp)
    for column in np.flatnonzero(units > domain):
        shard = Shard(tp=int(units[column]), pp=int(many[column]))
        for row in np.flatnonzero(chips >= shard.ranks):
            room = Room.of(int(chips[row]), domain, behind=int(behind[row]))
            found[row, column] = room.fits(shard)
    return found
