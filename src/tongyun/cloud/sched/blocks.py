"""Hand out KV blocks, share those with equal contents, and remember the ones just let go.

A block is *used* while a request holds it, *idle* when nobody does but its contents can
still be found by key, and *blank* otherwise; idle and blank blocks are both free. `take`,
`share`, `release` and `publish` change the pool, everything else only looks. The pool
knows block numbers, not what a key or a value is made of.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from tongyun.cloud.sched.tiers import Tiers


class BlockPool:
    """`total` blocks; every operation is O(1) per block it touches. What is evicted goes to `tiers`."""

    def __init__(self, total: int, tiers: Tiers | None = None) -> None:
        self.total = total
        self.tiers = tiers
        self.published = 0
        """Blocks published so far: while it stands still, no new prefix can match."""
        self.taken = 0
        """Blocks taken so far, cached ones that were shared left out."""
        self._blank = list(range(total - 1, -1, -1))
        # Least recently released first, which is the order of eviction.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * total
        self._block_by_key: dict[bytes, int] = {}
        self._key: list[bytes | None] = [None] * total
        # Parent key and packed tokens, compared on every hit: a digest alone is not proof.
        self._contents: list[tuple[bytes, bytes] | None] = [None] * total

    @property
    def free(self) -> int:
        return len(self._blank) + len(self._idle)

    @property
    def blank(self) -> int:
        """Free blocks whose contents nobody could find."""
        return len(self._blank)

    @property
    def used(self) -> int:
        return self.total - self.free

    @property
    def idle(self) -> int:
        return len(self._idle)

    def holders(self, block: int) -> int:
        """How many requests hold the block now."""
        return self._holders[block]

    def find(self, key: bytes, parent: bytes, contents: bytes) -> int | None:
        """The block published under `key`, if its tokens and parent are really these."""
        block = self._block_by_key.get(key)
        if block is None or self._contents[block] != (parent, contents):
            return None
        return block

    def can_take(self, count: int, sharing: Iterable[int] = ()) -> bool:
        """Whether `count` blocks are free besides those that `sharing` would bring back to use."""
        return len(self._blank) + len(self._idle) - sum(not self._holders[b] for b in sharing) >= count

    def take(self, count: int) -> list[int]:
        """`count` blocks for one new holder; blank ones first, then the longest idle, forgotten."""
        blank, holders = self._blank, self._holders
        kept = max(len(blank) - count, 0)
        taken = blank[kept:]
        taken.reverse()
        del blank[kept:]
        if len(taken) < count:
            taken += self._evict(count - len(taken))
        for block in taken:
            holders[block] = 1
        self.taken += count
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each of these published blocks."""
        for block in blocks:
            if not self._holders[block]:
                del self._idle[block]
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder fewer for each of a request's blocks, given in the request's order."""
        # Backwards, so that the end of a prefix is evicted before what it depends on.
        holders, keys, idle, blank = self._holders, self._key, self._idle, self._blank
        if not self._block_by_key:
            # Nothing was ever to be found: each has this one holder.
            for block in blocks:
                holders[block] = 0
            blank.extend(reversed(blocks))
            return
        for block in reversed(blocks):
            holders[block] = left = holders[block] - 1
            if not left:
                if keys[block] is None:
                    blank.append(block)
                else:
                    idle[block] = None

    def clear(self) -> None:
        """Forget everything, as memory does that lost its power; nobody may hold a block."""
        if self.used:
            raise RuntimeError(f"{self.used} blocks are held")
        for block in self._idle:
            self._key[block] = self._contents[block] = None
        self._idle.clear()
        self._block_by_key.clear()
        self._blank = list(range(self.total - 1, -1, -1))
        if self.tiers is not None:
            self.tiers.clear()

    def forget(self, count: int) -> int:
        """Make up to `count` idle blocks blank, the longest idle first; returns how many there were."""
        count = min(count, len(self._idle))
        self._blank += self._evict(count)
        return count

    def publish(
        self,
        blocks: Sequence[int],
        keys: Sequence[bytes],
        parents: Sequence[bytes],
        contents: Sequence[bytes],
    ) -> None:
        """Let others find these full, computed blocks; one whose equal is known already stays private."""
        known, key_of, contents_of, tiers = self._block_by_key, self._key, self._contents, self.tiers
        before = len(known)
        for block, key, named in zip(blocks, keys, zip(parents, contents, strict=True), strict=True):
            if known.setdefault(key, block) == block:
                key_of[block] = key
                contents_of[block] = named
                if tiers is not None:
                    tiers.drop(key)
        self.published += len(known) - before

    def _evict(self, count: int) -> list[int]:
        """So many idle blocks, the longest idle first, forgotten."""
        idle, keys, contents, known = self._idle, self._key, self._contents, self._block_by_key
        evicted = []
        for _ in range(count):
            block = idle.popitem(False)[0]
            key, named = keys[block], contents[block]
            # Idle are those alone that can be found.
            assert key is not None and named is not None
            if self.tiers is not None:
                self.tiers.demote((key, *named))
            del known[key]
            keys[block] = contents[block] = None
            evicted.append(block)
        return evicted
