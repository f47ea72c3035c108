"""Keep those who work for an engine off the core that it needs most.

The thread of an engine's loop computes all the time; its gateway and a load generator on
the same machine run in short bursts. Where they run on its core it waits for them,
and so does every operation that it shares out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

Cores = frozenset[int]


def given() -> Cores | None:
    """Cores that this thread may use; None where a system knows no affinity."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


@contextmanager
def on(cores: Cores | None) -> Iterator[None]:
    """Let this thread, and what it starts, use these cores until the block's end."""
    before = given()
    if cores is not None:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        if before is not None:
            os.sched_setaffinity(0, before)


def stand_aside(engines: int = 1) -> None:
    """Leave as many cores to the loops of engines: this thread, and those it starts, use the others.

    Nothing happens where none would be left, or where a system knows no affinity.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > engines:
            os.sched_setaffinity(0, cores[engines:])


@contextmanager
def aside(engines: int = 1) -> Iterator[None]:
    """As `stand_aside`, until the block's end."""
    with on(given()):
        stand_aside(engines)
        yield
