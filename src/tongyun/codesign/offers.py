"""Deployments that were found, priced at every corner of the chip's ranges.

Takes points of the search and how many replicas of each stand together; puts their figures
together as their users feel them. Searches nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tongyun.codesign.answer import Figures, Offer, Plan
from tongyun.codesign.pools import Paired, PoolPrices, Replicas, most_use_s, paired
from tongyun.codesign.space import Question
from tongyun.codesign.steady import Pricing
from tongyun.cost import usd_per_mtoken
from tongyun.model.shard import Shard
from tongyun.specs import Corner
from tongyun.units import Source

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A cut with the load it was found at, which is a group's."""

    shard: Shard
    batch: float
    budget: float


@dataclass(frozen=True, kw_only=True)
class Found:
    """A deployment: replicas of each kind, the main one first; chips that stay idle, and why."""

    kinds: tuple[tuple[Place, int], ...]
    idle_chips: int
    idle_reason: str
    meets: bool


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A deployment of two pools: prompts on one place, decoding on another."""

    prefill: tuple[Place, int]
    decode: tuple[Place, int]
    others: tuple[tuple[Place, int], ...]
    """Replicas beside them that do both."""
    idle_chips: int
    idle_reason: str
    meets: bool


@dataclass(frozen=True, kw_only=True)
class _Row:
    """What one replica of a place gives at one corner."""

    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    joules_per_token: float
    sources: frozenset[Source]


def corners_of(question: Question) -> tuple[Corner, ...]:
    """Nominal alone, or with the slow and fast ends of what has a range."""
    price = question.price
    ranged = question.chip.has_range or (price is not None and price.chip_hour.has_range)
    return (Corner.NOMINAL, Corner.SLOW, Corner.FAST) if ranged else (Corner.NOMINAL,)


def offers(question: Question, found: Sequence[Found | Pair]) -> list[Offer]:
    """Each deployment with its figures at all corners."""
    alone = [one for one in found if isinstance(one, Found)]
    pairs = [one for one in found if isinstance(one, Pair)]
    priced = dict(zip(alone, _alone(question, alone), strict=True)) if alone else {}
    priced_pairs = dict(zip(pairs, _pairs(question, pairs), strict=True)) if pairs else {}
    return [priced[one] if isinstance(one, Found) else priced_pairs[one] for one in found]


def _alone(question: Question, found: Sequence[Found]) -> list[Offer]:
    places = list(dict.fromkeys(place for one in found for place, _ in one.kinds))
    tables = {corner: _priced(question, corner, places) for corner in corners_of(question)}
    return [_offer(question, one, tables) for one in found]


def _priced(question: Question, corner: Corner, places: Sequence[Place]) -> dict[Place, _Row]:
    """All places at once, so that cuts share what layers cost."""
    batch, budget = (np.array([getattr(place, axis) for place in places]) for axis in ("batch", "budget"))
    pricing = Pricing(question, question.at(corner), batch, budget)
    states = {shard: pricing.steady(shard) for shard in dict.fromkeys(place.shard for place in places)}
    return {
        place: _Row(
            ttft_s=float(states[place.shard].ttft_s[i]),
            tpot_s=float(states[place.shard].tpot_s[i]),
            tokens_per_s=float(states[place.shard].tokens_per_s[i]),
            joules_per_token=float(states[place.shard].joules_per_token[i]),
            sources=states[place.shard].sources,
        )
        for i, place in enumerate(places)
    }


def _offer(question: Question, one: Found, tables: Mapping[Corner, Mapping[Place, _Row]]) -> Offer:
    price = question.price
    paid = frozenset() if price is None else frozenset({price.chip_hour.source})
    figures = {
        corner: _together(question, corner, [(rows[place], count) for place, count in one.kinds])
        for corner, rows in tables.items()
    }
    nominal = tables[Corner.NOMINAL]
    return Offer(
        plan=_plan(one),
        figures=figures[Corner.NOMINAL],
        slow=figures.get(Corner.SLOW),
        fast=figures.get(Corner.FAST),
        replica_tokens_per_s=nominal[one.kinds[0][0]].tokens_per_s,
        meets=one.meets,
        sources=paid.union(*(nominal[place].sources for place, _ in one.kinds)),
    )


def _together(question: Question, corner: Corner, kinds: Sequence[tuple[_Row, int]]) -> Figures:
    """Rates add up; latencies are the slowest kind's, energy the mean over tokens."""
    each = [(row, count * row.tokens_per_s) for row, count in kinds]
    rate = sum(tokens for _, tokens in each)
    return figures_of(
        question,
        corner,
        ttft_s=max(row.ttft_s for row, _ in each),
        tpot_s=max(row.tpot_s for row, _ in each),
        tokens_per_s=rate,
        joules_per_token=sum(row.joules_per_token * tokens for row, tokens in each) / rate,
    )


def _pairs(question: Question, pairs: Sequence[Pair]) -> list[Offer]:
    """Both pools of all pairs at once, corner by corner."""
    rows: list[dict[Corner, tuple[Paired, frozenset[Source]]]] = [{} for _ in pairs]
    places = list(dict.fromkeys(place for pair in pairs for place, _ in pair.others))
    tables = {corner: _priced(question, corner, places) if places else {} for corner in corners_of(question)}
    uses = np.ones(len(pairs))
    for corner in corners_of(question):
        batch = np.array([pair.decode[0].batch for pair in pairs])
        budget = np.array([pair.prefill[0].budget for pair in pairs])
        chip = question.at(corner)
        prices = PoolPrices(question, chip, batch, budget)
        first = {cut: prices.prefill(cut) for cut in {pair.prefill[0].shard for pair in pairs}}
        second = {cut: prices.decode(cut) for cut in {pair.decode[0].shard for pair in pairs}}
        for i, pair in enumerate(pairs):
            (one, x), (other, y) = pair.prefill, pair.decode
            sides = (
                Replicas(pool=first[one.shard], at=i, shard=one.shard, count=x),
                Replicas(pool=second[other.shard], at=i, shard=other.shard, count=y),
            )
            if corner is Corner.NOMINAL:
                uses[i] = most_use_s(sides[0].pool.step_s, question.ttft_s)[i]
            sources = sides[0].pool.sources | sides[1].pool.sources
            rows[i][corner] = (paired(question, chip, *sides, float(uses[i])), sources)
    return [_pair_offer(question, pair, row, tables) for pair, row in zip(pairs, rows, strict=True)]


def _pair_offer(
    question: Question,
    pair: Pair,
    row: Mapping[Corner, tuple[Paired, frozenset[Source]]],
    tables: Mapping[Corner, Mapping[Place, _Row]],
) -> Offer:
    figures = {}
    for corner, (one, found) in row.items():
        pools = _Row(
            ttft_s=one.ttft_s,
            tpot_s=one.tpot_s,
            tokens_per_s=one.requests_per_s * question.osl,
            joules_per_token=one.joules_per_token,
            sources=found,
        )
        beside = [(tables[corner][place], count) for place, count in pair.others]
        figures[corner] = _together(question, corner, [(pools, 1), *beside])
    nominal, sources = row[Corner.NOMINAL]
    sources = sources.union(*(tables[Corner.NOMINAL][place].sources for place, _ in pair.others))
    paid = frozenset() if question.price is None else frozenset({question.price.chip_hour.source})
    decode = plan_of(*pair.decode)
    return Offer(
        plan=replace(
            decode,
            prefill=plan_of(*pair.prefill),
            others=tuple(plan_of(*other) for other in pair.others),
            idle_chips=pair.idle_chips,
            idle_reason=pair.idle_reason,
        ),
        figures=figures[Corner.NOMINAL],
        slow=figures.get(Corner.SLOW),
        fast=figures.get(Corner.FAST),
        replica_tokens_per_s=nominal.requests_per_s * question.osl / decode.replicas,
        meets=pair.meets,
        sources=sources | paid,
    )


def figures_of(
    question: Question,
    corner: Corner,
    *,
    ttft_s: float,
    tpot_s: float,
    tokens_per_s: float,
    joules_per_token: float,
) -> Figures:
    """Figures of a whole deployment, which pays for all chips asked for."""
    rate = tokens_per_s / question.chips
    return Figures(
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        tok_s_per_chip=rate,
        joules_per_token=joules_per_token,
        usd_per_mtoken=_usd(question, rate, corner),
        usd_per_mtoken_total=_usd(question, rate * (question.isl + question.osl) / question.osl, corner),
    )


def _usd(question: Question, rate: float, corner: Corner) -> float | None:
    if question.price is None:
        return None
    return float(usd_per_mtoken(rate, 1, question.price.chip_hour.at(corner, more_is_better=False)))


def _plan(one: Found) -> Plan:
    first, *rest = (plan_of(place, count) for place, count in one.kinds)
    return replace(first, others=tuple(rest), idle_chips=one.idle_chips, idle_reason=one.idle_reason)


def plan_of(place: Place, replicas: int) -> Plan:
    """So many replicas of a place, no chip idle."""
    shard = place.shard
    return Plan(
        shard=shard,
        batch=int(place.batch) * shard.dp * shard.pp,
        step_tokens=int(place.budget),
        replicas=replicas,
        idle_chips=0,
    )
