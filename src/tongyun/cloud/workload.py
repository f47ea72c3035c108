"""When requests come, how long they are, and how much of their prompts they share.

A `Workload` is a description, an `Arrival` one request drawn from it (or read from a
trace), and `requests` gives arrivals made-up tokens. The same workload always yields the
same arrivals. Knows no endpoint, no engine and no text.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tongyun.cloud.day import DAY_S, Curve, Steps, Wave
from tongyun.cloud.sched.request import Request
from tongyun.errors import InputError
from tongyun.specs.workload import DaySpec, LengthSpec, PrefixSpec, WorkloadSpec

HASH_BLOCK_TOKENS = 512
"""Prompt tokens that one of `Arrival.hash_ids` stands for, as in the Mooncake traces."""


class Process(StrEnum):
    """How requests follow each other."""

    POISSON = "poisson"
    GAMMA = "gamma"
    CONSTANT = "constant"
    BURST = "burst"
    DIURNAL = "diurnal"
    CLOSED = "closed"


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """`rate_per_s` requests a second on average, or `users` that each wait for their answer."""

    process: Process
    rate_per_s: float | None = None
    variation: float = 1.0
    """Gamma and diurnal: standard deviation over mean of the gaps, a day's curve left out; 1 is Poisson."""
    burst: int = 1
    """Burst only: requests that come at the same moment."""
    users: int | None = None
    day: Curve | None = None
    """Diurnal only: how the rate, whose mean over the day is `rate_per_s`, rises and falls."""

    def __post_init__(self) -> None:
        diurnal = self.process is Process.DIURNAL
        _require((self.day is not None) == diurnal, "arrival.day", "a diurnal process's curve", self.day)
        if self.process is Process.CLOSED:
            _require(self.users is not None and self.users >= 1, "arrival.users", "at least 1", self.users)
            _require(self.rate_per_s is None, "arrival.rate_per_s", "none in a closed loop", self.rate_per_s)
            return
        rate = self.rate_per_s
        _require(rate is not None and 0 < rate < math.inf, "arrival.rate_per_s", "a positive number", rate)
        _require(self.users is None, "arrival.users", "none outside a closed loop", self.users)
        positive = 0 < self.variation < math.inf
        _require(positive, "arrival.variation", "a positive number", self.variation)
        _require(self.burst >= 1, "arrival.burst", "at least 1", self.burst)

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """`count` moments in seconds from 0, ascending; all 0 in a closed loop."""
        rate = self.rate_per_s
        if rate is None:
            return np.zeros(count)
        match self.process:
            case Process.CONSTANT:
                return np.arange(count, dtype=np.float64) / rate
            case Process.BURST:
                return np.floor(np.arange(count, dtype=np.float64) / self.burst) * (self.burst / rate)
            case Process.GAMMA:
                return self._gamma(count, rate, rng)
            case Process.DIURNAL:
                # Of variation 1 this is the Poisson process of that rate, exactly.
                assert self.day is not None
                return self.day.stretch(self._gamma(count, rate, rng))
            case _:
                return np.cumsum(rng.exponential(1 / rate, count))

    def _gamma(self, count: int, rate: float, rng: np.random.Generator) -> NDArray[np.float64]:
        shape = self.variation**-2
        return np.cumsum(rng.gamma(shape, 1 / (rate * shape), count))


class Distribution(StrEnum):
    """How lengths are spread."""

    FIXED = "fixed"
    UNIFORM = "uniform"
    LOGNORMAL = "lognormal"


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Token counts: `mean` (fixed, lognormal) or every whole number from `low` to `high` (uniform).

    A lognormal draw is rounded and then cut to the bounds, which moves its mean.
    """

    distribution: Distribution
    mean: float | None = None
    variation: float = 0.0
    """Lognormal only: standard deviation over mean."""
    low: int = 1
    high: int | None = None

    def __post_init__(self) -> None:
        _require(self.low >= 1, "length.low", "at least 1", self.low)
        high = self.high
        _require(high is None or high >= self.low, "length.high", f"at least low ({self.low})", high)
        if self.distribution is Distribution.UNIFORM:
            _require(high is not None, "length.high", "a bound, for a uniform distribution", high)
        else:
            mean = self.mean
            _require(mean is not None and 1 <= mean < math.inf, "length.mean", "at least 1", mean)
        finite = 0 <= self.variation < math.inf
        _require(finite, "length.variation", "zero or more", self.variation)

    @classmethod
    def fixed(cls, tokens: int) -> Lengths:
        """The same length every time."""
        return cls(distribution=Distribution.FIXED, mean=tokens)

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`count` lengths."""
        if self.distribution is Distribution.UNIFORM and self.high is not None:
            return rng.integers(self.low, self.high, count, dtype=np.int64, endpoint=True)
        mean = self.mean or 0.0
        if self.distribution is Distribution.FIXED:
            drawn = np.full(count, mean)
        else:
            # A lognormal of mean m and variation v: σ² = ln(1 + v²), μ = ln m - σ²/2.
            variance = math.log1p(self.variation**2)
            drawn = rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), count)
        whole: NDArray[np.int64] = np.clip(np.rint(drawn), self.low, self.high).astype(np.int64)
        return whole


@dataclass(frozen=True, kw_only=True)
class SharedPrefix:
    """`share` of the requests begin with one of `groups` prefixes of `tokens`, each equally likely.

    The prefix is part of the prompt, not added to it: a prompt no longer than the prefix
    is its beginning.
    """

    tokens: int
    groups: int = 1
    share: float = 1.0

    def __post_init__(self) -> None:
        _require(self.tokens >= 1, "prefix.tokens", "at least 1", self.tokens)
        _require(self.groups >= 1, "prefix.groups", "at least 1", self.groups)
        _require(0 <= self.share <= 1, "prefix.share", "from 0 to 1", self.share)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A load to plan for or to send: exactly one of `requests` and `duration_s` ends it."""

    name: str = ""
    arrivals: Arrivals
    prompt: Lengths
    output: Lengths
    prefix: SharedPrefix | None = None
    requests: int | None = None
    duration_s: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        one = (self.requests is None) != (self.duration_s is None)
        _require(one, "requests", "exactly one of requests and duration_s", self.requests)
        _require(self.requests is None or self.requests >= 1, "requests", "at least 1", self.requests)
        if self.duration_s is not None:
            positive = 0 < self.duration_s < math.inf
            _require(positive, "duration_s", "a positive number", self.duration_s)
            open_loop = self.arrivals.process is not Process.CLOSED
            _require(open_loop, "duration_s", "none in a closed loop; give requests", self.duration_s)
        _require(self.seed >= 0, "seed", "zero or more", self.seed)

    @classmethod
    def from_spec(cls, spec: WorkloadSpec) -> Workload:
        """The load a catalogue file describes, at the nominal value of each figure."""
        arrival, prefix = spec.arrival, spec.prefix
        return cls(
            name=spec.name,
            arrivals=Arrivals(
                process=Process(arrival.process),
                rate_per_s=None if arrival.rate is None else arrival.rate.value,
                variation=1.0 if arrival.variation is None else arrival.variation.value,
                burst=1 if arrival.burst is None else int(arrival.burst.value),
                users=None if arrival.users is None else int(arrival.users.value),
                day=None if arrival.day is None else _curve(arrival.day),
            ),
            prompt=_lengths(spec.input),
            output=_lengths(spec.output),
            prefix=None if prefix is None else _shared(prefix),
            requests=spec.requests,
            seed=spec.seed,
        )


def _curve(spec: DaySpec) -> Curve:
    period_s = DAY_S if spec.period is None else spec.period.value
    # Hours of the file are those of a day of 24, however long it lasts here.
    scale = period_s / DAY_S
    begin_s = 0.0 if spec.begin is None else spec.begin.value * scale
    if spec.hourly is not None:
        return Steps(factors=spec.hourly.ratios, period_s=period_s, begin_s=begin_s)
    assert spec.swing is not None and spec.peak is not None
    return Wave(swing=spec.swing.value, peak_s=spec.peak.value * scale, period_s=period_s, begin_s=begin_s)


def _shared(spec: PrefixSpec) -> SharedPrefix:
    return SharedPrefix(tokens=int(spec.length.value), groups=int(spec.groups.value), share=spec.share.value)


def _lengths(spec: LengthSpec) -> Lengths:
    if spec.distribution == Distribution.UNIFORM:
        return Lengths(distribution=Distribution.UNIFORM, low=int(spec.mean.low), high=int(spec.mean.high))
    return Lengths(
        distribution=Distribution(spec.distribution),
        mean=spec.mean.value,
        variation=0.0 if spec.variation is None else spec.variation.value,
        high=None if spec.longest is None else int(spec.longest.value),
    )


class Arrival(NamedTuple):
    """One request before it has tokens. `time_s` counts from the start of the workload.

    Two arrivals of one `prefix_group` share their first `prefix_tokens`; two whose
    `hash_ids` begin alike share that many blocks of `HASH_BLOCK_TOKENS`.
    """

    time_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_group: int | None = None
    prefix_tokens: int = 0
    hash_ids: tuple[int, ...] = ()
    model: str | None = None
    priority_class: str | None = None


def sample(workload: Workload) -> list[Arrival]:
    """Draw the workload. Moments, lengths and prefixes come from streams of their own, so that
    changing the rate leaves the lengths as they were."""
    # Seeds of the four streams; `spawn` would do, but this says which is which.
    moments_rng, prompt_rng, output_rng, prefix_rng = (
        np.random.default_rng([workload.seed, stream]) for stream in range(4)
    )
    times = _moments(workload, moments_rng)
    count = len(times)
    prompts = workload.prompt.draw(count, prompt_rng).tolist()
    outputs = workload.output.draw(count, output_rng).tolist()
    if workload.prefix is None:
        return list(map(Arrival, times.tolist(), prompts, outputs))
    prefix = workload.prefix
    groups = prefix_rng.integers(prefix.groups, size=count).tolist()
    shares = (prefix_rng.random(count) < prefix.share).tolist()
    return [
        Arrival(time_s, prompt, output, group, min(prefix.tokens, prompt))
        if shared
        else Arrival(time_s, prompt, output)
        for time_s, prompt, output, group, shared in zip(
            times.tolist(), prompts, outputs, groups, shares, strict=True
        )
    ]


def requests(
    arrivals: Iterable[Arrival],
    *,
    vocabulary: int,
    seed: int = 0,
    name: str = "r",
    priorities: Mapping[str, int] | None = None,
) -> Iterator[Request]:
    """Arrivals as requests with made-up tokens below `vocabulary`, one at a time; priorities by class.

    Tokens that arrivals share are equal, all others are unrelated. The requests ignore the
    end-of-text token: each produces exactly its `output_tokens`.
    """
    given = priorities or {}
    for index, arrival in enumerate(arrivals):
        yield Request(
            id=f"{name}{index}",
            # In a row: millions of numbers, each an object of its own, would fill the memory.
            prompt=array("i", _prompt(arrival, index, seed, vocabulary).astype(np.int32).tobytes()),
            output_tokens=arrival.output_tokens,
            arrival_s=arrival.time_s,
            ignore_eos=True,
            priority=given.get(arrival.priority_class or "", 0) if given else 0,
            model=arrival.model,
            priority_class=arrival.priority_class,
        )


def stretched(arrivals: Iterable[Arrival], factor: float) -> list[Arrival]:
    """The same arrivals over `factor` times the time: 2 halves the rate."""
    if not 0 < factor < math.inf:
        raise InputError(f"a trace is stretched by a positive number, not {factor}")
    return [arrival._replace(time_s=arrival.time_s * factor) for arrival in arrivals]


def _moments(workload: Workload, rng: np.random.Generator) -> NDArray[np.float64]:
    if workload.requests is not None:
        return workload.arrivals.draw(workload.requests, rng)
    duration_s, rate = workload.duration_s or 0.0, workload.arrivals.rate_per_s or 0.0
    # Longer than the duration with near certainty; doubled on the rare occasion that it is not.
    count = math.ceil(duration_s * rate * 1.5 + 20 * workload.arrivals.burst)
    state = rng.bit_generator.state
    while True:
        rng.bit_generator.state = state
        times = workload.arrivals.draw(count, rng)
        if times[-1] >= duration_s:
            return times[times < duration_s]
        count *= 2


def _prompt(arrival: Arrival, index: int, seed: int, vocabulary: int) -> NDArray[np.uint64]:
    length = arrival.prompt_tokens
    hashed = np.array(arrival.hash_ids, dtype=np.uint64)
    if len(hashed) * HASH_BLOCK_TOKENS >= length:
        # Nothing of it is its own.
        tokens = _noise(2, hashed, HASH_BLOCK_TOKENS, seed).reshape(-1)[:length]
    else:
        tokens = _noise(0, index, length, seed)
        if arrival.prefix_group is not None:
            shared = min(arrival.prefix_tokens, length)
            tokens[:shared] = _noise(1, arrival.prefix_group, shared, seed)
        if len(hashed):
            blocks = _noise(2, hashed, HASH_BLOCK_TOKENS, seed)
            tokens[: blocks.size] = blocks.reshape(-1)
    # Quicker than a remainder, which is not vectorised as division by one number is.
    tokens -= tokens // np.uint64(vocabulary) * np.uint64(vocabulary)
    return tokens


def _noise(kind: int, index: int | NDArray[np.uint64], count: int, seed: int) -> NDArray[np.uint64]:
    """`count` random words that depend on the arguments alone: the SplitMix64 sequence of a
    seed made from them (Steele, Lea and Flood, 2014). Of several indices, a row for each."""
    # Arrays, because a scalar that wraps around is a warning.
    start = _mix(np.array([seed * 3 + kind], dtype=np.uint64) * _GOLDEN)
    rows = np.atleast_1d(np.asarray(index, dtype=np.uint64)) + np.uint64(1)
    start = _mix(start + rows * _GOLDEN)
    words = _mix(start[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    return words if np.ndim(index) else words[0]


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = words ^ (words >> np.uint64(30))
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def _require(holds: bool, key: str, accepted: str, given: object) -> None:
    if not holds:
        raise InputError(f"workload: {key}: must be {accepted}, not {given}")
