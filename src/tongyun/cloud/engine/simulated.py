"""Execute batches without a model: price the step, invent the tokens.

The price comes from outside, as a function; this file knows no chip. Tokens follow from
the request's prompt and their place alone, so a preempted request produces the same ones
again, and any stretch of them can be told at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tongyun.cloud.engine.acceptance import chances, followed, right
from tongyun.cloud.engine.protocol import StepResult
from tongyun.cloud.engine.restore import Restore
from tongyun.cloud.sched.request import Batch, Piece, Request
from tongyun.units import Cost


@dataclass(frozen=True, kw_only=True)
class StepLoad:
    """One batch as numbers: per piece its new tokens and those cached before it."""

    new_tokens: NDArray[np.int64]
    context: NDArray[np.int64]
    """Tokens of the piece's request that already had keys and values when the step began."""
    samples: int
    """Pieces that yield a token: rows of the output head, without those of drafts."""
    verifying: int = 0
    """The first so many pieces verify drafts, as many each as the price knows."""

    @classmethod
    def of(cls, batch: Batch) -> StepLoad:
        table = np.array([piece[1:4] for piece in batch.pieces], dtype=np.int64)
        pieces = batch.pieces
        # Those that decode come first.
        verifying = sum(piece.drafts > 0 for piece in pieces) if pieces and pieces[0].drafts else 0
        return cls(
            context=table[:, 0],
            new_tokens=table[:, 1],
            samples=int(table[:, 2].sum()),
            verifying=verifying,
        )


StepCost = Callable[[StepLoad], Cost]


class DecodeCosts(Protocol):
    """A price of steps that can also tell those of decoding steps, many at a time."""

    def __call__(self, load: StepLoad, /) -> Cost: ...

    def decode(self, sequences: int, context_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """Seconds and joules, [2, steps], of steps in which so many decode behind these tokens in all.

        Each as `__call__` says.
        """

    def mixed(
        self, decoding: int, context_tokens: int, chunks: Sequence[tuple[int, int]], samples: int
    ) -> tuple[float, float]:
        """Seconds and joules of a step: chunks of prompts (new tokens, cached before) beside decoding.

        `samples` as in `StepLoad`. As `__call__` says, which must not ask for more of those that decode
        than their sum.
        """


class SimulatedExecutor:
    """Asks `step_cost` how long a step takes; time itself is the clock's business."""

    def __init__(
        self, step_cost: StepCost, *, vocabulary: int = 32_000, words: Sequence[int] | None = None
    ) -> None:
        """Tokens are those below `vocabulary`, or `words` alone, where somebody reads them."""
        self._step_cost = step_cost
        self._vocabulary = vocabulary if words is None else len(words)
        self._words = words
        self.restore: Restore | None = None
        """What it takes to bring blocks back from lower tiers, where there are any."""
        self.joules = 0.0
        """Of all steps so far."""
        self.acceptance = 0.0
        """Probability that a draft is right when those before it were, where drafts are verified."""

    def reprice(self, step_cost: DecodeCosts) -> None:
        """Price steps from the next one on like this."""
        self._step_cost = step_cost

    def execute(self, batch: Batch) -> StepResult:
        cost = self._step_cost(StepLoad.of(batch))
        seconds, joules = self._whole(float(cost.seconds), float(cost.joules), batch.pieces)
        self.joules += joules
        tokens = {
            piece.request.id: self._token(piece.request, len(piece.history))
            for piece in batch.pieces
            if piece.samples
        }
        return StepResult(
            tokens=tokens, duration_s=seconds, joules=joules, further=self._further(batch.pieces)
        )

    def accepted(self, piece: Piece) -> int:
        """How many of the piece's drafts are right: the same for a request and place, whenever asked.

        At most as many as the output limit leaves.
        """
        request, known = piece.request, len(piece.history)
        most = len(request.prompt) + request.output_tokens - known - 1
        return min(right(request.id, known, chances(self.acceptance, piece.drafts)), most)

    def path(self, request: Request, known: int, drafts: int) -> NDArray[np.int64]:
        """Tokens known before each step of a request from `known` on, and its limit; as `accepted` says."""
        limit = len(request.prompt) + request.output_tokens
        return followed(request.id, known, limit, chances(self.acceptance, drafts))

    def _further(self, pieces: Sequence[Piece]) -> Mapping[str, Sequence[int]]:
        found: dict[str, Sequence[int]] = {}
        for piece in pieces:
            # Those that decode come first.
            if not piece.drafts:
                break
            if right := self.accepted(piece):
                found[piece.request.id] = self.new_tokens(piece.request, len(piece.history) + 1, right)
        return found

    def _whole(self, seconds: float, joules: float, pieces: Sequence[Piece]) -> tuple[float, float]:
        """A step with the blocks that come back before it; without any, as it is."""
        return (seconds, joules) if self.restore is None else self.restore.whole(seconds, joules, pieces)

    def new_tokens(self, request: Request, known: int, count: int) -> list[int]:
        """Tokens that count up from what the prompt's end and the place say."""
        if self._words is not None:
            return [self._token(request, known + i) for i in range(count)]
        first, vocabulary = self._token(request, known), self._vocabulary
        if first + count <= vocabulary:
            return list(range(first, first + count))
        return [(first + i) % vocabulary for i in range(count)]

    def _token(self, request: Request, known: int) -> int:
        number = (31 * request.prompt[-1] + known) % self._vocabulary
        return number if self._words is None else self._words[number]


class LeapingExecutor(SimulatedExecutor):
    """A simulated executor whose price can foresee decoding steps (see `Foresight`)."""

    def __init__(
        self, step_cost: DecodeCosts, *, vocabulary: int = 32_000, words: Sequence[int] | None = None
    ) -> None:
        super().__init__(step_cost, vocabulary=vocabulary, words=words)
        self._decode, self._mixed = step_cost.decode, step_cost.mixed
        self._coming_joules = np.zeros(0)

    def reprice(self, step_cost: DecodeCosts) -> None:
        super().reprice(step_cost)
        self._decode, self._mixed = step_cost.decode, step_cost.mixed

    def coming_s(self, sequences: int, context_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """Seconds of each of the next steps, in which so many decode behind these tokens in all, [steps]."""
        costs = self._decode(sequences, context_tokens)
        self._coming_joules = costs[1]
        return np.asarray(costs[0])

    def beside(self, decoding: int, context_tokens: int, pieces: Sequence[Piece]) -> StepResult:
        """A step of these pieces of prompts beside so many requests that decode."""
        tokens = {
            piece.request.id: self._token(piece.request, len(piece.history))
            for piece in pieces
            if piece.samples
        }
        chunks = [(piece.length, piece.start) for piece in pieces]
        priced = self._mixed(decoding, context_tokens, chunks, decoding + len(tokens))
        seconds, joules = self._whole(*priced, pieces)
        self.joules += joules
        return StepResult(tokens=tokens, duration_s=seconds, joules=joules)

    def went(self, steps: int) -> None:
        # Summed one after the other, as `execute` does.
        joules = self._coming_joules[:steps]
        joules[0] += self.joules
        self.joules = float(np.add.accumulate(joules)[-1])
