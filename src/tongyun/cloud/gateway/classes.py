"""Decide what class of service a request is of, from what its client or a proxy before us says.

A name and nothing else crosses the wire: how much a class is worth is the server's to say,
so that no client can put itself before all others by a number of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tongyun.errors import RequestError, unknown

HEADER = "x-priority-class"
"""Goes before the body: a proxy sets it by who asks, and its clients cannot."""
FIELD = "service_tier"
"""OpenAI's name for it in a body."""
PLAIN = frozenset({"auto", "default"})
"""Tiers by which OpenAI's clients ask for nothing in particular."""


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes that requests may name; where there are none, none is read."""

    priorities: Mapping[str, int] = field(default_factory=dict)
    """Of each class; higher runs first, and a request without a class has 0."""

    def of(self, header: str | None, tier: str | None) -> tuple[str | None, int]:
        """Class and priority of a request; RequestError where it names a class that is not there."""
        priorities = self.priorities
        if not priorities:
            return None, 0
        name, said = (tier, FIELD) if header is None else (header, HEADER)
        if name is None:
            return None, 0
        if name in priorities:
            return name, priorities[name]
        if name in PLAIN:
            return None, 0
        raise RequestError(unknown(said, name, tuple(priorities)), param=said, code="invalid_value")
