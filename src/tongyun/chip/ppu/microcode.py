# ruff: noqa: SIM109, PLR1714, PLR0911 - numba takes long functions and plain comparisons
"""Fields to microcode, compiled with numba: one row of numbers an instruction, as `clockwork` runs them.

What only fills registers that no time depends on (which of two buffers has its turn) has no row: its cycles
are those of the next row. Knows no chip. Numba's cache does not see changes in another file, so numbers that
both files use are written out in both.

A row is operation, cycles until it is issued, semaphores taken, semaphores given, engine; then by operation
    LOAD      all moves: 5 address, 6 its register, 7 8 rows and columns, 9 10 their registers, 11 bytes of
              the type, 12 stride, 13 inward + 2 · gathered
    MMA       5 6 7 m n k, 8 9 10 their registers, 11 type of the smallest product
    ATTN      5 6 7 m n width, 8 9 10 their registers, 11 as MMA, 13 whether causal, 14 15 query and its
              register, 16 17 key and its register, 18 rows of a position
    VEC       all passes over elements: 5 6 rows and columns, 7 8 their registers, 9 times columns, 10 11
              passes on plain and on special lanes, 12 register of the plain ones
    ALL_REDUCE  all that use links: 8 operation, 9 bytes, 10 ranks, 11 whether there is an addend
    LOOP      5 depth, 6 the row behind it, 7 times, 8 its register
    ENDLOOP   5 depth, 6 the first row of its body, 7 how many registers change, 8 9 … which and by how much
    ADD …     the functions of ALU: 5 rd, 6 ra, 7 rb, 8 immediate
    LDS       5 rd, 6 register of the place, 7 table, 8 entry
    BARRIER   5 kernel, 6 whether it is a HALT
The other places are `clockwork`'s.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

# Operation numbers are places in `fields.OPS`.
_HALT, _ALU, _LDS, _LOOP, _ENDLOOP, _BARRIER, _LOAD, _GATHER, _STORE, _SCATTER, _MMA, _ATTN = range(12)
_VEC, _RED, _RMSNORM, _ROPE, _DRAIN, _ATTN_END, _ATTN_MERGE, _ATTN_INIT, _TOPK, _SORT, _ALL_REDUCE = range(
    12, 23
)
_RECV, _SYNC, _ADD = 27, 28, 32
_WIDTH = 20
_WHOLE, _NOWHERE = 64, 65
"""Registers behind those of the instruction set: one that cuts no count short, one that nobody reads."""


@njit(cache=True, error_model="numpy")
def _counted(op: Any) -> Any:
    """The places of an operation's counts: (first, how many)."""
    if op == _VEC or op == _RMSNORM or op == _DRAIN:
        return 3, 2
    if op == _RED or op == _ATTN_END or op == _ATTN_MERGE:
        return 2, 2
    if op == _LOAD or op == _GATHER or op == _STORE or op == _SCATTER:
        return 2, 2
    if op == _ROPE:
        return 4, 2
    if op == _ATTN_INIT:
        return 1, 2
    if op == _MMA or op == _TOPK:
        return 3, 3
    if op == _ATTN:
        return 4, 3
    if op == _SORT:
        return 3, 1
    if op == _LOOP:
        return 0, 1
    return 0, 0


@njit(cache=True, error_model="numpy")
def _living(head: Any, imm: Any, reg: Any, partner: Any) -> Any:
    """By instruction, as bits: the registers whose values some time may still depend on when it is done."""
    one = np.uint64(1)
    before, after = np.zeros(len(head) + 1, np.uint64), np.zeros(len(head), np.uint64)
    changed = True
    while changed:
        changed = False
        for at in range(len(head) - 1, -1, -1):
            op, live = head[at, 0], before[at + 1]
            if op == _LOOP or op == _ENDLOOP:
                live |= before[partner[at] + 1]
            after[at] = live
            if op == _ALU:
                if live >> np.uint64(imm[at, 0]) & one:
                    live &= ~(one << np.uint64(imm[at, 0]))
                    live |= one << np.uint64(imm[at, 1]) | one << np.uint64(imm[at, 2])
            elif op == _LDS:
                live = live & ~(one << np.uint64(imm[at, 0])) | one << np.uint64(reg[at, 1])
            else:
                first, many = _counted(op)
                for place in range(first, first + many):
                    live |= one << np.uint64(reg[at, place])
                if _LOAD <= op <= _SCATTER:
                    live |= one << np.uint64(reg[at, 0])
                if op == _ATTN and head[at, 3] & 1:
                    live |= one << np.uint64(reg[at, 11]) | one << np.uint64(reg[at, 12])
            live &= ~one
            if live != before[at]:
                before[at], changed = live, True
    return after


@njit(cache=True, error_model="numpy")
def lower(head: Any, imm: Any, reg: Any, partner: Any) -> Any:
    """Rows one behind the other, and the word that each is of."""
    size = len(head)
    after = _living(head, imm, reg, partner)
    place, cycles = np.zeros(size + 1, np.int64), np.zeros(size, np.int64)
    rows, lead = 1, 0
    for at in range(size):
        lead += 1
        place[at] = rows
        dead = (
            head[at, 0] == _ALU and not head[at, 4] and not after[at] >> np.uint64(imm[at, 0]) & np.uint64(1)
        )
        if not dead:
            cycles[at], lead = lead, 0
            rows += 1
    code, words = np.zeros((rows, _WIDTH), np.int64), np.zeros(rows, np.int64)
    # Cores begin as if behind a barrier.
    code[0, 0] = _BARRIER
    for at in range(size):
        if cycles[at]:
            row = code[place[at]]
            words[place[at]] = at
            row[1], row[2], row[3], row[4] = cycles[at], head[at, 4], head[at, 5], head[at, 1]
            _row(row, at, head, imm, reg)
            if row[0] == _LOOP:
                row[6] = place[partner[at] + 1] * _WIDTH
            elif row[0] == _ENDLOOP:
                row[6] = place[partner[at] + 1] * _WIDTH
                _steps(row, at, imm, reg, after)
    depth = 0
    for row in code:
        depth -= row[0] == _ENDLOOP
        if row[0] == _LOOP or row[0] == _ENDLOOP:
            row[5] = depth
        depth += row[0] == _LOOP
    return code.ravel(), words


@njit(cache=True, error_model="numpy")
def _steps(row: Any, at: Any, imm: Any, reg: Any, after: Any) -> None:
    """A loop's end: how many registers change, which, by how much."""
    many = 0
    for step in range(6):
        r = reg[at, step]
        if r and after[at] >> np.uint64(r) & np.uint64(1):
            row[8 + 2 * many], row[9 + 2 * many] = r, imm[at, step]
            many += 1
    row[7] = many


@njit(cache=True, error_model="numpy")
def _row(row: Any, at: Any, head: Any, imm: Any, reg: Any) -> None:
    op = head[at, 0]
    if op == _HALT or op == _BARRIER:
        row[0], row[5], row[6] = _BARRIER, imm[at, 0], op == _HALT
    elif op == _ALU or op == _LDS:
        row[0] = _ADD + head[at, 2] if op == _ALU else _LDS
        # Register 0 stays zero.
        row[5] = imm[at, 0] if imm[at, 0] else _NOWHERE
        row[6], row[7], row[8] = imm[at, 1] if op == _ALU else reg[at, 1], imm[at, 2], imm[at, 3]
    elif op == _LOOP:
        row[0], row[7], row[8] = _LOOP, imm[at, 0], _count(reg[at, 0])
    elif op == _ENDLOOP or op >= _SYNC:
        row[0] = min(op, _SYNC)
    elif op <= _SCATTER:
        row[0], row[5], row[6], row[7], row[8] = _LOAD, imm[at, 0], reg[at, 0], imm[at, 2], imm[at, 3]
        row[9], row[10] = _count(reg[at, 2]), _count(reg[at, 3])
        row[11], row[12] = head[at, 6], imm[at, 4]
        row[13] = (op == _LOAD or op == _GATHER) + 2 * (op == _GATHER)
    elif op == _MMA or op == _ATTN:
        first, _ = _counted(op)
        row[0], row[11] = op, head[at, 7]
        for i in range(3):
            row[5 + i], row[8 + i] = imm[at, first + i], _count(reg[at, first + i])
        if op == _ATTN:
            row[13] = head[at, 3] & 1
            row[14], row[15], row[16], row[17] = imm[at, 11], reg[at, 11], imm[at, 12], reg[at, 12]
            row[18] = max(imm[at, 13], 1)
    elif op >= _ALL_REDUCE:
        row[0], row[8], row[9] = _ALL_REDUCE, op, imm[at, 1] if op == _RECV else imm[at, 2]
        row[10], row[11] = imm[at, 3], imm[at, 4] != 0
    else:
        _pass(row, at, head, imm, reg)


@njit(cache=True, error_model="numpy")
def _count(reg: Any) -> Any:
    """A count without a register is never cut short."""
    return reg if reg else _WHOLE


@njit(cache=True, error_model="numpy")
def _pass(row: Any, at: Any, head: Any, imm: Any, reg: Any) -> None:
    """A vector instruction: so many passes over its elements on plain and on special lanes."""
    op, fn = head[at, 0], head[at, 2]
    first, _ = _counted(op)
    row[0], row[5], row[6] = _VEC, imm[at, first], imm[at, first + 1]
    row[7], row[8] = _count(reg[at, first]), _count(reg[at, first + 1])
    plain, special, times, top = 1, 0, np.int64(1), np.int64(0)
    if (op == _VEC and fn >= 8) or (op == _RED and fn == 3):
        plain, special = 3 * (op == _RED), 1
    elif op == _RMSNORM or op == _ATTN_MERGE:
        plain = 3
    elif op == _ROPE:
        plain, times = 3, imm[at, 6]
    elif op == _DRAIN:
        plain += (fn & 1) + ((fn >> 1) & 1) + ((fn >> 2) & 1) + ((fn >> 3) & 1) + ((fn >> 4) & 1)
        plain += ((fn >> 5) & 1) + ((fn >> 6) & 1)
        special = (fn >> 1) & 1
    elif op == _TOPK:
        plain, top = imm[at, first + 2], _count(reg[at, first + 2])
    elif op == _SORT:
        row[5], row[6], row[7], row[8], plain = 1, imm[at, first], _WHOLE, _count(reg[at, first]), 16
    row[9], row[10], row[11], row[12] = times, plain, special, top
