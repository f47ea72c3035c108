"""Prefill and decode on pools of their own: every cut of both, and every way to divide the chips.

Chips are divided in a row: so many for prefill, the rest for decode. Prefill loads whose replicas
fit alike differ in the prompts they carry within TTFT, and the one that carries most is best for
every decode pool. Of decode loads that fit alike, one that is slower for its users and serves
fewer never wins. What is left is tried in all combinations; what was not is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tongyun.codesign.leftover import Leftover
from tongyun.codesign.offers import Pair, Place
from tongyun.codesign.places import Room, counts, domain_of
from tongyun.codesign.pools import Pool, PoolPrices, hand_over_link, most_use_s
from tongyun.codesign.space import BATCHES, CHUNKS, Question
from tongyun.codesign.steady import Pricing
from tongyun.model.shard import Shard
from tongyun.specs import Chip
from tongyun.units import MS

Array = NDArray[np.float64]
Index = NDArray[np.intp]


@dataclass(frozen=True, kw_only=True)
class Side:
    """Loads of one task that are worth pairing."""

    cut: Index
    load: Index
    """Position among the budgets for prefill, the batches for decode."""
    place: Index
    requests_per_s: Array
    """Of a replica, as far as TTFT and the links allow."""
    tpot_s: Array
    """Decode: the time between tokens, this side's hand-over spread over them. Prefill: that alone."""
    fitting: int
    """Loads that fit memory."""
    too_large: int
    too_slow: int
    """Prefill that never keeps TTFT, decode that never keeps TPOT."""


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Divisions that no other beats, by rising time between tokens: pools, replicas, what they give."""

    prefill: Index
    decode: Index
    x: Index
    """Prefill replicas."""
    y: Index
    given: Index
    """Chips for prefill; the rest is for decode."""
    tpot_s: Array
    tokens_per_s: Array


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Divisions found, and what replicas that do both add on the chips they leave over."""

    splits: Splits
    left: Sequence[Room]
    filling: Leftover | None
    chips: int

    def rates(self, tpot_s: Array | float) -> Array:
        """Output tokens per second per chip asked for, fillings no slower than each time given."""
        if self.filling is None:
            return np.asarray(self.splits.tokens_per_s / self.chips)
        rung = np.broadcast_to(self.filling.at(np.asarray(tpot_s)), len(self.left))
        gains = [
            self.filling.gain(left)[step] if step >= 0 and left.chips else 0.0
            for left, step in zip(self.left, rung, strict=True)
        ]
        return np.asarray((self.splits.tokens_per_s + gains) / self.chips)


class Split:
    """The search over two pools; every property is computed once."""

    def __init__(self, mixed: Pricing, shards: Sequence[Shard], room_bytes: float) -> None:
        """`mixed` has priced the decode steps of the grid's batches, which both kinds of plan share."""
        self.question, self.chip, self.shards, self.room_bytes = (
            mixed.question,
            mixed.chip,
            shards,
            room_bytes,
        )
        question = mixed.question
        self.domain = domain_of(mixed.chip)
        budgets = np.asarray(CHUNKS, dtype=np.float64)
        self.prices = PoolPrices(question, mixed.chip, BATCHES, budgets, mixed=mixed)
        room = Room.of(question.chips, self.domain)
        of_shard = [room.place(shard) for shard in shards]
        self.places = sorted(set(of_shard))
        known = {place: number for number, place in enumerate(self.places)}
        self._place = np.array([known[place] for place in of_shard], dtype=np.intp)

    @staticmethod
    def is_possible(question: Question, chip: Chip) -> bool:
        """Whether there are two chips, and a link to hand over on."""
        return question.chips > 1 and hand_over_link(question, chip) is not None

    @cached_property
    def prefill(self) -> Side:
        """Of each place, the load that carries most prompts within TTFT."""
        limit, steps = self.question.ttft_s, self.question.osl - 1

        def of(shard: Shard) -> tuple[Pool, Array, Array]:
            pool = self.prices.prefill(shard)
            use = most_use_s(pool.step_s, limit)
            return pool, pool.requests_per_s * use, np.full_like(use, pool.hand_over_s / steps)

        side = self._side(of, self.prices.prefill_bytes)
        order = np.lexsort((side.cut, -side.requests_per_s, side.place))
        first = np.ones(len(order), dtype=bool)
        first[1:] = np.diff(side.place[order]) > 0
        kept = order[first & (side.requests_per_s[order] > 0)]
        return self._kept(side, kept, int(np.count_nonzero(side.requests_per_s <= 0)))

    @cached_property
    def decode(self) -> Side:
        """Of each place, the loads that no other beats in time between tokens and in requests."""
        limit, steps = self.question.tpot_s, self.question.osl - 1

        def of(shard: Shard) -> tuple[Pool, Array, Array]:
            pool = self.prices.decode(shard)
            return pool, pool.requests_per_s, pool.step_s + pool.hand_over_s / steps

        side = self._side(of, self.prices.decode_bytes)
        order = np.lexsort((-side.requests_per_s, side.tpot_s, side.place))
        ends = np.flatnonzero(np.diff(side.place[order])) + 1
        kept = [part[_rises(side.requests_per_s[part])] for part in np.split(order, ends) if len(part)]
        slow = 0 if limit is None else int(np.count_nonzero(side.tpot_s > limit))
        return self._kept(side, np.concatenate([np.zeros(0, dtype=np.intp), *kept]), slow)

    def _side(
        self, of: Callable[[Shard], tuple[Pool, Array, Array]], bytes_of: Callable[[Shard], Array]
    ) -> Side:
        """All loads of all cuts that fit memory. A cut that fits at no load is not priced."""
        columns: list[tuple[Index, Array, Array, Index]] = []
        too_large = 0
        for number, shard in enumerate(self.shards):
            needed = bytes_of(shard)
            load = np.flatnonzero(needed <= self.room_bytes)
            too_large += len(needed) - len(load)
            if len(load):
                pool, requests, tpot_s = of(shard)
                carried = np.minimum(requests, shard.dp / pool.hand_over_s)
                columns.append((load, carried[load], tpot_s[load], np.full(len(load), number)))
        none = (np.zeros(0, dtype=np.intp), np.zeros(0), np.zeros(0), np.zeros(0, dtype=np.intp))
        load, requests, tpot_s, cut = (np.concatenate(parts) for parts in zip(none, *columns, strict=True))
        return Side(
            cut=cut,
            load=load,
            place=self._place[cut],
            requests_per_s=requests,
            tpot_s=tpot_s,
            fitting=len(cut),
            too_large=too_large,
            too_slow=0,
        )

    @staticmethod
    def _kept(side: Side, kept: Index, too_slow: int) -> Side:
        return Side(
            cut=side.cut[kept],
            load=side.load[kept],
            place=side.place[kept],
            requests_per_s=side.requests_per_s[kept],
            tpot_s=side.tpot_s[kept],
            fitting=side.fitting,
            too_large=side.too_large,
            too_slow=too_slow,
        )

    @cached_property
    def found(self) -> Splits | None:
        """For each decode load the division that serves most, and of these what none beats; None where
        no two pools fit."""
        first, second, chips = self.prefill, self.decode, self.question.chips
        if not len(first.cut) or not len(second.cut):
            return None
        given = np.arange(1, chips, dtype=np.intp)
        x = counts(self.places, given, self.domain, behind=np.zeros_like(given))[:, first.place]
        y = counts(self.places, chips - given, self.domain, behind=given)[:, second.place]
        carried = x * first.requests_per_s
        best = np.argmax(carried, axis=1)
        most = carried[np.arange(len(given)), best]
        served = np.minimum(most[:, None], y * second.requests_per_s)
        row, column = np.argmax(served, axis=0), np.arange(len(second.cut))
        partner = best[row]
        able = served[row, column] > 0
        row, column, partner = row[able], column[able], partner[able]
        # The side whose ranks hold more sets the pace.
        each_s = {cut: self.prices.hand_over_s(self.shards[cut]) for cut in set(second.cut.tolist())}
        own_s = np.array([each_s[cut] for cut in second.cut[column]])
        more_s = np.maximum(first.tpot_s[partner] - own_s / (self.question.osl - 1), 0.0)
        tpot_s, tokens_per_s = second.tpot_s[column] + more_s, served[row, column] * self.question.osl
        order = np.lexsort((-tokens_per_s, tpot_s))
        kept = order[_rises(tokens_per_s[order])] if len(order) else order
        return Splits(
            prefill=partner[kept],
            decode=column[kept],
            x=x[row, partner][kept],
            y=y[row, column][kept],
            given=given[row][kept],
            tpot_s=tpot_s[kept],
            tokens_per_s=tokens_per_s[kept],
        )

    def left(self, splits: Splits, at: int) -> Room:
        """What the two pools of one of the deployments leave over."""
        given, (one, other) = int(splits.given[at]), self._cuts(splits, at)
        rest = Room.of(self.question.chips - given, self.domain, behind=given)
        first = Room.of(given, self.domain).without(one, int(splits.x[at]))
        return first.beside(rest.without(other, int(splits.y[at])))

    def _cuts(self, splits: Splits, at: int) -> tuple[Shard, Shard]:
        """Of prefill and of decode."""
        one, other = int(splits.prefill[at]), int(splits.decode[at])
        return self.shards[int(self.prefill.cut[one])], self.shards[int(self.decode.cut[other])]

    def pair(
        self,
        splits: Splits,
        at: int,
        others: tuple[tuple[Place, int], ...] = (),
        why: str = "",
    ) -> Pair:
        """One of the deployments found, with replicas beside it that do both; `why` no more of those."""
        one, other = int(splits.prefill[at]), int(splits.decode[at])
        first, second = self.prefill, self.decode
        cuts = self._cuts(splits, at)
        x, y = int(splits.x[at]), int(splits.y[at])
        beside = sum(count * place.shard.ranks for place, count in others)
        idle = self.question.chips - x * cuts[0].ranks - y * cuts[1].ranks - beside
        budget, batch = float(CHUNKS[int(first.load[one])]), float(BATCHES[int(second.load[other])])
        prompts = max(1.0, budget // self.question.computed)
        limit = self.question.tpot_s
        return Pair(
            prefill=(Place(shard=cuts[0], batch=prompts, budget=budget), x),
            decode=(
                Place(shard=cuts[1], batch=batch, budget=(1 + self.question.draft_tokens) * batch),
                y,
            ),
            others=others,
            idle_chips=idle,
            idle_reason=_idle(idle, cuts, why) if idle else "",
            meets=limit is None or bool(splits.tpot_s[at] <= limit),
        )

    def unmet(self) -> str:
        """Which limit no two pools keep, in words."""
        fitting = {"prefill": self.prefill, "decode": self.decode}
        for task, side in fitting.items():
            if not side.fitting:
                return f"memory: no {task} replica of up to {self.question.chips - 1} chips holds the model"
        if not len(self.prefill.cut):
            return "ttft: no prefill replica computes a prompt in time"
        if self.found is None or not len(self.found.tpot_s):
            return f"memory: {self.question.chips} chips do not hold a prefill and a decode replica"
        near = int(np.argmin(self.found.tpot_s))
        pair = self.pair(self.found, near)
        return (
            f"tpot: nearest is {pair.decode[0].shard} decoding at batch "
            f"{int(pair.decode[0].batch) * pair.decode[0].shard.dp * pair.decode[0].shard.pp} with TPOT "
            f"{self.found.tpot_s[near] / MS:.4g} ms"
        )

    @property
    def tried(self) -> int:
        """Loads of both tasks, and combinations of a division with a load of each that were looked at."""
        sides = (self.prefill, self.decode)
        looked_at = sum(side.fitting + side.too_large for side in sides)
        return looked_at + (self.question.chips - 1) * len(self.decode.cut)

    @property
    def beaten(self) -> int:
        """Combinations left out because one with the same places is at least as good."""
        every = self.prefill.fitting * self.decode.fitting
        return (self.question.chips - 1) * max(every - len(self.decode.cut), 0)


def _idle(idle: int, cuts: tuple[Shard, Shard], why: str) -> str:
    """Why chips beside two pools are left."""
    chips = "chip stays" if idle == 1 else "chips stay"
    takes = f"a prefill replica takes {cuts[0].ranks}, a decode replica {cuts[1].ranks}"
    return f"{idle} {chips} idle: {takes}, and one pool alone would serve no more{why}"


def _rises(values: Array) -> NDArray[np.bool_]:
    """Where a value is above all before it."""
    highest = np.maximum.accumulate(values)
    return np.concatenate([[True], highest[1:] > highest[:-1]])
