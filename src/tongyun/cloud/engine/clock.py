"""Two ways for time to pass.

The engine asks what time it is and waits until a moment; whether waiting takes any real
time is decided here and nowhere else.
"""

from __future__ import annotations

import time


class VirtualClock:
    """Time that passes only when somebody waits."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        return self._now_s

    def wait_until(self, moment_s: float) -> None:
        """Jump to `moment_s`; a moment in the past changes nothing."""
        self._now_s = max(self._now_s, moment_s)


class WallClock:
    """Monotonic seconds since an arbitrary start."""

    def now(self) -> float:
        return time.perf_counter()

    def wait_until(self, moment_s: float) -> None:
        """Sleep until `moment_s`; a moment in the past returns at once."""
        while (left_s := moment_s - time.perf_counter()) > 0:
            time.sleep(left_s)
