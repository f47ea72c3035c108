# ruff: noqa: RUF009 - `has` returns dataclasses.field, which is not evaluated per instance
"""What a workload file may say: when requests come, how long they are, what they share.

The names follow `cloud/workload.py`, which draws the requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from tongyun.specs.figure import COUNT, FRACTION, RATE, RATIO, TOKENS, Figure
from tongyun.specs.form import Fact, Section, Text, Texts, Whole, has


@dataclass(frozen=True, kw_only=True)
class ArrivalSpec:
    """When requests come: one by one at random, in bursts, evenly, or when users have their answers."""

    process: str = has(Text(("poisson", "gamma", "constant", "burst", "closed")))
    rate: Figure | None = has(Fact(RATE), default=None)
    """Requests per second; a closed loop has `users` instead."""
    variation: Figure | None = has(Fact(RATIO), default=None)
    """`gamma` only: coefficient of variation of the time between arrivals; 1 is Poisson."""
    burst: Figure | None = has(Fact(COUNT), default=None)
    """`burst` only: requests that come at the same moment."""
    users: Figure | None = has(Fact(COUNT), default=None)
    """`closed` only: users that each wait for their answer before they ask again."""

    def problem(self) -> str | None:
        needs = {"closed": "users", "gamma": "variation", "burst": "burst"}
        wanted = {needs.get(self.process, "rate"), "users" if self.process == "closed" else "rate"}
        given = {name for name in ("rate", "variation", "burst", "users") if getattr(self, name) is not None}
        if given != wanted:
            has_now = ", ".join(sorted(given)) or "nothing"
            return f"a {self.process} process has {', '.join(sorted(wanted))}, not {has_now}"
        zero = [name for name in sorted(given) if getattr(self, name).value == 0]
        return f"{zero[0]} is zero" if zero else None


@dataclass(frozen=True, kw_only=True)
class LengthSpec:
    """How many tokens: `fixed` at the mean, `uniform` within the mean's range, or `lognormal`."""

    distribution: str = has(Text(("fixed", "uniform", "lognormal")))
    mean: Figure = has(Fact(TOKENS))
    variation: Figure | None = has(Fact(RATIO), default=None)
    """`lognormal` only: standard deviation over mean."""
    longest: Figure | None = has(Fact(TOKENS), default=None)
    """`lognormal` only: draws above are cut to it."""

    def problem(self) -> str | None:
        if self.mean.low < 1:
            return "a length is at least one token"
        if (self.variation is not None) != (self.distribution == "lognormal"):
            return "variation belongs to a lognormal distribution, and it needs one"
        if self.longest is not None and (
            self.distribution != "lognormal" or self.longest.value < self.mean.value
        ):
            return "longest belongs to a lognormal distribution and is not below its mean"
        return None


@dataclass(frozen=True, kw_only=True)
class PrefixSpec:
    """Prompts that begin alike: `share` of requests start with one of `groups` prefixes of `length`."""

    share: Figure = has(Fact(FRACTION))
    groups: Figure = has(Fact(COUNT))
    length: Figure = has(Fact(TOKENS))


@dataclass(frozen=True, kw_only=True)
class WorkloadSpec:
    """Arrivals, lengths and shared prefixes, from which a trace is drawn."""

    name: str = has(Text())
    title: str = has(Text())
    aliases: tuple[str, ...] = has(Texts(), default=())
    note: str | None = has(Text(), default=None)
    requests: int = has(Whole())
    seed: int = has(Whole())
    arrival: ArrivalSpec = has(Section(ArrivalSpec))
    input: LengthSpec = has(Section(LengthSpec))
    output: LengthSpec = has(Section(LengthSpec))
    prefix: PrefixSpec | None = has(Section(PrefixSpec), default=None)
