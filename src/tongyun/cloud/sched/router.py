"""Choose which engine a request goes to.

Pure policies over what each engine reports: a simulated fleet and a gateway before real
engines ask the same objects. A router remembers where it sent what and nothing else; it
knows no clock and no engine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from tongyun.cloud.sched.freeness import Load, freeness
from tongyun.cloud.sched.prefix import block_keys
from tongyun.cloud.sched.request import Request
from tongyun.errors import InputError, unknown

__all__ = [
    "ROUTERS",
    "Freest",
    "LeastLoad",
    "Load",
    "PrefixAware",
    "Remembering",
    "RoundRobin",
    "Router",
    "find_router",
]

PREFIX_TOKENS = 512
"""Prefixes are compared in blocks of so many tokens: coarse, for a router sees every prompt whole."""
SLACK, IMBALANCE = 8, 1.5
"""An engine with this many requests more than the least loaded one, and so many times as many, is
spared even where it holds the prefix (the rule of cache-aware routing in SGLang's router)."""
MOST_KEYS = 1_000_000


class Router(Protocol):
    """Tells an engine for each request, in the order of arrival."""

    def choose(self, request: Request, loads: Sequence[Load]) -> int:
        """The index of an engine in `loads`."""


@runtime_checkable
class Remembering(Protocol):
    """A router that counts on what engines hold."""

    def forget(self, engine: int) -> None:
        """That engine has lost what it held."""


class RoundRobin:
    """One after the other, whatever they have to do."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, request: Request, loads: Sequence[Load]) -> int:
        chosen = self._next % len(loads)
        self._next = chosen + 1
        return chosen


class LeastLoad:
    """The engine with the fewest requests in flight; of equals, the fewest prompt tokens to come."""

    def choose(self, request: Request, loads: Sequence[Load]) -> int:
        return _least(loads, range(len(loads)))


class Freest:
    """The engine that can decode on for the most steps before its blocks run out, all who wait there
    included (see `freeness`); of equals, the least load."""

    def __init__(self, headroom: Mapping[str, float] | None = None) -> None:
        self._headroom = headroom or {}

    def choose(self, request: Request, loads: Sequence[Load]) -> int:
        frees = [freeness(load, self._headroom, whole_queue=True) for load in loads]
        return min(range(len(loads)), key=lambda index: (-frees[index], loads[index][:2], index))


class PrefixAware:
    """Where most of the prompt's beginning was sent before, unless that engine has far more to do."""

    def __init__(self, *, most_keys: int = MOST_KEYS) -> None:
        self._most = most_keys
        # Which engines were sent a prefix, as bits; least recently used first.
        self._sent: OrderedDict[bytes, int] = OrderedDict()

    def choose(self, request: Request, loads: Sequence[Load]) -> int:
        keys = block_keys(request.prompt, PREFIX_TOKENS)
        engines = [index if load.engine is None else load.engine for index, load in enumerate(loads)]
        holders = self._holders(keys, engines)
        least = _least(loads, range(len(loads)))
        chosen = _least(loads, holders) if holders else least
        ahead = loads[chosen].requests - loads[least].requests
        if ahead > SLACK and loads[chosen].requests > IMBALANCE * loads[least].requests:
            chosen = least
        self._remember(keys, engines[chosen])
        return chosen

    def forget(self, engine: int) -> None:
        """No prefix is there any more."""
        others = ~(1 << engine)
        self._sent = OrderedDict((key, left) for key, sent in self._sent.items() if (left := sent & others))

    def _holders(self, keys: Sequence[bytes], engines: Sequence[int]) -> list[int]:
        """Which of these engines were sent the longest known beginning; none where nobody was."""
        found, up = 0, sum(1 << engine for engine in engines)
        for key in keys:
            sent = self._sent.get(key, 0) & up
            left = sent & found if found else sent
            if not left:
                break
            found = left
        return [index for index, engine in enumerate(engines) if found >> engine & 1]

    def _remember(self, keys: Sequence[bytes], engine: int) -> None:
        for key in keys:
            self._sent[key] = self._sent.get(key, 0) | 1 << engine
            self._sent.move_to_end(key)
        while len(self._sent) > self._most:
            self._sent.popitem(last=False)


ROUTERS: dict[str, Callable[[], Router]] = {
    "round-robin": RoundRobin,
    "least-load": LeastLoad,
    "prefix": PrefixAware,
    "freeness": Freest,
}


def find_router(name: str, *, headroom: Mapping[str, float] | None = None) -> Router:
    """A fresh router by name; InputError with near names. `headroom` is for one that measures freeness."""
    if name not in ROUTERS:
        raise InputError(unknown("router", name, ROUTERS))
    return Freest(headroom) if ROUTERS[name] is Freest else ROUTERS[name]()


def _least(loads: Sequence[Load], among: Sequence[int]) -> int:
    return min(among, key=lambda index: (loads[index][:2], index))
