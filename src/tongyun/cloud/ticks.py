"""Look at a front's engines at every multiple of an interval, as long as one of them has a request.

Begins again when somebody is given one, so that the end of a simulation need not wait for looks.
"""

from __future__ import annotations

from collections.abc import Callable

from tongyun.cloud.front import Front


class Ticks:
    """Looks of one observer; a front has one."""

    def __init__(self, front: Front, interval_s: float, look: Callable[[float], bool]) -> None:
        """`look` is told the moment, and says whether there is anything to look at again."""
        self._front, self._interval_s, self._look = front, interval_s, look
        self._ticking = False
        front.roused = self._wake

    def _wake(self, now_s: float) -> None:
        if not self._ticking:
            self._ticking = True
            tick = int(now_s / self._interval_s) + 1
            # A product rounded down would be the same tick again.
            self._at(tick, max(tick * self._interval_s, now_s))

    def _at(self, tick: int, moment_s: float) -> None:
        self._front.at(moment_s, lambda: self._tick(tick, moment_s))

    def _tick(self, tick: int, now_s: float) -> None:
        if self._look(now_s):
            self._at(tick + 1, (tick + 1) * self._interval_s)
        else:
            self._ticking = False
