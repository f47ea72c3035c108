"""Keep what the block pool evicts, in slower memories behind it.

A block evicted from the chip's memory goes to the first tier, and what that evicts to the
next; what the last evicts is lost. A block is in one place only: it leaves its tier when a
request brings it back. Pool and tiers together are therefore one stack in the order of use.
Decides which blocks are where; knows no bytes, no bandwidth and no clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

Named = tuple[bytes, bytes, bytes]
"""Key, parent key and packed tokens of a block."""


class Tiers:
    """So many blocks in each tier, the fastest first; every operation is O(tiers)."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        # Longest unused first, which is the order of eviction.
        self._kept: list[OrderedDict[bytes, tuple[bytes, bytes]]] = [OrderedDict() for _ in self.sizes]
        self.demoted = [0] * len(self.sizes)
        """Blocks that have come down to each tier."""
        self.restored = [0] * len(self.sizes)
        """Blocks that requests have brought back from each tier."""
        self.dropped = [0] * len(self.sizes)
        """Blocks that were computed anew while a copy lay in the tier."""
        self.lost = 0
        """Blocks that fell out of the last tier."""
        self.cleared = [0] * len(self.sizes)
        """Blocks that lay in each tier when it was cleared."""

    @property
    def kept(self) -> tuple[int, ...]:
        """Blocks that lie in each tier now."""
        return tuple(len(tier) for tier in self._kept)

    def find(self, named: Named) -> int | None:
        """The tier that keeps the block, if its tokens and parent are really these."""
        key, parent, contents = named
        for index, tier in enumerate(self._kept):
            if tier.get(key) == (parent, contents):
                return index
        return None

    def demote(self, named: Named) -> None:
        """Keep a block that the pool has evicted."""
        key, *rest = named
        contents = rest[0], rest[1]
        for index, (size, tier) in enumerate(zip(self.sizes, self._kept, strict=True)):
            tier[key] = contents
            self.demoted[index] += 1
            if len(tier) <= size:
                return
            key, contents = tier.popitem(last=False)
        self.lost += 1

    def restore(self, key: bytes, index: int) -> None:
        """The block leaves tier `index`, which keeps it, for the pool."""
        del self._kept[index][key]
        self.restored[index] += 1

    def clear(self) -> None:
        """Keep nothing any more."""
        for index, tier in enumerate(self._kept):
            self.cleared[index] += len(tier)
            tier.clear()

    def drop(self, key: bytes) -> None:
        """Forget the copy of a block that the pool holds again, if there is one."""
        for index, tier in enumerate(self._kept):
            if tier.pop(key, None) is not None:
                self.dropped[index] += 1
