"""How long a call takes on a device, told from the noise of a shared machine.

A machine is quicker in one second than in the next: neighbours, clocks, other programs.
What is to be compared is therefore visited in turns, a little each time, and a reading is
the median of the visits, since neighbours on a shared host slow whole visits down; within a
visit it is the median too, which a single interruption does not move. Knows nothing of what
is measured.
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
QUEUED = 24
"""Calls that are put on a GPU's queue together, at most: a queue takes about a thousand kernels."""
QUEUED_S = 2e-3
"""What calls on a queue take together, about."""
HELD_CYCLES_PER_S = 2e9
"""A GPU's clock, or faster: what holds the queue while it fills may only be too long."""

Call = Callable[[], object]


class Stopwatch:
    """Times calls one after the other, each a little at every visit, about `budget_s`."""

    def __init__(self, calls: Sequence[Call], *, budget_s: float = 2e-3) -> None:
        self._calls, self._budget_s = calls, budget_s
        self._readings: list[list[float]] = [[] for _ in calls]

    def visit(self) -> None:
        """Time every call once more."""
        for call, readings in zip(self._calls, self._readings, strict=True):
            readings.append(self._visit(call, readings[-1] if readings else None))

    def seconds(self) -> list[float]:
        """Seconds of one call of each: the median over the visits so far."""
        return [statistics.median(readings) for readings in self._readings]

    def host_s(self) -> list[float] | None:
        """Seconds of the host in one call of each, where it does not wait for the device; else None."""
        return None

    def _visit(self, call: Call, known_s: float | None) -> float:
        """Median of a few readings."""
        if known_s is None or known_s < LONG_S:
            call()
        once = self._burst(call, 1) if known_s is None else known_s
        burst = max(1, int(LONG_ENOUGH_S / max(once, 1e-9)))
        repeats = min(max(int(self._budget_s / max(once * burst, 1e-9)), 1), MOST_REPEATS)
        return statistics.median(self._burst(call, burst) for _ in range(repeats))

    def _burst(self, call: Call, times: int) -> float:
        begun = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - begun) / times


class QueueStopwatch(Stopwatch):
    """Times calls that a host puts on a GPU's queue: what each takes of the GPU, and of the host.

    The host's part is what putting calls on an empty queue takes. The GPU's is the time
    between two events on a queue that is held until all of them are on it, so that it
    never waits for the host. A call that reads a result back waits itself: its seconds
    are then both.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        super().__init__(calls)
        self._host_readings: list[list[float]] = [[] for _ in calls]

    def visit(self) -> None:
        for place, call in enumerate(self._calls):
            readings = self._readings[place]
            if not readings:
                # What is compiled or chosen at the first call is not to be timed.
                call()
            times = min(QUEUED, max(2, int(QUEUED_S / readings[-1]))) if readings else 2
            host_s = self._host(call, times)
            self._host_readings[place].append(host_s)
            readings.append(self._queued(call, times, host_s))

    def host_s(self) -> list[float] | None:
        return [statistics.median(readings) for readings in self._host_readings]

    @staticmethod
    def _host(call: Call, times: int) -> float:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(times):
            call()
        took_s = (time.perf_counter() - begun) / times
        torch.cuda.synchronize()
        return took_s

    @staticmethod
    def _queued(call: Call, times: int, host_s: float) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        held = int(HELD_CYCLES_PER_S * (1.5 * times * host_s + 1e-4))
        torch.cuda._sleep(held)  # type: ignore[no-untyped-call]
        first.record()
        for _ in range(times):
            call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / times


def stopwatch(calls: Sequence[Call], device: torch.device) -> Stopwatch:
    """What times calls on `device`."""
    return QueueStopwatch(calls) if device.type == "cuda" else Stopwatch(calls)
