"""Count the steps of decoding sequences instead of taking them.

How many tokens a decoding sequence will know before a step is known (see `progress`), and so is what it
will need and when: the step that takes its next block, the one that fills a block others may share,
the one that ends it. `Coast` keeps these in order and does just them. Pool, blocks and rooms
are exact at any moment; histories fall behind and are made true by `settle`. Who decodes
is the scheduler's to say, by `join` and by ending them.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Series
from heapq import heappop, heappush
from itertools import islice
from typing import NamedTuple, Protocol

from tongyun.cloud.sched.blocks import BlockPool
from tongyun.cloud.sched.limits import SchedulerConfig
from tongyun.cloud.sched.progress import Drafted, Even, Progress, Tokens
from tongyun.cloud.sched.request import Piece, Request
from tongyun.cloud.sched.sequence import Rank, Sequence, State

Events = list[tuple[int, Rank, Sequence]]
"""A heap of steps in which something is due, the best rank of a step first, as in a batch."""


class Foretells(Protocol):
    """Who knows beforehand what requests will produce."""

    def new_tokens(self, request: Request, known: int, count: int, /) -> Series[int]:
        """The next `count` tokens of a request of which `known` are known."""

    def path(self, request: Request, known: int, drafts: int, /) -> Tokens:
        """See `progress.Paths`; asked where drafts are verified."""


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
    context_tokens: Tokens
    """Tokens of all of them that have keys and values before each of the steps, [steps]."""


class Coast:
    """Decoding sequences `steps` steps after it began.

    In step s a sequence computes the last of the tokens it knows, and verifies drafts behind it, of which
    the right ones are computed as well: all it knows before step s + 1, but for the last. Blocks
    are there when known + drafts ≤ room, or all that it will ever compute is.
    """

    def __init__(
        self,
        decoding: Iterable[Sequence],
        pool: BlockPool,
        config: SchedulerConfig,
        foretells: Foretells,
    ) -> None:
        self.steps = 0
        self.count = 0
        """Sequences that take part."""
        self._pool, self._block_tokens, self._new_tokens = pool, config.block_tokens, foretells.new_tokens
        self._caching = config.prefix_caching
        self._drafts, self._positions = config.draft_tokens, config.positions
        self._progress: Progress = (
            Drafted(foretells.path, config.draft_tokens) if config.draft_tokens else Even()
        )
        self._ends: Events = []
        self._grows: Events = []
        self._fulls: Events = []
        for seq in decoding:
            self.join(seq)

    @property
    def context_tokens(self) -> int:
        """Tokens of all that have keys and values before the next step."""
        return self._progress.context_tokens(self.steps, self.count)

    def contexts(self, steps: int) -> Tokens:
        """The same before each of the steps `ahead`, [steps]."""
        return self._progress.contexts(self.steps, steps, self.count)

    def gained(self, steps: int) -> int:
        """Tokens that the next steps yield, of those `ahead` or of one."""
        return self._progress.gained(self.steps, steps, self.count)

    def join(self, seq: Sequence) -> None:
        """`seq`, whose fields are true, decodes from the next step on."""
        self._progress.join(seq, self.steps)
        self.count += 1
        heappush(self._ends, (self._progress.reaches(seq, seq.limit) - 1, seq.rank, seq))
        heappush(self._grows, (self._outgrows(seq), seq.rank, seq))
        if self._caching:
            heappush(self._fulls, (self._fills(seq), seq.rank, seq))

    def ahead(self, *, still: bool) -> int:
        """Steps until a sequence ends, that one included, as far as there surely are blocks.

        With `still` the pool may not change either, since somebody who was refused would
        have to be asked again.
        """
        steps = _first(self._ends) - self.steps + 1
        if still:
            steps = min(steps, _first(self._grows) - self.steps)
            return min(steps, _first(self._fulls) - self.steps) if self._fulls else steps
        free, block_tokens, positions = self._pool.free, self._block_tokens, self._positions
        while steps > 0 and self.count * ((steps * positions - 1) // block_tokens + 1) > free:
            steps //= 2
        return steps

    def grow(self) -> bool:
        """Give the next step its blocks; false, and nothing is changed, where there are too few."""
        grows, step = self._grows, self.steps
        if not grows or grows[0][0] > step:
            return True
        due: Events = []
        while grows and grows[0][0] == step:
            event = heappop(grows)
            if event[2].state is State.DECODING:
                due.append(event)
        if self._drafts:
            return self._grow_unevenly(due)
        # Each lacks one, and the next when that is full.
        enough = len(due) <= self._pool.free
        if enough:
            for (_, _, seq), block in zip(due, self._pool.take(len(due)), strict=True):
                seq.blocks.append(block)
                seq.room += self._block_tokens
        again = step + self._block_tokens if enough else step
        for _, rank, seq in due:
            heappush(grows, (again, rank, seq))
        return enough

    def _grow_unevenly(self, due: Events) -> bool:
        """Give those who are due as many blocks as each lacks."""
        lacking = [self._lacking(seq) for _, _, seq in due]
        enough = sum(lacking) <= self._pool.free
        if enough:
            taken = iter(self._pool.take(sum(lacking)))
            for (_, _, seq), blocks in zip(due, lacking, strict=True):
                seq.blocks.extend(islice(taken, blocks))
                seq.room += blocks * self._block_tokens
        for _, rank, seq in due:
            heappush(self._grows, (self._outgrows(seq) if enough else self.steps, rank, seq))
        return enough

    def _outgrows(self, seq: Sequence) -> int:
        """The step, from the next on, that takes its next block; past its last where it has all it needs."""
        past = seq.room + 1
        step = self._progress.reaches(seq, past - self._drafts if past < seq.limit else seq.limit)
        # Who was preempted has less room than when it was at that place of its path before.
        return max(step, self.steps)

    def _lacking(self, seq: Sequence) -> int:
        """Blocks that the next step takes for it."""
        wanted = min(self._progress.known(seq, self.steps) + self._drafts, seq.limit - 1)
        return -((seq.room - wanted) // self._block_tokens)

    def _fills(self, seq: Sequence) -> int:
        """The step that fills its next block that others may share; past its last where none does."""
        return self._progress.reaches(seq, seq.publish_at + 1) - 1

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
            self._progress.leave(seq)
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
            self._tell(seq, self._progress.known(seq, self.steps))
            seq.computed = len(seq.history) - 1

    def _tell(self, seq: Sequence, tokens: int) -> None:
        """Let `seq` know so many tokens."""
        known = len(seq.history)
        missing = tokens - known
        if missing > 0:
            seq.history.extend(self._new_tokens(seq.request, known, missing))

    def _publish(self) -> None:
        """Let others share the blocks that this step has filled."""
        fulls, step = self._fulls, self.steps
        while fulls and fulls[0][0] == step:
            _, rank, seq = heappop(fulls)
            if seq.state is State.DECODING:
                seq.computed = computed = self._progress.known(seq, step + 1) - 1
                self._tell(seq, computed)
                seq.publish(self._pool, self._block_tokens)
                heappush(fulls, (self._fills(seq), rank, seq))


def _first(events: Events) -> int:
    """The step of the first event that still concerns somebody; there must be one."""
    while events[0][2].state is not State.DECODING:
        heappop(events)
    return events[0][0]
