"""Who holds KV blocks and who waits for them: admission, growth and preemption.

Rank decides: the best-ranked waiting request is admitted first and nobody overtakes it; when
blocks run out, the lowest-ranked running one gives all of its back and waits again. Knows no
step and no token budget.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as Series
from math import ceil

from tongyun.cloud.sched.blocks import BlockPool
from tongyun.cloud.sched.freeness import Room
from tongyun.cloud.sched.limits import Counters, SchedulerConfig
from tongyun.cloud.sched.sequence import Rank, Sequence, State, Stored
from tongyun.cloud.sched.waiting import Waiting


class Residents:
    """Running requests with their blocks, and those that wait for some."""

    def __init__(self, config: SchedulerConfig, pool: BlockPool, counters: Counters) -> None:
        self.config, self.pool, self.counters = config, pool, counters
        self.waiting = Waiting(config.block_tokens)
        # Best rank first, so that the one to preempt is always at an end.
        self.decoding: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self.reserved: dict[str, list[int]] = {}
        """Blocks, and with them a place, for requests that are on their way from another engine."""
        self.preempted: list[str] | None = None
        """Who was preempted, where somebody put a list here, and empties it."""
        self._reserve = ceil(config.watermark * config.blocks)

    @property
    def running(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    @property
    def full(self) -> bool:
        """Whether nobody more may run, whatever there is of blocks."""
        running = len(self.decoding) + len(self.prefilling)
        return running + len(self.reserved) >= self.config.max_sequences

    def reserve(self, request_id: str, blocks: int) -> bool:
        """Keep so many blocks in all for a request that will arrive; false, and nothing is changed, where
        they or a place are lacking besides what those who wait will need."""
        held = self.reserved.get(request_id)
        more = blocks - len(held or ())
        if (held is None and self.full) or not self.pool.can_take(more + self._reserve + self.waiting.blocks):
            return False
        self.reserved.setdefault(request_id, []).extend(self.pool.take(more) if more > 0 else ())
        return True

    def give_up(self, request_id: str) -> None:
        """Keep nothing for that request any more."""
        self.pool.release(self.reserved.pop(request_id, []))

    def room(self) -> Room:
        """What there is and what is asked for, in blocks."""
        waiting = self.waiting
        return Room(
            blocks=self.pool.total,
            block_tokens=self.config.block_tokens,
            free_blocks=self.pool.free - self._reserve,
            running=self.running + len(self.reserved),
            waiting=len(waiting),
            head_blocks=self._blocks_for(waiting.head()) if waiting else 0,
            waiting_blocks=waiting.blocks,
            places=self.config.max_sequences - self.running - len(self.reserved),
        )

    def make_way(self, now: float) -> None:
        """Preempt requests of a lower priority while one of a higher priority cannot start."""
        while self.waiting:
            head, worst = self.waiting.head(), self.worst()
            if worst is None or head.rank[0] >= worst.rank[0]:
                return
            if self.admit(now) is not None:
                continue
            lower = [s for s in self.decoding + self.prefilling if s.rank[0] > head.rank[0]]
            if self._blocks_for(head) > self.pool.free + sum(len(seq.blocks) for seq in lower):
                return
            self.preempt(worst)

    def grow(self, seq: Sequence) -> bool:
        """One more block for `seq`, taken from the lowest-ranked if need be; False if that is itself."""
        while not self.pool.can_take(1):
            if self.reserved:
                # Who is here goes before who may come.
                self.give_up(next(reversed(self.reserved)))
                continue
            worst = self.worst()
            if worst is None or worst is seq:
                self.preempt(seq)
                return False
            self.preempt(worst)
        seq.blocks += self.pool.take(1)
        seq.room += self.config.block_tokens
        return True

    def admit(self, now: float) -> Sequence | None:
        """Start the best-ranked waiting request if its known text fits; nobody overtakes it."""
        seq, pool = self.waiting.head(), self.pool
        state = pool.free, pool.published
        if self.full or (self.running and seq.refused_at == state):
            return self._alone(now)
        block_tokens = self.config.block_tokens
        found = self._found(seq)
        shared = [entry for entry in found if isinstance(entry, int)]
        need = self._blocks_for(seq) - len(shared)
        if not pool.can_take(need + (self._reserve if self.running else 0), sharing=shared):
            seq.refused_at = state
            return self._alone(now)
        self.waiting.pop()
        pool.share(shared)
        seq.blocks = (
            shared + pool.take(need) if len(shared) == len(found) else self._restore(seq, found, need)
        )
        seq.room = len(seq.blocks) * block_tokens
        seq.computed = len(found) * block_tokens
        seq.published = len(found)
        seq.publish_at = seq.computed + block_tokens
        seq.state = State.PREFILLING
        insort(self.prefilling, seq, key=by_rank)
        if not seq.admitted:
            self._count_admission(seq, now)
            # What was handed over is gone once the request is preempted.
            seq.computed = max(seq.computed, seq.request.handed_tokens)
        return seq

    def _alone(self, now: float) -> Sequence | None:
        """Who was refused while nobody runs goes before those who may come; else nobody is admitted."""
        if self.running or not self.reserved:
            return None
        for request_id in list(self.reserved):
            self.give_up(request_id)
        return self.admit(now)

    def _found(self, seq: Sequence) -> Series[int | Stored]:
        """The blocks from the start of `seq` that need not be computed, in order."""
        if not self.config.prefix_caching:
            return []
        handed = seq.request.handed_tokens and not seq.admitted
        # What was handed over is here already, and nothing of it has to be brought.
        if self.pool.tiers is None or handed:
            return seq.cached_prefix(self.pool, self.config.block_tokens)
        return seq.stored_prefix(self.pool, self.pool.tiers, self.config.block_tokens)

    def _restore(self, seq: Sequence, found: Series[int | Stored], need: int) -> list[int]:
        """The blocks of `seq`, the shared ones held already; those in lower tiers are brought back."""
        tiers, block_tokens = self.pool.tiers, self.config.block_tokens
        assert tiers is not None
        counts = [0] * len(tiers.sizes)
        # Before blocks are taken: what they evict could push out the very blocks that are wanted.
        for entry in found:
            if not isinstance(entry, int):
                tiers.restore(*entry)
                counts[entry[1]] += 1
        fresh = iter(self.pool.take(need))
        blocks = [entry if isinstance(entry, int) else next(fresh) for entry in found]
        for index, entry in enumerate(found):
            if not isinstance(entry, int):
                key, parent, contents = seq.named(index, block_tokens)
                self.pool.publish((blocks[index],), (key,), (parent,), (contents,))
        seq.restored = tuple(counts)
        return blocks + list(fresh)

    def _count_admission(self, seq: Sequence, now: float) -> None:
        seq.admitted = True
        seq.cached_tokens = seq.computed
        self.counters.prompt_tokens += len(seq.history)
        self.counters.prefix_hit_tokens += seq.computed
        for tier, count in enumerate(seq.restored):
            self.counters.tier_hit_tokens[tier] += count * self.config.block_tokens
        self.counters.queued_s += now - seq.request.arrival_s

    def preempt(self, seq: Sequence) -> None:
        """Take all blocks from the last of its list; what it knows is computed again later."""
        (self.decoding if seq.state is State.DECODING else self.prefilling).pop()
        self.pool.release(seq.blocks)
        # A new list: pieces and tests may still look at the old one.
        seq.blocks, seq.computed, seq.restored = [], 0, ()
        self.counters.preemptions += 1
        if self.preempted is not None:
            self.preempted.append(seq.request.id)
        self.waiting.push(seq)

    def worst(self) -> Sequence | None:
        """The lowest-ranked running request."""
        tails = [group[-1] for group in (self.decoding, self.prefilling) if group]
        return max(tails, key=by_rank, default=None)

    def _blocks_for(self, seq: Sequence) -> int:
        return -(-len(seq.history) // self.config.block_tokens)


def by_rank(seq: Sequence) -> Rank:
    """The key that orders running requests."""
    return seq.rank
