"""What a lowered program takes, without simulating it: the analytic price of the very same instructions.

First all cores go through a kernel in step, without times: what is counted, what they ask the L2 for, who
shares a tile, what comes from the HBM (`census`). Then cores that go the same way are one strand, 32 at
most, and one core of each is walked (`strands`): tokens, queues, double buffers filling and draining; with
its requests the servers pass what all cores of the strand ask for. A kernel takes as long as its slowest
strand, and no less than L2 and HBM need for all bytes.

It does not know how the cores of one strand drift apart, nor exactly who is first at a shared tile. With a
strand a core it is the simulator's time. Against the timing simulator: `benchmarks/ppu_analytic.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tongyun.chip.ppu.program import Program
from tongyun.chip.ppu.rates import TICKS
from tongyun.chip.ppu.timing import COUNTERS, Timing, chips, product_rates, shortened, tables
from tongyun.specs.ppu import Ppu

_WIDTH = 20
"""Length of a row of microcode."""


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


class _Memory:
    """What the L2 holds, kept from program to program so that it need not be cleared; one a thread."""

    _threads = threading.local()

    def __init__(self) -> None:
        from tongyun.chip.ppu.census import PLACE, PLACES

        self.tags = np.zeros((PLACES, PLACE), dtype=np.int64)
        self.filled = np.array([0, 1, 1, 1], dtype=np.int64)

    @classmethod
    def of_thread(cls) -> _Memory:
        held: _Memory | None = getattr(cls._threads, "memory", None)
        if held is None:
            held = cls._threads.memory = cls()
        return held


def analyse(program: Program, ppu: Ppu, symbols: Mapping[str, ArrayLike] | None = None) -> Timing:
    """The analytic counterpart of `timing.simulate`: cycles and counters kernel by kernel."""
    return price(Laid.of(program, ppu), ppu, symbols)


def analyse_repeated(program: Program, ppu: Ppu, symbols: Mapping[str, ArrayLike] | None = None) -> Timing:
    """The same of what `timing.simulate_repeated` runs: kernels that repeat three times, then counted."""
    shorter, times = shortened(program)
    return replace(analyse(shorter, ppu, symbols), times=times)


def price(laid: Laid, ppu: Ppu, symbols: Mapping[str, ArrayLike] | None = None) -> Timing:
    """The same of a program that has been laid out."""
    from tongyun.chip.ppu.clockwork import _weigh
    from tongyun.chip.ppu.strands import price as priced

    program = laid.program
    rates, _ = chips(program, ppu)
    starts, values = tables(program, dict(symbols or {}))
    flat = laid.code.copy()
    _weigh(flat, rates)
    ticks, counters = np.zeros(len(program.kernels)), np.zeros((len(program.kernels), len(COUNTERS)))
    memory = _Memory.of_thread()
    priced(
        flat.reshape(-1, _WIDTH), starts, values, rates, memory.tags, memory.filled, ticks, counters,
    )  # fmt: skip
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
