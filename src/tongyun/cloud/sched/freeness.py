"""How free an engine is, in decode steps that its batch can still take before its blocks run out.

The measure of Llumnix (Sun et al., OSDI 2024): blocks of the engine without those in use *virtually*,
over the requests that share them. What a waiting request will need counts as used although nobody
holds it, and so does the headroom of a class of service. Knows numbers only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple


class Room(NamedTuple):
    """An engine's KV blocks and places at this moment."""

    blocks: int
    block_tokens: int
    free_blocks: int
    """Without those that admission keeps for running requests to grow into; may be below zero."""
    running: int
    """Requests that hold blocks, those on their way here included."""
    waiting: int
    head_blocks: int
    """What the next to be admitted needs."""
    waiting_blocks: int
    """What all who wait need."""
    places: int
    """Requests more that may run."""


EMPTY = Room(0, 1, 0, 0, 0, 0, 0, 0)


class Load(NamedTuple):
    """What an engine has to do at this moment."""

    requests: int
    """In flight: waiting, in prefill and decoding."""
    prompt_tokens: int
    """Of requests that have no first token yet."""
    room: Callable[[], Room] = lambda: EMPTY
    """Told to who asks: most routers do not."""
    classes: Mapping[str, int] = {}
    """Requests in flight by class of service, where they name one."""
    up: bool = True
    """Whether it is given requests."""
    models: tuple[tuple[str, int, float], ...] = ()
    """Where several share the engine: by model, requests in flight, and the share of the engine's time that
    keeps their time between tokens. A model that only lies ready has none."""
    engine: int | None = None
    """Which engine it is, where some of them are not up; by default they are numbered as they stand."""


def freeness(load: Load, headroom: Mapping[str, float], *, whole_queue: bool) -> float:
    """Decode steps of the batch until blocks run out: F = (M - ΣV) / B, in tokens.

    M - ΣV are the free blocks without what waits (the `whole_queue`, or its head alone, which is what
    holds the others up) and without the share of all blocks that `headroom` keeps around the requests of a
    class that is here; B is the number of requests, at least one. Below zero where more is wanted than
    there is; without a place for who waits, never above zero.
    """
    room = load.room()
    urgent = sum(headroom.get(name, 0.0) for name, count in load.classes.items() if count)
    wanted = room.waiting_blocks if whole_queue else room.head_blocks
    left = room.free_blocks - wanted - urgent * room.blocks
    requests = room.running + (room.waiting if whole_queue else min(room.waiting, 1))
    steps = left * room.block_tokens / max(requests, 1)
    return min(steps, 0.0) if room.waiting and room.places <= 0 else steps
