# ruff: noqa: PLR0912, PLR1714, SIM109 - numba takes long functions and plain comparisons
"""All cores at one instruction, and which turns of a loop are alike for all of them; compiled with numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

# As in `microcode`.
_LDS, _LOOP, _LOAD, _MMA, _ATTN, _VEC, _ADD = 2, 3, 6, 10, 11, 12, 32
_WIDTH = 20

ROWS = 24
"""Rows of a loop that may be taken many turns at a time."""


@njit(cache=True, error_model="numpy")
def plain_loops(code: Any) -> Any:
    """Which LOOPs hold no other loop, read no numbers and compute none: their turns may be alike."""
    plain = np.zeros(len(code), np.bool_)
    for at in range(len(code)):
        if code[at, 0] == _LOOP:
            end = code[at, 6] // _WIDTH
            plain[at] = end - at <= ROWS
            for i in range(at + 1, end):
                op = code[i, 0]
                plain[at] = plain[at] and op != _LOOP and op != _LDS and op < _ADD
    return plain


@njit(cache=True, error_model="numpy")
def compute(fn: Any, rd: Any, ra: Any, rb: Any, imm: Any, who: Any, count: Any) -> None:
    """One function of all cores that go on: rd = f(ra, rb + imm)."""
    if count == len(rd) and fn < 3:
        if fn == 0:
            for c in range(count):
                rd[c] = ra[c] + rb[c] + imm
        elif fn == 1:
            for c in range(count):
                rd[c] = ra[c] - rb[c] - imm
        else:
            for c in range(count):
                rd[c] = ra[c] * (rb[c] + imm)
        return
    for i in range(count):
        c = who[i]
        a, b = ra[c], rb[c] + imm
        if fn == 0:
            a = a + b
        elif fn == 1:
            a = a - b
        elif fn == 2:
            a = a * b
        elif fn == 3:
            a = a // b if b != 0 else 0
        elif fn == 4:
            a = a % b if b != 0 else 0
        elif fn == 5:
            a = min(a, b)
        elif fn == 6:
            a = max(a, b)
        elif fn == 7:
            a = a ^ b
        else:
            a = np.int64(a < b)
        rd[c] = a


@njit(cache=True, error_model="numpy")
def reaches(held: Any, imm: Any, who: Any, count: Any) -> Any:
    """Whether a register cuts none of the cores short."""
    for i in range(count):  # noqa: SIM110 - numba knows no generators
        if held[who[i]] < imm:
            return False
    return True


@njit(cache=True, error_model="numpy")
def alike(first: Any, end: Any, code: Any, regs: Any, who: Any, count: Any, most: Any) -> Any:
    """How many of the next turns of the loop at first … end - 1 are like the last one, at most `most`."""
    last = code[end]
    for at in range(first, end):
        row = code[at]
        op, place, many = row[0], 5, 2
        if op == _LOAD:
            place = 7
        elif op == _MMA or op == _ATTN:
            many = 3
        elif op != _VEC:
            continue
        for step in range(last[7]):
            register, change = last[8 + 2 * step], last[9 + 2 * step]
            held = regs[register]
            for i in range(place, place + many):
                if row[i + many] == register:
                    for j in range(count):
                        # What the last turn saw, and what the next ones will.
                        v = held[who[j]]
                        if v < row[i] or v - change < row[i]:
                            return 0
                        if change < 0:
                            most = min(most, (v - row[i]) // -change + 1)
            if op == _ATTN and row[13] and register == row[17]:
                for j in range(count):
                    ahead = row[14] + regs[row[15], who[j]] - row[16] - held[who[j]] + 1 - row[6]
                    if ahead < 0:
                        return 0
                    most = min(most, ahead // max(change, 1) + 1)
            if op == _VEC and row[12] and register == row[12]:
                return 0
    return most
