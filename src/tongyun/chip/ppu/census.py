# ruff: noqa: PLR0912, PLR0915 - numba takes long functions and plain comparisons
"""Who asks for what in a kernel: all cores in step through its instructions, compiled with numba.

Every instruction is taken by all cores at once; cores whose loop has ended wait for the others behind it.
In a loop whose turns are alike the cores that share a tile are found once. What comes out has no times: what
is counted, and request by request what the cores of a strand ask of the L2, and which of it the L2 does not
hold. `strands` gives it times. `microcode` says what a row means.

It does not know which core is first at a tile but by what each has moved before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from tongyun.chip.ppu.clockwork import _access, _attended, _attention, _cut, _elements, _product
from tongyun.chip.ppu.turns import ROWS, alike, compute, reaches

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
_WIDTH, _WHOLE, _REGISTERS, _DEPTH = 20, 64, 66, 8
_FLOPS, _HBM, _L2, _SRAM, _LINK, _ELEMENTS, _BUSY = range(7)
_SETS, _HASH = 1 << 16, -7046029254386353131

PLACES, PLACE = 2 * _SETS, 6
"""What the L2 holds, two tiles a set: address, bytes filled by then, bytes of its own, the fetch that brought
it, the event that asked last and which of its leaders."""
ASK, FETCH = 3, 2
"""A strand's request: bytes of the L2, first fetch that it owes, fetch that it waits for. A fetch: bytes, the
next that the same request owes. -1 is none."""


@njit(cache=True, error_model="numpy", forceinline=True)
def _place(tags: Any, address: Any, floor: Any) -> Any:
    """Where the L2 holds an address, or may; what a fetch before `floor` left is another program's."""
    slot = (address * _HASH >> 48 & _SETS - 1) * 2
    one, two = tags[slot], tags[slot + 1]
    if one[0] == address and one[3] >= floor:
        return slot
    old = one[1] if one[3] >= floor else 0
    if two[3] < floor:
        return slot + (old > 0)
    return slot + (two[0] == address or two[1] < old)


@njit(cache=True, error_model="numpy", forceinline=True)
def _fetched(sizes: Any, number: Any, size: Any, head: Any, tail: Any, s: Any) -> Any:
    """Note a fetch that the next request of strand s owes; the fetches, perhaps made longer."""
    if number == len(sizes):
        longer = np.zeros((2 * number, FETCH), np.int64)
        longer[:number] = sizes
        sizes = longer
    sizes[number, 0], sizes[number, 1] = size, -1
    if head[s] < 0:
        head[s] = number
    else:
        sizes[tail[s], 1] = number
    tail[s] = number
    return sizes


@njit(cache=True, error_model="numpy", forceinline=True)
def _requested(asks: Any, asked: Any, pending: Any, head: Any, s: Any, awaited: Any) -> Any:
    """Note a request of strand s for all that is pending; the requests, perhaps made longer."""
    capacity = asks.shape[1]
    if asked[s] == capacity:
        longer = np.zeros((len(asks), 2 * capacity, ASK), np.int64)
        longer[:, :capacity] = asks
        asks = longer
    ask = asks[s, asked[s]]
    ask[0], ask[1], ask[2] = pending[s], head[s], awaited
    asked[s] += 1
    pending[s], head[s] = 0, -1
    return asks


@njit(cache=True, error_model="numpy")
def census(
    begin: Any, code: Any, plain: Any, starts: Any, values: Any, rates: Any, strand: Any, speaks: Any,
    look: Any, tags: Any, filled: Any, counters: Any, work: Any, asks: Any, sizes: Any,
) -> Any:  # fmt: skip
    """Take all cores through the kernel that begins at `begin`; (requests, fetches, how many of each).

    `strand` says which strand a core is of, `speaks` which core speaks for its strand. With `look` the L2 is
    asked, else only `work`, each core's busy ticks, is summed. Adds to `counters`. `asks` [strand, number,
    ASK] and `sizes` [number, FETCH] are made longer as needed.
    """
    cores = len(strand)
    strands = len(asks)
    regs = np.zeros((_REGISTERS, cores), np.int64)
    regs[1], regs[2], regs[_WHOLE] = np.arange(cores), cores, 1 << 62
    who, many = np.zeros((_DEPTH + 1, cores), np.int64), np.zeros(_DEPTH + 1, np.int64)
    times, turn, body = (
        np.zeros((_DEPTH, cores), np.int64),
        np.zeros(_DEPTH, np.int64),
        np.zeros(_DEPTH, np.int64),
    )
    asked, spoken = np.zeros(strands, np.int64), np.zeros(strands, np.int64)
    awaited, pending = np.zeros(strands, np.int64), np.zeros(strands, np.int64)
    head, tail = np.full(strands, -1), np.zeros(strands, np.int64)
    clock, before = np.zeros(cores, np.int64), np.zeros((2, cores), np.int64)
    counted = np.zeros(12)
    # Of the last turn of a loop, by row: cores that ask first for a tile and what for; of each strand the
    # bytes, and the leader whose tile its speaker waits for.
    leaders, led = np.zeros((ROWS, cores, 3), np.int64), np.zeros(ROWS, np.int64)
    passed, heard = np.zeros((ROWS, strands), np.int64), np.zeros((ROWS, strands), np.int64)
    brought = np.zeros(cores, np.int64)
    fetches, floor, first = 0, filled[2], filled[1]
    held_bytes = np.int64(rates[13])
    event = filled[3]
    for c in range(cores):
        who[0, c] = c
    many[0] = cores
    depth, at, loop = 0, begin, -1
    while True:
        row = code[at]
        op, alive, count = row[0], who[depth], many[depth]
        if op >= _ADD:
            compute(op - _ADD, regs[row[5]], regs[row[6]], regs[row[7]], row[8], alive, count)
        elif op == _LOOP:
            inside = 0
            held, within = regs[row[8]], who[depth + 1]
            for i in range(count):
                c = alive[i]
                n = _cut(row[7], held[c])
                times[depth, c] = n
                if n:
                    within[inside] = c
                    inside += 1
            if not inside:
                at = row[6] // _WIDTH
                continue
            turn[depth], body[depth], many[depth + 1] = 0, at + 1, inside
            depth += 1
            loop = -1
            if plain[at]:
                loop = at + 1
                counted[:] = counters
                before[0], before[1] = work, clock
        elif op == _ENDLOOP:
            for step in range(row[7]):
                held, change = regs[row[8 + 2 * step]], row[9 + 2 * step]
                if count == cores:
                    for c in range(cores):
                        held[c] += change
                else:
                    for i in range(count):
                        held[alive[i]] += change
            level = depth - 1
            turn[level] += 1
            inside, gone, least = 0, turn[level], np.int64(1 << 62)
            for i in range(count):
                c = alive[i]
                left = times[level, c] - gone
                if left > 0:
                    alive[inside] = c
                    inside += 1
                    least = min(least, left)
            many[depth] = inside
            if loop >= 0 and inside == count and least > 1:
                turns = alike(loop, at, code, regs, alive, count, least)
                if turns > 0:
                    if look:
                        for t in range(turns):
                            for i in range(loop, at):
                                other = code[i]
                                if other[0] != _LOAD:
                                    continue
                                base, place = regs[other[6]], i - loop
                                event += 1
                                onward = 0
                                for step in range(row[7]):
                                    if row[8 + 2 * step] == other[6]:
                                        onward += row[9 + 2 * step] * t
                                inward = other[13] & 1
                                for j in range(led[place]):
                                    c, s, fetched = leaders[place, j]
                                    address = other[5] + base[c] + onward
                                    one = tags[_place(tags, address, floor)]
                                    if not (
                                        inward and one[0] == address and one[3] >= floor and one[2] >= fetched
                                        and filled[0] - one[1] <= held_bytes
                                    ):  # fmt: skip
                                        filled[0] += fetched
                                        sizes = _fetched(sizes, fetches, fetched, head, tail, s)
                                        one[3] = first + fetches
                                        fetches += 1
                                        counters[_HBM] += fetched
                                    one[0], one[1], one[2] = address, filled[0], fetched
                                    brought[j] = one[3] - first
                                for s in range(strands):
                                    pending[s] += passed[place, s]
                                    if heard[place, s] >= 0:
                                        asks = _requested(
                                            asks, asked, pending, head, s, brought[heard[place, s]]
                                        )
                    for i in range(12):
                        if i != _HBM:
                            counters[i] += (counters[i] - counted[i]) * turns
                    for i in range(count):
                        c = alive[i]
                        work[c] += (work[c] - before[0, c]) * turns
                        clock[c] += (clock[c] - before[1, c]) * turns
                    for step in range(row[7]):
                        held, change = regs[row[8 + 2 * step]], row[9 + 2 * step] * turns
                        for i in range(count):
                            held[alive[i]] += change
                    turn[level] += turns
                    if turns == least:
                        gone, inside = turn[level], 0
                        for i in range(count):
                            if times[level, alive[i]] > gone:
                                alive[inside] = alive[i]
                                inside += 1
                        many[depth] = inside
            if inside:
                at = body[level]
                if loop >= 0:
                    counted[:] = counters
                    before[0], before[1] = work, clock
                continue
            depth, loop = level, -1
        elif op == _LDS:
            table, held = row[7], regs[row[6]]
            low, high = starts[table - 1], starts[table] - 1
            into = regs[row[5]]
            for i in range(count):
                c = alive[i]
                into[c] = values[min(max(low + row[8] + (held[c] >> 2), low), high)]
        elif op == _BARRIER:
            break
        elif op == _LOAD:
            base, high, wide = regs[row[6]], regs[row[9]], regs[row[10]]
            engine, inward, place = row[4], row[13] & 1, at - loop
            cut = not (
                (row[9] == _WHOLE or reaches(high, row[7], alive, count))
                and (row[10] == _WHOLE or reaches(wide, row[8], alive, count))
            )
            moved, fetched = row[14], row[15]
            ticks = row[16]
            if look:
                # A core that has moved less comes earlier.
                for i in range(1, count):
                    c = alive[i]
                    key, j = clock[c], i
                    while j > 0 and clock[alive[j - 1]] > key:
                        alive[j] = alive[j - 1]
                        j -= 1
                    alive[j] = c
                event += 1
                spoken[:] = -1
                if loop >= 0:
                    led[place] = 0
                    passed[place] = 0
            if not cut:
                counters[_SRAM] += moved * count
                counters[_L2] += fetched * count
                counters[_BUSY + engine] += ticks * count
                for i in range(count):
                    work[alive[i]] += ticks
            for i in range(count):
                c = alive[i]
                if cut:
                    moved, fetched = _access(
                        _cut(row[7], high[c]), _cut(row[8], wide[c]), row[11], row[12], row[13] & 2
                    )
                    if not moved:
                        continue
                    ticks = np.int64(moved * rates[8])
                    counters[_SRAM] += moved
                    counters[_L2] += fetched
                    counters[_BUSY + engine] += ticks
                    work[c] += ticks
                if not look:
                    if not cut:
                        break
                    continue
                clock[c] += ticks * inward
                s = strand[c]
                pending[s] += fetched
                address = row[5] + base[c]
                one = tags[_place(tags, address, floor)]
                hit = (
                    inward and one[0] == address and one[3] >= floor and one[2] >= fetched
                    and filled[0] - one[1] <= held_bytes
                )  # fmt: skip
                again = hit and one[4] == event and one[2] == fetched
                if not hit:
                    filled[0] += fetched
                    sizes = _fetched(sizes, fetches, fetched, head, tail, s)
                    one[3] = first + fetches
                    fetches += 1
                    counters[_HBM] += fetched
                one[0], one[1], one[2], one[4] = address, filled[0], fetched, event
                if loop >= 0:
                    passed[place, s] += fetched
                    if not again:
                        one[5] = led[place]
                        lead = leaders[place, led[place]]
                        lead[0], lead[1], lead[2] = c, s, fetched
                        led[place] += 1
                if speaks[c]:
                    spoken[s], awaited[s] = one[5], one[3] - first
            if look:
                if loop >= 0:
                    heard[place] = spoken
                for s in range(strands):
                    if spoken[s] >= 0:
                        asks = _requested(asks, asked, pending, head, s, awaited[s])
        elif op == _MMA:
            engine = row[4]
            if (
                (row[8] == _WHOLE or reaches(regs[row[8]], row[5], alive, count))
                and (row[9] == _WHOLE or reaches(regs[row[9]], row[6], alive, count))
                and (row[10] == _WHOLE or reaches(regs[row[10]], row[7], alive, count))
            ):
                counters[_FLOPS] += row[14] * count
                counters[_SRAM] += row[15] * count
                counters[_BUSY + engine] += row[13] * count
                for i in range(count):
                    work[alive[i]] += row[13]
            else:
                for i in range(count):
                    c = alive[i]
                    m, n = _cut(row[5], regs[row[8], c]), _cut(row[6], regs[row[9], c])
                    took, flops, near = _product(m, n, _cut(row[7], regs[row[10], c]), row[11], rates)
                    counters[_FLOPS] += flops
                    counters[_SRAM] += near
                    counters[_BUSY + engine] += took
                    work[c] += took
        elif op == _VEC:
            engine = row[4]
            for i in range(count):
                c = alive[i]
                spread = _cut(row[10], regs[row[12], c]) if row[12] else row[10]
                rows, cols = _cut(row[5], regs[row[7], c]), _cut(row[6], regs[row[8], c])
                took, elements = _elements(rows, cols * row[9], spread, row[11], rates)
                counters[_ELEMENTS] += elements
                counters[_SRAM] += 8 * elements
                counters[_BUSY + engine] += took
                work[c] += took
        elif op == _ATTN:
            engine = row[4]
            for i in range(count):
                c = alive[i]
                m, n = _cut(row[5], regs[row[8], c]), _cut(row[6], regs[row[9], c])
                width = _cut(row[7], regs[row[10], c])
                if m and n:
                    took, pairs = _attention(m, n, width, row[6], row[11], rates), m * n
                    if row[13]:
                        query, key = row[14] + regs[row[15], c], row[16] + regs[row[17], c]
                        pairs = _attended(m, n, query - key, row[18])
                    counters[_FLOPS] += 4 * pairs * width
                    counters[_ELEMENTS] += m * n
                    counters[_SRAM] += 2 * (m + 2 * n) * width + 8 * m * width
                    counters[_BUSY + engine] += took
                    work[c] += took
        elif op == _ALL_REDUCE:
            for i in range(count):
                if alive[i] == 0:
                    counters[_LINK] += row[6]
                    counters[_HBM] += row[7]
                    counters[_BUSY + row[4]] += row[5]
                    work[0] += row[5]
        at += 1
    filled[1] += fetches
    filled[3] = event
    return asks, sizes, fetches
