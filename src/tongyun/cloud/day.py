"""How a load rises and falls over a day.

A curve says how many times its mean the rate is at each moment, repeats every period and is one on
average. Arrivals of constant rate become arrivals of that rate by stretching time (Cinlar 1975): the
k-th comes at the t for which t and the curve's swing up to it add up to when it came at the mean rate.
Knows no requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tongyun.errors import InputError

Array = NDArray[np.float64]
DAY_S = 86_400.0
_HALVINGS = 64
"""Of a bracket no wider than a period: to the last bit of a float."""


class Curve(Protocol):
    """A rate over its mean, in time."""

    def factor(self, moments_s: Array) -> Array:
        """How many times the mean rate it is at each moment."""

    def stretch(self, even_s: Array) -> Array:
        """When arrivals come that at the mean rate would come at `even_s`, both ascending from 0."""


@dataclass(frozen=True, kw_only=True)
class Wave:
    """1 + swing · cos(2π (t + begin − peak) / period)."""

    swing: float
    """From 0, a constant rate, to 1, at which the rate falls to nothing half a period from its peak."""
    peak_s: float
    period_s: float = DAY_S
    begin_s: float = 0.0
    """The moment of the day at which the load begins."""

    def __post_init__(self) -> None:
        if not 0 <= self.swing <= 1:
            raise InputError(f"workload: day.swing: must be from 0 to 1, not {self.swing}")
        _check_period(self.period_s)

    def factor(self, moments_s: Array) -> Array:
        turn = 2 * math.pi / self.period_s
        return np.asarray(1 + self.swing * np.cos(turn * (moments_s + self.begin_s - self.peak_s)))

    def stretch(self, even_s: Array) -> Array:
        turn, phase_s = 2 * math.pi / self.period_s, self.begin_s - self.peak_s
        most_s = self.swing / turn

        def whole(moments_s: Array) -> Array:
            """The integral of `factor` from 0."""
            waves = np.sin(turn * (moments_s + phase_s)) - math.sin(turn * phase_s)
            return np.asarray(moments_s + most_s * waves)

        low, high = np.maximum(even_s - 2 * most_s, 0.0), even_s + 2 * most_s
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            early = whole(middle) < even_s
            low, high = np.where(early, middle, low), np.where(early, high, middle)
        return np.asarray(np.maximum.accumulate(high))


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A period in equal parts, each with a factor of its own; they are scaled to a mean of one."""

    factors: tuple[float, ...]
    period_s: float = DAY_S
    begin_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.factors or not all(0 <= one < math.inf for one in self.factors) or not sum(self.factors):
            raise InputError("workload: day.hourly: must be numbers from 0 on that are not all 0")
        _check_period(self.period_s)

    def factor(self, moments_s: Array) -> Array:
        scaled = _scaled(self.factors)
        place = np.floor((moments_s + self.begin_s) / self.period_s % 1 * len(scaled)).astype(np.int64)
        return np.asarray(scaled[np.minimum(place, len(scaled) - 1)])

    def stretch(self, even_s: Array) -> Array:
        scaled = _scaled(self.factors)
        knots_s = np.linspace(0.0, self.period_s, len(scaled) + 1)
        # At every knot, the integral of the factor from the day's beginning: a whole period has itself.
        whole_s = np.concatenate(([0.0], np.cumsum(scaled))) * (self.period_s / len(scaled))
        before_s = self.begin_s // self.period_s * self.period_s
        before_s += float(np.interp(self.begin_s % self.period_s, knots_s, whole_s))
        # In what is empty nothing comes: of knots at the same integral the last one counts.
        days, rest_s = np.divmod(even_s + before_s, self.period_s)
        place = np.clip(np.searchsorted(whole_s, rest_s, side="right") - 1, 0, len(scaled) - 1)
        rate = np.where(scaled[place] > 0, scaled[place], 1.0)
        within_s = np.minimum(knots_s[place] + (rest_s - whole_s[place]) / rate, self.period_s)
        moments_s = days * self.period_s + within_s - self.begin_s
        return np.asarray(np.maximum(np.maximum.accumulate(moments_s), 0.0))


def _scaled(factors: Sequence[float]) -> Array:
    values = np.asarray(factors, dtype=np.float64)
    return np.asarray(values / values.mean())


def _check_period(period_s: float) -> None:
    if not 0 < period_s < math.inf:
        raise InputError(f"workload: day.period: must be a positive time, not {period_s}")
