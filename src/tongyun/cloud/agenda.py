"""What is to happen at which moment, to engines that come there first."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush


class Agenda:
    """Actions in the order of their moments; equal moments in the order in which they were put down."""

    def __init__(self) -> None:
        # The number keeps the order of equal moments.
        self._entries: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0

    def __bool__(self) -> bool:
        return bool(self._entries)

    @property
    def next_s(self) -> float | None:
        """When the first of them is due; None where there is none."""
        return self._entries[0][0] if self._entries else None

    def put(self, moment_s: float, action: Callable[[], None]) -> None:
        self._serial += 1
        heappush(self._entries, (moment_s, self._serial, action))

    def advance(self, until_s: float, all_to: Callable[[float], None]) -> None:
        """Take everybody to `until_s` with `all_to`, by way of all that happens until then.

        What an action puts down until then happens too.
        """
        while self._entries and self._entries[0][0] <= until_s:
            moment_s, _, action = heappop(self._entries)
            all_to(moment_s)
            action()
        all_to(until_s)
