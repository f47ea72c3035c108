"""When those who look at a fleet again and again need look no more. Knows no reason to look."""

from __future__ import annotations

from collections.abc import Callable

from tongyun.cloud.front import Fronts

MOST_LOOKS = 10_000
"""Looks in a row at requests that wait while no engine works, all having arrived; then they are lost."""


class Ending:
    """The end of a load on one fleet."""

    def __init__(self, fleet: Fronts) -> None:
        self._fleet = fleet
        self.closing = False
        """Whether all requests have arrived."""

    def watch(self) -> Callable[[], bool]:
        """A question for every look: whether nobody is left, or who is left has waited in vain for long."""
        looks = 0

        def over() -> bool:
            nonlocal looks
            if not self.closing:
                return False
            held = sum(front.held for front in self._fleet.fronts)
            looks = looks + 1 if held == self._fleet.in_flight else 0
            return not self._fleet.in_flight or looks > MOST_LOOKS

        return over
