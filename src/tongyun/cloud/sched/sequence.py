"""A request in the scheduler's hands: what is known, what is computed, what it holds.

Only the scheduler changes a sequence. It knows no policy.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
from numpy.typing import NDArray

from tongyun.cloud.sched.blocks import BlockPool
from tongyun.cloud.sched.prefix import ROOT, child_key, contents_of, extend_keys, row
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.tiers import Tiers

Rank = tuple[int, float, int]
Stored = tuple[bytes, int]
"""A block in a lower tier: its key and the tier."""


class State(Enum):
    """WAITING holds no blocks; PREFILLING and DECODING do; ENDED is gone for good."""

    WAITING = 0
    PREFILLING = 1
    DECODING = 2
    ENDED = 3


def rank_of(request: Request, serial: int, aging_s: float | None) -> Rank:
    """Higher priority, earlier arrival, earlier call of `add`; the least is the best.

    With `aging_s`, a step of priority is worth so many seconds of arrival: all who wait age alike,
    so that who comes before whom never changes, and nobody waits behind a higher priority that came
    more than `aging_s` · (difference of priorities) later. Ranks of such requests begin alike: blocks that
    run out are still taken from the last, but nobody is stopped to let another start.
    """
    if aging_s is None:
        return -request.priority, request.arrival_s, serial
    return 0, request.arrival_s - request.priority * aging_s, serial


class Sequence:
    """`history[:computed]` has keys and values in `blocks`; `room` tokens fit in them.

    `rank` orders requests and never changes (see `rank_of`).
    """

    __slots__ = (
        "_keys",
        "admitted",
        "blocks",
        "cached_tokens",
        "computed",
        "history",
        "limit",
        "offset",
        "path",
        "publish_at",
        "published",
        "rank",
        "refused_at",
        "request",
        "restored",
        "room",
        "state",
    )

    def __init__(
        self, request: Request, serial: int, aging_s: float | None = None, *, keys: list[bytes] | None = None
    ) -> None:
        """`keys` are of the first blocks of the prompt, where they are known; more are added to them."""
        self.request = request
        self.rank = rank_of(request, serial, aging_s)
        self.state = State.WAITING
        self.history = row(request.prompt)
        self.limit = len(self.history) + request.output_tokens
        self.computed = 0
        self.offset = 0
        """While its steps are only counted: tokens known, or its place on `path`, when the count was zero."""
        self.path: NDArray[np.int64] | None = None
        """Tokens known before each step that verifies drafts (see `progress`), once it was asked for."""
        self.blocks: list[int] = []
        self.room = 0
        self.admitted = False
        self.cached_tokens = 0
        self.restored: tuple[int, ...] = ()
        """Blocks that come back from each lower tier and no piece has named yet."""
        self.publish_at = 0
        """Computed tokens at which the next block can be published; set on admission."""
        self.published = 0
        """How many leading blocks are published or were found published."""
        self.refused_at: tuple[int, int] | None = None
        """The pool's (free, published) when admission last failed for want of blocks."""
        # Keys depend on contents alone, so they outlive a preemption.
        self._keys: list[bytes] = [] if keys is None else keys

    def named(self, index: int, block_tokens: int) -> tuple[bytes, bytes, bytes]:
        """Key, parent key and packed tokens of the full block `index`, the next after known ones."""
        contents = self.history[index * block_tokens : (index + 1) * block_tokens].tobytes()
        parent = self._keys[index - 1] if index else ROOT
        if index == len(self._keys):
            self._keys.append(child_key(parent, contents))
        return self._keys[index], parent, contents

    def cached_prefix(self, pool: BlockPool, block_tokens: int) -> list[int]:
        """The published blocks this sequence could share, from its start on.

        The block of the last known token is never among them: at least one token has to
        be computed to yield the next, and it must not be written into a shared block.
        """
        found: list[int] = []
        for index in range((len(self.history) - 1) // block_tokens):
            block = pool.find(*self.named(index, block_tokens))
            if block is None:
                break
            found.append(block)
        return found

    def stored_prefix(self, pool: BlockPool, tiers: Tiers, block_tokens: int) -> list[int | Stored]:
        """As `cached_prefix`, blocks in lower tiers included: those as (key, tier)."""
        found: list[int | Stored] = []
        for index in range((len(self.history) - 1) // block_tokens):
            named = self.named(index, block_tokens)
            block = pool.find(*named)
            if block is not None:
                found.append(block)
                continue
            tier = tiers.find(named)
            if tier is None:
                break
            found.append((named[0], tier))
        return found

    def publish(self, pool: BlockPool, block_tokens: int) -> None:
        """Let others share the blocks that have become full and computed."""
        first, past = self.published, self.computed // block_tokens
        if first >= past:
            return
        contents = contents_of(self.history[first * block_tokens : past * block_tokens], block_tokens)
        keys = self._keys
        if len(keys) < past:
            extend_keys(keys, contents[len(keys) - first :])
        parents = keys[first - 1 : past - 1] if first else [ROOT, *keys[: past - 1]]
        pool.publish(self.blocks[first:past], keys[first:past], parents, contents)
        self.published = past
        self.publish_at = (past + 1) * block_tokens
