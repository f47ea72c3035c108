# ruff: noqa: E501, SIM109, PLR1714, PLR0912, PLR0915 - numba takes long argument lists and plain comparisons
"""The timing simulator's inner loop, compiled with numba: flat arrays in, ticks out.

`timing` lays a program out in these arrays and says what they mean. One function interprets a core until
its next request to shared memory; the other lets the core with the earliest request go first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

# Operation numbers are places in `timing.OPS`.
_HALT, _ALU, _LDS, _LOOP, _ENDLOOP, _BARRIER, _LOAD, _GATHER, _STORE, _SCATTER, _MMA, _ATTN = range(12)
_VEC, _RED, _RMSNORM, _ROPE, _DRAIN, _ATTN_END, _ATTN_MERGE, _ATTN_INIT, _TOPK, _SORT, _ALL_REDUCE = range(
    12, 23
)
_ALL_GATHER, _REDUCE_SCATTER, _ALL_TO_ALL, _SEND, _RECV, _SYNC = range(23, 29)
_CONTROL, _LOADS, _STORES, _TENSOR, _VECTOR, _ICN = range(6)
_FLOPS, _HBM, _L2, _SRAM, _LINK, _ELEMENTS, _BUSY = range(7)
_TICK = 256
_RING = 16
"""Tokens a semaphore may hold; two a buffer are usual."""
_DEPTH = 8
_TABLE = 1 << 17
_READ = 24 * _TICK
"""Ticks from an LDS to its number being in the register."""


@njit(cache=True, error_model="numpy", inline="always")
def _count(imm: Any, reg: Any, regs: Any, c: Any) -> Any:
    return imm if reg == 0 else min(max(regs[c, reg], 0), imm)


@njit(cache=True, error_model="numpy", inline="always")
def _ceil(a: Any, b: Any) -> Any:
    return (a + b - 1) // b


@njit(cache=True, error_model="numpy", forceinline=True)
def _alu(fn: Any, a: Any, b: Any) -> Any:  # noqa: PLR0911 - one answer a function
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
    return 1 if a < b else 0


@njit(cache=True, error_model="numpy")
def _vector(
    op: Any, fn: Any, at: Any, c: Any, imm: Any, reg: Any, regs: Any, rates: Any, counters: Any, kernel: Any
) -> Any:
    """Ticks of a vector instruction: passes over elements on plain and on special lanes."""
    plain, special, rows, cols = 0, 0, 0, 0
    if op == _VEC or op == _RED:
        slot = 3 if op == _VEC else 2
        rows = _count(imm[at, slot], reg[at, slot], regs, c)
        cols = _count(imm[at, slot + 1], reg[at, slot + 1], regs, c)
        plain = 1
        if op == _VEC and fn >= 8:
            plain, special = 0, 1
        if op == _RED and fn == 3:
            plain, special = 3, 1
    elif op == _RMSNORM:
        rows, cols, plain = (
            _count(imm[at, 3], reg[at, 3], regs, c),
            _count(imm[at, 4], reg[at, 4], regs, c),
            3,
        )
    elif op == _ROPE:
        rows, cols, plain = (
            _count(imm[at, 4], reg[at, 4], regs, c),
            _count(imm[at, 5], reg[at, 5], regs, c) * imm[at, 6],
            3,
        )
    elif op == _DRAIN:
        rows, cols, plain = (
            _count(imm[at, 3], reg[at, 3], regs, c),
            _count(imm[at, 4], reg[at, 4], regs, c),
            1,
        )
        plain += (fn & 1) + ((fn >> 2) & 1) + ((fn >> 3) & 1) + ((fn >> 4) & 1)
        if fn & 2:
            plain, special = plain + 1, 1
    elif op == _ATTN_END:
        rows, cols, plain = (
            _count(imm[at, 2], reg[at, 2], regs, c),
            _count(imm[at, 3], reg[at, 3], regs, c),
            1,
        )
    elif op == _ATTN_MERGE:
        rows, cols, plain = (
            _count(imm[at, 2], reg[at, 2], regs, c),
            _count(imm[at, 3], reg[at, 3], regs, c),
            3,
        )
    elif op == _ATTN_INIT:
        rows, cols, plain = (
            _count(imm[at, 1], reg[at, 1], regs, c),
            _count(imm[at, 2], reg[at, 2], regs, c),
            1,
        )
    elif op == _TOPK:
        rows, cols, plain = (
            _count(imm[at, 3], reg[at, 3], regs, c),
            _count(imm[at, 4], reg[at, 4], regs, c),
            _count(imm[at, 5], reg[at, 5], regs, c),
        )
    elif op == _SORT:
        rows, cols, plain = 1, _count(imm[at, 3], reg[at, 3], regs, c), 16
    elements = rows * cols
    counters[kernel, _ELEMENTS] += elements * (plain + special)
    counters[kernel, _SRAM] += elements * (plain + special) * 8
    return np.int64(elements * (plain * rates[5] + special * rates[6]))


@njit(cache=True, error_model="numpy")
def _attended(m: Any, n: Any, query: Any, key: Any, group: Any) -> Any:
    """Pairs that a causal tile computes: keys up to each row's own position."""
    pairs = 0
    for row in range(m):
        pairs += min(max(query + row // group - key + 1, 0), n)
    return pairs


@njit(cache=True, error_model="numpy", forceinline=True)
def _core(
    c: Any, head: Any, imm: Any, reg: Any, starts: Any, values: Any, rates: Any, counters: Any, kernel: Any, pc: Any, now: Any,
    regs: Any, free: Any, done: Any, ring: Any, put: Any, took: Any, loops: Any, depth: Any, request: Any,
) -> Any:  # fmt: skip
    """Run core c up to its next request to shared memory, barrier or end; returns instructions run."""
    at, t, ran = pc[c], now[c], 0
    while True:
        op, engine, wait, signal = head[at, 0], head[at, 1], head[at, 4], head[at, 5]
        t += _TICK
        ready = t
        while wait:
            bit = (wait & 31) - 1
            ready = max(ready, ring[c, bit, took[c, bit] & (_RING - 1)])
            took[c, bit] += 1
            wait >>= 5
        if op == _ALU:
            regs[c, imm[at, 0]] = _alu(head[at, 2], regs[c, imm[at, 1]], regs[c, imm[at, 2]] + imm[at, 3])
            regs[c, 0] = 0
            at += 1
            ran += 1
            continue
        if op == _LOOP:
            times = _count(imm[at, 0], reg[at, 0], regs, c)
            if times > 0:
                loops[c, depth[c], 0] = at + 1
                loops[c, depth[c], 1] = times
                depth[c] += 1
                at += 1
            else:
                at += 1 + imm[at, 1]
            ran += 1
            continue
        if op == _ENDLOOP:
            for step in range(6):
                if reg[at, step]:
                    regs[c, reg[at, step]] += imm[at, step]
            top = depth[c] - 1
            loops[c, top, 1] -= 1
            if loops[c, top, 1]:
                at = loops[c, top, 0]
            else:
                depth[c] = top
                at += 1
            ran += 1
            continue
        if op == _LDS:
            t = ready + _READ
            table = imm[at, 2] - 1
            place = imm[at, 3] + regs[c, reg[at, 1]] // 4
            regs[c, imm[at, 0]] = values[min(starts[table] + place, starts[table + 1] - 1)]
            at += 1
            ran += 1
            continue
        if op == _BARRIER or op == _HALT:
            pc[c], now[c], request[c] = at, t, -1
            return ran
        if op <= _SCATTER:
            pc[c], now[c] = at, t
            request[c] = max(ready, free[c, engine])
            return ran
        start = max(ready, free[c, engine])
        ticks, latency = np.int64(0), np.int64(0)
        if op == _MMA:
            m, n, k = (
                _count(imm[at, 3], reg[at, 3], regs, c),
                _count(imm[at, 4], reg[at, 4], regs, c),
                _count(imm[at, 5], reg[at, 5], regs, c),
            )
            if m and n and k:
                tiles = (
                    _ceil(m, np.int64(rates[1])) * _ceil(n, np.int64(rates[2])) * _ceil(k, np.int64(rates[3]))
                )
                ticks, latency = tiles * head[at, 7], np.int64(rates[4])
                counters[kernel, _FLOPS] += 2 * m * n * k
                counters[kernel, _SRAM] += 2 * (m * k + n * k) + 8 * m * n
        elif op == _ATTN:
            m, n, width = (
                _count(imm[at, 4], reg[at, 4], regs, c),
                _count(imm[at, 5], reg[at, 5], regs, c),
                _count(imm[at, 6], reg[at, 6], regs, c),
            )
            if m and n:
                tiles = _ceil(m, np.int64(rates[1])) * (
                    _ceil(n, np.int64(rates[2])) * _ceil(width, np.int64(rates[3]))
                    + _ceil(width, np.int64(rates[2])) * _ceil(n, np.int64(rates[3]))
                )
                ticks = max(tiles * head[at, 7], np.int64(m * n * rates[6]))
                latency = np.int64(rates[4] + rates[7])
                pairs = m * n
                if head[at, 3] & 1:
                    pairs = _attended(
                        m,
                        n,
                        imm[at, 11] + regs[c, reg[at, 11]],
                        imm[at, 12] + regs[c, reg[at, 12]],
                        max(imm[at, 13], 1),
                    )
                counters[kernel, _FLOPS] += 4 * pairs * width
                counters[kernel, _ELEMENTS] += m * n
                counters[kernel, _SRAM] += 2 * (m + 2 * n) * width + 8 * m * width
        elif engine == _VECTOR and op < _SYNC:
            ticks = _vector(op, head[at, 2], at, c, imm, reg, regs, rates, counters, kernel)
            latency = np.int64(rates[7]) if ticks else np.int64(0)
        elif engine == _ICN and c == 0:
            parts = imm[at, 3]
            size = imm[at, 2]
            # `memory`: what HBM gives and takes, each byte once, while the links move theirs.
            moved, hops, memory = size, 1, size
            if op == _ALL_REDUCE:
                moved, hops = 2 * (parts - 1) * size // parts, 2 * (parts - 1)
                memory = 3 * size if imm[at, 4] else 2 * size
            elif op != _SEND and op != _RECV:
                moved, hops = (parts - 1) * size, parts - 1
                memory = 2 * parts * size if op == _ALL_TO_ALL else (parts + 1) * size
            ticks = np.int64(max(moved * rates[15] + hops * rates[16], memory * rates[11]))
            counters[kernel, _LINK] += moved
            counters[kernel, _HBM] += memory
        free[c, engine] = start + ticks
        done[c, engine] = max(done[c, engine], start + ticks + latency)
        counters[kernel, _BUSY + engine] += ticks
        end = done[c, engine]
        while signal:
            bit = (signal & 31) - 1
            ring[c, bit, put[c, bit] & (_RING - 1)] = end
            put[c, bit] += 1
            signal >>= 5
        at += 1
        ran += 1


@njit(cache=True, error_model="numpy", forceinline=True)
def _serve(
    c: Any, head: Any, imm: Any, reg: Any, rates: Any, counters: Any, kernel: Any, pc: Any, now: Any, regs: Any, free: Any, done: Any,
    ring: Any, put: Any, request: Any, shared: Any, tags: Any, filled: Any,
) -> None:  # fmt: skip
    """Give core c's request its times at port, L2 and HBM, and its tokens."""
    at = pc[c]
    op, engine, signal, size = head[at, 0], head[at, 1], head[at, 5], head[at, 6]
    start = request[c]
    rows, cols = _count(imm[at, 2], reg[at, 2], regs, c), _count(imm[at, 3], reg[at, 3], regs, c)
    moved = rows * cols * size
    end = start
    if moved:
        # Memory is read in pieces of 64 bytes; rows that lie apart fill whole ones, and a row that
        # repeats (stride 0) is read once.
        apart = imm[at, 4] != cols * size or op == _GATHER
        fetched = rows * _ceil(cols * size, 64) * 64 if apart else _ceil(moved, 64) * 64
        if imm[at, 4] == 0:
            fetched = _ceil(cols * size, 64) * 64
        address = imm[at, 0] + regs[c, reg[at, 0]]
        slot = ((address >> 6) * 0x9E3779B1 >> 8) % _TABLE
        inward = op == _LOAD or op == _GATHER
        held = inward and tags[slot, 0] == address and tags[slot, 2] >= fetched
        held = held and filled[0] - tags[slot, 1] <= np.int64(rates[13])
        if not held:
            filled[0] += fetched
        tags[slot, 0], tags[slot, 1], tags[slot, 2] = address, filled[0], fetched
        port = start + np.int64(moved * rates[8])
        shared[0] = max(shared[0], start) + np.int64(fetched * rates[9])
        end = max(port, shared[0]) + np.int64(rates[10])
        if not held:
            shared[1] = max(shared[1], start) + np.int64(fetched * rates[11])
            end = max(end, shared[1] + np.int64(rates[12]))
            counters[kernel, _HBM] += fetched
        counters[kernel, _L2] += fetched
        counters[kernel, _SRAM] += moved
        counters[kernel, _BUSY + engine] += port - start
        free[c, engine] = port
    else:
        free[c, engine] = start
    done[c, engine] = max(done[c, engine], end)
    end = done[c, engine]
    while signal:
        bit = (signal & 31) - 1
        ring[c, bit, put[c, bit] & (_RING - 1)] = end
        put[c, bit] += 1
        signal >>= 5
    pc[c] = at + 1


@njit(cache=True, error_model="numpy", forceinline=True)
def _sift(heap: Any, size: Any, place: Any, request: Any) -> None:
    """Let the core at `place` sink until no child's request is earlier; of equals the lower core goes first."""
    while True:
        least = place
        for child in (2 * place + 1, 2 * place + 2):
            if child < size:
                a, b = request[heap[child]], request[heap[least]]
                if a < b or (a == b and heap[child] < heap[least]):
                    least = child
        if least == place:
            return
        heap[place], heap[least] = heap[least], heap[place]
        place = least


@njit(cache=True, error_model="numpy")
def run(head: Any, imm: Any, reg: Any, starts: Any, values: Any, rates: Any, kernels: Any) -> Any:
    """(ticks by kernel, counters by kernel, instructions run)."""
    cores = np.int64(rates[0])
    pc, now = np.zeros(cores, np.int64), np.zeros(cores, np.int64)
    regs = np.zeros((cores, 64), np.int64)
    free, done = np.zeros((cores, 6), np.int64), np.zeros((cores, 6), np.int64)
    ring = np.zeros((cores, 16, _RING), np.int64)
    put, took = np.zeros((cores, 16), np.int64), np.zeros((cores, 16), np.int64)
    loops, depth = np.zeros((cores, _DEPTH, 2), np.int64), np.zeros(cores, np.int64)
    request, heap = np.zeros(cores, np.int64), np.zeros(cores, np.int64)
    shared, filled = np.zeros(2, np.int64), np.zeros(1, np.int64)
    tags = np.full((_TABLE, 3), -1, np.int64)
    ticks, counters = np.zeros(kernels, np.int64), np.zeros((kernels + 1, 12), np.int64)
    for c in range(cores):
        regs[c, 1], regs[c, 2] = c, cores
    kernel, total = -1, 0
    begun: Any = now[0]
    while True:
        for c in range(cores):
            total += _core(
                c, head, imm, reg, starts, values, rates, counters, kernel, pc, now, regs, free, done, ring, put, took, loops,
                depth, request,
            )  # fmt: skip
        size = 0
        for c in range(cores):
            if request[c] >= 0:
                heap[size] = c
                size += 1
        for place in range(size // 2 - 1, -1, -1):
            _sift(heap, size, place, request)
        while size:
            first = heap[0]
            _serve(
                first, head, imm, reg, rates, counters, kernel, pc, now, regs, free, done, ring, put, request, shared, tags, filled,
            )  # fmt: skip
            total += 1 + _core(
                first, head, imm, reg, starts, values, rates, counters, kernel, pc, now, regs, free, done, ring, put, took, loops,
                depth, request,
            )  # fmt: skip
            if request[first] < 0:
                size -= 1
                heap[0] = heap[size]
            _sift(heap, size, 0, request)
        latest: Any = now.max()
        for c in range(cores):
            for engine in range(6):
                latest = max(latest, done[c, engine])
        if kernel >= 0:
            ticks[kernel] = latest - begun
        if head[pc[0], 0] == _HALT:
            return ticks, counters[:kernels], total + cores
        kernel = int(imm[pc[0], 0])
        begun = latest
        latest = latest + np.int64(rates[14])
        total += int(cores)
        for c in range(cores):
            now[c] = latest
            pc[c] += 1
            for engine in range(6):
                free[c, engine] = latest
                done[c, engine] = latest
        shared[0], shared[1] = max(shared[0], latest), max(shared[1], latest)
