"""What a fixed number of users feel, each asking again when answered, step by step.

How prompts share steps with decoding is the engine's policy, and decides latencies more
than any kernel does:

    mixed      a step decodes every sequence and prefills what its budget leaves, in chunks
    whole      the same, but a prompt is never cut
    prefill    prompts go first, without decoding, until none waits

Under `prefill` users who began together start decoding together and end together: each
round is a burst, and the mean first token waits for half of it. Under `mixed` a prompt
that was prefilled later also ends later, so that rounds spread out after the first.
Requests are alike; steps between two events are alike and taken at once. It plans
nothing and knows no arrivals but the users' own.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from tongyun.codesign.space import Question
from tongyun.codesign.steady import USABLE_MEMORY, distinct_stages
from tongyun.cost import StepPrices
from tongyun.errors import Infeasible
from tongyun.model.graph import Sequences, StepShape
from tongyun.model.shard import Shard
from tongyun.model.steps import kv_bytes, weight_bytes

Array = NDArray[np.float64]
POINTS = 20
"""Sizes priced along each axis; between them a step's time is linear."""


class Policy(Enum):
    """How an engine lets prompts share its steps."""

    MIXED = "mixed"
    WHOLE = "whole"
    PREFILL = "prefill"


POLICIES = {"any": Policy.MIXED, "vllm": Policy.MIXED, "sglang": Policy.PREFILL, "trtllm": Policy.WHOLE}
"""What each engine does unless told otherwise: vLLM mixes chunks, SGLang runs prompts first
(`--enable-mixed-chunk` is off), TensorRT-LLM mixes but cuts no prompt (`enable_chunked_prefill` is off)."""


@dataclass(frozen=True, kw_only=True)
class Felt:
    """Latencies of every request, in the order in which they were answered."""

    ttft_s: Array
    tpot_s: Array


def play_users(question: Question, shard: Shard, users: int, step_tokens: int, rounds: int) -> Felt:
    """`users` of one replica, `rounds` requests each, on steps of at most `step_tokens` a group.

    Infeasible where the cache holds no request.
    """
    groups = shard.dp * shard.pp
    each = math.ceil(users / groups)
    most = min(each, _capacity(question, shard, step_tokens))
    if most < 1:
        raise Infeasible(f"{question.model.name} on {shard}: no room for one request")
    steps = _Steps(question, shard, most, step_tokens)
    return _Users(question, steps, POLICIES[question.engine], each, most, rounds).play()


def _capacity(question: Question, shard: Shard, step_tokens: int) -> int:
    """Sequences at full length that an attention group keeps, beside weights and a step's residuals."""
    room = USABLE_MEMORY * question.at().memory_bytes
    length = question.isl + question.osl
    act = question.precision.activations.bytes
    left = []
    for part, (stage, _) in distinct_stages(question.model, shard).items():
        weights = weight_bytes(question.model, shard, question.precision, stage=stage)
        residuals = 3 * step_tokens * question.model.hidden * act
        kv = shard.pp * float(kv_bytes(question.model, length, question.precision, part))
        left.append((room - weights - residuals) / kv)
    return math.floor(min(left))


class _Steps:
    """Seconds of any step of one group, read off a table priced in two passes."""

    def __init__(self, question: Question, shard: Shard, most: int, budget: int) -> None:
        self._question, self._shard = question, shard
        self.budget = max(budget, most)
        counts = np.unique(np.round(np.geomspace(1, max(most, 2), POINTS)))
        self._tokens = np.unique(np.round(np.geomspace(16, self.budget, POINTS)))
        every = np.arange(max(most, 2) + 1)
        plain = self._priced(counts, None)
        self._plain = np.interp(every, counts, plain).tolist()
        alone = self._priced(None, self._tokens)
        beside = self._priced(counts[:, None], self._tokens[None, :])
        at = np.concatenate([[0.0], counts])
        rows = np.vstack([alone[None, :], beside])
        self._mixed = np.stack([np.interp(every, at, column) for column in rows.T], axis=1)

    def decode_s(self, sequences: int) -> float:
        return float(self._plain[sequences])

    def mixed_s(self, sequences: int, tokens: float) -> float:
        return float(np.interp(tokens, self._tokens, self._mixed[sequences]))

    def _priced(self, count: Array | None, tokens: Array | None) -> Array:
        """Sequences decode half-way through their output; a cut prompt has its mean chunk behind it."""
        q = self._question
        decode = prefill = None
        sampled: Array | float = 0.0
        if count is not None:
            decode = Sequences(new=1, context=q.isl + q.osl / 2, count=count)
            sampled = sampled + count
        if tokens is not None:
            new = np.minimum(tokens, q.isl)
            prompts = np.maximum(tokens / q.isl, 1.0)
            prefill = Sequences(new=new, context=(q.isl - new) / 2, count=prompts)
            sampled = sampled + tokens / q.isl
        shape = StepShape(decode=decode, prefill=prefill, sampled=sampled)
        prices = StepPrices(q.model, shape, q.at(), q.precision)
        stages = [first for first, _ in distinct_stages(q.model, self._shard).values()]
        slowest = np.max(np.stack([np.asarray(prices.at(self._shard, s).seconds) for s in stages]), axis=0)
        return np.asarray(self._shard.pp * slowest)


class _Users:
    """One group of users, played once."""

    def __init__(
        self, question: Question, steps: _Steps, policy: Policy, users: int, most: int, rounds: int
    ) -> None:
        self.isl, self.further = question.isl, question.osl - 1
        self.steps, self.policy, self.most = steps, policy, most
        self.to_come = users * (rounds - 1)
        self.now, self.decoded = 0.0, 0
        self.waiting: deque[tuple[float, float]] = deque((0.0, float(self.isl)) for _ in range(users))
        """When each asked, and the prompt tokens still to come."""
        self.running: list[tuple[int, float]] = []
        """Decode step at which each ends, and when its first token came."""
        self.ttft_s: list[float] = []
        self.tpot_s: list[float] = []

    def play(self) -> Felt:
        while self.waiting or self.running:
            if self.waiting and len(self.running) < self.most:
                self._prefill()
            else:
                self._coast()
            self._end()
        return Felt(ttft_s=np.asarray(self.ttft_s), tpot_s=np.asarray(self.tpot_s))

    def _coast(self) -> None:
        """Decode until the next sequence ends."""
        ahead = max(self.running[0][0] - self.decoded, 1)
        self.now += ahead * self.steps.decode_s(len(self.running))
        self.decoded += ahead

    def _prefill(self) -> None:
        """One step with prompts, first come first served."""
        alone = self.policy is Policy.PREFILL
        decoding = 0 if alone else len(self.running)
        room = max(self.steps.budget - decoding, 1.0)
        tokens = 0.0
        begun: list[float] = []
        while self.waiting and tokens < room and len(self.running) + len(begun) < self.most:
            asked, left = self.waiting[0]
            if left > room - tokens and tokens and self.policy is Policy.WHOLE:
                break
            taken = min(left, room - tokens)
            tokens += taken
            if taken < left:
                self.waiting[0] = (asked, left - taken)
                break
            begun.append(self.waiting.popleft()[0])
        self.now += self.steps.mixed_s(decoding, tokens)
        self.decoded += not alone
        for asked in begun:
            self.ttft_s.append(self.now - asked)
            heapq.heappush(self.running, (self.decoded + self.further, self.now))

    def _end(self) -> None:
        """Sequences that have their last token leave; their users ask again."""
        while self.running and self.running[0][0] <= self.decoded:
            _, first = heapq.heappop(self.running)
            self.tpot_s.append((self.now - first) / self.further)
            if self.to_come:
                self.to_come -= 1
                self.waiting.append((self.now, float(self.isl)))
