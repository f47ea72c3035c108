# ruff: noqa: RUF009 - `has` returns dataclasses.field, which is not evaluated per instance
"""What a fleet file's `[experts]` may say: how unevenly experts are picked, and what is done about it."""

from __future__ import annotations

from dataclasses import dataclass

from tongyun.specs.figure import FRACTION, RATIO, Figure
from tongyun.specs.form import Fact, Flag, Number, Text, Whole, has


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """Exactly one of `skew` and `counts` says how often each expert is picked."""

    skew: Figure | None = has(Fact(RATIO, more_is_better=False), default=None)
    """s: the r-th most picked expert is picked as r^-s; 0 picks all alike."""
    counts: str | None = has(Text(), default=None)
    """A CSV file of recorded counts: a line for each layer, a column for each expert."""
    rebalance: bool = has(Flag(), default=False)
    """Experts are placed by how often they were picked, not by their number."""
    redundant: int | None = has(Whole(), default=None)
    """Copies of much picked experts, over all ranks of a replica; they take memory."""
    drift: Figure | None = has(Fact(FRACTION, more_is_better=False), default=None)
    """Share of the picks that has moved to other experts since experts were placed."""
    drift_s: float | None = has(Number(least=1e-3), default=None)
    """Instead of once before the run, that share of the experts trade places every so many seconds."""
    window_s: float | None = has(Number(least=1e-3), default=None)
    """Seconds in which picks are counted; at their end experts are placed anew, again and again."""
    move_share: Figure | None = has(Fact(FRACTION), default=None)
    """Of a link's bandwidth, what weights on their way take from steps; without it steps stand still."""

    @property
    def during(self) -> bool:
        """Whether anything changes while a load is served."""
        return self.drift_s is not None or self.window_s is not None

    def problem(self) -> str | None:
        if (self.skew is None) == (self.counts is None):
            return "accepted: one of skew and counts"
        if not self.rebalance and (self.redundant is not None or self.drift is not None):
            return "redundant and drift need rebalance = true: else experts lie in the order of their number"
        return self._changing()

    def _changing(self) -> str | None:
        if self.window_s is not None and not self.rebalance:
            return "window_s needs rebalance = true: else experts lie in the order of their number"
        if self.drift_s is not None and self.drift is None:
            return "drift_s says how often picks drift; drift, which says how much, is missing"
        if self.move_share is not None and self.window_s is None:
            return "move_share is of weights that move after a window; window_s is missing"
        if self.move_share is not None and not 0 < self.move_share.value < 1:
            return "move_share: accepted: above 0 and below 1; without it steps stand still meanwhile"
        return None
