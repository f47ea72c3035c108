"""A load for a plan: which requests come, how long they are, and how many a second.

Made of a rate, of a described workload or of a recorded trace. It prices nothing and
plays nothing; the search reads its mean lengths, a play its arrivals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tongyun.cloud.workload import Arrival, Arrivals, Lengths, Process, Workload, sample, stretched
from tongyun.errors import InputError

REQUESTS = 1000
"""Requests played of a process that has no end: ten of them are behind a p99."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Requests for a whole deployment, in order of time."""

    name: str
    arrivals: tuple[Arrival, ...]
    rate_per_s: float

    @cached_property
    def isl(self) -> int:
        """Mean input tokens, rounded."""
        return max(1, round(sum(a.prompt_tokens for a in self.arrivals) / len(self.arrivals)))

    @cached_property
    def osl(self) -> int:
        """Mean output tokens, rounded; at least the two that have a time between them."""
        return max(2, round(sum(a.output_tokens for a in self.arrivals) / len(self.arrivals)))


def of_rate(rate_per_s: float, isl: int, osl: int) -> Demand:
    """Poisson arrivals of equal requests."""
    _positive(rate_per_s)
    load = Workload(
        arrivals=Arrivals(process=Process.POISSON, rate_per_s=rate_per_s),
        prompt=Lengths.fixed(isl),
        output=Lengths.fixed(osl),
        requests=REQUESTS,
    )
    name = f"{rate_per_s:g} requests/s, Poisson, {isl} + {osl} tokens"
    return Demand(name=name, arrivals=tuple(sample(load)), rate_per_s=rate_per_s)


def of_workload(workload: Workload, rate_per_s: float | None = None) -> Demand:
    """The process and lengths a workload describes, at its own rate or another."""
    own = workload.arrivals.rate_per_s
    if own is None:
        raise InputError(f"workload {workload.name}: a closed loop has no rate to plan for")
    if rate_per_s is not None:
        _positive(rate_per_s)
    rate = rate_per_s or own
    arrivals = replace(workload.arrivals, rate_per_s=rate)
    drawn = sample(replace(workload, arrivals=arrivals, requests=REQUESTS, duration_s=None))
    return Demand(name=f"{workload.name} at {rate:g} requests/s", arrivals=tuple(drawn), rate_per_s=rate)


def of_trace(recorded: Sequence[Arrival], rate_per_s: float | None = None, *, name: str) -> Demand:
    """Recorded requests at their own mean rate, or with every gap stretched to another."""
    lasted = recorded[-1].time_s - recorded[0].time_s if recorded else 0.0
    if lasted <= 0:
        raise InputError(f"{name}: {len(recorded)} requests at one moment have no rate to plan for")
    own = (len(recorded) - 1) / lasted
    if rate_per_s is None:
        return Demand(name=f"{name}, {own:.4g} requests/s", arrivals=tuple(recorded), rate_per_s=own)
    _positive(rate_per_s)
    slower = stretched(recorded, own / rate_per_s)
    return Demand(name=f"{name} at {rate_per_s:g} requests/s", arrivals=tuple(slower), rate_per_s=rate_per_s)


def _positive(rate_per_s: float) -> None:
    if not 0 < rate_per_s < math.inf:
        raise InputError(f"--rate {rate_per_s:g}: accepted: a positive number of requests a second")
