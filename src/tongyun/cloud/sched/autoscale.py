"""Decide how many instances a pool should have.

A pure policy over what a pool reports: a simulated fleet and a controller of real ones ask
the same object. It knows no clock (the caller passes `now_s` in), no engine and no price.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from math import ceil
from typing import NamedTuple

from tongyun.errors import InputError

TOLERANCE = 0.1
"""A measure this close to its target, in shares of it, moves nothing (as Kubernetes' horizontal scaler)."""


class By(StrEnum):
    """What is measured against the target."""

    REQUESTS = "requests"
    """Requests in flight an instance."""
    TOKENS = "tokens"
    """Prompt tokens an instance of requests that have no first token yet."""
    WAIT = "wait"
    """Seconds that the longest-waiting request without a first token has waited."""


class Seen(NamedTuple):
    """A pool at this moment."""

    up: int
    """Instances that are given requests."""
    coming: int
    """Instances that have been started and are not up yet."""
    requests: int
    """In flight on any instance and held before all."""
    prompt_tokens: int
    wait_s: float


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A target, and how far and how fast to go for it."""

    by: By
    target: float
    least: int
    most: int
    step: int | None = None
    """Instances started or stopped by one decision; None is any number."""
    cooldown_up_s: float = 0.0
    """From one start to the next."""
    cooldown_down_s: float = 300.0
    """Fewer instances only when never more were wanted for so long."""

    def __post_init__(self) -> None:
        if not 0 < self.target < float("inf"):
            raise InputError(f"autoscale: target: must be above 0, not {self.target}")
        if not 0 <= self.least <= self.most or self.most < 1:
            raise InputError(
                f"autoscale: min {self.least} and max {self.most}: accepted: 0 ≤ min ≤ max, 1 ≤ max"
            )


class Autoscaler:
    """One pool's; it remembers what it wanted of late and nothing else."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._wanted: deque[tuple[float, int]] = deque()
        self._started_s = -float("inf")

    def decide(self, now_s: float, seen: Seen) -> int:
        """How many instances there should be, those on their way included.

        wanted = ⌈have · measure / target⌉, which for sums over the pool is ⌈sum / target⌉,
        between least and most, and at least one while anybody is there to be served.
        """
        rule, have = self.rule, seen.up + seen.coming
        wanted = min(max(self._raw(seen, have), rule.least, int(seen.requests > 0)), rule.most)
        recent = self._wanted
        recent.append((now_s, wanted))
        while recent[0][0] < now_s - rule.cooldown_down_s:
            recent.popleft()
        if wanted > have:
            if now_s - self._started_s < rule.cooldown_up_s:
                return have
            self._started_s = now_s
            return wanted if rule.step is None else min(wanted, have + rule.step)
        wanted = min(have, max(each for _, each in recent))
        return wanted if rule.step is None else max(wanted, have - rule.step)

    def _raw(self, seen: Seen, have: int) -> int:
        rule = self.rule
        if rule.by is By.WAIT:
            # A wait tells nothing of how idle instances are: down by one, and see.
            if seen.wait_s > rule.target * (1 + TOLERANCE):
                return max(have + 1, ceil(have * seen.wait_s / rule.target))
            return have if seen.wait_s > rule.target / 2 else have - 1
        total = seen.requests if rule.by is By.REQUESTS else seen.prompt_tokens
        ratio = total / rule.target
        if have and abs(ratio / have - 1) <= TOLERANCE:
            return have
        return ceil(ratio)
