"""Find accesses that nothing keeps in order.

SRAM: a vector clock for each engine's queue. An instruction starts after its queue's last one, after the
control flow that issued it and after the tokens it takes; two accesses to the same bytes, one of them
a write, must be ordered so. HBM: between two barriers, what one core wrote no other core may touch,
and no core may read. Bytes are watched in granules of four.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from tongyun.chip.ppu.isa import Engine

GRANULE = 4
_ENGINES = {engine: number for number, engine in enumerate(Engine)}
_CONTROL = _ENGINES[Engine.CONTROL]
_NAMES = [engine.value for engine in Engine]

Clock = NDArray[np.int64]


class SramRaces:
    """The clocks of one core, and when each granule was last read and written by each engine."""

    def __init__(self, size: int) -> None:
        engines = len(_ENGINES)
        self._clock = np.zeros((engines, engines), dtype=np.int64)
        self._now = np.zeros(engines, dtype=np.int64)
        self._written = np.zeros((size // GRANULE + 1, engines), dtype=np.int32)
        self._read = np.zeros((size // GRANULE + 1, engines), dtype=np.int32)

    def begin(self, engine: Engine, tokens: Iterable[Clock]) -> None:
        """An instruction of `engine` starts: it knows its queue, its issuer, and its tokens' givers."""
        at = _ENGINES[engine]
        clock = np.maximum(self._clock[at], self._clock[_CONTROL])
        for token in tokens:
            clock = np.maximum(clock, token)
        clock[at] += 1
        self._clock[at] = clock

    def end(self, engine: Engine) -> Clock:
        """The token its signals carry."""
        clock: Clock = self._clock[_ENGINES[engine]].copy()
        return clock

    def barrier(self) -> None:
        self._clock[:] = self._clock.max(axis=0)

    def access(
        self, engine: Engine, at: int, rows: int, width: int, stride: int, *, writes: bool
    ) -> str | None:
        """Record an access to `rows` stretches of `width` bytes; the problem, if it races."""
        me, clock = _ENGINES[engine], self._clock[_ENGINES[engine]]
        if stride == width or rows == 1:
            where: slice | NDArray[np.int64] = slice(at // GRANULE, (at + rows * width - 1) // GRANULE + 1)
        else:
            each = np.arange(at // GRANULE, (at + width - 1) // GRANULE + 1)
            where = ((np.arange(rows) * stride)[:, None] // GRANULE + each).ravel()
        # An engine's own entries never exceed its clock, so they pass by themselves.
        for kind, seen in (("wrote", self._written), ("reads", self._read))[: 2 if writes else 1]:
            latest = seen[where].max(axis=0)
            for other in np.flatnonzero(latest > clock):
                deed = "writes" if writes else "reads"
                theirs = f"{_NAMES[other]} {kind}"
                return f"race: {_NAMES[me]} {deed} SRAM near {at} that {theirs}, and nothing orders them"
        (self._written if writes else self._read)[where, me] = clock[me]
        return None


class HbmRaces:
    """Who touched each granule of HBM since the last barrier."""

    def __init__(self, size: int) -> None:
        self._written = np.zeros(size // GRANULE + 1, dtype=np.int32)
        self._read = np.zeros(size // GRANULE + 1, dtype=np.int32)
        self._epoch = 1

    _SPAN = 1 << 12
    """More than the cores of a chip; an entry is epoch · SPAN + core."""

    def barrier(self) -> None:
        self._epoch += 1
        if self._epoch * self._SPAN > 2**30:
            self._written[:] = 0
            self._read[:] = 0
            self._epoch = 1

    def access(self, starts: NDArray[np.int64], width: int, core: int, *, writes: bool) -> str | None:
        """Record an access to stretches of `width` bytes at `starts`; the problem, if it races."""
        each = np.arange((width + GRANULE - 1) // GRANULE)
        where = (np.asarray(starts)[:, None] // GRANULE + each).ravel()
        begun, mine = self._epoch * self._SPAN, self._epoch * self._SPAN + core
        wrote = self._written[where]
        if writes:
            other = (wrote >= begun) & (wrote != mine)
            read = self._read[where]
            other |= (read >= begun) & (read != mine)
            self._written[where] = mine
        else:
            other = wrote >= begun
            self._read[where] = mine
        if other.any():
            first = int(where[int(np.argmax(other))]) * GRANULE
            deed = "writes" if writes else "reads"
            return f"race: {deed} HBM at {first}, which was touched since the last barrier"
        return None
