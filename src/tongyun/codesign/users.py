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

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tongyun.codesign.closed_loop import play
from tongyun.codesign.engines import Engine, Prompts
from tongyun.codesign.space import Question
from tongyun.codesign.steady import USABLE_MEMORY, activation_bytes, distinct_stages
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
class Room:
    """What an engine lets weights, a step, and keys and values take of a chip."""

    usable_bytes: float
    kv: float = 1.0
    """Share, of what weights and a step leave of that, for keys and values."""
    holds_step: bool = True
    """Whether a step's tensors come out of it, or are kept beside it."""


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

    def __init__(
        self, question: Question, shard: Shard, users: Users, step_tokens: int, room: Room | None = None
    ) -> None:
        """Infeasible where the cache holds no request; without `room` an engine takes `USABLE_MEMORY`."""
        room = room or Room(usable_bytes=USABLE_MEMORY * question.at().memory_bytes)
        self.question = replace(question, isl=users.mean(question.isl), osl=max(2, users.mean(question.osl)))
        self._shard = shard
        self.users = replace(users, count=math.ceil(users.count / (shard.dp * shard.pp)))
        seats = self.users.count if users.seats is None else min(users.seats, self.users.count)
        self.most = min(seats, _capacity(self.question, shard, seats, step_tokens, room))
        if self.most < 1:
            raise Infeasible(f"{question.model.name} on {shard}: no room for one request")
        self.budget = max(step_tokens, self.most)
        self.lengths = tuple(
            np.array(self.users.lengths(longest, at))
            for at, longest in enumerate((question.isl, question.osl))
        )
        counts = np.unique(np.round(np.geomspace(1, max(self.most, 2), POINTS)))
        self._tokens = np.unique(np.round(np.geomspace(min(16, self.budget), self.budget, POINTS)))
        every = np.arange(max(self.most, 2) + 1)
        decode = np.interp(every, counts, self._priced(counts, None))
        alone = self._priced(None, self._tokens)
        beside = self._priced(counts[:, None], self._tokens[None, :])
        rows = np.vstack([alone[None, :], beside])
        at = np.concatenate([[0.0], counts])
        mixed = np.stack([np.interp(every, at, column) for column in rows.T], axis=1)
        self.prices = decode, self._tokens, np.ascontiguousarray(mixed)

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
    prompt_s = engine.prompt_layer_s * table.question.model.layers
    ttft_s, tpot_s = play(
        table.prices,
        table.lengths,
        (table.users.count, table.most, table.budget),
        (list(Prompts).index(engine.prompts), engine.plans_ahead),
        (engine.step_s, engine.sequence_s, prompt_s, engine.request_s, engine.token_s),
    )
    return Felt(ttft_s=ttft_s, tpot_s=tpot_s)


def _capacity(question: Question, shard: Shard, seats: int, step_tokens: int, room: Room) -> int:
    """Sequences at full length that an attention group keeps, beside weights and a step's tensors."""
    length = question.isl + question.osl
    left = []
    for part, (stage, _) in distinct_stages(question.model, shard).items():
        taken = weight_bytes(question.model, shard, question.precision, stage=stage)
        if room.holds_step:
            taken += float(activation_bytes(question, part, np.array(step_tokens), np.array(seats)))
        kv = shard.pp * float(kv_bytes(question.model, length, question.precision, part))
        left.append(room.kv * (room.usable_bytes - taken) / kv)
    return math.floor(min(left))
