"""How long a call takes on a device, told from the noise of a shared machine.

A reading is the median of repeats inside a small budget of time. Decides how often a
call is repeated; knows nothing of what is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

LONG_ENOUGH_S = 100e-6
"""Shorter calls are timed several at once, so that reading the clock does not count."""


@dataclass(frozen=True, kw_only=True)
class Stopwatch:
    """Times calls on `device`; `budget_s` is what one reading may cost, warm-up apart."""

    device: torch.device
    budget_s: float = 0.02
    least: int = 3
    most: int = 50

    def seconds(self, call: Callable[[], object]) -> float:
        """Median seconds of one call. On a GPU the queue is emptied before and after a reading."""
        call()
        once = self._burst(call, 1)
        burst = max(1, int(LONG_ENOUGH_S / max(once, 1e-9)))
        repeats = int(self.budget_s / max(once * burst, 1e-9))
        repeats = min(max(repeats, self.least), self.most)
        return statistics.median(self._burst(call, burst) for _ in range(repeats))

    def _burst(self, call: Callable[[], object], times: int) -> float:
        self._settle()
        begun = time.perf_counter()
        for _ in range(times):
            call()
        self._settle()
        return (time.perf_counter() - begun) / times

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
