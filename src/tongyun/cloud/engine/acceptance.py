"""Which drafts are right where no model says so: drawn for a request and its place, and for nothing else.

The number drawn behind so many known tokens is hash(request) + known · γ, mixed as SplitMix64 mixes its
counter (Steele, Lea and Flood, OOPSLA 2014): any place can be asked for alone, or all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate, repeat
from operator import mul
from typing import Any

import numpy as np
from numpy.typing import NDArray

MASK = 2**64 - 1
GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def chances(acceptance: float, drafts: int) -> Sequence[float]:
    """Probabilities that the first one, two, … of the drafts are right: a, a², …"""
    return tuple(accumulate(repeat(acceptance, drafts), mul))


def right(name: str, known: int, chances: Sequence[float]) -> int:
    """How many drafts are right behind so many known tokens: m or more with the m-th chance."""
    return int(_right(name, known, chances))


def followed(name: str, known: int, limit: int, chances: Sequence[float]) -> NDArray[np.int64]:
    """Tokens known before each step from `known` on, which yields one and those `right`; `limit` last."""
    places = np.arange(known, limit, dtype=np.uint64)
    after = np.minimum(places.astype(np.int64) + 1 + _right(name, places, chances), limit).tolist()
    path, first = [known], known
    while known < limit:
        known = after[known - first]
        path.append(known)
    return np.array(path, dtype=np.int64)


def _right(name: str, known: Any, chances: Sequence[float]) -> Any:
    """Of one place, or of an array of them as uint64."""
    seed = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")
    mixed = seed + known * GAMMA & MASK
    mixed = (mixed ^ (mixed >> 30)) * FIRST & MASK
    mixed = (mixed ^ (mixed >> 27)) * SECOND & MASK
    # The 53 bits that a float holds.
    drawn = ((mixed ^ (mixed >> 31)) >> 11) * 2.0**-53
    return sum(drawn < chance for chance in chances)
