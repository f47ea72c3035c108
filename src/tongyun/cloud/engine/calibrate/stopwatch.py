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
WARM_CALLS, WARM_S = 5, 12e-3
"""Calls before a reading, and the seconds after which they are enough. A processor whose outer cache
takes what the inner ones drop finds a call's data there after the fourth call at the earliest, and a model
that runs has called often."""

LEAST_REPEATS, MOST_REPEATS = 3, 15
LONG_S = 12e-3
"""A call of this length is timed once at a visit."""
QUEUED = 24
"""Calls of a GPU that are captured and replayed together."""
FEW = 8
"""Calls by which the host's part is told."""

Call = Callable[[], object]


def typical(readings: Sequence[float], chosen: Sequence[int] | None = None) -> float:
    """The mean of readings, all or those chosen, less the smallest and the largest of four or more."""
    ranked = sorted(readings if chosen is None else [readings[place] for place in chosen])
    return statistics.fmean(ranked[1:-1] if len(ranked) >= 4 else ranked)


class Stopwatch:
    """Times calls one after the other, each a little at every visit, about `budget_s`."""

    def __init__(self, calls: Sequence[Call], *, budget_s: float = 2e-3) -> None:
        self._calls, self._budget_s = calls, budget_s
        self._readings: list[list[float]] = [[] for _ in calls]

    def visit(self) -> None:
        """Time every call once more."""
        for call, readings in zip(self._calls, self._readings, strict=True):
            readings.append(self._visit(call, readings[-1] if readings else None))

    def seconds(self, visits: Sequence[int] | None = None) -> list[float]:
        """Seconds of one call of each, of all visits or of these."""
        return [typical(readings, visits) for readings in self._readings]

    def host_s(self, visits: Sequence[int] | None = None) -> list[float] | None:
        """Seconds of the host in one call of each, where it does not wait for the device; else None."""
        return None

    def _visit(self, call: Call, known_s: float | None) -> float:
        """Median of a few readings."""
        once = self._warm(call) if known_s is None else known_s
        if known_s is not None and known_s < LONG_S:
            self._warm(call)
        burst = max(1, int(LONG_ENOUGH_S / max(once, 1e-9)))
        least = LEAST_REPEATS if once < LONG_S else 1
        repeats = min(max(int(self._budget_s / max(once * burst, 1e-9)), least), MOST_REPEATS)
        return statistics.median(self._burst(call, burst) for _ in range(repeats))

    def _warm(self, call: Call) -> float:
        """Bring what a call reads to where it is while a model runs; seconds of the last call."""
        spent_s = took_s = 0.0
        for _ in range(WARM_CALLS):
            took_s = self._burst(call, 1)
            spent_s += took_s
            if spent_s > WARM_S:
                break
        return took_s

    def _burst(self, call: Call, times: int) -> float:
        begun = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - begun) / times


class QueueStopwatch(Stopwatch):
    """Times calls that a host puts on a GPU's queue: what each takes of the GPU, and of the host.

    The host's part is what putting calls on an empty queue takes. For the GPU's the calls are
    captured and replayed, as the engine does with decoding steps: between two events there
    is then nothing but the GPU's work. A call that reads a result back cannot be captured: its
    seconds are those of the host, which waits.
    """

    def __init__(self, calls: Sequence[Call], waiting: Sequence[bool]) -> None:
        super().__init__(calls)
        self._waiting = waiting
        self._host_readings: list[list[float]] = [[] for _ in calls]
        self._graphs: list[torch.cuda.CUDAGraph | None] = []
        self._pool = torch.cuda.graph_pool_handle()

    def visit(self) -> None:
        if not self._graphs:
            self._graphs = [
                None if waits else self._captured(call)
                for call, waits in zip(self._calls, self._waiting, strict=True)
            ]
        for place, (call, graph) in enumerate(zip(self._calls, self._graphs, strict=True)):
            host_s = self._host(call)
            self._host_readings[place].append(host_s)
            self._readings[place].append(host_s if graph is None else self._replayed(graph))

    def host_s(self, visits: Sequence[int] | None = None) -> list[float] | None:
        return [typical(readings, visits) for readings in self._host_readings]

    def _captured(self, call: Call) -> torch.cuda.CUDAGraph:
        """Some calls, one after the other."""
        # What is compiled or chosen at the first call is not to be captured.
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            for _ in range(QUEUED):
                call()
        return graph

    @staticmethod
    def _host(call: Call) -> float:
        call()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(FEW):
            call()
        took_s = (time.perf_counter() - begun) / FEW
        torch.cuda.synchronize()
        return took_s

    @staticmethod
    def _replayed(graph: torch.cuda.CUDAGraph) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        # Once before, so that the clock runs while the queue is read.
        graph.replay()
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / QUEUED


def stopwatch(
    calls: Sequence[Call], device: torch.device, *, waiting: Sequence[bool] | None = None
) -> Stopwatch:
    """What times calls on `device`; `waiting` are those that read a result back from it."""
    if device.type == "cuda":
        return QueueStopwatch(calls, [False] * len(calls) if waiting is None else waiting)
    return Stopwatch(calls)
