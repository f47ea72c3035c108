"""Foresee the steps in which nothing is decided: the same requests decode, and nobody comes or goes.

Steps like these need no turn each. `foresee` says how many of them are ahead, `take` has
them done, and leaves pool and sequences exactly as so many turns would have: the same
blocks in the same hands, published in the same order. The scheduler's own lists come in
as arguments; nothing here holds any.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Series

from tongyun.cloud.sched.blocks import BlockPool
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.sequence import Sequence

NewTokens = Callable[[Request, int, int], Series[int]]
"""Tokens that a request produces next: of which request, how many tokens are known, how many to give."""


def foresee(
    decoding: Series[Sequence], pool: BlockPool, block_tokens: int, *, still: bool, caching: bool
) -> int:
    """Steps until a request reaches its limit, that one included, as far as blank blocks last.

    With `still` the pool may not change either, since somebody who was refused would have
    to be asked again.
    """
    steps = min(seq.limit - len(seq.history) for seq in decoding)
    if still:
        for seq in decoding:
            known = len(seq.history)
            steps = min(steps, seq.room - known + 1)
            if caching:
                steps = min(steps, seq.publish_at - known)
        return max(steps, 0)
    # Idle blocks would be forgotten when taken, which may come before or after a publication.
    while steps > 0 and _grown(decoding, steps, block_tokens) > pool.blank:
        steps //= 2
    return max(steps, 0)


def _grown(decoding: Series[Sequence], steps: int, block_tokens: int) -> int:
    """Blocks that so many steps take."""
    total = 0
    for seq in decoding:
        beyond = len(seq.history) + steps - 1 - seq.room
        if beyond > 0:
            total += -(-beyond // block_tokens)
    return total


def take(
    decoding: Series[Sequence],
    steps: int,
    new_tokens: NewTokens,
    pool: BlockPool,
    block_tokens: int,
    *,
    caching: bool,
) -> None:
    """Let every sequence decode `steps` tokens."""
    growing: list[tuple[int, int]] = []
    full: list[tuple[int, int, int]] = []
    for index, seq in enumerate(decoding):
        known = len(seq.history)
        # Step k computes token known + k; its block must be there, and is full when computed.
        growing += [(k, index) for k in range(seq.room - known + 1, steps, block_tokens)]
        if caching:
            full += [(k, index, known + k) for k in range(seq.publish_at - known, steps, block_tokens)]
        seq.history.extend(new_tokens(seq.request, known, steps))
        seq.computed = known + steps - 1
    growing.sort()
    for (_, index), block in zip(growing, pool.take(len(growing)), strict=True):
        seq = decoding[index]
        seq.blocks.append(block)
        seq.room += block_tokens
    full.sort()
    for _, index, computed in full:
        seq, after = decoding[index], decoding[index].computed
        seq.computed = computed
        seq.publish(pool, block_tokens)
        seq.computed = after
