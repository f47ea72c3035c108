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

from tongyun.chip.ppu.program import Program
from tongyun.chip.ppu.rates import TICKS
from tongyun.chip.ppu.timing import COUNTERS, Timing, chips, product_rates, tables
from tongyun.specs.ppu import Ppu

_WIDTH, _BARRIER = 20, 5
"""Of a row of microcode: its length, and the operation that begins a kernel or ends the program."""


@dataclass(frozen=True, kw_only=True)
class Laid:
    """A program in microcode, laid out once and priced many times, for chips of the same tensor unit."""

    program: Program
    code: NDArray[np.int64]

    @classmethod
    def of(cls, program: Program, ppu: Ppu) -> Laid:
        from tongyun.chip.ppu.fields import fields, partners
        from tongyun.chip.ppu.microcode import lower

        head, imm, reg = fields(program.words, ppu)
        partner = partners(head, imm, len(program.symbols), len(program.kernels))
        code, _ = lower(head, imm, reg, partner)
        return cls(program=program, code=code)


def analyse(program: Program, ppu: Ppu, symbols: Mapping[str, ArrayLike] | None = None) -> Timing:
    """The analytic counterpart of `timing.simulate`: cycles and counters kernel by kernel."""
    return price(Laid.of(program, ppu), ppu, symbols)


def price(laid: Laid, ppu: Ppu, symbols: Mapping[str, ArrayLike] | None = None) -> Timing:
    """The same of a program that has been laid out."""
    from tongyun.chip.ppu.clockwork import _weigh
    from tongyun.chip.ppu.recurrence import PLACES, kernel, plain_loops

    program = laid.program
    rates, _ = chips(program, ppu)
    starts, values = tables(program, dict(symbols or {}))
    flat = laid.code.copy()
    _weigh(flat, rates)
    code = flat.reshape(-1, _WIDTH)
    plain = plain_loops(code)
    borders = np.flatnonzero(code[:, 0] == _BARRIER)[1:]
    ticks, counters = np.zeros(len(program.kernels)), np.zeros((len(program.kernels), len(COUNTERS)))
    tags, filled = np.zeros((PLACES, 4), dtype=np.int64), np.zeros(2)
    for number in range(len(program.kernels)):
        begin, end = int(borders[number]) + 1, int(borders[number + 1])
        ticks[number] = kernel(begin, end, code, plain, starts, values, rates, tags, filled, counters[number])
    return Timing(
        ppu=ppu,
        names=tuple(each.name for each in program.kernels),
        kinds=tuple(each.kind for each in program.kernels),
        ticks=np.rint(ticks + ppu.barrier_s * TICKS).astype(np.int64),
        counters=np.rint(counters).astype(np.int64),
        times=np.ones(len(program.kernels), dtype=np.int64),
        instructions=0,
        rates=product_rates(program),
    )
