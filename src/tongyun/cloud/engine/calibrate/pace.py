"""Tell how fast the processors run while something else runs on them, and wait for calm.

On a shared host a processor is slower in one moment than in the next, by half or more, when
somebody else runs on the other thread of its core. No counter of a guest tells: its own time
simply buys less. A loop of plain Python in a process of its own, timed in processor time so
that waiting does not count, tells what it buys now. Knows nothing of what is measured.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import TypeVar

PERIOD_S = 0.04
LOOPS, WARMUP = 4000, 500
"""About 0.15 ms: with the period, less than a hundredth of one core."""
QUICK = 0.05
"""The share of samples that are quicker than what is called undisturbed."""
CALM = 1.10
"""Up to here what was measured meanwhile is taken as it is."""
MOST = 4
"""Times that one thing is measured, at most."""
LOOP = "loop_s"
"""Where a calibration's description of its machine keeps the seconds of the loop, undisturbed."""
PACE, SERVED_PACE = "pace", "served_pace"
"""Where it keeps how much slower they were: of operators and steps, and of serving."""

T = TypeVar("T")


def undisturbed_s(machine: Mapping[str, object]) -> float | None:
    """What a calibration kept of the loop, for `Pace`; None in one that was made before it did."""
    kept = machine.get(LOOP)
    return kept if isinstance(kept, float) else None


def served_pace(machine: Mapping[str, object]) -> float:
    """The pace when serving was calibrated; 1 where it was not kept."""
    kept = machine.get(SERVED_PACE)
    return kept if isinstance(kept, float) else 1.0


class Pace:
    """Samples the processors while the `with` block runs; 1.2 means they are a fifth slower than undisturbed.

    `quickest_s` are the loop's undisturbed seconds where they are known from before. What is
    measured in a disturbed moment is measured again, for `patience_s` seconds in all.
    """

    def __init__(self, *, quickest_s: float | None = None, patience_s: float = 0.0) -> None:
        self._quickest_s = quickest_s
        self._left_s = patience_s
        self._samples: list[float] = []
        self._taken: list[float] = []

    def __enter__(self) -> Pace:
        context = multiprocessing.get_context("spawn")
        self._line, there = context.Pipe()
        # No fork: it would copy the locks of PyTorch's threads.
        self._sampler = context.Process(target=_sample, args=(there,), daemon=True)
        self._sampler.start()
        there.close()
        self._line.recv()
        return self

    def __exit__(self, *error: object) -> None:
        self._line.close()
        self._sampler.join()

    @property
    def quickest_s(self) -> float:
        """Processor seconds of the loop when nothing disturbs it."""
        known = [self._quickest_s] if self._quickest_s is not None else []
        ranked = sorted(self._samples)
        return min([*known, *ranked[int(QUICK * len(ranked)) :][:1]])

    def taken(self) -> float:
        """The mean pace of what `calmly` and `rounds` took since this was last asked."""
        taken, self._taken = self._taken, []
        return statistics.fmean(taken or [1.0])

    def read(self) -> float:
        """The mean pace since the last reading; 1 where that was too short to tell."""
        self._line.send(None)
        new: list[float] = self._line.recv()
        self._samples += new
        return statistics.fmean(new) / self.quickest_s if new else 1.0

    def calmly(self, call: Callable[[], T]) -> tuple[T, float]:
        """What `call` returned in the calmest of a few tries, the last of which is calm if any; its pace."""
        tries = [self._paced(call)]
        while tries[-1][1] > CALM and len(tries) < MOST and self._left_s > 0:
            tries.append(self._again(call))
        best = min(tries, key=lambda each: each[1])
        self._taken.append(best[1])
        return best

    def rounds(
        self, calls: Sequence[Callable[[], object]], count: int, tell: Callable[[float], object]
    ) -> tuple[tuple[int, ...], ...]:
        """Call all in turns until each was called `count` times in calm; of each, which were its calmest.

        `tell` hears the share of the rounds that are done.
        """
        paces: list[list[float]] = [[] for _ in calls]
        for number in range(MOST * count):
            tell(min(number / count, 1.0))
            wanting = [place for place, seen in enumerate(paces) if sum(p <= CALM for p in seen) < count]
            if not wanting or (number >= count and self._left_s <= 0):
                break
            for place in wanting:
                run = self._paced if number < count else self._again
                paces[place].append(run(calls[place])[1])
        self._taken += [pace for seen in paces for pace in sorted(seen)[:count]]
        return tuple(tuple(sorted(range(len(seen)), key=seen.__getitem__)[:count]) for seen in paces)

    def _paced(self, call: Callable[[], T]) -> tuple[T, float]:
        self.read()
        return call(), self.read()

    def _again(self, call: Callable[[], T]) -> tuple[T, float]:
        """As before, on the patience there is."""
        begun = time.monotonic()
        try:
            return self._paced(call)
        finally:
            self._left_s -= time.monotonic() - begun


def _sample(line: Connection) -> None:
    """The sampler's process: take a sample now and then, and send all new ones when asked."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    chance, samples = random.Random(0), list[float]()
    line.send(None)
    while True:
        if line.poll(PERIOD_S):
            try:
                line.recv()
            except EOFError:
                return
            line.send(samples)
            samples = []
        if cpus:
            os.sched_setaffinity(0, {chance.choice(cpus)})
        _loop(WARMUP)
        samples.append(_loop(LOOPS))


def _loop(times: int) -> float:
    """Seconds of processor time that a loop of plain Python takes."""
    begun, total = time.thread_time(), 0
    for number in range(times):
        total += number * number
    return time.thread_time() - begun
