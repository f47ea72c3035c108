# ruff: noqa: SIM109, PLR1714, PLR0911, PLR0912 - numba takes long argument lists and plain comparisons
"""Words to flat arrays of their fields, for what times a program: checked as `asm.decode` checks them.

Compiled with numba, because a model's step is a hundred thousand words. Knows no times.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tongyun.chip.ppu.asm import Words, decode, flags_of, is_function
from tongyun.chip.ppu.isa import ENGINES, OPCODES, Form
from tongyun.chip.ppu.rates import PORTS, TILES, rates
from tongyun.errors import InputError
from tongyun.specs.ppu import Ppu

OPS = (
    "HALT", "ALU", "LDS", "LOOP", "ENDLOOP", "BARRIER", "LOAD", "GATHER", "STORE", "SCATTER", "MMA",
    "ATTN", "VEC", "RED", "RMSNORM", "ROPE", "DRAIN", "ATTN_END", "ATTN_MERGE", "ATTN_INIT", "TOPK",
    "SORT", "ALL_REDUCE", "ALL_GATHER", "REDUCE_SCATTER", "ALL_TO_ALL", "SEND", "RECV", "SYNC_LOAD",
    "SYNC_STORE", "SYNC_TENSOR", "SYNC_VECTOR",
)  # fmt: skip
DEPTH = 8
"""Loops that may be open at once."""
_OPERANDS = 14
_HALT, _LDS, _LOOP, _ENDLOOP, _BARRIER, _MMA, _ATTN = (
    OPS.index(name) for name in ("HALT", "LDS", "LOOP", "ENDLOOP", "BARRIER", "MMA", "ATTN")
)
_FORMS = (
    Form.FLOAT, Form.COUNT, Form.SRAM, Form.POSITION, Form.HBM, Form.INTEGER, Form.STEP, Form.BYTES,
    Form.REGISTER,
)  # fmt: skip


@cache
def _tables() -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """By opcode: (number, engine, types, flags, slots used), forms of operands, their slots, functions."""
    about = np.full((256, 5), -1, dtype=np.int64)
    forms, slots = np.full((256, _OPERANDS), -1, dtype=np.int64), np.zeros((256, _OPERANDS), dtype=np.int64)
    functions = np.zeros((256, 256), dtype=np.bool_)
    for each in OPCODES:
        used = 3
        for place, (name, form) in enumerate(each.operands.items()):
            forms[each.code, place], slots[each.code, place] = _FORMS.index(form), each.slot[name]
            used |= (1 << form.slots) - 1 << each.slot[name]
        number, engine = OPS.index(each.name), ENGINES.index(each.engine)
        about[each.code] = number, engine, each.types, flags_of(each.name), used
        functions[each.code] = [is_function(each.functions, fn) for fn in range(256)]
    return about, forms, slots, functions


def fields(words: Words, ppu: Ppu) -> tuple[NDArray[np.int64], ...]:
    """(head, imm, reg): operation, engine, function, flags, wait, signal, bytes of the type and type of
    the smallest product; then immediate and register of each operand.

    InputError names the first word that is no instruction, or none of this chip.
    """
    head, imm, reg = (np.zeros((len(words), size), dtype=np.int64) for size in (8, _OPERANDS, _OPERANDS))
    bad = _unpack(np.ascontiguousarray(words), *_tables(), rates(ppu)[TILES:PORTS] >= 0, head, imm, reg)
    if bad >= 0:
        each = decode(words[bad].tolist(), int(bad))
        lacking = [kind.name for kind in each.types[:2] if kind.rate not in ppu.tensor_flops]
        if each.op in {"MMA", "ATTN"} and lacking:
            has = ", ".join(ppu.tensor_flops)
            raise InputError(f"{ppu.name} has no tensor rate for {lacking[0]}; it has {has}")
        raise InputError(f"word {bad}: {each.op} with more than 12 semaphores; the timing simulator takes 12")
    _distances(head, imm)
    return head, imm, reg


@njit(cache=True, error_model="numpy")
def _unpack(
    words: Any,
    about: Any,
    forms: Any,
    slots: Any,
    functions: Any,
    rated: Any,
    head: Any,
    imm: Any,
    reg: Any,
) -> Any:
    """Fill the arrays; the first word that is none, or -1."""
    sizes = (0, 4, 2, 1, 1, 4, 8)
    for at in range(len(words)):
        first = np.int64(words[at, 0])
        code, fn, flags = first & 0xFF, first >> 8 & 0xFF, first >> 28
        number, types, used = about[code, 0], about[code, 2], about[code, 4]
        if number < 0 or not functions[code, fn] or flags & ~about[code, 3]:
            return at
        for place in range(3):
            kind = first >> 16 + 4 * place & 15
            if kind > 6 or (kind and place >= types):
                return at
        for slot in range(16):
            if words[at, slot] and not used >> slot & 1:
                return at
        masks = np.int64(words[at, 1])
        head[at, 0], head[at, 1], head[at, 2], head[at, 3] = number, about[code, 1], fn, flags
        head[at, 4], head[at, 5] = _listed(masks & 0xFFFF), _listed(masks >> 16)
        if head[at, 4] < 0 or head[at, 5] < 0:
            return at
        head[at, 6] = sizes[first >> 16 & 15]
        if number == _MMA or number == _ATTN:
            # Operands of two types run at the rate of the wider one.
            one, other = first >> 16 & 15, first >> 20 & 15
            if not rated[one] or not rated[other]:
                return at
            head[at, 7] = one if sizes[one] > sizes[other] else other
        for place in range(_OPERANDS):
            form, slot = forms[code, place], slots[code, place]
            if form <= 0:
                continue
            low = np.int64(words[at, slot])
            if form <= 3 or form == 6:
                imm[at, place], reg[at, place] = low & 0xFFFFFF, low >> 24
                if form == 6 and low >> 23 & 1:
                    imm[at, place] -= 1 << 24
            elif form == 4:
                high = np.int64(words[at, slot + 1])
                imm[at, place], reg[at, place] = low | (high & 0xFFFFFF) << 32, high >> 24
            elif form == 5:
                imm[at, place] = low | np.int64(words[at, slot + 1]) << 32
            else:
                imm[at, place] = low
            if reg[at, place] >= 64 or (form == 8 and low >= 64):
                return at
    return -1


@njit(cache=True, error_model="numpy")
def _listed(mask: Any) -> Any:
    """The semaphores of a mask, each plus one, five bits each from the lowest on; -1 for more than 12."""
    listed, place = 0, 0
    for bit in range(16):
        if mask >> bit & 1:
            if place == 60:
                return -1
            listed |= bit + 1 << place
            place += 5
    return listed


@njit(cache=True, error_model="numpy")
def _distances(head: Any, imm: Any) -> None:
    """A table's entries are told apart by their distance from the first one that the kernel reads."""
    kernel, most = 0, 0
    for at in range(len(head)):
        if head[at, 0] == _LDS:
            most = max(most, imm[at, 2])
    first, seen = np.zeros(most + 1, np.int64), np.full(most + 1, -1, np.int64)
    for at in range(len(head)):
        kernel += head[at, 0] == _BARRIER
        if head[at, 0] == _LDS:
            table = imm[at, 2]
            if seen[table] != kernel:
                seen[table], first[table] = kernel, imm[at, 1]
            imm[at, 3] = imm[at, 1] - first[table] >> 2


def partners(
    head: NDArray[np.int64], imm: NDArray[np.int64], symbols: int, kernels: int
) -> NDArray[np.int64]:
    """For each LOOP its ENDLOOP and the other way round, -1 for all else.

    InputError for what cannot be timed: loops that do not close, numbers and kernels that the program does
    not name.
    """
    partner, odd = _pairs(head, imm)
    if odd >= 0:
        raise InputError(
            f"word {odd}: a loop that does not end within its kernel, or more than {DEPTH} open at once"
        )
    for op, place, low, high, what in (
        (_LDS, 2, 1, symbols, "reads a number that the program does not name"),
        (_BARRIER, 0, 0, kernels - 1, "begins a kernel that the program does not have"),
    ):
        found = np.flatnonzero((head[:, 0] == op) & ((imm[:, place] < low) | (imm[:, place] > high)))
        if len(found):
            raise InputError(f"word {found[0]}: {OPS[op]} {what}")
    known: NDArray[np.int64] = partner
    return known


@njit(cache=True, error_model="numpy")
def _pairs(head: Any, imm: Any) -> Any:
    """Partners, and the first place of a loop that has none, or -1."""
    partner, open_, depth = np.full(len(head), -1, np.int64), np.zeros(DEPTH, np.int64), 0
    for at in range(len(head)):
        if head[at, 0] == _LOOP:
            if depth == DEPTH:
                return partner, at
            open_[depth] = at
            depth += 1
        elif head[at, 0] == _ENDLOOP:
            depth -= 1
            if depth < 0 or open_[depth] + imm[open_[depth], 1] != at:
                return partner, at
            partner[at], partner[open_[depth]] = open_[depth], at
        elif (head[at, 0] == _BARRIER or head[at, 0] == _HALT) and depth:
            return partner, at
    return partner, np.int64(-1)
