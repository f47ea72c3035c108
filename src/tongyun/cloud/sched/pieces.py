"""Put together the pieces of a step, and record what came of them.

Pieces of those that decode come first, each with the drafts it verifies, then chunks of prompts as far
as the token budget goes. Who gets blocks is said elsewhere, and so is who leaves.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Series

from tongyun.cloud.sched.request import Batch, Finish, Piece
from tongyun.cloud.sched.residents import Residents, by_rank
from tongyun.cloud.sched.sequence import Sequence, State


class Pieces:
    """Of the steps of running requests."""

    def __init__(self, residents: Residents) -> None:
        self._residents = residents
        self._config, self._pool, self._counters = residents.config, residents.pool, residents.counters
        # The residents' own lists, which change in place.
        self._waiting = residents.waiting
        self._decoding, self._prefilling = residents.decoding, residents.prefilling

    def propose_decodes(self, pieces: list[Piece]) -> bool:
        """One piece for every decoding request that has or gets room; whether any was preempted."""
        before, drafts = self._counters.preemptions, self._config.draft_tokens
        for seq in self._decoding:
            known = len(seq.history)
            # The last token produced is never fed back, as a draft no more than otherwise.
            wanted = min(known + drafts, seq.limit - 1) if drafts else known
            while wanted > seq.room and self._residents.grow(seq):
                pass
            if wanted > seq.room:
                # It was the lowest-ranked one left, so nobody comes after it.
                break
            pieces.append(
                Piece(seq.request, known - 1, 1, True, seq.history, seq.blocks, seq.cached_tokens, (), drafts)
            )
        return self._counters.preemptions > before

    def propose_prompts(
        self, now: float, pieces: list[Piece], chosen: list[Sequence], decoding: int, *, admit: bool
    ) -> None:
        """Chunks of prompts, those under way first, as far as the budget goes beside the tokens of those
        that decode."""
        budget = self._config.max_step_tokens - decoding
        for seq in self._prefilling:
            if budget <= 0:
                break
            budget -= self._propose_chunk(seq, budget, pieces, chosen)
        while budget > 0 and self._waiting and admit:
            admitted = self._residents.admit(now)
            if admitted is None:
                break
            budget -= self._propose_chunk(admitted, budget, pieces, chosen)

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

    def record(
        self,
        pieces: Iterable[Piece],
        chosen: list[Sequence],
        tokens: Mapping[str, int],
        stopped: Mapping[str, Finish],
        ended: dict[str, Finish],
        further: Mapping[str, Series[int]],
    ) -> None:
        """What was computed and sampled; adds to `ended`."""
        caching, block_tokens = self._config.prefix_caching, self._config.block_tokens
        computed_tokens = output_tokens = 0
        for piece, seq in zip(pieces, chosen, strict=True):
            if seq.state is State.ENDED:
                continue
            seq.computed = computed = piece.start + piece.length
            computed_tokens += piece.length
            if caching and computed >= seq.publish_at:
                seq.publish(self._pool, block_tokens)
            if not piece.samples:
                continue
            output_tokens += 1
            request_id = piece.request.id
            seq.history.append(tokens[request_id])
            if piece.drafts:
                computed_tokens += piece.drafts
                accepted = self._accept(seq, further.get(request_id, ()))
                output_tokens += accepted
                computed += accepted
            if stopped and request_id in stopped:
                ended[request_id] = stopped[request_id]
            elif computed + 1 >= seq.limit:
                ended[request_id] = Finish.LENGTH
            elif seq.state is State.PREFILLING:
                seq.state = State.DECODING
                insort(self._decoding, seq, key=by_rank)
        self._counters.computed_tokens += computed_tokens
        self._counters.output_tokens += output_tokens

    def _accept(self, seq: Sequence, more: Series[int]) -> int:
        """Take in the drafts that were right, up to the output limit; returns how many."""
        more = more[: seq.limit - len(seq.history)]
        seq.history.extend(more)
        seq.computed += len(more)
        if self._config.prefix_caching and seq.computed >= seq.publish_at:
            seq.publish(self._pool, self._config.block_tokens)
        self._counters.verifications += 1
        self._counters.accepted_tokens += len(more)
        return len(more)


def check_drafts(batch: Batch, further: Mapping[str, Series[int]]) -> None:
    """ValueError where a step yields more than it verified, for which there may be no blocks."""
    for piece in batch.pieces:
        more = len(further.get(piece.request.id, ()))
        if more > piece.drafts:
            raise ValueError(f"{more} drafts accepted for '{piece.request.id}', {piece.drafts} verified")
