"""What a lowered program takes, without simulating it: the analytic price of the very same instructions.

A kernel is one core's recurrence: tokens, queues, double buffers filling and draining, in the order of the
program. L2 and HBM are servers that pass a request of all cores that go the same way; every time is that of
the first and of the last of them. Loops whose turns repeat are multiplied out. The kernel takes as long as
its slowest core, and no less than L2 and HBM need for all bytes. What the L2 holds follows from the order
of the requests that cores would make alone.

It does not know how cores of unlike work meet: their requests count as if they came together, turn by turn.
Against the timing simulator: `benchmarks/ppu_analytic.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tongyun.chip.ppu.asm import disassemble
from tongyun.chip.ppu.isa import Form, Instruction
from tongyun.chip.ppu.program import Program
from tongyun.chip.ppu.timing import COUNTERS, OPS, TICKS, Timing, _decoded, _rates, tables
from tongyun.specs.ppu import Ppu


@dataclass(frozen=True, kw_only=True)
class Laid:
    """A program as arrays, laid out once and priced many times."""

    program: Program
    head: NDArray[np.int64]
    imm: NDArray[np.int64]
    reg: NDArray[np.int64]
    counts: NDArray[np.bool_]
    """Which operands are counts that a register may lower."""
    plain: NDArray[np.bool_]
    """Which LOOPs hold no other loop and read no numbers, so that their turns may be multiplied out."""

    @classmethod
    def of(cls, program: Program, ppu: Ppu) -> Laid:
        instructions = disassemble(program.words)
        head, imm, reg = _decoded(instructions, ppu)
        counts = np.zeros(imm.shape, dtype=bool)
        plain = np.zeros(len(head), dtype=bool)
        for at, each in enumerate(instructions):
            for place, form in enumerate(each.opcode.operands.values()):
                counts[at, place] = form is Form.COUNT and reg[at, place] != 0
            if each.op == "LOOP":
                body = instructions[at + 1 : at + 1 + each.plain("length")]
                plain[at] = not any(_turns(inside) for inside in body)
        return cls(program=program, head=head, imm=imm, reg=reg, counts=counts, plain=plain)


def _turns(each: Instruction) -> bool:
    """Whether an instruction may make one turn of its loop unlike the next: all but the swap of a buffer."""
    swap = each.op == "ALU" and each.operands["rd"] == each.operands["ra"] and each.fn == 7
    return each.op in {"LOOP", "LDS"} or (each.op == "ALU" and not swap)


def analyse(program: Program, ppu: Ppu, symbols: Mapping[str, ArrayLike] | None = None) -> Timing:
    """The analytic counterpart of `timing.simulate`: cycles and counters kernel by kernel."""
    return price(Laid.of(program, ppu), ppu, symbols)


def price(laid: Laid, ppu: Ppu, symbols: Mapping[str, ArrayLike] | None = None) -> Timing:
    """The same of a program that has been laid out, for a chip of the same tensor rates."""
    from tongyun.chip.ppu.recurrence import PLACES, kernel

    program, rates = laid.program, _rates(ppu)
    starts, values = tables(program, dict(symbols or {}))
    code = (laid.head, laid.imm, laid.reg, laid.counts, laid.plain)
    borders = [*np.flatnonzero(laid.head[:, 0] == OPS.index("BARRIER")), len(laid.head) - 1]
    ticks, counters = np.zeros(len(program.kernels)), np.zeros((len(program.kernels), len(COUNTERS)))
    tags, filled = np.zeros((PLACES, 3), dtype=np.int64), np.zeros(1)
    for number in range(len(program.kernels)):
        begin, end = int(borders[number]) + 1, int(borders[number + 1])
        ticks[number] = kernel(begin, end, code, starts, values, rates, tags, filled, counters[number])
    return Timing(
        ppu=ppu,
        names=tuple(each.name for each in program.kernels),
        kinds=tuple(each.kind for each in program.kernels),
        cycles=ticks / TICKS + ppu.barrier_s * ppu.clock_hz,
        counters=np.rint(counters).astype(np.int64),
        times=np.ones(len(program.kernels), dtype=np.int64),
        instructions=0,
    )
