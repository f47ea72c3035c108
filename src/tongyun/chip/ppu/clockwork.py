# ruff: noqa: PLR1714, PLR0912, PLR0915 - one loop, so that a core's state stays in the processor's registers
"""The timing simulator's inner loop, compiled with numba: microcode in, ticks out.

A core runs until its next request to shared memory. Whose is served next is given, as a run on another chip
wrote it down, or it is the earliest, of equal ones the lower core's. What a product, a move or a pass over
elements takes when nothing cuts it short is worked out once, and not each time it runs. `microcode` says
what a row means, `rates` what a chip's numbers are. One file, because numba's cache does not see changes in
another: a formula apart could be changed and the loop run as before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

# As in `microcode`.
_LDS, _LOOP, _ENDLOOP, _BARRIER, _LOAD, _MMA, _ATTN, _VEC, _ALL_REDUCE = 2, 3, 4, 5, 6, 10, 11, 12, 22
_ALL_TO_ALL, _SEND, _RECV = 25, 26, 27
_ADD, _SUB, _MUL, _DIV, _MOD, _MIN, _MAX, _XOR = range(32, 40)
_WIDTH, _CYCLE, _TILES, _PORTS = 20, 20, 21, 37
_WHOLE, _NOWHERE = 64, 65

TOKENS = 16
"""A semaphore holds no more; two a buffer are usual."""
_WELL, _OVERFLOW, _DEADLOCK, _APART = range(4)
ENDS = (
    "",
    f"a semaphore holds {TOKENS} tokens and is given one more",
    "deadlock: nothing has signalled a semaphore it waits for",
    "some cores wait at a barrier, others have halted",
)
"""How a run ends, by its number."""
AS_THEY_COME, KEEP, FOLLOW = range(3)
"""How requests are served: as they come, as they come and written down, as written down."""
_FLOPS, _HBM, _L2, _SRAM, _LINK, _ELEMENTS, _BUSY = range(7)
_SETS, _HASH = 1 << 16, -7046029254386353131
"""What the L2 holds, two tiles a set: address, bytes filled by then, bytes of its own, when it arrives."""
_READ = 24
"""Cycles from an LDS to its number being in the register."""
_CORE = 12
"""Bits of a core's number."""
CORES = 1 << _CORE
_NEVER, _LONGEST = 1 << 62, (1 << 50) - 1
# A core's state, one behind the other: place and time of control; when each queue is free and is done; how
# many tokens each semaphore holds; turns left of each loop; when its request comes; registers; when tokens
# were given, oldest first.
_PC, _NOW, _FREE, _DONE, _HELD, _LEFT, _ASK, _REGS = 0, 1, 2, 8, 14, 30, 38, 39
_GIVEN = _REGS + _NOWHERE + 1
_STATE = _GIVEN + 16 * TOKENS


@njit(cache=True, error_model="numpy")
def _weigh(code: Any, rates: Any) -> None:
    """What the rows take on a chip when nothing cuts them short, and their latencies.

    All: 1 ticks until it is issued. LOAD: 14 bytes moved, 15 fetched, 16 17 18 ticks at port, L2 and HBM.
    MMA: 11 ticks of the smallest product, 12 latency, 13 ticks, 14 FLOPs, 15 bytes of SRAM. ATTN: 11, 12 as
    MMA. VEC: 13 ticks, 14 elements, 15 latency. Links: 5 ticks, 6 bytes, 7 of HBM.
    """
    cycle = np.int64(rates[_CYCLE])
    for row in code.reshape(-1, _WIDTH):
        row[1] *= cycle
        if row[0] == _MMA or row[0] == _ATTN:
            row[11] = np.int64(rates[_TILES + row[11]])
        if row[0] == _LOAD:
            row[14], row[15] = _access(row[7], row[8], row[11], row[12], row[13] & 2)
            row[16] = np.int64(row[14] * rates[8])
            row[17], row[18] = np.int64(row[15] * rates[9]), np.int64(row[15] * rates[11])
        elif row[0] == _MMA:
            row[12] = np.int64(rates[4])
            row[13], row[14], row[15] = _product(row[5], row[6], row[7], row[11], rates)
        elif row[0] == _ATTN:
            row[12] = np.int64(rates[4] + rates[7])
        elif row[0] == _VEC:
            row[13], row[14] = _elements(row[5], row[6] * row[9], row[10], row[11], rates)
            row[15] = np.int64(rates[7])
        elif row[0] == _ALL_REDUCE:
            row[5], row[6], row[7] = _linked(row[8], row[9], row[10], row[11], rates)


@njit(cache=True, error_model="numpy", forceinline=True)
def _access(rows: Any, cols: Any, size: Any, stride: Any, gather: Any) -> Any:
    """(bytes moved, bytes fetched): memory is read in pieces of 64 bytes.

    Rows that lie apart fill whole pieces; a row that repeats (stride 0) is read once.
    """
    width = cols * size
    moved = rows * width
    if stride == 0:
        return moved, (width + 63) // 64 * 64
    if stride != width or gather:
        return moved, rows * ((width + 63) // 64 * 64)
    return moved, (moved + 63) // 64 * 64


@njit(cache=True, error_model="numpy", forceinline=True)
def _product(m: Any, n: Any, k: Any, tile_ticks: Any, rates: Any) -> Any:
    """(ticks, FLOPs, bytes of SRAM) of a product; it fills whole tiles of the tensor unit."""
    tile_m, tile_n, tile_k = np.int64(rates[1]), np.int64(rates[2]), np.int64(rates[3])
    tiles = ((m + tile_m - 1) // tile_m) * ((n + tile_n - 1) // tile_n) * ((k + tile_k - 1) // tile_k)
    if not (m and n and k):
        return np.int64(0), np.int64(0), np.int64(0)
    return tiles * tile_ticks, 2 * m * n * k, 2 * (m * k + n * k) + 8 * m * n


@njit(cache=True, error_model="numpy", forceinline=True)
def _attention(m: Any, n: Any, width: Any, most: Any, tile_ticks: Any, rates: Any) -> Any:
    """Ticks of a tile of attention: two products and the softmax between them.

    Where it is a kernel of its own and not one instruction's work, tiles are as large as written.
    """
    rows = np.int64(rates[17])
    if rows:
        m, n = (m + rows - 1) // rows * rows, most
    products = _product(m, n, width, tile_ticks, rates)[0] + _product(m, width, n, tile_ticks, rates)[0]
    softmax = np.int64(m * n * rates[18])
    return max(products, softmax) + np.int64(min(products, softmax) * rates[19])


@njit(cache=True, error_model="numpy", forceinline=True)
def _elements(rows: Any, cols: Any, plain: Any, special: Any, rates: Any) -> Any:
    """(ticks, elements times passes) of a pass over rows · cols elements."""
    each = rows * cols
    return np.int64(each * (plain * rates[5] + special * rates[6])), each * (plain + special)


@njit(cache=True, error_model="numpy")
def _linked(op: Any, size: Any, ranks: Any, addend: Any, rates: Any) -> Any:
    """(ticks, bytes over the links, bytes of HBM) of a collective or message.

    HBM gives and takes each byte once, while the links move theirs. Without a switch few peers use few ports.
    """
    moved, hops, memory, peers = size, np.int64(1), size, ranks - 1
    if op == _ALL_REDUCE:
        moved, hops = 2 * (ranks - 1) * size // ranks, 2 * (ranks - 1)
        memory = 3 * size if addend else 2 * size
    elif op != _SEND and op != _RECV:
        moved, hops = (ranks - 1) * size, ranks - 1
        memory = 2 * ranks * size if op == _ALL_TO_ALL else (ranks + 1) * size
    else:
        peers = np.int64(1)
    each = rates[15] * max(rates[_PORTS] / max(peers, 1), 1.0)
    return np.int64(max(moved * each + hops * rates[16], memory * rates[11])), moved, memory


@njit(cache=True, error_model="numpy", forceinline=True)
def _cut(imm: Any, held: Any) -> Any:
    return min(max(held, 0), imm)


@njit(cache=True, error_model="numpy")
def _attended(m: Any, n: Any, ahead: Any, group: Any) -> Any:
    """Pairs that a causal tile computes: keys up to each row's own position, `ahead` of the first key."""
    if ahead + 1 >= n:
        return m * n
    pairs = 0
    for row in range(m):
        pairs += min(max(ahead + row // group + 1, 0), n)
    return pairs


@njit(cache=True, error_model="numpy")
def run(code: Any, starts: Any, values: Any, rates: Any, kernels: Any, order: Any, what: Any) -> Any:
    """(ticks and counters by kernel, instructions run, how it ended, row and core where it did, order).

    `what` says whether requests are served in `order` (FOLLOW), or as they come, which may be written down
    (KEEP): the core that goes on, -1 where a kernel ends.
    """
    _weigh(code, rates)
    follow, keep, turn = what == FOLLOW, what == KEEP, 0
    cores, cycle = np.int64(rates[0]), np.int64(rates[_CYCLE])
    state = np.zeros(cores * _STATE, np.int64)
    for c in range(cores):
        state[c * _STATE + _REGS + 1], state[c * _STATE + _REGS + 2] = c, cores
        state[c * _STATE + _REGS + _WHOLE] = _NEVER
    leaves = 1
    while leaves < cores:
        leaves *= 2
    first = np.full(2 * leaves, _NEVER, np.int64)
    tags = np.zeros(_SETS * 8, np.int64)
    ticks, counters = np.zeros(kernels, np.int64), np.zeros((kernels + 1, 12), np.int64)
    busy = np.zeros(8, np.int64)
    flops, hbm, l2, sram, link, passed = 0, 0, 0, 0, 0, 0
    l2_free, hbm_free, filled, begun, kernel, total = 0, 0, 0, 0, -1, 0
    l2_latency, hbm_latency = np.int64(rates[10]), np.int64(rates[12])
    l2_bytes, barrier = np.int64(rates[13]), np.int64(rates[14])
    while True:
        for c in range(cores):
            # Before every request, and in order: cores that begin a kernel.
            first[leaves + c] = c
        for node in range(leaves - 1, 0, -1):
            first[node] = min(first[2 * node], first[2 * node + 1])
        level = state[_NOW]
        while True:
            if follow:
                c = int(order[turn])
                turn += 1
            else:
                c = first[1] & CORES - 1 if first[1] != _NEVER else -1
                if keep:
                    if turn == len(order):
                        longer = np.zeros(2 * turn, np.int16)
                        longer[:turn] = order
                        order = longer
                    order[turn] = c
                    turn += 1
            if c < 0:
                break
            base = c * _STATE
            regs, given, held = base + _REGS, base + _GIVEN, base + _HELD
            at, now = state[base + _PC], state[base + _NOW]
            if code[at] == _LOAD:
                start = state[base + _ASK]
                engine = code[at + 4]
                rows = _cut(code[at + 7], state[regs + code[at + 9]])
                cols = _cut(code[at + 8], state[regs + code[at + 10]])
                if rows == code[at + 7] and cols == code[at + 8]:
                    moved, fetched = code[at + 14], code[at + 15]
                    at_port, at_l2, at_hbm = code[at + 16], code[at + 17], code[at + 18]
                else:
                    moved, fetched = _access(rows, cols, code[at + 11], code[at + 12], code[at + 13] & 2)
                    at_port = np.int64(moved * rates[8])
                    at_l2, at_hbm = np.int64(fetched * rates[9]), np.int64(fetched * rates[11])
                end = start
                if moved:
                    address = code[at + 5] + state[regs + code[at + 6]]
                    slot = (address * _HASH >> 48 & _SETS - 1) * 8
                    if tags[slot] != address and (
                        tags[slot + 4] == address or tags[slot + 5] < tags[slot + 1]
                    ):
                        slot += 4
                    hit = (
                        code[at + 13] & 1 and tags[slot] == address and tags[slot + 2] >= fetched
                        and filled - tags[slot + 1] <= l2_bytes
                    )  # fmt: skip
                    port = start + at_port
                    l2_free = max(l2_free, start) + at_l2
                    end = max(port, l2_free) + l2_latency
                    if hit:
                        # It may still be on its way, asked for by another core.
                        end = max(end, tags[slot + 3])
                    else:
                        filled += fetched
                        hbm_free = max(hbm_free, start) + at_hbm
                        end = max(end, hbm_free + hbm_latency)
                        hbm += fetched
                        tags[slot + 3] = hbm_free + hbm_latency
                    tags[slot], tags[slot + 1], tags[slot + 2] = address, filled, fetched
                    l2 += fetched
                    sram += moved
                    busy[engine] += at_port
                    start = port
                state[base + _FREE + engine] = start
                end = max(end, state[base + _DONE + engine])
                state[base + _DONE + engine] = end
                signal = code[at + 3]
                while signal:
                    bit = (signal & 31) - 1
                    count = state[held + bit]
                    if count == TOKENS:
                        return ticks, counters, total, _OVERFLOW, at // _WIDTH, c, order
                    state[given + count * 16 + bit] = end
                    state[held + bit] = count + 1
                    signal >>= 5
            at += _WIDTH
            wish = _NEVER
            while True:
                op = code[at]
                now += code[at + 1]
                total += code[at + 1]
                ready, wait = now, code[at + 2]
                while wait:
                    bit = (wait & 31) - 1
                    count = state[held + bit] - 1
                    if count < 0:
                        return ticks, counters, total, _DEADLOCK, at // _WIDTH, c, order
                    ready = max(ready, state[given + bit])
                    for place in range(count):
                        state[given + place * 16 + bit] = state[given + place * 16 + 16 + bit]
                    state[held + bit] = count
                    wait >>= 5
                if op == _LOAD:
                    start = max(ready, state[base + _FREE + code[at + 4]])
                    state[base + _ASK] = start
                    # Order is told apart up to so many ticks behind the kernel's beginning.
                    wish = min(start - level, _LONGEST) << _CORE | c
                    break
                if op == _ENDLOOP:
                    for step in range(code[at + 7]):
                        state[regs + code[at + 8 + 2 * step]] += code[at + 9 + 2 * step]
                    left = state[base + _LEFT + code[at + 5]] - 1
                    state[base + _LEFT + code[at + 5]] = left
                    at = code[at + 6] if left else at + _WIDTH
                    continue
                if op >= _ADD:
                    a, b = state[regs + code[at + 6]], state[regs + code[at + 7]] + code[at + 8]
                    if op == _ADD:
                        a += b
                    elif op == _SUB:
                        a -= b
                    elif op == _MUL:
                        a *= b
                    elif op == _DIV:
                        a = a // b if b != 0 else 0
                    elif op == _MOD:
                        a = a % b if b != 0 else 0
                    elif op == _MIN:
                        a = min(a, b)
                    elif op == _MAX:
                        a = max(a, b)
                    elif op == _XOR:
                        a ^= b
                    else:
                        a = np.int64(a < b)
                    state[regs + code[at + 5]] = a
                    at += _WIDTH
                    continue
                if op == _LOOP:
                    times = _cut(code[at + 7], state[regs + code[at + 8]])
                    state[base + _LEFT + code[at + 5]] = times
                    at = at + _WIDTH if times else code[at + 6]
                    continue
                if op == _LDS:
                    now = ready + _READ * cycle
                    table = code[at + 7]
                    entry = starts[table - 1] + code[at + 8] + (state[regs + code[at + 6]] >> 2)
                    entry = min(max(entry, starts[table - 1]), starts[table] - 1)
                    state[regs + code[at + 5]] = values[entry]
                    at += _WIDTH
                    continue
                if op == _BARRIER:
                    break
                engine = code[at + 4]
                start = max(ready, state[base + _FREE + engine])
                took, latency = 0, 0
                if op == _MMA:
                    m = _cut(code[at + 5], state[regs + code[at + 8]])
                    n = _cut(code[at + 6], state[regs + code[at + 9]])
                    k = _cut(code[at + 7], state[regs + code[at + 10]])
                    if m == code[at + 5] and n == code[at + 6] and k == code[at + 7]:
                        took, work, near = code[at + 13], code[at + 14], code[at + 15]
                    else:
                        took, work, near = _product(m, n, k, code[at + 11], rates)
                    latency = code[at + 12] if work else 0
                    flops += work
                    sram += near
                elif op == _VEC:
                    rows = _cut(code[at + 5], state[regs + code[at + 7]])
                    cols = _cut(code[at + 6], state[regs + code[at + 8]])
                    if rows == code[at + 5] and cols == code[at + 6] and not code[at + 12]:
                        took, work = code[at + 13], code[at + 14]
                    else:
                        plain = code[at + 10]
                        if code[at + 12]:
                            plain = _cut(plain, state[regs + code[at + 12]])
                        took, work = _elements(rows, cols * code[at + 9], plain, code[at + 11], rates)
                    passed += work
                    sram += 8 * work
                    latency = code[at + 15] if took else 0
                elif op == _ATTN:
                    m = _cut(code[at + 5], state[regs + code[at + 8]])
                    n = _cut(code[at + 6], state[regs + code[at + 9]])
                    width = _cut(code[at + 7], state[regs + code[at + 10]])
                    if m and n:
                        took = _attention(m, n, width, code[at + 6], code[at + 11], rates)
                        latency, pairs = code[at + 12], m * n
                        if code[at + 13]:
                            query = code[at + 14] + state[regs + code[at + 15]]
                            key = code[at + 16] + state[regs + code[at + 17]]
                            pairs = _attended(m, n, query - key, code[at + 18])
                        flops += 4 * pairs * width
                        passed += m * n
                        sram += 2 * (m + 2 * n) * width + 8 * m * width
                elif op == _ALL_REDUCE and c == 0:
                    took = code[at + 5]
                    link += code[at + 6]
                    hbm += code[at + 7]
                busy[engine] += took
                state[base + _FREE + engine] = start + took
                end = max(state[base + _DONE + engine], start + took + latency)
                state[base + _DONE + engine] = end
                signal = code[at + 3]
                while signal:
                    bit = (signal & 31) - 1
                    count = state[held + bit]
                    if count == TOKENS:
                        return ticks, counters, total, _OVERFLOW, at // _WIDTH, c, order
                    state[given + count * 16 + bit] = end
                    state[held + bit] = count + 1
                    signal >>= 5
                at += _WIDTH
            state[base + _PC], state[base + _NOW] = at, now
            if follow:
                continue
            node = leaves + c
            first[node] = wish
            while node > 1:
                wish = min(wish, first[node ^ 1])
                node >>= 1
                first[node] = wish
        latest: Any = begun
        at = state[_PC]
        for c in range(cores):
            base = c * _STATE
            latest = max(latest, state[base + _NOW])
            for engine in range(6):
                latest = max(latest, state[base + _DONE + engine])
            if code[state[base + _PC] + 6] != code[at + 6]:
                return ticks, counters, total, _APART, state[base + _PC] // _WIDTH, c, order
        if kernel >= 0:
            ticks[kernel] = latest - begun
        counts = counters[kernel]
        counts[_FLOPS] += flops
        counts[_HBM] += hbm
        counts[_L2] += l2
        counts[_SRAM] += sram
        counts[_LINK] += link
        counts[_ELEMENTS] += passed
        for engine in range(6):
            counts[_BUSY + engine] += busy[engine]
            busy[engine] = 0
        flops, hbm, l2, sram, link, passed = 0, 0, 0, 0, 0, 0
        if code[at + 6]:
            return ticks, counters[:kernels], total // cycle, _WELL, at // _WIDTH, 0, order
        kernel, begun = code[at + 5], latest
        latest += barrier
        for c in range(cores):
            base = c * _STATE
            state[base + _NOW] = latest
            for engine in range(6):
                state[base + _FREE + engine] = latest
                state[base + _DONE + engine] = latest
        l2_free, hbm_free = max(l2_free, latest), max(hbm_free, latest)
