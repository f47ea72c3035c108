"""Requests that wait for blocks, the best-ranked first. Knows no pool and no policy but rank."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from tongyun.cloud.sched.sequence import Rank, Sequence, State


class Waiting:
    """A heap in which those that were aborted stay until they surface or outnumber the living."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._heap: list[tuple[Rank, Sequence]] = []
        self._count = 0
        self.blocks = 0
        """That all who wait will need, if none is shared."""

    def __len__(self) -> int:
        return self._count

    def push(self, seq: Sequence) -> None:
        """Let `seq`, which holds nothing, wait from now on."""
        seq.state = State.WAITING
        heappush(self._heap, (seq.rank, seq))
        self._count += 1
        self.blocks += self._need(seq)

    def head(self) -> Sequence:
        """The best-ranked; there must be one."""
        while self._heap[0][1].state is State.ENDED:
            heappop(self._heap)
        return self._heap[0][1]

    def last(self) -> Sequence:
        """The lowest-ranked; there must be one. Looks at all."""
        return max(entry for entry in self._heap if entry[1].state is State.WAITING)[1]

    def pop(self) -> None:
        """The head waits no more."""
        self.blocks -= self._need(heappop(self._heap)[1])
        self._count -= 1

    def left(self, seq: Sequence) -> None:
        """One that waited has ended."""
        self._count -= 1
        self.blocks -= self._need(seq)
        if len(self._heap) > 2 * self._count + 16:
            self._heap = [entry for entry in self._heap if entry[1].state is State.WAITING]
            heapify(self._heap)

    def _need(self, seq: Sequence) -> int:
        return -(-len(seq.history) // self._block_tokens)
