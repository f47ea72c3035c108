"""How long a call takes on a device, told from the noise of a shared machine.

A machine is quicker in one moment than in the next: neighbours, clocks, other programs.
What is to be compared is therefore visited in turns, a little each time. A reading is the
mean of the visits without their extremes: where visits are either quick or slow, a median
would be the one or the other by chance, and steps that consist of many calls feel the mean.
Within a visit it is the median, which a single interruption does not move. Knows nothing of
what is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

LONG_ENOUGH_S = 50e-6
"""Shorter calls are timed several at once, so that reading the clock does not count."""
LONG_S = 3e-3
"""A call of this length needs no other before it to warm up the caches."""

MOST_REPEATS = 15

Call = Callable[[], object]


def typical(readings: Sequence[float], chosen: Sequence[int] | None = None) -> float:
    """The mean of readings, all or those chosen, less the smallest and the largest of four or more."""
    ranked = sorted(readings if chosen is None else [readings[place] for place in chosen])
    return statistics.fmean(ranked[1:-1] if len(ranked) >= 4 else ranked)


class Stopwatch:
    """Times calls on `device`, each a little at every visit; `budget_s` is what one takes at a visit."""

    def __init__(self, calls: Sequence[Call], device: torch.device, *, budget_s: float = 2e-3) -> None:
        self._calls, self._device, self._budget_s = calls, device, budget_s
        self._readings: list[list[float]] = [[] for _ in calls]

    def visit(self) -> None:
        """Time every call once more."""
        for call, readings in zip(self._calls, self._readings, strict=True):
            readings.append(self._visit(call, readings[-1] if readings else None))

    def seconds(self, visits: Sequence[int] | None = None) -> list[float]:
        """Seconds of one call of each, of all visits or of these."""
        return [typical(readings, visits) for readings in self._readings]

    def _visit(self, call: Call, known_s: float | None) -> float:
        """Median of a few readings; on a GPU the queue is emptied before and after each."""
        if known_s is None or known_s < LONG_S:
            call()
        once = self._burst(call, 1) if known_s is None else known_s
        burst = max(1, int(LONG_ENOUGH_S / max(once, 1e-9)))
        repeats = min(max(int(self._budget_s / max(once * burst, 1e-9)), 1), MOST_REPEATS)
        return statistics.median(self._burst(call, burst) for _ in range(repeats))

    def _burst(self, call: Call, times: int) -> float:
        self._settle()
        begun = time.perf_counter()
        for _ in range(times):
            call()
        self._settle()
        return (time.perf_counter() - begun) / times

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
