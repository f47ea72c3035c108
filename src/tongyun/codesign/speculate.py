"""Speculative decoding: drafted tokens that the model verifies in one step.

A draft module proposes k tokens one after the other, and the model runs k + 1 positions of every
sequence in one step. Each drafted token is right with probability a if those before it were:

    tokens of a step = 1 + a + … + a^k = (1 − a^(k+1)) / (1 − a)

The module is the model's own multi-token prediction layer where its config has one (DeepSeek-V3):
a projection of two hidden states to one, a layer, and the model's head. For other models the same
is assumed. It runs on the last pipeline stage, over a chunk of prompt tokens as well, and holds a
layer of weights and of KV there. Acceptance is an input; it is not predicted.
"""

from __future__ import annotations

from dataclasses import replace

from tongyun.codesign.space import Question
from tongyun.cost import ranks_cost
from tongyun.model.graph import Operator, StepShape
from tongyun.model.shard import Shard, Slice
from tongyun.model.steps import draft_bytes as module_bytes
from tongyun.model.steps import drafting
from tongyun.specs import Chip
from tongyun.units import Cost, Source


def drafts(question: Question, shape: StepShape, shard: Shard) -> tuple[Operator, ...]:
    """What drafting adds to a step of this shape on the last stage; nothing without drafting."""
    return drafting(question.model, shape, shard, question.precision, question.draft_tokens)


class Drafts:
    """What drafting costs at one load, priced once for cuts that differ in depth alone."""

    def __init__(self, question: Question, shape: StepShape, chip: Chip) -> None:
        self._question, self._shape, self._chip = question, shape, chip
        self._known: dict[Shard, Cost] = {}
        self.are_made = question.draft_tokens > 0

    def at(self, shard: Shard) -> Cost:
        """Seconds on a rank of the last stage, and joules of all its ranks."""
        flat = replace(shard, pp=1)
        if flat not in self._known:
            cost = ranks_cost(drafts(self._question, self._shape, flat), self._chip, flat.stage_ranks)
            own = self._question.model.mtp_layers > 0
            sources = cost.sources if own else cost.sources | {Source.ASSUMED}
            self._known[flat] = replace(cost, sources=sources)
        return self._known[flat]


def draft_bytes(question: Question, part: Slice) -> tuple[float, float]:
    """Weights, and KV for a token of a sequence, that the draft module holds on a rank of `part`."""
    if not question.draft_tokens:
        return 0.0, 0.0
    return module_bytes(question.model, part, question.precision)
