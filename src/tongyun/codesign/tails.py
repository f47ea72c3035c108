"""Percentiles of a plan: plans of an answer played request by request under a demand.

`plan` prices the steady state of equal requests. Here the fleet of each plan is played
with the demand's arrivals and lengths and the production scheduler, so that queueing,
bursts and shared prefixes are in p50 and p99. Plans are tried from the fewest chips up,
until one keeps the limits at p99. What was not played is counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tongyun.cloud.latency import Percentiles, Slo
from tongyun.cloud.sched.router import LeastLoad
from tongyun.codesign.answer import Answer, Offer, Plan
from tongyun.codesign.demand import Demand
from tongyun.codesign.fleet import Fleet, Played
from tongyun.codesign.plan import plan as search
from tongyun.codesign.replicas import of_a_group, pools_of
from tongyun.cost import usd_per_mtoken
from tongyun.units import Source

MOST_PLAYED = 12
"""Plays of one answer; about half a second each."""
ROOM = (1.0, 1.15, 1.4, 2.0)
"""Replicas tried, over those that could just carry the mean rate."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A plan on as many replicas as were tried, and what its requests felt."""

    plan: Plan
    """Its idle chips are those the demand leaves free."""
    ttft_s: Percentiles
    tpot_s: Percentiles
    attainment: float
    """Share of the requests that stayed within both limits."""
    prefix_hits: float
    """Share of prompt tokens found in a cache."""
    usd_per_mtoken: float | None
    """Of output tokens, the replicas' chips paid."""
    meets: bool
    """Whether both limits hold at p99 and no request failed."""
    sources: frozenset[Source]

    @property
    def chips(self) -> int:
        return self.plan.chips


@dataclass(frozen=True, kw_only=True)
class Tails:
    """What was played for a demand."""

    demand: Demand
    best: Trial | None
    """Fewest chips that keep the limits at p99."""
    trials: tuple[Trial, ...]
    """All played, in the order of trying: by chips, then by time between tokens."""
    not_played: int
    """Candidates left when the best was found, or after `MOST_PLAYED`."""
    too_small: int
    """Plans within the limits at rest that the chips cannot hold often enough to carry the rate."""
    staged: int
    """Plans with pipeline stages, which are not played."""

    @property
    def limit(self) -> str:
        """Why there is no best, in words."""
        if not self.trials:
            return f"rate: no plan within the limits carries {self.demand.rate_per_s:g} requests/s"
        near = min(self.trials, key=lambda trial: (-trial.attainment, trial.chips))
        return (
            f"ttft and tpot at p99: nearest is {near.plan} with TTFT p99 "
            f"{near.ttft_s.p99 * 1e3:.4g} ms and TPOT p99 {near.tpot_s.p99 * 1e3:.4g} ms, "
            f"{near.attainment:.1%} of requests within both; {self.not_played} candidates not played"
        )


def tails(answer: Answer, demand: Demand) -> Tails:
    """Play plans of the answer's Pareto under the demand until one keeps the limits at p99."""
    within = [offer for offer in _offers(answer) if offer.meets]
    played = [offer for offer in within if all(kind.shard.pp == 1 for _, kind in offer.plan.kinds)]
    candidates = sorted(
        _candidates(answer, demand, played),
        key=lambda pair: (pair[0].chips, pair[1].figures.tpot_s, -pair[0].batch),
    )
    trials: list[Trial] = []
    best = None
    for plan, offer in candidates[:MOST_PLAYED]:
        trials.append(_play(answer, demand, plan, offer))
        if trials[-1].meets:
            best = trials[-1]
            break
    return Tails(
        demand=demand,
        best=best,
        trials=tuple(trials),
        not_played=len(candidates) - len(trials),
        too_small=sum(_least(demand, offer) > offer.plan.replicas for offer in played),
        staged=len(within) - len(played),
    )


def _offers(answer: Answer) -> tuple[Offer, ...]:
    """The Pareto; where both kinds of deployment share one, each kind's own, for on fewer chips than all
    a kind may win that loses on all."""
    question = answer.question
    if question.pools != "both":
        return answer.pareto
    kinds = (search(replace(question, pools=pools)).pareto for pools in ("mixed", "split"))
    return tuple(offer for pareto in kinds for offer in pareto)


def _candidates(answer: Answer, demand: Demand, offers: list[Offer]) -> Iterator[tuple[Plan, Offer]]:
    """Each offer with numbers of replicas from those that just carry the rate up, once each."""
    for offer in offers:
        least, most = _least(demand, offer), offer.plan.replicas
        for replicas in sorted({min(math.ceil(least * room), most) for room in ROOM}):
            if replicas >= least:
                plan = _scaled(offer.plan, replicas)
                yield replace(plan, idle_chips=answer.question.chips - plan.chips), offer


def _scaled(plan: Plan, replicas: int) -> Plan:
    """The plan's main kind on so many replicas; a prefill pool keeps its ratio to them."""
    first = plan.prefill
    if first is not None:
        first = replace(first, replicas=math.ceil(first.replicas * replicas / plan.replicas))
    return replace(plan, replicas=replicas, prefill=first, others=())


def _least(demand: Demand, offer: Offer) -> int:
    """Replicas of the main kind whose steady rate is the demand's mean one."""
    return math.ceil(demand.rate_per_s * demand.osl / offer.replica_tokens_per_s)


def _play(answer: Answer, demand: Demand, plan: Plan, offer: Offer) -> Trial:
    question = answer.question
    chips = plan.chips
    slo = Slo(ttft_s=question.ttft_s, tpot_s=question.tpot_s)
    # A fleet's batch and budget are a group's. Free chips are not part of it.
    pools = pools_of(replace(of_a_group(plan), idle_chips=0))
    fleet = Fleet(question=replace(question, chips=chips), pools=pools)
    played = fleet.play(demand.arrivals, LeastLoad(), chip=question.chip.at(), slo=slo)
    report = played.report
    ttft, tpot = report.ttft_s or _NEVER, report.tpot_s or _NEVER
    meets = (
        not report.failed
        and (slo.ttft_s is None or ttft.p99 <= slo.ttft_s)
        and (slo.tpot_s is None or tpot.p99 <= slo.tpot_s)
    )
    return Trial(
        plan=plan,
        ttft_s=ttft,
        tpot_s=tpot,
        attainment=report.attainment,
        prefix_hits=played.prefix_hits,
        usd_per_mtoken=_usd(answer, demand, chips),
        meets=meets,
        sources=_sources(offer, played),
    )


def _usd(answer: Answer, demand: Demand, chips: int) -> float | None:
    """What the chips cost for each million tokens of the demand's mean rate."""
    price = answer.question.price
    if price is None:
        return None
    return float(usd_per_mtoken(demand.rate_per_s * demand.osl, chips, price.chip_hour.value))


def _sources(offer: Offer, played: Played) -> frozenset[Source]:
    return offer.sources | played.sources | {Source.SIMULATED}


_NEVER = Percentiles(mean=math.inf, p50=math.inf, p90=math.inf, p99=math.inf, p99_9=math.inf, most=math.inf)
