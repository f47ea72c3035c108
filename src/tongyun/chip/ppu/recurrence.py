# ruff: noqa: E501, SIM109, PLR1714, PLR0912, PLR0915 - numba takes long argument lists and plain comparisons
"""One core's times as a recurrence, and what the L2 holds: the inner loops of `analytic`, compiled with numba.

A core is walked alone, its requests to L2 and HBM stretched by what the others ask meanwhile. A loop whose
times grow by the same amounts from one turn to the next is not walked on but multiplied out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from tongyun.chip.ppu.clockwork import (
    _ALL_REDUCE,
    _ALL_TO_ALL,
    _ALU,
    _ATTN,
    _BARRIER,
    _BUSY,
    _DEPTH,
    _ELEMENTS,
    _ENDLOOP,
    _FLOPS,
    _GATHER,
    _HALT,
    _HBM,
    _ICN,
    _L2,
    _LDS,
    _LINK,
    _LOAD,
    _LOOP,
    _MMA,
    _READ,
    _RECV,
    _RING,
    _SCATTER,
    _SEND,
    _SRAM,
    _SYNC,
    _TABLE,
    _TICK,
    _VECTOR,
    _alu,
    _attended,
    _ceil,
    _count,
    _vector,
)

ROUNDS = 16
"""Turns of a kernel's outermost loop that are told apart; later ones count as the last."""
PLACES = _TABLE
"""Rows of the table of what the L2 holds: (address, filled so far, bytes)."""
_WALKED = 3
"""Cores that are walked among the others' requests, beside the one that asks for most."""
_MARKS = 3
_PAST = 6
"""Requests before the last that a server remembers."""
_STATE = 15
"""Control, six engines' queues free and done, what L2 and HBM have taken on; twice, for the first and the last core."""


@njit(cache=True, error_model="numpy", forceinline=True)
def _fetched(op: Any, at: Any, size: Any, rows: Any, cols: Any, imm: Any) -> Any:
    if imm[at, 4] == 0:
        return _ceil(cols * size, 64) * 64
    if imm[at, 4] != cols * size or op == _GATHER:
        return rows * _ceil(cols * size, 64) * 64
    return _ceil(rows * cols * size, 64) * 64


@njit(cache=True, error_model="numpy")
def _saturated(at: Any, end: Any, skip: Any, imm: Any, reg: Any, counts: Any, regs: Any) -> Any:
    """Whether no count of the loop at…end falls below its room for `skip` more turns."""
    for step in range(6):
        register, change = reg[end, step], imm[end, step]
        if register == 0 or change >= 0:
            continue
        for i in range(at, end):
            for slot in range(imm.shape[1]):
                if (
                    counts[i, slot]
                    and reg[i, slot] == register
                    and regs[0, register] + change * skip < imm[i, slot]
                ):
                    return False
    return True


@njit(cache=True, error_model="numpy", forceinline=True)
def _served(first: Any, last: Any, own: Any, together: Any, server: Any) -> Any:
    """When a server has passed the request of the first core and of the last, of all cores that make it.

    `server` holds when it is done with all it was given (its last row), and of the requests before: when the
    first and the last core came, and their work. The first core waits for what came before it, the last one for all.
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
    c: Any, begin: Any, code: Any, starts: Any, values: Any, rates: Any, batch: Any, short: Any, missed: Any, counters: Any,
    asked: Any, events: Any, weights: Any, count: Any,
) -> Any:  # fmt: skip
    """Walk core c through the kernel that begins at `begin`; (ticks, events so far), which may exceed the room.

    Every time is that of the first and of the last of the cores that go the same way, which shared servers draw
    apart. `batch` [instruction, round] is what all of them ask for with one request, `short` the part that
    the L2 does not hold, `missed` the share of this core's requests of which that holds. Each request is an event (instruction, round, address, bytes, first, last) with a
    weight; `asked` [round] sums bytes.
    """
    head, imm, reg, counts, plain = code
    regs = np.zeros((1, 64), np.int64)
    regs[0, 1], regs[0, 2] = c, np.int64(rates[0])
    now = 0.0
    free, done = np.zeros((6, 2)), np.zeros((6, 2))
    l2, hbm = np.zeros((_PAST + 1, 3)), np.zeros((_PAST + 1, 3))
    came0, came1 = 0.0, 0.0
    state = np.zeros(_STATE)
    ring = np.zeros((16, _RING, 2))
    put, took, giver = np.zeros(16, np.int64), np.zeros(16, np.int64), np.zeros(16, np.int64)
    loops = np.zeros((_DEPTH, 3), np.int64)
    marks, marked = np.zeros((_MARKS, _STATE)), np.zeros((_MARKS, 16), np.int64)
    tallies, spots = np.zeros((_MARKS, 12)), np.zeros(_MARKS, np.int64)
    tally = np.zeros(12)
    at, depth, turn, met = begin, 0, 0, count
    room, whole = len(weights), np.zeros((1, 12), np.int64)
    while True:
        op, engine, wait, signal, size = head[at, 0], head[at, 1], head[at, 4], head[at, 5], head[at, 6]
        now += _TICK
        first, last = now, now
        while wait:
            bit = (wait & 31) - 1
            token = took[bit] & (_RING - 1)
            first, last = max(first, ring[bit, token, 0]), max(last, ring[bit, token, 1])
            took[bit] += 1
            wait >>= 5
        if op == _ALU:
            regs[0, imm[at, 0]] = _alu(head[at, 2], regs[0, imm[at, 1]], regs[0, imm[at, 2]] + imm[at, 3])
            regs[0, 0] = 0
            at += 1
            continue
        if op == _LOOP:
            times = _count(imm[at, 0], reg[at, 0], regs, 0)
            if times > 0:
                loops[depth, 0], loops[depth, 1], loops[depth, 2] = at + 1, times, 0
                depth += 1
                at += 1
            else:
                at += 1 + imm[at, 1]
            continue
        if op == _ENDLOOP:
            for step in range(6):
                if reg[at, step]:
                    regs[0, reg[at, step]] += imm[at, step]
            top = depth - 1
            loops[top, 1] -= 1
            loops[top, 2] += 1
            inner = plain[loops[top, 0] - 1]
            # A turn that asks for nothing passes by.
            if top == 0 and count > met:
                turn, met = min(turn + 1, ROUNDS - 1), count
            if inner and loops[top, 2] % 2 == 0 and loops[top, 1] > 3:
                state[0], state[1], state[2] = now, l2[_PAST, 0], hbm[_PAST, 0]
                state[3:9], state[9:15] = done[:, 0], done[:, 1]
                for i in range(_MARKS - 1):
                    marks[i], marked[i], tallies[i], spots[i] = (
                        marks[i + 1],
                        marked[i + 1],
                        tallies[i + 1],
                        spots[i + 1],
                    )
                marks[2], marked[2], tallies[2], spots[2] = state, put, tally, count
                skip = (loops[top, 1] - 2) // 2 * 2
                if loops[top, 2] >= 6 and skip >= 2:
                    grown = marks[2] - marks[1]
                    steady = np.abs(grown - marks[1] + marks[0]).max() <= 2.0 + 0.001 * grown.max()
                    if steady and _saturated(loops[top, 0], at, skip, imm, reg, counts, regs):
                        pairs = skip // 2
                        for bit in range(16):
                            if marked[2, bit] != marked[1, bit]:
                                for token in range(took[bit], put[bit]):
                                    for side in range(2):
                                        ring[bit, token & (_RING - 1), side] += (
                                            grown[3 + 6 * side + giver[bit]] * pairs
                                        )
                        now += grown[0] * pairs
                        l2[:, :2] += grown[1] * pairs
                        hbm[:, :2] += grown[2] * pairs
                        came0 += grown[1] * pairs
                        came1 += grown[1] * pairs
                        for i in range(6):
                            for side in range(2):
                                free[i, side] += grown[3 + 6 * side + i] * pairs
                                done[i, side] += grown[3 + 6 * side + i] * pairs
                        tally += (tallies[2] - tallies[1]) * pairs
                        for i in range(spots[1], min(spots[2], room)):
                            weights[i] *= 1 + pairs
                            asked[turn] += events[i, 3] * pairs
                            events[i, 5] = done[1, 1]
                        for step in range(6):
                            if reg[at, step]:
                                regs[0, reg[at, step]] += imm[at, step] * skip
                        loops[top, 1] -= skip
            if loops[top, 1]:
                at = loops[top, 0]
            else:
                depth = top
                at += 1
            continue
        if op == _LDS:
            now = last + _READ
            table = imm[at, 2] - 1
            place = imm[at, 3] + regs[0, reg[at, 1]] // 4
            regs[0, imm[at, 0]] = values[min(starts[table] + place, starts[table + 1] - 1)]
            at += 1
            continue
        if op == _BARRIER or op == _HALT:
            break
        first, last = max(first, free[engine, 0]), max(last, free[engine, 1])
        ticks, latency = 0.0, 0.0
        end0, end1 = first, last
        if op <= _SCATTER:
            rows, cols = _count(imm[at, 2], reg[at, 2], regs, 0), _count(imm[at, 3], reg[at, 3], regs, 0)
            moved = rows * cols * size
            if moved:
                fetched = _fetched(op, at, size, rows, cols, imm)
                if count < room:
                    events[count, 0], events[count, 1] = at, turn
                    events[count, 2] = imm[at, 0] + regs[0, reg[at, 0]]
                    events[count, 3], weights[count] = fetched, 1.0
                    events[count, 4], events[count, 5] = np.int64(first), np.int64(first) + 1
                    events[count, 6] = depth > 0 and plain[loops[depth - 1, 0] - 1]
                count += 1
                asked[turn] += fetched
                ticks = moved * rates[8]
                together = max(batch[at - begin, turn], fetched)
                # A core's requests come in the order of its program.
                came0, came1 = max(came0, first), max(came1, last)
                end0, end1 = _served(came0, came1, fetched * rates[9], together * rates[9], l2)
                end0, end1 = max(end0, first + ticks) + rates[10], max(end1, last + ticks) + rates[10]
                if short[at - begin, turn]:
                    share = missed[at - begin, turn]
                    miss0, miss1 = _served(
                        came0, came1, fetched * rates[11], short[at - begin, turn] * rates[11], hbm
                    )
                    end0 += share * max(0.0, miss0 + rates[12] - end0)
                    end1 += share * max(0.0, miss1 + rates[12] - end1)
                tally[_L2] += fetched
                tally[_SRAM] += moved
        elif op == _MMA:
            m, n, k = (
                _count(imm[at, 3], reg[at, 3], regs, 0),
                _count(imm[at, 4], reg[at, 4], regs, 0),
                _count(imm[at, 5], reg[at, 5], regs, 0),
            )
            if m and n and k:
                tiles = (
                    _ceil(m, np.int64(rates[1])) * _ceil(n, np.int64(rates[2])) * _ceil(k, np.int64(rates[3]))
                )
                ticks, latency = tiles * head[at, 7], rates[4]
                tally[_FLOPS] += 2 * m * n * k
                tally[_SRAM] += 2 * (m * k + n * k) + 8 * m * n
        elif op == _ATTN:
            m, n, width = (
                _count(imm[at, 4], reg[at, 4], regs, 0),
                _count(imm[at, 5], reg[at, 5], regs, 0),
                _count(imm[at, 6], reg[at, 6], regs, 0),
            )
            if m and n:
                tiles = _ceil(m, np.int64(rates[1])) * (
                    _ceil(n, np.int64(rates[2])) * _ceil(width, np.int64(rates[3]))
                    + _ceil(width, np.int64(rates[2])) * _ceil(n, np.int64(rates[3]))
                )
                ticks, latency = max(tiles * head[at, 7], m * n * rates[6]), rates[4] + rates[7]
                pairs = m * n
                if head[at, 3] & 1:
                    pairs = _attended(
                        m,
                        n,
                        imm[at, 11] + regs[0, reg[at, 11]],
                        imm[at, 12] + regs[0, reg[at, 12]],
                        max(imm[at, 13], 1),
                    )
                tally[_FLOPS] += 4 * pairs * width
                tally[_ELEMENTS] += m * n
                tally[_SRAM] += 2 * (m + 2 * n) * width + 8 * m * width
        elif engine == _VECTOR and op < _SYNC:
            whole[0] = 0
            ticks = float(_vector(op, head[at, 2], at, 0, imm, reg, regs, rates, whole, 0))
            tally += whole[0]
            latency = rates[7] if ticks else 0.0
        elif engine == _ICN and c == 0:
            parts, given = imm[at, 3], imm[at, 2]
            moved, hops, memory = given, 1, given
            if op == _ALL_REDUCE:
                moved, hops = 2 * (parts - 1) * given // parts, 2 * (parts - 1)
                memory = 3 * given if imm[at, 4] else 2 * given
            elif op != _SEND and op != _RECV:
                moved, hops = (parts - 1) * given, parts - 1
                memory = 2 * parts * given if op == _ALL_TO_ALL else (parts + 1) * given
            ticks = max(moved * rates[15] + hops * rates[16], memory * rates[11])
            tally[_LINK] += moved
            tally[_HBM] += memory
        free[engine, 0], free[engine, 1] = first + ticks, last + ticks
        done[engine, 0] = max(done[engine, 0], end0, first + ticks + latency)
        done[engine, 1] = max(done[engine, 1], end1, last + ticks + latency)
        tally[_BUSY + engine] += ticks
        while signal:
            bit = (signal & 31) - 1
            ring[bit, put[bit] & (_RING - 1)] = done[engine]
            put[bit] += 1
            giver[bit] = engine
            signal >>= 5
        at += 1
    counters += tally
    return max(now, done.max()), count


@njit(cache=True, error_model="numpy")
def hold(
    head: Any,
    events: Any,
    weights: Any,
    tags: Any,
    filled: Any,
    capacity: Any,
    begin: Any,
    given: Any,
    lost: Any,
) -> Any:
    """Bytes asked and bytes the L2 does not hold, [instruction of the kernel, round]; `tags` and `filled` go on.

    Requests in the order of their beginning; what one brings is there, for the age of others, at its end.
    """
    first, last = np.argsort(events[:, 4], kind="mergesort"), np.argsort(events[:, 5], kind="mergesort")
    ended = 0
    brought = np.zeros(len(weights))
    for i in range(len(first)):
        e = first[i]
        while ended < len(last) and events[last[ended], 5] <= events[e, 4]:
            filled[0] += brought[last[ended]]
            ended += 1
        at, turn, address, size = events[e, 0], events[e, 1], events[e, 2], events[e, 3]
        slot = ((address >> 6) * 0x9E3779B1 >> 8) % _TABLE
        op = head[at, 0]
        held = op == _LOAD or op == _GATHER
        held = (
            held
            and tags[slot, 0] == address
            and tags[slot, 2] >= size
            and filled[0] - tags[slot, 1] <= capacity
        )
        tags[slot, 0], tags[slot, 1], tags[slot, 2] = address, np.int64(filled[0]), size
        given[at - begin, turn] += size * weights[e]
        if not held:
            brought[e] = size * weights[e]
            lost[at - begin, turn] += size * weights[e]
    while ended < len(last):
        filled[0] += brought[last[ended]]
        ended += 1
    return brought


@njit(cache=True, error_model="numpy")
def shared(events: Any, weights: Any, brought: Any) -> Any:
    """The share of each request that misses: of equal ones in a stream and a round, each the same.

    Cores that walk a stream side by side miss in turn; elsewhere the one that comes first does.
    """
    size = 16
    while size < 2 * len(weights):
        size *= 2
    place, known = np.zeros(len(weights), np.int64), np.full(size, -1, np.int64)
    asked, lost = np.zeros(len(weights)), np.zeros(len(weights))
    for e in range(len(weights)):
        slot = (
            (events[e, 2] >> 6) * 0x9E3779B1 + events[e, 1] * 0x85EBCA6B + events[e, 0] * 97 >> 4
        ) & size - 1
        while known[slot] >= 0:
            other = known[slot]
            if (
                events[other, 0] == events[e, 0]
                and events[other, 1] == events[e, 1]
                and events[other, 2] == events[e, 2]
            ):
                break
            slot = slot + 1 & size - 1
        if known[slot] < 0:
            known[slot] = e
        place[e] = known[slot]
        asked[place[e]] += weights[e]
        lost[place[e]] += weights[e] if brought[e] > 0 else 0.0
    share = np.zeros(len(weights))
    for e in range(len(weights)):
        share[e] = lost[place[e]] / asked[place[e]] if events[e, 6] else np.float64(brought[e] > 0)
    return share


@njit(cache=True, error_model="numpy")
def kernel(
    begin: Any,
    end: Any,
    code: Any,
    starts: Any,
    values: Any,
    rates: Any,
    tags: Any,
    filled: Any,
    counters: Any,
) -> Any:
    """Ticks of the kernel whose instructions are begin … end - 1, after its barrier; adds to `counters`.

    Every core is walked alone, which says what it asks for and when; then those that take longest, or ask for
    most, among the others' requests.
    """
    cores, size = np.int64(rates[0]), end - begin
    batch, short = np.zeros((size, ROUNDS)), np.zeros((size, ROUNDS))
    asked, alone = np.zeros((cores, ROUNDS)), np.zeros(cores)
    bounds = np.zeros(cores + 1, np.int64)
    events, weights = np.zeros((1024, 7), np.int64), np.ones(1024)
    for c in range(cores):
        while True:
            own = np.zeros(12)
            asked[c] = 0
            ticks, count = walk(
                c,
                begin,
                code,
                starts,
                values,
                rates,
                batch,
                short,
                short,
                own,
                asked[c],
                events,
                weights,
                bounds[c],
            )
            if count <= len(weights):
                break
            more, heavier = np.zeros((2 * count, 7), np.int64), np.ones(2 * count)
            more[: bounds[c]], heavier[: bounds[c]] = events[: bounds[c]], weights[: bounds[c]]
            events, weights = more, heavier
        alone[c], bounds[c + 1] = ticks, count
        counters += own
    given, lost = np.zeros((size, ROUNDS)), np.zeros((size, ROUNDS))
    brought = hold(
        code[0],
        events[: bounds[cores]],
        weights[: bounds[cores]],
        tags,
        filled,
        rates[13],
        begin,
        given,
        lost,
    )
    counters[_HBM] += lost.sum()
    bytes_ = np.zeros(cores)
    for c in range(cores):
        bytes_[c] = asked[c].sum()
    share = shared(events[: bounds[cores]], weights[: bounds[cores]], brought)
    requests = np.zeros((size, ROUNDS))
    for e in range(bounds[cores]):
        requests[events[e, 0] - begin, events[e, 1]] += weights[e]
    slowest = np.argsort(-alone, kind="mergesort")
    latest = max(
        bytes_.sum() * rates[9] + rates[10], lost.sum() * rates[11] + rates[12] if lost.sum() else 0.0
    )
    spare, unused, none = np.zeros((0, 7), np.int64), np.zeros(0), np.zeros(ROUNDS)
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
            at, turn = events[e, 0] - begin, events[e, 1]
            times[at, turn] += weights[e]
            missed[at, turn] += weights[e] * share[e]
        for at in range(size):
            for turn in range(ROUNDS):
                many = crowd[turn] / max(requests[at, turn], 1.0)
                batch[at, turn], short[at, turn] = given[at, turn] * many, lost[at, turn] * many
                missed[at, turn] /= max(times[at, turn], 1.0)
        ticks, _ = walk(
            c, begin, code, starts, values, rates, batch, short, missed, own, none, spare, unused, 0
        )
        latest = max(latest, ticks)
    return latest
