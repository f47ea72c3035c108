"""Count the steps of decoding sequences instead of taking them.

A decoding sequence gains one token a step, so that what it will need and when follows from a
count: the step that takes its next block, the one that fills a block others may share, the
one that ends it. `Coast` keeps these in order and does just them. Pool, blocks and rooms
are exact at any moment; histories fall behind and are made true by `settle`. Who decodes
is the scheduler's to say, by `join` and by ending them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Series
from heapq import heappop, heappush
from typing import NamedTuple

from tongyun.cloud.sched.blocks import BlockPool
from tongyun.cloud.sched.request import Piece, Request
from tongyun.cloud.sched.sequence import Rank, Sequence, State

NewTokens = Callable[[Request, int, int], Series[int]]
"""Tokens that a request produces next: of which request, how many tokens are known, how many to give."""
Events = list[tuple[int, Rank, Sequence]]
"""A heap of steps in which something is due, the best rank of a step first, as in a batch."""


class Step(NamedTuple):
    """One step's work where those that decode are only counted."""

    decoding: int
    context_tokens: int
    """Tokens of all that decode that have keys and values before the step."""
    pieces: list[Piece]
    """Of prompts."""


class Ahead(NamedTuple):
    """Steps in which the same requests decode and nothing else happens."""

    decoding: int
    context_tokens: int
    """Tokens of all of them that have keys and values before the first of the steps."""
    steps: int


class Coast:
    """Decoding sequences `steps` steps after it began.

    In step s a sequence that knew `offset` + s tokens computes the last of them. The block
    for it is there when known ≤ room; it is full, and the request over, as `commit` finds
    with computed = known.
    """

    def __init__(
        self,
        decoding: Iterable[Sequence],
        pool: BlockPool,
        block_tokens: int,
        new_tokens: NewTokens,
        *,
        caching: bool,
    ) -> None:
        self.steps = 0
        self.count = 0
        """Sequences that take part."""
        self._offsets = 0
        self._pool, self._block_tokens, self._new_tokens = pool, block_tokens, new_tokens
        self._caching = caching
        self._ends: Events = []
        self._grows: Events = []
        self._fulls: Events = []
        for seq in decoding:
            self.join(seq)

    @property
    def context_tokens(self) -> int:
        """Tokens of all that have keys and values before the next step."""
        return self._offsets + self.count * (self.steps - 1)

    def join(self, seq: Sequence) -> None:
        """`seq`, whose fields are true, decodes from the next step on."""
        seq.offset = offset = len(seq.history) - self.steps
        self.count += 1
        self._offsets += offset
        heappush(self._ends, (seq.limit - 1 - offset, seq.rank, seq))
        heappush(self._grows, (seq.room + 1 - offset, seq.rank, seq))
        if self._caching:
            heappush(self._fulls, (seq.publish_at - offset, seq.rank, seq))

    def ahead(self, *, still: bool) -> int:
        """Steps until a sequence ends, that one included, as far as there surely are blocks.

        With `still` the pool may not change either, since somebody who was refused would
        have to be asked again.
        """
        steps = _first(self._ends) - self.steps + 1
        if still:
            steps = min(steps, _first(self._grows) - self.steps)
            return min(steps, _first(self._fulls) - self.steps) if self._fulls else steps
        free, block_tokens = self._pool.free, self._block_tokens
        while steps > 0 and self.count * ((steps - 1) // block_tokens + 1) > free:
            steps //= 2
        return steps

    def grow(self) -> bool:
        """Give the next step its blocks; false, and nothing is changed, where there are too few."""
        grows, step = self._grows, self.steps
        if not grows or grows[0][0] > step:
            return True
        due = []
        while grows and grows[0][0] == step:
            event = heappop(grows)
            if event[2].state is State.DECODING:
                due.append(event)
        enough = len(due) <= self._pool.free
        if enough:
            for (_, _, seq), block in zip(due, self._pool.take(len(due)), strict=True):
                seq.blocks.append(block)
                seq.room += self._block_tokens
        again = step + self._block_tokens if enough else step
        for _, rank, seq in due:
            heappush(grows, (again, rank, seq))
        return enough

    def commit(self) -> list[Sequence]:
        """End the step that `grow` began; returns who has reached its limit, and takes no part any more."""
        if self._fulls:
            self._publish()
        ends, step = self._ends, self.steps
        self.steps += 1
        ended: list[Sequence] = []
        while ends and ends[0][0] == step:
            seq = heappop(ends)[2]
            ended.append(seq)
            self.count -= 1
            self._offsets -= seq.offset
        return ended

    def leap(self, steps: int) -> list[Sequence]:
        """Take so many of the steps `ahead`; returns who ended with the last of them."""
        last = self.steps + steps - 1
        while True:
            due = _first(self._grows)
            if self._fulls:
                due = min(due, _first(self._fulls))
            if due >= last:
                break
            self.steps = due
            self.grow()
            self._publish()
        self.steps = last
        self.grow()
        return self.commit()

    def settle(self, decoding: Iterable[Sequence]) -> None:
        """Make the fields of all sequences true again."""
        for seq in decoding:
            self._tell(seq, self.steps)
            seq.computed = len(seq.history) - 1

    def _tell(self, seq: Sequence, step: int) -> None:
        """Let `seq` know the tokens it knew when this step began."""
        known = len(seq.history)
        missing = seq.offset + step - known
        if missing > 0:
            seq.history.extend(self._new_tokens(seq.request, known, missing))

    def _publish(self) -> None:
        """Let others share the blocks that this step has filled."""
        fulls, step = self._fulls, self.steps
        while fulls and fulls[0][0] == step:
            _, rank, seq = heappop(fulls)
            if seq.state is State.DECODING:
                self._tell(seq, step)
                seq.computed = seq.offset + step
                seq.publish(self._pool, self._block_tokens)
                heappush(fulls, (seq.publish_at - seq.offset, rank, seq))


def _first(events: Events) -> int:
    """The step of the first event that still concerns somebody; there must be one."""
    while events[0][2].state is not State.DECODING:
        heappop(events)
    return events[0][0]
