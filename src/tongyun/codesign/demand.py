"""What a deployment has to serve: requests a second, how they come, and how long they are.

A `Demand` is made of a rate, of a described workload or of a recorded trace. The search uses
its rate and variations; a simulation plays its arrivals. It prices nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tongyun.cloud.workload import Arrival, Arrivals, Process, Workload, sample
from tongyun.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Requests for the whole deployment."""

    rate_per_s: float
    isl: int
    """Mean input tokens."""
    osl: int
    """Mean output tokens."""
    isl_variation: float = 0.0
    """Standard deviation over mean; so for the other two."""
    osl_variation: float = 0.0
    gap_variation: float = 1.0
    """Of the time between arrivals; 1 is Poisson."""
    arrivals: tuple[Arrival, ...] = ()
    """Recorded or drawn requests to play; empty: Poisson arrivals of equal requests."""
    name: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.rate_per_s < math.inf:
            raise InputError(f"rate must be a positive number of requests a second, got {self.rate_per_s}")

    def played(self, count: int, share: float, *, seed: int = 0) -> list[Arrival]:
        """`count` arrivals as one of many equal groups sees them: `share` of the demand, at random.

        Moments are thinned by drawing gaps anew, with the demand's variation (a small share of
        any stream is nearly Poisson); lengths and prefixes are those of the demand, in turn.
        """
        rng = np.random.default_rng([seed, count])
        # Thinning a stream by `share` leaves 1 + share · (c² − 1) of its squared variation.
        squared = 1 + share * (self.gap_variation**2 - 1)
        rate = self.rate_per_s * share
        gaps = Arrivals(process=Process.GAMMA, rate_per_s=rate, variation=math.sqrt(max(squared, 1e-6)))
        moments = gaps.draw(count, rng).tolist()
        if not self.arrivals:
            return [Arrival(moment, self.isl, self.osl) for moment in moments]
        chosen = rng.permutation(len(self.arrivals))
        return [
            self.arrivals[int(chosen[i % len(chosen)])]._replace(time_s=moment)
            for i, moment in enumerate(moments)
        ]


def of_rate(rate_per_s: float, isl: int, osl: int) -> Demand:
    """Poisson arrivals of equal requests."""
    return Demand(rate_per_s=rate_per_s, isl=isl, osl=osl)


def of_workload(workload: Workload, rate_per_s: float | None = None) -> Demand:
    """The demand a workload describes, at its own rate or another."""
    own = workload.arrivals.rate_per_s
    rate = rate_per_s if rate_per_s is not None else own
    if rate is None:
        raise InputError(f"workload {workload.name}: a closed loop has no rate; give one with --rate")
    return _of_arrivals(sample(workload), rate, _gap_variation(workload.arrivals), workload.name)


def of_trace(arrivals: Sequence[Arrival], rate_per_s: float | None = None, *, name: str) -> Demand:
    """The demand of a recorded trace, at its own mean rate or stretched to another."""
    times = np.asarray([arrival.time_s for arrival in arrivals])
    gaps = np.diff(times)
    if len(gaps) < 2 or times[-1] <= times[0]:
        raise InputError(f"{name}: a trace of {len(arrivals)} requests has no rate; give one with --rate")
    rate = rate_per_s if rate_per_s is not None else float(1 / gaps.mean())
    return _of_arrivals(arrivals, rate, float(gaps.std() / gaps.mean()), name)


def _of_arrivals(arrivals: Sequence[Arrival], rate: float, gap_variation: float, name: str) -> Demand:
    prompts = np.asarray([arrival.prompt_tokens for arrival in arrivals], dtype=np.float64)
    outputs = np.asarray([arrival.output_tokens for arrival in arrivals], dtype=np.float64)
    return Demand(
        rate_per_s=rate,
        isl=max(1, round(float(prompts.mean()))),
        osl=max(2, round(float(outputs.mean()))),
        isl_variation=float(prompts.std() / prompts.mean()),
        osl_variation=float(outputs.std() / outputs.mean()),
        gap_variation=gap_variation,
        arrivals=tuple(arrivals),
        name=name,
    )


def _gap_variation(arrivals: Arrivals) -> float:
    """Standard deviation over mean of the gaps: bursts of b leave b − 1 gaps of nothing before each."""
    if arrivals.process is Process.CONSTANT:
        return 0.0
    if arrivals.process is Process.BURST:
        return math.sqrt(arrivals.burst - 1)
    return arrivals.variation if arrivals.process is Process.GAMMA else 1.0
