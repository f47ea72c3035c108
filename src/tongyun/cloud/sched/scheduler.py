"""Choose what runs next.

The simulated and the real engine both drive this class, so it knows no clock, tensor
or chip. A turn is two calls: `next_batch` proposes work and `commit` records what came
back. `add` and `abort` may come at any moment. Who can tell beforehand what tokens will
be takes lighter turns, in which requests that only decode are counted and not listed:
`next_step` and `commit_step`, or where turns would only repeat, `ahead` and `leap`.
Nothing else changes a request.

A step holds one token of every request that is decoding, with the drafts it verifies, then
prompt chunks as far as the token budget goes. A request is admitted when its whole known
text fits, and grows a block at a time. When blocks run out, the lowest-ranked request gives all of its blocks
back and is computed again later; the best-ranked one therefore always moves, and every
request ends.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Mapping
from collections.abc import Sequence as Series

from tongyun.cloud.sched.blocks import BlockPool
from tongyun.cloud.sched.coast import Ahead, Coast, Foretells, Step
from tongyun.cloud.sched.freeness import Room
from tongyun.cloud.sched.limits import Counters, SchedulerConfig
from tongyun.cloud.sched.migrate import Movable, Traveller
from tongyun.cloud.sched.pieces import Pieces, check_drafts
from tongyun.cloud.sched.request import Batch, Finish, Piece, Request
from tongyun.cloud.sched.residents import Residents, by_rank
from tongyun.cloud.sched.sequence import Sequence, State
from tongyun.cloud.sched.tiers import Tiers
from tongyun.errors import RequestError

__all__ = ["Counters", "Scheduler", "SchedulerConfig"]


class Scheduler:
    """Continuous batching over a paged KV cache with prefix sharing."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.tiers = None if config.tiers is None else Tiers(config.tiers)
        self.pool = BlockPool(config.blocks, self.tiers)
        self.counters = Counters(tier_hit_tokens=[0] * len(config.tiers or ()))
        self._sequences: dict[str, Sequence] = {}
        self._serial = 0
        self._residents = residents = Residents(config, self.pool, self.counters)
        self._pieces = Pieces(residents)
        self._waiting = residents.waiting
        # The residents' own lists, which change in place.
        self._decoding, self._prefilling = residents.decoding, residents.prefilling
        self._proposed: tuple[Batch | Step, list[Sequence]] | None = None
        # While it is there, what decoding sequences know falls behind.
        self._coast: Coast | None = None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def decoding(self) -> int:
        return len(self._decoding)

    @property
    def running(self) -> int:
        return len(self._decoding) + len(self._prefilling)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def check(self, request: Request) -> None:
        """RequestError if `request` could never run here, however empty the cache."""
        self.config.check(request)

    def add(self, request: Request) -> None:
        """Queue a request; RequestError if it could never run or its id is in flight."""
        self.check(request)
        if request.id in self._sequences:
            raise RequestError(f"request '{request.id}' is already in flight", param="id")
        self._waiting.push(self._new(request))

    def _new(self, request: Request) -> Sequence:
        keys = None if request.keys is None else request.keys.setdefault(self.config.block_tokens, [])
        seq = Sequence(request, self._serial, self.config.aging_s, keys=keys)
        self._serial += 1
        self._sequences[request.id] = seq
        return seq

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
            self._waiting.left(seq)
        return True

    def watch_preempted(self, names: list[str] | None) -> None:
        """Have the ids of requests that are preempted from now on written to a list."""
        self._residents.preempted = names

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

    # ── between engines ──────────────────────────────────────────────────────────────

    def room(self) -> Room:
        """Blocks and places there are, and those that are asked for."""
        return self._residents.room()

    def reserve(self, request_id: str, blocks: int) -> bool:
        """Keep so many blocks in all, and a place, for a request that will `arrive`; false where there
        are too few. They go, the last one's first, to those who are here and cannot go on without."""
        return self._residents.reserve(request_id, blocks)

    def give_up(self, request_id: str) -> None:
        """Keep nothing for that request any more."""
        self._residents.give_up(request_id)

    def reserved(self, request_id: str) -> Series[int]:
        """The blocks that are kept for it, in order; none once they went to others."""
        return self._residents.reserved.get(request_id, ())

    def held(self, request_id: str) -> Series[int]:
        """The blocks of a request in flight, in order; a live list."""
        return self._sequences[request_id].blocks

    def movable(self, request_id: str) -> Movable | None:
        """A request that decodes or waits, as it is now; None where it is not here or in prefill."""
        seq = self._sequences.get(request_id)
        if seq is None or seq.state is State.PREFILLING:
            return None
        self.settle()
        request, decodes = seq.request, seq.state is State.DECODING
        # Who was admitted once has what was handed over in its blocks, or has lost it.
        handed = 0 if seq.admitted else request.handed_tokens
        return Movable(request.id, request.priority, decodes, len(seq.history), handed)

    def movables(self) -> list[Movable]:
        """Requests that decode, the best-ranked first."""
        found = (self.movable(seq.request.id) for seq in self._decoding)
        return [one for one in found if one is not None]

    def head(self) -> Movable | None:
        """The request that is admitted next; None where none waits or it cannot leave."""
        return self.movable(self._waiting.head().request.id) if self._waiting else None

    def last(self) -> Movable | None:
        """The request that is admitted after all others that wait; None where none does."""
        return self.movable(self._waiting.last().request.id) if self._waiting else None

    def depart(self, request_id: str) -> Traveller:
        """Let a `movable` request go, between two turns: it is here no more and its blocks are free."""
        self._check_turn()
        self.settle()
        seq = self._sequences[request_id]
        traveller = Traveller(seq.request, seq.history, seq.computed, seq.admitted, seq.cached_tokens)
        self.abort(request_id)
        return traveller

    def arrive(self, traveller: Traveller) -> bool:
        """Go on, between two turns, with a request that departed elsewhere.

        With its keys and values in the blocks reserved for it, it decodes from the next step on; else
        it waits, and what it knows is computed again. Returns whether it decodes.
        """
        self._check_turn()
        self.settle()
        seq = self._new(traveller.request)
        seq.history, seq.admitted = traveller.history, traveller.admitted
        seq.cached_tokens = traveller.cached_tokens
        block_tokens, name = self.config.block_tokens, traveller.request.id
        enough = traveller.computed <= block_tokens * len(self._residents.reserved.get(name, ()))
        if not (traveller.computed and enough):
            self.give_up(name)
            self._waiting.push(seq)
            return False
        seq.blocks = self._residents.reserved.pop(name)
        seq.room = block_tokens * len(seq.blocks)
        seq.computed, seq.publish_at = traveller.computed, block_tokens
        if self.config.prefix_caching:
            seq.publish(self.pool, block_tokens)
        seq.state = State.DECODING
        insort(self._decoding, seq, key=by_rank)
        return True

    def steps_within(self, blocks: int) -> int:
        """Decoding steps that take no more than so many blocks; one, where even that may take more."""
        tokens = blocks // max(self.running, 1) * self.config.block_tokens
        return max(tokens // self.config.positions, 1)

    def surrender(self) -> None:
        """Take all blocks from every running request; what they know is computed again later."""
        self._check_turn()
        self.settle()
        while (worst := self._residents.worst()) is not None:
            self._residents.preempt(worst)

    def produced(self, request_id: str) -> int:
        """How many tokens a request in flight has produced."""
        self.settle()
        seq = self._sequences[request_id]
        return len(seq.history) - len(seq.request.prompt)

    def next_batch(self, now: float) -> Batch | None:
        """The next step's work, or None when no request is left; `commit` must follow."""
        self._check_turn()
        self.settle()
        self._residents.make_way(now)
        pieces: list[Piece] = []
        preempted = self._pieces.propose_decodes(pieces)
        chosen = self._decoding[:]
        # What was just preempted would come straight back and be preempted again.
        taken = len(pieces) * self.config.positions
        self._pieces.propose_prompts(now, pieces, chosen, taken, admit=not preempted)
        if not pieces:
            self._check_idle()
            return None
        batch = Batch(pieces)
        self._proposed = batch, chosen
        return batch

    def commit(
        self,
        batch: Batch,
        tokens: Mapping[str, int],
        stopped: Mapping[str, Finish],
        further: Mapping[str, Series[int]] | None = None,
    ) -> dict[str, Finish]:
        """Record a step: `tokens` of the pieces that sample, and who ends for a reason of the caller's.

        `further` are the tokens after those, of pieces whose drafts were right; what lies past an
        output limit is left out. Returns every request that ended with this step, those at their
        output limit included.
        """
        ended: dict[str, Finish] = {}
        chosen = self._take_proposed(batch)
        if further:
            check_drafts(batch, further)
        self._pieces.record(batch.pieces, chosen, tokens, stopped, ended, further or {})
        self._leave(ended)
        return ended

    # ── lighter turns ────────────────────────────────────────────────────────────────

    def next_step(self, now: float, foretells: Foretells) -> Step | None:
        """As `next_batch`, with those that decode only counted; `commit_step` must follow at once.

        None also where a request may have to be preempted: `next_batch` knows how.
        """
        self._check_turn()
        if self._waiting:
            worst = self._residents.worst()
            if worst is not None and self._waiting.head().rank[0] < worst.rank[0]:
                return None
        coast = self._coasting(foretells)
        if not coast.grow():
            return None
        pieces: list[Piece] = []
        chosen: list[Sequence] = []
        taken = coast.count * self.config.positions
        self._pieces.propose_prompts(now, pieces, chosen, taken, admit=True)
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
        self._count(coast, 1)
        ended = {seq.request.id: Finish.LENGTH for seq in coast.commit()}
        if chosen:
            self._pieces.record(step.pieces, chosen, tokens, {}, ended, {})
            for seq in chosen:
                if seq.state is State.DECODING:
                    coast.join(seq)
        self._leave(ended)
        return ended

    def ahead(self, foretells: Foretells) -> Ahead | None:
        """The steps in which the same requests decode and nothing is decided; None if the next is not one."""
        decoding = self._decoding
        if self._proposed is not None or self._prefilling or not decoding:
            return None
        full = self._residents.full
        if self._waiting:
            head = self._waiting.head()
            refused = full or head.refused_at == (self.pool.free, self.pool.published)
            if not refused or head.rank[0] < decoding[-1].rank[0]:
                return None
        coast = self._coasting(foretells)
        steps = coast.ahead(still=len(self._waiting) > 0 and not full)
        return Ahead(coast.count, coast.contexts(steps)) if steps > 0 else None

    def leap(self, steps: int) -> dict[str, Finish]:
        """Take so many steps of those `ahead` at once; returns who ended, all at their output limit.

        Once settled, everything is as so many turns would have left it.
        """
        coast = self._coast
        assert coast is not None
        self._count(coast, steps)
        ended = {seq.request.id: Finish.LENGTH for seq in coast.leap(steps)}
        self._leave(ended)
        return ended

    def settle(self) -> None:
        """Make true what decoding sequences know, where their steps were only counted."""
        if self._coast is not None:
            self._coast.settle(self._decoding)
            self._coast = None

    def _coasting(self, foretells: Foretells) -> Coast:
        if self._coast is None:
            self._coast = Coast(self._decoding, self.pool, self.config, foretells)
        return self._coast

    def _count(self, coast: Coast, steps: int) -> None:
        """Count what those that decode will be given in so many steps."""
        counters, drafts = self.counters, self.config.draft_tokens
        taken = gained = steps * coast.count
        if drafts:
            gained = coast.gained(steps)
            counters.verifications += taken
            counters.accepted_tokens += gained - taken
        counters.computed_tokens += taken * (1 + drafts)
        counters.output_tokens += gained

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

    def _leave(self, ended: Collection[str]) -> None:
        """Forget who ended, and sort out who decodes and who is in prefill now."""
        for request_id in ended:
            self._end(self._sequences.pop(request_id))
        if ended:
            self._decoding[:] = [seq for seq in self._decoding if seq.state is State.DECODING]
        if self._prefilling:
            self._prefilling[:] = [seq for seq in self._prefilling if seq.state is State.PREFILLING]

    def _end(self, seq: Sequence) -> None:
        seq.state = State.ENDED
        self.pool.release(seq.blocks)
