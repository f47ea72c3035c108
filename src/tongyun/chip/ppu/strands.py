# ruff: noqa: PLR0912, PLR0915 - numba takes long functions and plain comparisons
"""When the strands of a kernel are done, compiled with numba: cores that go the same way are walked as one.

A strand is walked as the core of it that has most to do; with each of its requests the L2 and the HBM pass
what all its cores ask for. Strands meet there as cores do in `clockwork`: the one whose request is earliest
goes on. `microcode` says what a row means, `census` what a request is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from tongyun.chip.ppu.census import ASK, FETCH, census
from tongyun.chip.ppu.clockwork import _access, _attention, _cut, _elements, _product
from tongyun.chip.ppu.turns import plain_loops

# As in `microcode` and `clockwork`.
_LDS, _LOOP, _ENDLOOP, _BARRIER, _LOAD, _MMA, _ATTN, _VEC, _ALL_REDUCE, _ADD = (
    2,
    3,
    4,
    5,
    6,
    10,
    11,
    12,
    22,
    32,
)
_WIDTH, _WHOLE, _REGISTERS, _CYCLE = 20, 64, 66, 20
_READ = 24
_TOKENS, _DEPTH, _ENGINES = 16, 8, 6
_L2 = 2
_NEVER = np.inf

STRANDS = 32
"""Strands of a kernel at most. As many as cores give what the simulator gives."""


@njit(cache=True, error_model="numpy", forceinline=True)
def _computed(fn: Any, a: Any, b: Any) -> Any:  # noqa: PLR0911 - one answer a function
    if fn == 0:
        return a + b
    if fn == 1:
        return a - b
    if fn == 2:
        return a * b
    if fn == 3:
        return a // b if b != 0 else 0
    if fn == 4:
        return a % b if b != 0 else 0
    if fn == 5:
        return min(a, b)
    if fn == 6:
        return max(a, b)
    if fn == 7:
        return a ^ b
    return np.int64(a < b)


@njit(cache=True, error_model="numpy", forceinline=True)
def _hand(signal: Any, end: Any, ring: Any, put: Any) -> None:
    """Hand on a row's tokens, which are good from its end on."""
    while signal:
        bit = (signal & 31) - 1
        ring[bit, put[bit] & _TOKENS - 1] = end
        put[bit] += 1
        signal >>= 5


@njit(cache=True, error_model="numpy")
def walk(
    begin: Any, code: Any, starts: Any, values: Any, rates: Any, speakers: Any, cores: Any, asks: Any,
    sizes: Any, fetches: Any,
) -> Any:  # fmt: skip
    """Ticks from the barrier to the end of the last strand; `speakers` are the cores that are walked."""
    strands = len(speakers)
    regs = np.zeros((strands, _REGISTERS), np.int64)
    places, now = np.full(strands, begin), np.zeros(strands)
    free, done = np.zeros((strands, _ENGINES)), np.zeros((strands, _ENGINES))
    ring = np.zeros((strands, 16, _TOKENS))
    put, took = np.zeros((strands, 16), np.int64), np.zeros((strands, 16), np.int64)
    left, number = np.zeros((strands, _DEPTH), np.int64), np.zeros(strands, np.int64)
    wish, arrived = np.zeros(strands), np.full(fetches, -1.0)
    l2_free, hbm_free, latest = 0.0, 0.0, 0.0
    for s in range(strands):
        regs[s, 1], regs[s, 2], regs[s, _WHOLE] = speakers[s], cores, 1 << 62
    while True:
        s, earliest = 0, _NEVER
        for i in range(strands):
            if wish[i] < earliest:
                s, earliest = i, wish[i]
        if earliest == _NEVER:
            break
        r, f, d = regs[s], free[s], done[s]
        at, clock = places[s], now[s]
        row = code[at]
        if row[0] == _LOAD:
            start, engine = earliest, row[4]
            rows, cols = _cut(row[7], r[row[9]]), _cut(row[8], r[row[10]])
            if rows == row[7] and cols == row[8]:
                moved, fetched = row[14], row[15]
            else:
                moved, fetched = _access(rows, cols, row[11], row[12], row[13] & 2)
            end = start
            if moved:
                ask = asks[s, number[s]]
                number[s] += 1
                port = start + moved * rates[8]
                begun = max(l2_free, start)
                l2_free = begun + ask[0] * rates[9]
                # The core that is walked stands for the middle one of those that come together.
                end = max(port, begun + 0.5 * (ask[0] + fetched) * rates[9]) + rates[10]
                fetch, awaited = ask[1], ask[2]
                if fetch >= 0:
                    hbm_free = max(hbm_free, start)
                    while fetch >= 0:
                        if arrived[fetch] < 0:
                            hbm_free += sizes[fetch, 0] * rates[11]
                            arrived[fetch] = hbm_free + rates[12]
                        fetch = sizes[fetch, 1]
                if awaited >= 0:
                    if arrived[awaited] < 0:
                        hbm_free = max(hbm_free, start) + sizes[awaited, 0] * rates[11]
                        arrived[awaited] = hbm_free + rates[12]
                    end = max(end, arrived[awaited])
                start = port
            f[engine] = start
            end = max(end, d[engine])
            d[engine] = end
            _hand(row[3], end, ring[s], put[s])
            at += 1
        hope = _NEVER
        while True:
            row = code[at]
            op, wait = row[0], row[2]
            clock += row[1]
            ready = clock
            while wait:
                bit = (wait & 31) - 1
                ready = max(ready, ring[s, bit, took[s, bit] & _TOKENS - 1])
                took[s, bit] += 1
                wait >>= 5
            if op == _LOAD:
                hope = max(ready, f[row[4]])
                break
            if op == _ENDLOOP:
                for step in range(row[7]):
                    r[row[8 + 2 * step]] += row[9 + 2 * step]
                left[s, row[5]] -= 1
                at = row[6] // _WIDTH if left[s, row[5]] else at + 1
                continue
            if op >= _ADD:
                r[row[5]] = _computed(op - _ADD, r[row[6]], r[row[7]] + row[8])
                at += 1
                continue
            if op == _LOOP:
                times = _cut(row[7], r[row[8]])
                left[s, row[5]] = times
                at = at + 1 if times else row[6] // _WIDTH
                continue
            if op == _LDS:
                clock = ready + _READ * rates[_CYCLE]
                table = row[7]
                entry = starts[table - 1] + row[8] + (r[row[6]] >> 2)
                r[row[5]] = values[min(max(entry, starts[table - 1]), starts[table] - 1)]
                at += 1
                continue
            if op == _BARRIER:
                latest = max(latest, clock)
                break
            engine = row[4]
            start, ticks, latency = max(ready, f[engine]), np.int64(0), 0.0
            if op == _MMA:
                m, n, k = _cut(row[5], r[row[8]]), _cut(row[6], r[row[9]]), _cut(row[7], r[row[10]])
                if m == row[5] and n == row[6] and k == row[7]:
                    ticks, flops = row[13], row[14]
                else:
                    ticks, flops, _ = _product(m, n, k, row[11], rates)
                latency = rates[4] if flops else 0.0
            elif op == _VEC:
                plain = _cut(row[10], r[row[12]]) if row[12] else row[10]
                rows, cols = _cut(row[5], r[row[7]]), _cut(row[6], r[row[8]])
                ticks, _ = _elements(rows, cols * row[9], plain, row[11], rates)
                latency = rates[7] if ticks else 0.0
            elif op == _ATTN:
                m, n = _cut(row[5], r[row[8]]), _cut(row[6], r[row[9]])
                if m and n:
                    width = _cut(row[7], r[row[10]])
                    ticks, latency = _attention(m, n, width, row[6], row[11], rates), rates[4] + rates[7]
            elif op == _ALL_REDUCE and speakers[s] == 0:
                ticks = row[5]
            f[engine] = start + ticks
            end = max(d[engine], start + ticks + latency)
            d[engine] = end
            _hand(row[3], end, ring[s], put[s])
            at += 1
        places[s], now[s], wish[s] = at, clock, hope
    return max(latest, done.max())


@njit(cache=True, error_model="numpy")
def _grouped(work: Any, strand: Any, speaks: Any) -> Any:
    """Deal cores out to strands by how much they have to do; the core that speaks for each."""
    cores = len(work)
    speakers = np.zeros(min(cores, STRANDS), np.int64)
    order = np.argsort(-work, kind="mergesort")
    speaks[:] = False
    for i in range(cores - 1, -1, -1):
        strand[order[i]] = i * len(speakers) // cores
        speakers[strand[order[i]]] = order[i]
    speaks[speakers] = True
    return speakers


@njit(cache=True, error_model="numpy")
def price(
    code: Any, starts: Any, values: Any, rates: Any, tags: Any, filled: Any, ticks: Any, counters: Any
) -> None:
    """Fill in what each kernel of a program takes and counts.

    `tags` and `filled` hold what the L2 holds and may be used again: bytes filled, fetches so far, fetches
    before this program, events.
    """
    plain, cores = plain_loops(code), np.int64(rates[0])
    strand, speaks, idle = np.zeros(cores, np.int64), np.zeros(cores, np.bool_), np.zeros(cores, np.int64)
    most: Any = min(cores, STRANDS)
    asks = np.empty((most, 64, ASK), np.int64)
    sizes = np.empty((256, FETCH), np.int64)
    filled[0], filled[2] = 0, filled[1]
    begin, number = -1, 0
    for at in range(1, len(code)):
        if code[at, 0] != _BARRIER:
            continue
        if begin > 0:
            counts, uneven = counters[number], False
            for i in range(begin, at):
                inner = code[i, 0] == _LOOP and code[i, 5] > 0 and code[i, 8] != _WHOLE
                uneven = uneven or inner or code[i, 0] == _LDS
            work = np.zeros(cores, np.int64)
            if uneven:
                census(
                    begin, code, plain, starts, values, rates, strand, speaks, False, tags, filled,
                    np.zeros(12), work, asks, sizes,
                )  # fmt: skip
            speakers = _grouped(work, strand, speaks)
            asks, sizes, fetches = census(
                begin, code, plain, starts, values, rates, strand, speaks, True, tags, filled, counts, idle,
                asks, sizes,
            )  # fmt: skip
            took = walk(begin, code, starts, values, rates, speakers, cores, asks, sizes, fetches)
            # No sooner than the servers pass all bytes.
            if counts[_L2]:
                took = max(took, counts[_L2] * rates[9] + rates[10])
            if fetches:
                took = max(took, sizes[:fetches, 0].sum() * rates[11] + rates[12])
            ticks[number] = took
            number += 1
        begin = at + 1
