"""What a fixed number of users feel, each asking again when answered, step by step.

How prompts share steps with decoding is the engine's (`engines.py`), and decides latencies
more than any kernel does. Where prompts go first, users who began together start decoding
together and end together: each round is a burst, and the mean first token waits for half
of it. Where they are mixed in, a prompt that was prefilled later also ends later, so that
rounds spread out. An answer and the next question pass a front end that does one thing at a
time; a question therefore misses the step that follows the answer, and where steps are
planned ahead the next one too. Steps between two events are alike and taken at once.
It plans nothing and knows no arrivals but the users' own.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tongyun.codesign.engines import Engine, Prompts
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


@dataclass(frozen=True, kw_only=True)
class Users:
    """A closed loop: who asks, how often, and how much questions differ."""

    count: int
    rounds: float
    """Questions over users."""
    shortest: float = 1.0
    """Lengths are uniform between this share of the question's and the question's own."""
    seats: int | None = None
    """Sequences an attention group of the engine serves at once; None for what its memory holds."""

    def lengths(self, longest: int, stream: int) -> list[int]:
        """One for each request, the same in every run."""
        number = round(self.count * self.rounds)
        if self.shortest >= 1:
            return [longest] * number
        drawn = np.random.default_rng(stream).integers(int(longest * self.shortest), longest + 1, number)
        return [int(length) for length in drawn]

    def mean(self, longest: int) -> int:
        return max(1, round(longest * (1 + min(self.shortest, 1.0)) / 2))


@dataclass(frozen=True, kw_only=True)
class Felt:
    """Latencies of every request as its user sees them: `ttft_s` in the order of first tokens,
    `tpot_s` in the order of last ones."""

    ttft_s: Array
    tpot_s: Array


class Table:
    """Seconds of the kernels of any step of one attention group, read off prices taken in three passes.

    A plan is priced once and can then be played under many engines' habits.
    """

    def __init__(self, question: Question, shard: Shard, users: Users, step_tokens: int) -> None:
        """Infeasible where the cache holds no request."""
        self.question = replace(question, isl=users.mean(question.isl), osl=max(2, users.mean(question.osl)))
        self._shard = shard
        self.users = replace(users, count=math.ceil(users.count / (shard.dp * shard.pp)))
        seats = self.users.count if users.seats is None else min(users.seats, self.users.count)
        self.most = min(seats, _capacity(self.question, shard, step_tokens))
        if self.most < 1:
            raise Infeasible(f"{question.model.name} on {shard}: no room for one request")
        self.budget = max(step_tokens, self.most)
        self.isl, self.osl = self.users.lengths(question.isl, 0), self.users.lengths(question.osl, 1)
        counts = np.unique(np.round(np.geomspace(1, max(self.most, 2), POINTS)))
        self._tokens = np.unique(np.round(np.geomspace(min(16, self.budget), self.budget, POINTS)))
        every = np.arange(max(self.most, 2) + 1)
        self._plain = np.interp(every, counts, self._priced(counts, None)).tolist()
        alone = self._priced(None, self._tokens)
        beside = self._priced(counts[:, None], self._tokens[None, :])
        rows = np.vstack([alone[None, :], beside])
        at = np.concatenate([[0.0], counts])
        self._mixed = np.stack([np.interp(every, at, column) for column in rows.T], axis=1)

    def decode_s(self, sequences: int) -> float:
        return float(self._plain[sequences])

    def mixed_s(self, sequences: int, tokens: float) -> float:
        return float(np.interp(tokens, self._tokens, self._mixed[sequences]))

    def _priced(self, count: Array | None, tokens: Array | None) -> Array:
        """Sequences decode half-way through their output; a cut prompt has its mean chunk behind it."""
        q = self.question
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
        # What the host takes is the engine's, and added as the steps are played.
        prices = StepPrices(q.model, shape, replace(q.at(), step_host_s=0.0), q.precision)
        stages = [first for first, _ in distinct_stages(q.model, self._shard).values()]
        slowest = np.max(np.stack([np.asarray(prices.at(self._shard, s).seconds) for s in stages]), axis=0)
        return np.asarray(self._shard.pp * slowest)


def play_users(table: Table, engine: Engine) -> Felt:
    """Every request of the table's users, answered once."""
    return _Play(table, engine).felt()


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


@dataclass(slots=True)
class _Prompt:
    """A question that waits, or is being prefilled."""

    request: int
    sent_s: float
    left: int
    """Tokens still to come."""


class _Play:
    """One group of users, played once."""

    def __init__(self, table: Table, engine: Engine) -> None:
        self.table, self.engine = table, engine
        self.prompt_s = engine.prompt_layer_s * table.question.model.layers
        self.now = self.front = self.planned = 0.0
        """The engine's clock, until when the front end is busy, and when the step to come was made up."""
        self.decoded = self.asked = 0
        self.coming: deque[tuple[float, _Prompt]] = deque()
        """When each question gets to the engine."""
        self.waiting: deque[_Prompt] = deque()
        self.running: list[tuple[int, float, int]] = []
        """Decode step at which each ends, when its first token was seen, and which it is."""
        self.ttft_s: list[float] = []
        self.tpot_s: list[float] = []
        for _ in range(table.users.count):
            self._ask(0.0)

    def felt(self) -> Felt:
        while self.coming or self.waiting or self.running:
            self._receive()
            if self.waiting and len(self.running) < self.table.most:
                self._prefill()
            elif self.running:
                self._coast()
            else:
                self.now = self.planned = max(self.now, self.coming[0][0])
            self._end()
        return Felt(ttft_s=np.asarray(self.ttft_s), tpot_s=np.asarray(self.tpot_s))

    def _ask(self, sent_s: float) -> None:
        if self.asked < len(self.table.isl):
            prompt = _Prompt(self.asked, sent_s, self.table.isl[self.asked])
            self.front = max(self.front, sent_s) + self.engine.request_s
            self.coming.append((self.front, prompt))
            self.asked += 1

    def _receive(self) -> None:
        """Questions that had come when the step was made up."""
        seen_s = self.planned if self.engine.plans_ahead else self.now
        while self.coming and self.coming[0][0] <= seen_s:
            self.waiting.append(self.coming.popleft()[1])

    def _coast(self) -> None:
        """Decode until the next sequence ends, or a question can be taken up."""
        count = len(self.running)
        steps = max(self.running[0][0] - self.decoded, 1)
        step_s = self.table.decode_s(count) + self._host_s(count)
        if self.coming and count < self.table.most:
            until = math.ceil((self.coming[0][0] - self.now) / step_s) + self.engine.plans_ahead
            steps = min(steps, max(until, 1))
        sent_s = count * self.engine.token_s
        # The front end may lag behind before these steps, from the first of them on, or not at all.
        waits = (self.front + steps * sent_s, self.now + step_s + steps * sent_s)
        self.now += steps * step_s
        self.front = max(*waits, self.now + sent_s)
        self.planned = self.now - step_s
        self.decoded += steps

    def _prefill(self) -> None:
        """One step with prompts, first come first served."""
        decoding = 0 if self.engine.prompts is Prompts.FIRST else len(self.running)
        begun, tokens = self._taken(max(self.table.budget - decoding, 1))
        count = decoding + len(begun)
        self.planned = self.now
        self.now += max(self.table.mixed_s(decoding, tokens), self.prompt_s) + self._host_s(count)
        self.decoded += self.engine.prompts is not Prompts.FIRST
        self.front = max(self.front, self.now) + count * self.engine.token_s
        for prompt in begun:
            self.ttft_s.append(self.front - prompt.sent_s)
            last = self.decoded + self.table.osl[prompt.request] - 1
            heapq.heappush(self.running, (last, self.front, prompt.request))

    def _taken(self, room: int) -> tuple[list[_Prompt], int]:
        """Prompts that a step completes, and the tokens it prefills."""
        begun: list[_Prompt] = []
        tokens = 0
        while self.waiting and tokens < room and len(self.running) + len(begun) < self.table.most:
            prompt = self.waiting[0]
            if prompt.left > room - tokens and tokens and self.engine.prompts is Prompts.WHOLE:
                break
            taken = min(prompt.left, room - tokens)
            tokens += taken
            prompt.left -= taken
            if prompt.left:
                break
            begun.append(self.waiting.popleft())
        return begun, tokens

    def _end(self) -> None:
        """Sequences that have their last token leave; their users ask again."""
        while self.running and self.running[0][0] <= self.decoded:
            _, first_s, request = heapq.heappop(self.running)
            self.tpot_s.append((self.front - first_s) / max(self.table.osl[request] - 1, 1))
            self._ask(self.front)

    def _host_s(self, sequences: int) -> float:
        return self.engine.step_s + self.engine.sequence_s * sequences
