# ruff: noqa: RUF009 - `has` returns dataclasses.field, which is not evaluated per instance
"""What a workload file may say: when requests come, how long they are, what they share.

The names follow `cloud/workload.py`, which draws the requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from tongyun.specs.figure import COUNT, FRACTION, KINDS, RATE, RATIO, TIME, TOKENS, Figure
from tongyun.specs.form import Fact, Section, Text, Texts, Where, Whole, has, number, shown

HOURS = 24


@dataclass(frozen=True)
class Ratios:
    """A number ≥ 0 for each hour of a day, not all of them zero."""

    def read(self, raw: object, where: Where) -> tuple[float, ...]:
        if not isinstance(raw, list) or len(raw) != HOURS:
            raise where.wrong(f"expected a list of {HOURS} numbers, got {shown(raw)}")
        values = tuple(number(item, where / i) for i, item in enumerate(raw))
        if not any(values):
            raise where.wrong("all of them are zero")
        return values

    def plain(self, value: tuple[float, ...]) -> list[float]:
        return list(value)


@dataclass(frozen=True, kw_only=True)
class HourlySpec:
    """The load of each hour of a day against the others."""

    ratios: tuple[float, ...] = has(Ratios())
    """They are scaled to a mean of one."""
    kind: str = has(Text(tuple(KINDS)))
    source: str = has(Text())


@dataclass(frozen=True, kw_only=True)
class DaySpec:
    """How the rate rises and falls: a cosine of `swing` around `peak`, or a table of hours."""

    swing: Figure | None = has(Fact(FRACTION), default=None)
    """How far the rate rises above its mean and falls below it."""
    peak: Figure | None = has(Fact(TIME), default=None)
    """Hour of the day of the most."""
    hourly: HourlySpec | None = has(Section(HourlySpec), default=None)
    begin: Figure | None = has(Fact(TIME), default=None)
    """Hour of the day at which the load begins; midnight unless told."""
    period: Figure | None = has(Fact(TIME), default=None)
    """How long the day lasts: 24 h unless it is played faster. `peak` and `begin` are shortened with it."""

    def problem(self) -> str | None:
        wave = (self.swing is not None, self.peak is not None)
        if wave != (self.hourly is None,) * 2:
            return "a day has swing and peak, or hourly, and not both"
        if self.period is not None and self.period.value == 0:
            return "period is zero"
        return None


@dataclass(frozen=True, kw_only=True)
class ArrivalSpec:
    """When requests come: at random, in bursts, evenly, by the hour, or when users have their answers."""

    process: str = has(Text(("poisson", "gamma", "constant", "burst", "diurnal", "closed")))
    rate: Figure | None = has(Fact(RATE), default=None)
    """Requests per second, over a whole day; a closed loop has `users` instead."""
    variation: Figure | None = has(Fact(RATIO), default=None)
    """`gamma`, and `diurnal` if given: coefficient of variation of the time between arrivals, a day's curve
    left out; 1 is Poisson."""
    burst: Figure | None = has(Fact(COUNT), default=None)
    """`burst` only: requests that come at the same moment."""
    users: Figure | None = has(Fact(COUNT), default=None)
    """`closed` only: users that each wait for their answer before they ask again."""
    day: DaySpec | None = has(Section(DaySpec), default=None)
    """`diurnal` only."""

    def problem(self) -> str | None:
        needs = {"closed": "users", "gamma": "variation", "burst": "burst", "diurnal": "day"}
        wanted = {needs.get(self.process, "rate"), "users" if self.process == "closed" else "rate"}
        names = ("rate", "variation", "burst", "users", "day")
        given = {name for name in names if getattr(self, name) is not None}
        spare = {"variation"} if self.process == "diurnal" else set()
        if given - spare != wanted:
            has_now = ", ".join(sorted(given)) or "nothing"
            return f"a {self.process} process has {', '.join(sorted(wanted))}, not {has_now}"
        zero = [name for name in sorted(given - {"day"}) if getattr(self, name).value == 0]
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
