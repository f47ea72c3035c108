"""Whether a cut of a model fits a chip's memory, what takes it, and which cut would.

A rank holds its weights, the widest moment of a step, and the keys and values of one request
at least, in whole blocks. Knows no fleet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, floor

import numpy as np

from tongyun.codesign.plan import Plan
from tongyun.codesign.space import Question, cuts
from tongyun.codesign.speculate import draft_bytes
from tongyun.codesign.steady import USABLE_MEMORY, activation_bytes
from tongyun.errors import Infeasible
from tongyun.model.shard import slice_of
from tongyun.model.steps import kv_bytes, weight_bytes
from tongyun.specs import Chip
from tongyun.units import GB

MOST_CHIPS = 128
"""Ranks up to which a cut that fits is looked for."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Bytes of one rank: what there is, and what is needed."""

    memory_bytes: int
    usable_bytes: int
    weight_bytes: int
    activation_bytes: int
    block_bytes: float
    """Of a block of KV."""
    request_blocks: int
    """Of one request of the question's lengths."""

    @property
    def kv_bytes(self) -> int:
        """Of that request."""
        return ceil(self.request_blocks * self.block_bytes)

    @property
    def room_bytes(self) -> int:
        """Left for KV; below zero where weights and activations alone are too much."""
        return self.usable_bytes - self.weight_bytes - self.activation_bytes

    @property
    def lacking_bytes(self) -> int:
        """How much more it would take; zero where it fits."""
        return max(self.kv_bytes - self.room_bytes, 0)

    @property
    def blocks(self) -> int:
        """Of KV, in what is left."""
        return int(self.room_bytes // self.block_bytes)


def fit(question: Question, chip: Chip, plan: Plan, block_tokens: int) -> Fit:
    """What a rank of `plan`, whose batch and budget are an attention group's, has to hold.

    Where tokens are drafted, the draft module and its KV among it.
    """
    model, precision, part = question.model, question.precision, slice_of(question.model, plan.shard)
    tokens, sequences = np.array(plan.step_tokens), np.array((1 + question.draft_tokens) * plan.batch)
    drafting, drafted = draft_bytes(question, part)
    return Fit(
        memory_bytes=floor(chip.memory_bytes),
        usable_bytes=floor(USABLE_MEMORY * chip.memory_bytes),
        weight_bytes=ceil(weight_bytes(model, plan.shard, precision) + drafting),
        activation_bytes=ceil(float(activation_bytes(question, part, tokens, sequences))),
        block_bytes=block_tokens * (float(kv_bytes(model, 1, precision, part)) + drafted),
        request_blocks=-(-(question.isl + question.osl) // block_tokens),
    )


def check_fit(question: Question, chip: Chip, plan: Plan, block_tokens: int) -> Fit:
    """The fit of a plan; Infeasible, with every byte told, where there is none."""
    found = fit(question, chip, plan, block_tokens)
    if not found.lacking_bytes:
        return found
    tokens = question.isl + question.osl
    raise Infeasible(
        f"{question.model.name} does not fit as {plan.shard}: a rank of {chip.name} lacks "
        f"{_told(found.lacking_bytes)}. Needed: {_told(found.weight_bytes)} of weights, "
        f"{_told(found.activation_bytes)} of activations (batch {plan.batch}, {plan.step_tokens} tokens a "
        f"step), {_told(found.kv_bytes)} of keys and values of one request ({tokens} tokens in blocks of "
        f"{block_tokens}). There: {_told(found.usable_bytes)}, {USABLE_MEMORY:.0%} of the memory. "
        + _remedy(question, chip, plan, block_tokens)
    )


def smallest_cut(question: Question, chip: Chip, plan: Plan, block_tokens: int) -> Plan | None:
    """The plan on the fewest chips a replica that fits, batch and budget kept, without pipeline stages."""
    legal = [shard for shard in cuts(question.model, chip, MOST_CHIPS).legal if shard.pp == 1]
    # Of equal size, the one with the fewest attention groups, then with the fewest expert ranks.
    for shard in sorted(legal, key=lambda one: (one.ranks, one.dp, one.ep)):
        tried = replace(plan, shard=shard)
        if not fit(question, chip, tried, block_tokens).lacking_bytes:
            return tried
    return None


def _remedy(question: Question, chip: Chip, plan: Plan, block_tokens: int) -> str:
    small = replace(plan, step_tokens=1, batch=1)
    offers = []
    if not fit(question, chip, small, block_tokens).lacking_bytes:
        offers.append(f"as cut with fewer than {plan.step_tokens} tokens a step or batch {plan.batch}")
    other = smallest_cut(question, chip, plan, block_tokens)
    if other is not None and other.shard != plan.shard:
        ranks = other.shard.ranks
        offers.append(f"{other.shard}, {ranks} chip{'s' * (ranks > 1)} a replica")
    if not offers:
        return f"No cut of up to {MOST_CHIPS} chips without pipeline stages would fit"
    return f"Would fit: {'; or '.join(offers)}"


def _told(size: int) -> str:
    return f"{size:,} bytes ({size / GB:.3g} GB)"
