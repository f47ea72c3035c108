# ruff: noqa: PLR0912, PLR0915, PLR1714, SIM109 - numba takes long functions and plain comparisons
"""One core's times as a recurrence, and what the L2 holds: the loops of `analytic`, compiled with numba.

A core is walked alone, its requests to L2 and HBM stretched by what the others ask meanwhile. A loop whose
times grow by the same amounts from one turn to the next is not walked on but multiplied out. `microcode` says
what a row means.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from tongyun.chip.ppu.clockwork import _access, _attended, _attention, _cut, _elements, _product

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
_TOKENS, _DEPTH = 16, 8
_FLOPS, _HBM, _L2, _SRAM, _LINK, _ELEMENTS, _BUSY = range(7)
_SETS, _HASH = 1 << 16, -7046029254386353131

PLACES = 2 * _SETS
"""Rows of what the L2 holds: address, bytes filled by then, bytes of its own, when it arrives."""
ROUNDS = 16
"""Turns of a kernel's outermost loop that are told apart; later ones count as the last."""
_WALKED = 3
"""Cores that are walked among the others' requests, beside the first and the one that asks for most."""
_MARKS = 3
_PAST = 6
"""Requests before the last that a server remembers."""
_STATE = 15
"""Control, L2, HBM, and when six engines are done: for the first and for the last core."""


@njit(cache=True, error_model="numpy")
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


@njit(cache=True, error_model="numpy")
def plain_loops(code: Any) -> Any:
    """Which LOOPs hold no other loop, read no numbers and compute none: their turns may be multiplied out."""
    plain = np.zeros(len(code), np.bool_)
    for at in range(len(code)):
        if code[at, 0] == _LOOP:
            plain[at] = True
            for i in range(at + 1, code[at, 6] // _WIDTH):
                op = code[i, 0]
                plain[at] = plain[at] and op != _LOOP and op != _LDS and op < _ADD
    return plain


@njit(cache=True, error_model="numpy")
def _saturated(at: Any, end: Any, skip: Any, code: Any, regs: Any) -> Any:
    """Whether no count of the loop at…end falls below its room for `skip` more turns."""
    for step in range(code[end, 7]):
        register, change = code[end, 8 + 2 * step], code[end, 9 + 2 * step]
        for i in range(at, end):
            op, first, many = code[i, 0], 5, 2
            if op == _LOAD:
                first = 7
            elif op == _MMA or op == _ATTN:
                many = 3
            elif op != _VEC:
                continue
            for place in range(first, first + many):
                if code[i, place + many] == register and regs[register] + change * skip < code[i, place]:
                    return False
    return True


@njit(cache=True, error_model="numpy", forceinline=True)
def _served(first: Any, last: Any, own: Any, together: Any, server: Any) -> Any:
    """When a server has passed the request of the first core and of the last, of all cores that make it.

    `server` holds when it is done with all it was given (its last row), and of the requests before: when the
    first and the last core came, and their work. The first core waits for what came before it, the last one
    for all.
    """
    behind = 0.0
    for i in range(_PAST):
        if first < server[i, 1]:
            behind += server[i, 2] * (server[i, 1] - first) / (server[i, 1] - server[i, 0])
    early = max(first, server[_PAST, 0] - behind) + own
    server[_PAST, 0] = max(server[_PAST, 0], first) + together
    for i in range(_PAST - 1):
        server[i] = server[i + 1]
    server[_PAST - 1, 0], server[_PAST - 1, 1], server[_PAST - 1, 2] = first, last, together
    return min(early, server[_PAST, 0]), max(last + own, server[_PAST, 0])


@njit(cache=True, error_model="numpy")
def walk(
    c: Any, begin: Any, code: Any, plain: Any, starts: Any, values: Any, rates: Any, batch: Any, short: Any,
    missed: Any, counters: Any, asked: Any, events: Any, weights: Any, count: Any,
) -> Any:  # fmt: skip
    """Walk core c through the kernel that begins at `begin`; (ticks, events so far), perhaps more than fit.

    Every time is that of the first and of the last of the cores that go the same way, which shared servers
    draw apart. `batch` [row, round] is what all of them ask for with one request, `short` the part that the
    L2 does not hold, `missed` the share of this core's requests that wait for the HBM. Each request is an
    event (row, round, address, bytes, first, last) with a weight; `asked` [round] sums bytes.
    """
    regs = np.zeros(_REGISTERS, np.int64)
    regs[1], regs[2], regs[_WHOLE] = c, np.int64(rates[0]), 1 << 62
    now, came0, came1 = 0.0, 0.0, 0.0
    free, done = np.zeros((6, 2)), np.zeros((6, 2))
    l2, hbm = np.zeros((_PAST + 1, 3)), np.zeros((_PAST + 1, 3))
    ring = np.zeros((16, _TOKENS, 2))
    put, took, giver = np.zeros(16, np.int64), np.zeros(16, np.int64), np.zeros(16, np.int64)
    loops = np.zeros((_DEPTH, 3), np.int64)
    marks, marked = np.zeros((_MARKS, _STATE)), np.zeros((_MARKS, 16), np.int64)
    tallies, spots = np.zeros((_MARKS, 12)), np.zeros(_MARKS, np.int64)
    tally = np.zeros(12)
    at, turn, met, room = begin, 0, count, len(weights)
    while True:
        op, wait, signal, engine = code[at, 0], code[at, 2], code[at, 3], code[at, 4]
        now += code[at, 1]
        first, last = now, now
        while wait:
            bit = (wait & 31) - 1
            token = took[bit] & (_TOKENS - 1)
            first, last = max(first, ring[bit, token, 0]), max(last, ring[bit, token, 1])
            took[bit] += 1
            wait >>= 5
        if op >= _ADD:
            b = regs[code[at, 7]] + code[at, 8]
            regs[code[at, 5]] = _computed(op - _ADD, regs[code[at, 6]], b)
            at += 1
            continue
        if op == _LOOP:
            times, level = _cut(code[at, 7], regs[code[at, 8]]), code[at, 5]
            loops[level, 0], loops[level, 1], loops[level, 2] = at + 1, times, 0
            at = at + 1 if times else code[at, 6] // _WIDTH
            continue
        if op == _ENDLOOP:
            level = code[at, 5]
            for step in range(code[at, 7]):
                regs[code[at, 8 + 2 * step]] += code[at, 9 + 2 * step]
            loops[level, 1] -= 1
            loops[level, 2] += 1
            # A turn that asks for nothing passes by.
            if level == 0 and count > met:
                turn, met = min(turn + 1, ROUNDS - 1), count
            if plain[loops[level, 0] - 1] and loops[level, 2] % 2 == 0 and loops[level, 1] > 3:
                for i in range(_MARKS - 1):
                    marks[i], marked[i], tallies[i], spots[i] = (
                        marks[i + 1],
                        marked[i + 1],
                        tallies[i + 1],
                        spots[i + 1],
                    )
                marks[2, 0], marks[2, 1], marks[2, 2] = now, l2[_PAST, 0], hbm[_PAST, 0]
                marks[2, 3:9], marks[2, 9:15] = done[:, 0], done[:, 1]
                marked[2], tallies[2], spots[2] = put, tally, count
                skip = (loops[level, 1] - 2) // 2 * 2
                grown = marks[2] - marks[1]
                steady = (
                    np.abs(grown - marks[1] + marks[0]).max() <= 0.01 * rates[_CYCLE] + 0.001 * grown.max()
                )
                if loops[level, 2] >= 6 and steady and _saturated(loops[level, 0], at, skip, code, regs):
                    pairs = skip // 2
                    for bit in range(16):
                        if marked[2, bit] != marked[1, bit]:
                            for token in range(took[bit], put[bit]):
                                for side in range(2):
                                    ring[bit, token & (_TOKENS - 1), side] += (
                                        grown[3 + 6 * side + giver[bit]] * pairs
                                    )
                    now += grown[0] * pairs
                    l2[:, :2] += grown[1] * pairs
                    hbm[:, :2] += grown[2] * pairs
                    came0, came1 = came0 + grown[1] * pairs, came1 + grown[1] * pairs
                    for i in range(6):
                        for side in range(2):
                            free[i, side] += grown[3 + 6 * side + i] * pairs
                            done[i, side] += grown[3 + 6 * side + i] * pairs
                    tally += (tallies[2] - tallies[1]) * pairs
                    for i in range(spots[1], min(spots[2], room)):
                        weights[i] *= 1 + pairs
                        asked[turn] += events[i, 3] * pairs
                        events[i, 5] = done[1, 1]
                    for step in range(code[at, 7]):
                        regs[code[at, 8 + 2 * step]] += code[at, 9 + 2 * step] * skip
                    loops[level, 1] -= skip
            at = loops[level, 0] if loops[level, 1] else at + 1
            continue
        if op == _LDS:
            now = last + _READ * rates[_CYCLE]
            table = code[at, 7]
            entry = starts[table - 1] + code[at, 8] + (regs[code[at, 6]] >> 2)
            regs[code[at, 5]] = values[min(max(entry, starts[table - 1]), starts[table] - 1)]
            at += 1
            continue
        if op == _BARRIER:
            break
        first, last = max(first, free[engine, 0]), max(last, free[engine, 1])
        ticks, latency = 0.0, 0.0
        end0, end1 = first, last
        if op == _LOAD:
            rows, cols = _cut(code[at, 7], regs[code[at, 9]]), _cut(code[at, 8], regs[code[at, 10]])
            moved, fetched = _access(rows, cols, code[at, 11], code[at, 12], code[at, 13] & 2)
            if moved:
                if count < room:
                    events[count, 0], events[count, 1], events[count, 3] = at, turn, fetched
                    events[count, 2] = code[at, 5] + regs[code[at, 6]]
                    events[count, 4], events[count, 5] = np.int64(first), np.int64(first) + 1
                    weights[count] = 1.0
                count += 1
                asked[turn] += fetched
                ticks = np.float64(moved * rates[8])
                # A core's requests come in the order of its program.
                came0, came1 = max(came0, first), max(came1, last)
                together = max(batch[at - begin, turn], fetched)
                end0, end1 = _served(came0, came1, fetched * rates[9], together * rates[9], l2)
                end0, end1 = max(end0, first + ticks) + rates[10], max(end1, last + ticks) + rates[10]
                share, lacking = missed[at - begin, turn], short[at - begin, turn]
                if share:
                    miss0, miss1 = _served(came0, came1, fetched * rates[11], lacking * rates[11], hbm)
                    end0 += share * max(0.0, miss0 + rates[12] - end0)
                    end1 += share * max(0.0, miss1 + rates[12] - end1)
                tally[_L2] += fetched
                tally[_SRAM] += moved
        elif op == _MMA:
            m, n = _cut(code[at, 5], regs[code[at, 8]]), _cut(code[at, 6], regs[code[at, 9]])
            taken, work, near = _product(m, n, _cut(code[at, 7], regs[code[at, 10]]), code[at, 11], rates)
            ticks, latency = np.float64(taken), rates[4] if work else 0.0
            tally[_FLOPS] += work
            tally[_SRAM] += near
        elif op == _VEC:
            spread = _cut(code[at, 10], regs[code[at, 12]]) if code[at, 12] else code[at, 10]
            rows, cols = _cut(code[at, 5], regs[code[at, 7]]), _cut(code[at, 6], regs[code[at, 8]])
            taken, work = _elements(rows, cols * code[at, 9], spread, code[at, 11], rates)
            ticks, latency = np.float64(taken), rates[7] if taken else 0.0
            tally[_ELEMENTS] += work
            tally[_SRAM] += 8 * work
        elif op == _ATTN:
            m, n = _cut(code[at, 5], regs[code[at, 8]]), _cut(code[at, 6], regs[code[at, 9]])
            width = _cut(code[at, 7], regs[code[at, 10]])
            if m and n:
                ticks = np.float64(_attention(m, n, width, code[at, 6], code[at, 11], rates))
                latency, many = rates[4] + rates[7], m * n
                if code[at, 13]:
                    query = code[at, 14] + regs[code[at, 15]]
                    many = _attended(m, n, query - code[at, 16] - regs[code[at, 17]], code[at, 18])
                tally[_FLOPS] += 4 * many * width
                tally[_ELEMENTS] += m * n
                tally[_SRAM] += 2 * (m + 2 * n) * width + 8 * m * width
        elif op == _ALL_REDUCE and c == 0:
            ticks = np.float64(code[at, 5])
            tally[_LINK] += code[at, 6]
            tally[_HBM] += code[at, 7]
        free[engine, 0], free[engine, 1] = first + ticks, last + ticks
        done[engine, 0] = max(done[engine, 0], end0, first + ticks + latency)
        done[engine, 1] = max(done[engine, 1], end1, last + ticks + latency)
        tally[_BUSY + engine] += ticks
        while signal:
            bit = (signal & 31) - 1
            ring[bit, put[bit] & (_TOKENS - 1)] = done[engine]
            put[bit] += 1
            giver[bit] = engine
            signal >>= 5
        at += 1
    counters += tally
    return max(now, done.max()), count


@njit(cache=True, error_model="numpy")
def hold(
    code: Any,
    events: Any,
    weights: Any,
    tags: Any,
    filled: Any,
    rates: Any,
    begin: Any,
    given: Any,
    lost: Any,
) -> Any:
    """Which events wait for the HBM; bytes asked for and bytes the L2 does not hold, [row, round].

    Requests in the order of their beginning; what one brings is there, for the age of others, at its end.
    `tags` and `filled` (bytes, ticks before this kernel) go on from kernel to kernel.
    """
    order = np.argsort(events[:, 4], kind="mergesort")
    ends = np.argsort(events[:, 5], kind="mergesort")
    ended, latency = 0, np.int64(rates[12])
    brought, waits = np.zeros(len(weights)), np.zeros(len(weights))
    for e in order:
        while ended < len(ends) and events[ends[ended], 5] <= events[e, 4]:
            filled[0] += brought[ends[ended]]
            ended += 1
        at, turn, address, size = events[e, 0], events[e, 1], events[e, 2], events[e, 3]
        slot, clock = (address * _HASH >> 48 & _SETS - 1) * 2, events[e, 4] + np.int64(filled[1])
        if tags[slot, 0] != address and (tags[slot + 1, 0] == address or tags[slot + 1, 1] < tags[slot, 1]):
            slot += 1
        held = code[at, 13] & 1 and tags[slot, 0] == address and tags[slot, 2] >= size
        held = held and filled[0] - tags[slot, 1] <= rates[13]
        tags[slot, 0], tags[slot, 1], tags[slot, 2] = address, np.int64(filled[0]), size
        given[at - begin, turn] += size * weights[e]
        if not held:
            brought[e] = size * weights[e]
            lost[at - begin, turn] += size * weights[e]
            tags[slot, 3] = clock + latency
        # It may still be on its way, asked for by another core.
        waits[e] = not held or tags[slot, 3] > clock
    while ended < len(ends):
        filled[0] += brought[ends[ended]]
        ended += 1
    return waits


@njit(cache=True, error_model="numpy")
def kernel(
    begin: Any, end: Any, code: Any, plain: Any, starts: Any, values: Any, rates: Any, tags: Any, filled: Any,
    counters: Any,
) -> Any:  # fmt: skip
    """Ticks of the kernel of rows begin … end - 1, behind its barrier; adds to `counters`.

    Every core is walked alone, which says what it asks for and when; then those that take longest, or ask for
    most, among the others' requests.
    """
    cores, size = np.int64(rates[0]), end - begin
    batch, short = np.zeros((size, ROUNDS)), np.zeros((size, ROUNDS))
    asked, alone = np.zeros((cores, ROUNDS)), np.zeros(cores)
    bounds = np.zeros(cores + 1, np.int64)
    events, weights = np.zeros((1024, 6), np.int64), np.ones(1024)
    for c in range(cores):
        while True:
            own = np.zeros(12)
            asked[c] = 0
            alone[c], count = walk(
                c, begin, code, plain, starts, values, rates, batch, short, short, own, asked[c], events,
                weights, bounds[c],
            )  # fmt: skip
            if count <= len(weights):
                break
            more, heavier = np.zeros((2 * count, 6), np.int64), np.ones(2 * count)
            more[: bounds[c]], heavier[: bounds[c]] = events[: bounds[c]], weights[: bounds[c]]
            events, weights = more, heavier
        bounds[c + 1] = count
        counters += own
    given, lost, requests = np.zeros((size, ROUNDS)), np.zeros((size, ROUNDS)), np.zeros((size, ROUNDS))
    events, weights = events[: bounds[cores]], weights[: bounds[cores]]
    waits = hold(code, events, weights, tags, filled, rates, begin, given, lost)
    for e in range(len(weights)):
        requests[events[e, 0] - begin, events[e, 1]] += weights[e]
    counters[_HBM] += lost.sum()
    bytes_ = asked.sum(axis=1)
    latest = bytes_.sum() * rates[9] + rates[10]
    if lost.sum():
        latest = max(latest, lost.sum() * rates[11] + rates[12])
    slowest, none = np.argsort(-alone, kind="mergesort"), np.zeros(ROUNDS)
    spare, unused = np.zeros((0, 6), np.int64), np.zeros(0)
    for i in range(_WALKED + 2):
        c = 0 if i == _WALKED else int(slowest[min(i, int(cores) - 1)])
        if i == _WALKED + 1:
            c = int(bytes_.argmax())
        times, missed, crowd = np.zeros((size, ROUNDS)), np.zeros((size, ROUNDS)), np.zeros(ROUNDS)
        for turn in range(ROUNDS):
            if asked[c, turn]:
                # A core that asks for more than this one goes on when this one is done.
                crowd[turn] = np.minimum(asked[:, turn], asked[c, turn]).sum() / asked[c, turn]
        for e in range(bounds[c], bounds[c + 1]):
            times[events[e, 0] - begin, events[e, 1]] += weights[e]
            missed[events[e, 0] - begin, events[e, 1]] += weights[e] * waits[e]
        for at in range(size):
            for turn in range(ROUNDS):
                many = crowd[turn] / max(requests[at, turn], 1.0)
                batch[at, turn], short[at, turn] = given[at, turn] * many, lost[at, turn] * many
                missed[at, turn] /= max(times[at, turn], 1.0)
        ticks, _ = walk(
            c, begin, code, plain, starts, values, rates, batch, short, missed, own, none, spare, unused, 0
        )
        latest = max(latest, ticks)
    filled[1] += latest + rates[14]
    return latest
