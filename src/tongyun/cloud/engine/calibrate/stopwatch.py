"""How long a call takes on a device, told from the noise of a shared machine.

A machine is quicker in one second than in the next: neighbours, clocks, other programs.
What is to be compared is therefore visited in turns, a little each time, and a reading is
the mean over the visits; within a visit it is the median, which a single interruption does
not move. Knows nothing of what is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

LONG_ENOUGH_S = 50e-6
"""Shorter calls are timed several at once, so that reading the clock does not count."""
LONG_S = 3e-3
"""A call of this length needs no other before it to warm up the caches."""

Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Stopwatch:
    """Times calls on `device`; `budget_s` is what one visit may cost beyond a first call."""

    device: torch.device
    budget_s: float = 2e-3
    visits: int = 5
    most: int = 15

    def seconds(
        self, calls: Sequence[Call], visited: Callable[[int], object] = lambda _: None
    ) -> list[float]:
        """Seconds of one call of each, over all visits; `visited` is told after every round."""
        readings: list[list[float]] = [[] for _ in calls]
        for visit in range(self.visits):
            for call, read in zip(calls, readings, strict=True):
                read.append(self._visit(call, read[-1] if read else None))
            visited(visit + 1)
        return [statistics.fmean(read) for read in readings]

    def _visit(self, call: Call, known_s: float | None) -> float:
        """Median of a few readings; on a GPU the queue is emptied before and after each."""
        if known_s is None or known_s < LONG_S:
            call()
        once = self._burst(call, 1) if known_s is None else known_s
        burst = max(1, int(LONG_ENOUGH_S / max(once, 1e-9)))
        repeats = min(max(int(self.budget_s / max(once * burst, 1e-9)), 1), self.most)
        return statistics.median(self._readings(call, burst, repeats))

    def _readings(self, call: Call, burst: int, repeats: int) -> Iterator[float]:
        for _ in range(repeats):
            yield self._burst(call, burst)

    def _burst(self, call: Call, times: int) -> float:
        self._settle()
        begun = time.perf_counter()
        for _ in range(times):
            call()
        self._settle()
        return (time.perf_counter() - begun) / times

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
