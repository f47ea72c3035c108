"""What a fleet does over time, taken down as it is simulated, in memory that does not grow.

Engines tell of stretches of steps (see `Tape`), so that a leap is one entry. Levels and
rates are integrated exactly into equal parts of the run; the parts double when the run
outlasts them. Outside its steps an engine has no requests and every level is zero. Knows
no scheduler and no price.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tongyun.cloud.engine.protocol import Stretch, Tape
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.sched.migrate import Traveller
from tongyun.cloud.sched.request import Finish, Piece, Request

Array = NDArray[np.float64]

PARTS = 2048
"""Of a run, at most; at least half as many once it has lasted a few seconds."""
LEVELS = 2000
"""Of occupancy that are told apart: half a thousandth of the cache each."""
_HELD = 4096
"""Stretches an engine keeps before they are summed up."""
_FIRST_S = 2.0**-10
COLUMNS = ("busy", "running", "waiting", "kv_blocks", "decode_tokens", "prompt_tokens", "steps", "joined")
"""Integrals over a part: of levels in seconds, of rates in counts. `joined` is of requests that decode."""


@dataclass(frozen=True, kw_only=True)
class Occupancy:
    """Shares of an engine's KV blocks that requests hold, over time and the pool's engines."""

    mean: float
    p99: float
    """99 % of the time it is no more, to a two-thousandth."""
    most: float
    """The most that any engine held, exactly."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """What a pool's engines did together, in equal parts of the run; the last may be cut short."""

    role: str
    width_s: float
    """Of a part."""
    until_s: float
    running: Array
    """Requests with blocks, mean over the part; as the others, [parts]."""
    waiting: Array
    kv: Array
    """Share of all KV blocks that requests hold."""
    decode_tokens_per_s: Array
    prompt_tokens_per_s: Array
    batch: Array
    """Requests that decode in a step, mean over the time in steps; 0 where there is none."""
    steps_per_s: Array
    busy: Array
    """Share of the engines that are in a step."""
    engines: Array
    """Engines that are given requests, mean over the part."""

    @property
    def borders_s(self) -> Array:
        """Where parts begin, and the end of the last."""
        return np.asarray(np.minimum(np.arange(len(self.running) + 1) * self.width_s, self.until_s))

    def coarse(self, most: int) -> Series:
        """The same in no more than so many parts, each of several: exact means of theirs."""
        each = -(-len(self.running) // most)
        if each == 1:
            return self
        starts = np.arange(0, len(self.running), each)
        spans_s = np.maximum(np.diff(self.borders_s), 1e-12)

        def mean(values: Array, weights: Array) -> Array:
            whole = np.add.reduceat(weights, starts)
            top = np.add.reduceat(values * weights, starts)
            return np.asarray(np.divide(top, whole, out=np.zeros_like(top), where=whole > 0))

        plain = [name for name in LEVELS_AND_RATES if name != "batch"]
        means: dict[str, Any] = {name: mean(getattr(self, name), spans_s) for name in plain}
        batch = mean(self.batch, self.busy * spans_s)
        return replace(self, width_s=each * self.width_s, batch=batch, **means)


LEVELS_AND_RATES = (
    "running",
    "waiting",
    "kv",
    "decode_tokens_per_s",
    "prompt_tokens_per_s",
    "batch",
    "steps_per_s",
    "busy",
    "engines",
)
"""Fields of `Series` that have a value for each part."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A run over time, and what each of its requests felt."""

    records: tuple[RequestRecord, ...]
    occupancy: tuple[Occupancy, ...]
    """Of each pool, as are `series`."""
    series: tuple[Series, ...]


class Recorder:
    """Takes down what the engines of a run's pools do; one for each run.

    `also` gives further tapes for the engines of a pool (role, engines, blocks): told the same.
    """

    def __init__(self, also: Callable[[str, int, int], Sequence[Tape]] | None = None) -> None:
        self.width_s = _FIRST_S
        self._also = also
        self._pools: list[_Pool] = []

    def pool(self, role: str, engines: int, blocks: int) -> list[Tape]:
        """A tape for each engine of a pool, each with so many blocks."""
        pool = _Pool(role, engines, blocks)
        self._pools.append(pool)
        also = [None] * engines if self._also is None else self._also(role, engines, blocks)
        pool.tapes = [_EngineTape(self, pool, i, one) for i, one in enumerate(also)]
        return list(pool.tapes)

    def series(self, until_s: float) -> list[Series]:
        """Of each pool, up to `until_s`."""
        self._flush(until_s)
        parts = max(1, int(np.ceil(until_s / self.width_s)))
        spans_s = np.full(parts, self.width_s)
        spans_s[-1] = until_s - (parts - 1) * self.width_s
        return [self._series(pool, spans_s) for pool in self._pools]

    def occupancy(self, duration_s: float) -> list[Occupancy]:
        """Of each pool over so many seconds, in which all it did took place."""
        self._flush(0.0)
        return [pool.occupancy(duration_s) for pool in self._pools]

    def recording(self, records: Sequence[RequestRecord]) -> Recording:
        """What was taken down, with the records of the requests."""
        begin_s, end_s = min(one.arrival_s for one in records), max(one.ended_s for one in records)
        return Recording(
            records=tuple(records),
            occupancy=tuple(self.occupancy(end_s - begin_s)),
            series=tuple(self.series(end_s)),
        )

    def reach(self, moment_s: float) -> None:
        """Make the parts reach a moment."""
        while moment_s > PARTS * self.width_s:
            self.width_s *= 2
            for pool in self._pools:
                pairs = pool.parts.reshape(PARTS // 2, 2, len(COLUMNS)).sum(axis=1)
                pool.parts = np.concatenate((pairs, np.zeros_like(pairs)))

    def _flush(self, until_s: float) -> None:
        for pool in self._pools:
            for tape in pool.tapes:
                tape.flush()
        self.reach(until_s)

    def _series(self, pool: _Pool, spans_s: Array) -> Series:
        sums = pool.parts[: len(spans_s)]
        column = {name: sums[:, i] / spans_s for i, name in enumerate(COLUMNS)}
        busy = column["busy"]
        return Series(
            role=pool.role,
            width_s=self.width_s,
            until_s=float(spans_s.sum()),
            running=column["running"],
            waiting=column["waiting"],
            kv=column["kv_blocks"] / (pool.blocks * pool.engines),
            decode_tokens_per_s=column["decode_tokens"],
            prompt_tokens_per_s=column["prompt_tokens"],
            batch=np.divide(column["joined"], busy, out=np.zeros_like(busy), where=busy > 0),
            steps_per_s=column["steps"],
            busy=busy / pool.engines,
            engines=_up(pool.changes, pool.engines, self.width_s, spans_s),
        )


class _Pool:
    """Sums of equal engines."""

    def __init__(self, role: str, engines: int, blocks: int) -> None:
        self.role, self.engines, self.blocks = role, engines, blocks
        self.tapes: list[_EngineTape] = []
        self.changes: list[tuple[float, int, bool]] = []
        """Moments at which an engine began or ceased to be given requests."""
        self.parts = np.zeros((PARTS, len(COLUMNS)))
        self.levels_s = np.zeros(LEVELS + 1)
        """Seconds of engines at each level of occupancy."""
        self.blocks_s = 0.0
        self.most = 0

    def occupancy(self, duration_s: float) -> Occupancy:
        whole_s = duration_s * self.engines
        seconds = self.levels_s.copy()
        seconds[0] += max(whole_s - seconds.sum(), 0.0)
        place = int(np.searchsorted(np.cumsum(seconds), 0.99 * seconds.sum()))
        return Occupancy(
            mean=self.blocks_s / (whole_s * self.blocks),
            p99=min(place / LEVELS, self.most / self.blocks),
            most=self.most / self.blocks,
        )


class _EngineTape:
    """One engine's stretches, summed up a few thousand at a time."""

    def __init__(self, recorder: Recorder, pool: _Pool, index: int, also: Tape | None) -> None:
        self._recorder, self._pool, self._index, self._also = recorder, pool, index, also
        self._held: list[Stretch] = []

    def queued(self, request: Request) -> None:
        if self._also is not None:
            self._also.queued(request)

    def left(self, request_id: str, moment_s: float) -> None:
        if self._also is not None:
            self._also.left(request_id, moment_s)

    def arrived(self, traveller: Traveller, moment_s: float, decodes: bool) -> None:
        if self._also is not None:
            self._also.arrived(traveller, moment_s, decodes)

    def preempted(self, request_id: str, moment_s: float) -> None:
        if self._also is not None:
            self._also.preempted(request_id, moment_s)

    def turned(self, up: bool, moment_s: float) -> None:
        self._pool.changes.append((moment_s, self._index, up))
        if self._also is not None:
            self._also.turned(up, moment_s)

    def moved(self, begin_s: float, end_s: float, standing: bool) -> None:
        if self._also is not None:
            self._also.moved(begin_s, end_s, standing)

    def note(self, stretch: Stretch, pieces: Sequence[Piece], ended: Mapping[str, Finish]) -> None:
        self._held.append(stretch)
        if len(self._held) >= _HELD:
            self.flush()
        if self._also is not None:
            self._also.note(stretch, pieces, ended)

    def flush(self) -> None:
        """Add what is held to the pool's sums."""
        if not self._held:
            return
        rows = np.array(self._held, dtype=np.float64)
        self._held = []
        rows = rows[rows[:, 1] > rows[:, 0]]
        if not len(rows):
            return
        self._recorder.reach(float(rows[-1, 1]))
        _integrate(rows, self._pool.parts, self._recorder.width_s)
        _tally(rows, self._pool)


def _integrate(rows: Array, parts: Array, width_s: float) -> None:
    """Add to each part the integrals of `COLUMNS` over the stretches, which follow each other."""
    begin_s, end_s, steps, decoding, _, prompt, running, waiting, kv_begin, kv_end, accepted = rows.T
    spent_s = end_s - begin_s
    ones = np.ones_like(spent_s)
    level = np.stack(
        (
            ones,
            running,
            waiting,
            kv_begin,
            (steps * decoding + accepted) / spent_s,
            prompt / spent_s,
            steps / spent_s,
            decoding,
        ),
        axis=1,
    )
    rise = np.zeros_like(level)
    rise[:, COLUMNS.index("kv_blocks")] = (kv_end - kv_begin) / spent_s
    each = level * spent_s[:, None] + rise * (spent_s**2 / 2)[:, None]
    before = np.concatenate((np.zeros((1, len(COLUMNS))), np.cumsum(each, axis=0)))
    first, last = int(begin_s[0] // width_s), min(int(end_s[-1] // width_s), PARTS - 1)
    borders_s = np.arange(first, last + 2) * width_s
    # Up to each border: the stretches before the one it lies in or after, and its part of that one.
    place = np.clip(np.searchsorted(begin_s, borders_s, side="right") - 1, 0, None)
    into_s = np.clip(borders_s - begin_s[place], 0.0, spent_s[place])[:, None]
    upto = before[place] + level[place] * into_s + rise[place] * (into_s**2 / 2)
    parts[first : last + 1] += np.diff(upto, axis=0)


def _tally(rows: Array, pool: _Pool) -> None:
    """Add the stretches to the pool's distribution of occupancy."""
    spent_s, kv_begin, kv_end = rows[:, 1] - rows[:, 0], rows[:, 8], rows[:, 9]
    pool.blocks_s += float((spent_s * (kv_begin + kv_end)).sum() / 2)
    pool.most = max(pool.most, int(kv_end.max()), int(kv_begin.max()))
    # A stretch that grows through several levels spends its time in them evenly.
    scale = LEVELS / pool.blocks
    pieces = np.maximum(np.ceil(np.abs(kv_end - kv_begin) * scale), 1).astype(np.int64)
    row = np.repeat(np.arange(len(rows)), pieces)
    within = (np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces) + 0.5) / pieces[row]
    level = (kv_begin[row] + (kv_end - kv_begin)[row] * within) * scale
    pool.levels_s += np.bincount(
        np.ceil(level - 1e-9).astype(np.int64), weights=(spent_s / pieces)[row], minlength=LEVELS + 1
    )


def _up(changes: Sequence[tuple[float, int, bool]], engines: int, width_s: float, spans_s: Array) -> Array:
    """Engines that are up, mean over each part; all are at first."""
    whole = np.full(len(spans_s), float(engines))
    up = dict.fromkeys(range(engines), True)
    begins_s = np.arange(len(spans_s)) * width_s
    for moment_s, index, state in changes:
        if up.get(index, False) != state:
            up[index] = state
            share = np.clip((begins_s + spans_s - moment_s) / spans_s, 0.0, 1.0)
            whole += share if state else -share
    return whole
