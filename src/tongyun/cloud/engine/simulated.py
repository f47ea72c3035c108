"""Execute batches without a model: price the step, invent the tokens.

The price comes from outside, as a function; this file knows no chip. Tokens follow from
the request's own history alone, so a preempted request produces the same ones again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tongyun.cloud.engine.protocol import StepResult
from tongyun.cloud.sched.request import Batch
from tongyun.units import Cost


@dataclass(frozen=True, kw_only=True)
class StepLoad:
    """One batch as numbers: per piece its new tokens and those cached before it."""

    new_tokens: NDArray[np.int64]
    context: NDArray[np.int64]
    """Tokens of the piece's request that already had keys and values when the step began."""
    samples: int
    """Pieces that yield a token: rows of the output head."""

    @classmethod
    def of(cls, batch: Batch) -> StepLoad:
        table = np.array([piece[1:4] for piece in batch.pieces], dtype=np.int64)
        return cls(context=table[:, 0], new_tokens=table[:, 1], samples=int(table[:, 2].sum()))


StepCost = Callable[[StepLoad], Cost]


class SimulatedExecutor:
    """Asks `step_cost` how long a step takes; time itself is the clock's business."""

    def __init__(self, step_cost: StepCost, *, vocabulary: int = 32_000) -> None:
        self._step_cost = step_cost
        self._vocabulary = vocabulary

    def execute(self, batch: Batch) -> StepResult:
        cost = self._step_cost(StepLoad.of(batch))
        vocabulary = self._vocabulary
        tokens = {
            piece.request.id: (31 * piece.history[-1] + len(piece.history)) % vocabulary
            for piece in batch.pieces
            if piece.samples
        }
        return StepResult(tokens=tokens, duration_s=float(cost.seconds), joules=float(cost.joules))
