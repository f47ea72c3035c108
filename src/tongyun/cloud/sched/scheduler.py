"""Choose what runs next.

The simulated and the real engine both drive this class, so it knows no clock, tensor
or chip. A turn is two calls: `next_batch` proposes work and `commit` records what came
back. `add` and `abort` may come at any moment. Who can tell beforehand what tokens will
be takes lighter turns, in which requests that only decode are counted and not listed:
`next_step` and `commit_step`, or where turns would only repeat, `ahead` and `leap`.
Nothing else changes a request.

A step holds one token of every request that is decoding, then prompt chunks as far as
the token budget goes. A request is admitted when its whole known text fits, and grows a
block at a time. When blocks run out, the lowest-ranked request gives all of its blocks
back and is computed again later; the best-ranked one therefore always moves, and every
request ends.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Series
from dataclasses import dataclass, field
from math import ceil

from tongyun.cloud.sched.blocks import BlockPool
from tongyun.cloud.sched.coast import Ahead, Coast, NewTokens, Step
from tongyun.cloud.sched.request import Batch, Finish, Piece, Request
from tongyun.cloud.sched.sequence import Rank, Sequence, State, Stored
from tongyun.cloud.sched.tiers import Tiers
from tongyun.cloud.sched.waiting import Waiting
from tongyun.errors import InputError, RequestError


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """The limits of one engine."""

    blocks: int
    """KV blocks in the cache."""
    block_tokens: int = 16
    max_context_tokens: int
    """Prompt and output of one request together."""
    max_sequences: int = 64
    """Requests that may hold blocks at the same time."""
    max_step_tokens: int = 1024
    """Tokens computed in one step, decodes and prompt chunks together."""
    prefix_caching: bool = True
    watermark: float = 0.01
    """Share of the blocks that admission leaves free for running requests to grow into."""
    tiers: tuple[int, ...] | None = None
    """Blocks in each slower memory behind the cache, for executors that heed `Piece.restored`."""

    def __post_init__(self) -> None:
        for name in ("blocks", "block_tokens", "max_context_tokens", "max_sequences", "max_step_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"scheduler: {name}: must be at least 1, not {getattr(self, name)}")
        if self.tiers is not None and min(self.tiers, default=0) < 0:
            raise InputError(f"scheduler: tiers: must be at least 0, not {min(self.tiers)}")
        if not 0 <= self.watermark < 1:
            raise InputError(f"scheduler: watermark: must be in [0, 1), not {self.watermark}")
        if self.max_step_tokens < self.max_sequences:
            # Otherwise decodes alone could fill every step and prompts would never start.
            raise InputError(
                f"scheduler: max_step_tokens: {self.max_step_tokens} is less than"
                f" max_sequences {self.max_sequences}; accepted: at least that many"
            )


@dataclass(slots=True)
class Counters:
    """What has happened since the start; they only grow."""

    prompt_tokens: int = 0
    """Prompt tokens of admitted requests, cached ones included."""
    prefix_hit_tokens: int = 0
    tier_hit_tokens: list[int] = field(default_factory=list)
    """Those of the hits that lay in each lower tier."""
    computed_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    queued_s: float = 0.0
    """Seconds requests spent between arrival and first admission, summed."""


class Scheduler:
    """Continuous batching over a paged KV cache with prefix sharing."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.tiers = None if config.tiers is None else Tiers(config.tiers)
        self.pool = BlockPool(config.blocks, self.tiers)
        self.counters = Counters(tier_hit_tokens=[0] * len(config.tiers or ()))
        self._reserve = ceil(config.watermark * config.blocks)
        self._sequences: dict[str, Sequence] = {}
        self._serial = 0
        self._waiting = Waiting()
        # Best rank first, so that the one to preempt is always at an end.
        self._decoding: list[Sequence] = []
        self._prefilling: list[Sequence] = []
        self._proposed: tuple[Batch | Step, list[Sequence]] | None = None
        # While it is there, what decoding sequences know falls behind.
        self._coast: Coast | None = None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._decoding) + len(self._prefilling)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def check(self, request: Request) -> None:
        """RequestError if `request` could never run here, however empty the cache."""
        prompt, config = len(request.prompt), self.config
        if prompt < 1:
            raise RequestError("the prompt is empty; at least one token is needed", param="prompt")
        if request.output_tokens < 1:
            raise RequestError(f"max_tokens is {request.output_tokens}; at least 1", param="max_tokens")
        if not 0 <= request.handed_tokens < prompt:
            # The last token is computed here, whatever came along: it yields the next.
            raise RequestError(f"{request.handed_tokens} of {prompt} prompt tokens cannot be handed over")
        total = prompt + request.output_tokens
        # The last token produced is never fed back and needs no place in the cache.
        capacity = min(config.max_context_tokens, config.blocks * config.block_tokens + 1)
        if total > capacity:
            limit = "context" if capacity == config.max_context_tokens else "KV cache"
            raise RequestError(
                f"{prompt} prompt tokens and {request.output_tokens} output tokens are {total};"
                f" the {limit} holds at most {capacity}",
                param="prompt" if prompt >= capacity else "max_tokens",
                code="context_length_exceeded",
            )

    def add(self, request: Request) -> None:
        """Queue a request; RequestError if it could never run or its id is in flight."""
        self.check(request)
        if request.id in self._sequences:
            raise RequestError(f"request '{request.id}' is already in flight", param="id")
        seq = Sequence(request, self._serial)
        self._serial += 1
        self._sequences[request.id] = seq
        self._waiting.push(seq)

    def abort(self, request_id: str) -> bool:
        """End a request now and free its blocks; False if it is not in flight.

        Between the two calls of a turn the step's result for it is dropped at `commit`.
        """
        self.settle()
        seq = self._sequences.pop(request_id, None)
        if seq is None:
            return False
        waited = seq.state is State.WAITING
        if not waited:
            (self._decoding if seq.state is State.DECODING else self._prefilling).remove(seq)
            self.pool.release(seq.blocks)
        seq.state = State.ENDED
        if waited:
            self._waiting.left()
        return True

    def evict(self, request_id: str) -> Series[int]:
        """End a request in flight between two turns, as `abort` does; returns every token known of it."""
        self.settle()
        known = self._sequences[request_id].history
        self.abort(request_id)
        return known

    def clear(self) -> None:
        """Forget what is cached; no request may hold a block."""
        self.settle()
        self.pool.clear()

    def produced(self, request_id: str) -> int:
        """How many tokens a request in flight has produced."""
        self.settle()
        seq = self._sequences[request_id]
        return len(seq.history) - len(seq.request.prompt)

    def next_batch(self, now: float) -> Batch | None:
        """The next step's work, or None when no request is left; `commit` must follow."""
        self._check_turn()
        self.settle()
        self._make_way(now)
        pieces: list[Piece] = []
        preempted = self._propose_decodes(pieces)
        chosen = self._decoding[:]
        # What was just preempted would come straight back and be preempted again.
        self._propose_prompts(now, pieces, chosen, len(pieces), admit=not preempted)
        if not pieces:
            self._check_idle()
            return None
        batch = Batch(pieces)
        self._proposed = batch, chosen
        return batch

    def commit(
        self, batch: Batch, tokens: Mapping[str, int], stopped: Mapping[str, Finish]
    ) -> dict[str, Finish]:
        """Record a step: `tokens` of the pieces that sample, and who ends for a reason of the caller's.

        Returns every request that ended with this step, those at their output limit included.
        """
        ended: dict[str, Finish] = {}
        self._record(batch.pieces, self._take_proposed(batch), tokens, stopped, ended)
        self._leave(ended)
        return ended

    # ── lighter turns ────────────────────────────────────────────────────────────────

    def next_step(self, now: float, new_tokens: NewTokens) -> Step | None:
        """As `next_batch`, with those that decode only counted; `commit_step` must follow at once.

        None also where a request may have to be preempted: `next_batch` knows how.
        """
        self._check_turn()
        if self._waiting:
            worst = self._worst()
            if worst is not None and self._waiting.head().rank[0] < worst.rank[0]:
                return None
        coast = self._coasting(new_tokens)
        if not coast.grow():
            return None
        pieces: list[Piece] = []
        chosen: list[Sequence] = []
        self._propose_prompts(now, pieces, chosen, coast.count, admit=True)
        if not pieces and not coast.count:
            self._check_idle()
            return None
        step = Step(coast.count, coast.context_tokens, pieces)
        self._proposed = step, chosen
        return step

    def commit_step(self, step: Step, tokens: Mapping[str, int]) -> dict[str, Finish]:
        """Record a step of `next_step`: `tokens` of the pieces that sample; returns who ended."""
        chosen, coast = self._take_proposed(step), self._coast
        assert coast is not None
        self.counters.computed_tokens += step.decoding
        self.counters.output_tokens += step.decoding
        ended = {seq.request.id: Finish.LENGTH for seq in coast.commit()}
        if chosen:
            self._record(step.pieces, chosen, tokens, {}, ended)
            for seq in chosen:
                if seq.state is State.DECODING:
                    coast.join(seq)
        self._leave(ended)
        return ended

    def ahead(self, new_tokens: NewTokens) -> Ahead | None:
        """The steps in which the same requests decode and nothing is decided; None if the next is not one."""
        decoding = self._decoding
        if self._proposed is not None or self._prefilling or not decoding:
            return None
        full = self.running >= self.config.max_sequences
        if self._waiting:
            head = self._waiting.head()
            refused = full or head.refused_at == (self.pool.free, self.pool.published)
            if not refused or head.rank[0] < decoding[-1].rank[0]:
                return None
        coast = self._coasting(new_tokens)
        steps = coast.ahead(still=len(self._waiting) > 0 and not full)
        return Ahead(coast.count, coast.context_tokens, steps) if steps > 0 else None

    def leap(self, steps: int) -> dict[str, Finish]:
        """Take so many steps of those `ahead` at once; returns who ended, all at their output limit.

        Once settled, everything is as so many turns would have left it.
        """
        coast = self._coast
        assert coast is not None
        tokens = steps * coast.count
        self.counters.computed_tokens += tokens
        self.counters.output_tokens += tokens
        ended = {seq.request.id: Finish.LENGTH for seq in coast.leap(steps)}
        self._leave(ended)
        return ended

    def settle(self) -> None:
        """Make true what decoding sequences know, where their steps were only counted."""
        if self._coast is not None:
            self._coast.settle(self._decoding)
            self._coast = None

    def _coasting(self, new_tokens: NewTokens) -> Coast:
        if self._coast is None:
            config = self.config
            self._coast = Coast(
                self._decoding, self.pool, config.block_tokens, new_tokens, caching=config.prefix_caching
            )
        return self._coast

    # ── what turns are made of ───────────────────────────────────────────────────────

    def _check_turn(self) -> None:
        if self._proposed is not None:
            raise RuntimeError("next_batch was called twice without commit")

    def _check_idle(self) -> None:
        if self._sequences:
            raise RuntimeError(f"no step possible with {len(self._sequences)} requests in flight")

    def _take_proposed(self, work: Batch | Step) -> list[Sequence]:
        """The sequences of the turn that is committed."""
        if self._proposed is None or self._proposed[0] is not work:
            raise RuntimeError("commit of a batch that was not proposed last")
        chosen, self._proposed = self._proposed[1], None
        return chosen

    def _propose_prompts(
        self, now: float, pieces: list[Piece], chosen: list[Sequence], decoding: int, *, admit: bool
    ) -> None:
        """Chunks of prompts, those under way first, as far as the budget goes beside so many that decode."""
        budget = self.config.max_step_tokens - decoding
        for seq in self._prefilling:
            if budget <= 0:
                break
            budget -= self._propose_chunk(seq, budget, pieces, chosen)
        while budget > 0 and self._waiting and admit:
            admitted = self._admit(now)
            if admitted is None:
                break
            budget -= self._propose_chunk(admitted, budget, pieces, chosen)

    def _record(
        self,
        pieces: Iterable[Piece],
        chosen: list[Sequence],
        tokens: Mapping[str, int],
        stopped: Mapping[str, Finish],
        ended: dict[str, Finish],
    ) -> None:
        """What was computed and sampled; adds to `ended`."""
        caching, block_tokens = self.config.prefix_caching, self.config.block_tokens
        computed_tokens = output_tokens = 0
        for piece, seq in zip(pieces, chosen, strict=True):
            if seq.state is State.ENDED:
                continue
            seq.computed = computed = piece.start + piece.length
            computed_tokens += piece.length
            if caching and computed >= seq.publish_at:
                seq.publish(self.pool, block_tokens)
            if not piece.samples:
                continue
            output_tokens += 1
            request_id = piece.request.id
            seq.history.append(tokens[request_id])
            if stopped and request_id in stopped:
                ended[request_id] = stopped[request_id]
            elif computed + 1 >= seq.limit:
                ended[request_id] = Finish.LENGTH
            elif seq.state is State.PREFILLING:
                seq.state = State.DECODING
                insort(self._decoding, seq, key=_rank)
        self.counters.computed_tokens += computed_tokens
        self.counters.output_tokens += output_tokens

    def _leave(self, ended: Collection[str]) -> None:
        """Forget who ended, and sort out who decodes and who is in prefill now."""
        for request_id in ended:
            self._end(self._sequences.pop(request_id))
        if ended:
            self._decoding = [seq for seq in self._decoding if seq.state is State.DECODING]
        if self._prefilling:
            self._prefilling = [seq for seq in self._prefilling if seq.state is State.PREFILLING]

    def _make_way(self, now: float) -> None:
        """Preempt requests of a lower priority while one of a higher priority cannot start."""
        while self._waiting:
            head, worst = self._waiting.head(), self._worst()
            if worst is None or head.rank[0] >= worst.rank[0]:
                return
            if self._admit(now) is not None:
                continue
            lower = [s for s in self._decoding + self._prefilling if s.rank[0] > head.rank[0]]
            if self._blocks_for(head) > self.pool.free + sum(len(seq.blocks) for seq in lower):
                return
            self._preempt(worst)

    def _propose_decodes(self, pieces: list[Piece]) -> bool:
        """One piece for every decoding request that has or gets room; whether any was preempted."""
        before = self.counters.preemptions
        for seq in self._decoding:
            known = len(seq.history)
            if known > seq.room and not self._grow(seq):
                # It was the lowest-ranked one left, so nobody comes after it.
                break
            pieces.append(Piece(seq.request, known - 1, 1, True, seq.history, seq.blocks, seq.cached_tokens))
        return self.counters.preemptions > before

    def _grow(self, seq: Sequence) -> bool:
        """One more block for `seq`, taken from the lowest-ranked if need be; False if that is itself."""
        while not self.pool.can_take(1):
            worst = self._worst()
            if worst is None or worst is seq:
                self._preempt(seq)
                return False
            self._preempt(worst)
        seq.blocks += self.pool.take(1)
        seq.room += self.config.block_tokens
        return True

    def _propose_chunk(self, seq: Sequence, budget: int, pieces: list[Piece], chosen: list[Sequence]) -> int:
        """As much of what `seq` still has to compute as `budget` tokens allow; returns how many."""
        left = len(seq.history) - seq.computed
        length = min(left, budget)
        pieces.append(
            Piece(
                seq.request,
                seq.computed,
                length,
                length == left,
                seq.history,
                seq.blocks,
                seq.cached_tokens,
                seq.restored,
            )
        )
        seq.restored = ()
        chosen.append(seq)
        return length

    def _admit(self, now: float) -> Sequence | None:
        """Start the best-ranked waiting request if its known text fits; nobody overtakes it."""
        seq, pool = self._waiting.head(), self.pool
        state = pool.free, pool.published
        if self.running >= self.config.max_sequences or (self.running and seq.refused_at == state):
            return None
        block_tokens = self.config.block_tokens
        found = self._found(seq)
        shared = [entry for entry in found if isinstance(entry, int)]
        need = self._blocks_for(seq) - len(shared)
        if not pool.can_take(need + (self._reserve if self.running else 0), sharing=shared):
            seq.refused_at = state
            return None
        self._waiting.pop()
        pool.share(shared)
        seq.blocks = (
            shared + pool.take(need) if len(shared) == len(found) else self._restore(seq, found, need)
        )
        seq.room = len(seq.blocks) * block_tokens
        seq.computed = len(found) * block_tokens
        seq.published = len(found)
        seq.publish_at = seq.computed + block_tokens
        seq.state = State.PREFILLING
        insort(self._prefilling, seq, key=_rank)
        if not seq.admitted:
            self._count_admission(seq, now)
            # What was handed over is gone once the request is preempted.
            seq.computed = max(seq.computed, seq.request.handed_tokens)
        return seq

    def _found(self, seq: Sequence) -> Series[int | Stored]:
        """The blocks from the start of `seq` that need not be computed, in order."""
        if not self.config.prefix_caching:
            return []
        handed = seq.request.handed_tokens and not seq.admitted
        # What was handed over is here already, and nothing of it has to be brought.
        if self.tiers is None or handed:
            return seq.cached_prefix(self.pool, self.config.block_tokens)
        return seq.stored_prefix(self.pool, self.tiers, self.config.block_tokens)

    def _restore(self, seq: Sequence, found: Series[int | Stored], need: int) -> list[int]:
        """The blocks of `seq`, the shared ones held already; those in lower tiers are brought back."""
        tiers, block_tokens = self.tiers, self.config.block_tokens
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
                self.pool.publish(blocks[index], *seq.named(index, block_tokens))
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

    def _preempt(self, seq: Sequence) -> None:
        """Take all blocks from the last of its list; what it knows is computed again later."""
        (self._decoding if seq.state is State.DECODING else self._prefilling).pop()
        self.pool.release(seq.blocks)
        # A new list: pieces and tests may still look at the old one.
        seq.blocks, seq.computed, seq.restored = [], 0, ()
        self.counters.preemptions += 1
        self._waiting.push(seq)

    def _worst(self) -> Sequence | None:
        """The lowest-ranked running request."""
        tails = [group[-1] for group in (self._decoding, self._prefilling) if group]
        return max(tails, key=_rank, default=None)

    def _end(self, seq: Sequence) -> None:
        seq.state = State.ENDED
        self.pool.release(seq.blocks)

    def _blocks_for(self, seq: Sequence) -> int:
        return -(-len(seq.history) // self.config.block_tokens)


def _rank(seq: Sequence) -> Rank:
    return seq.rank
