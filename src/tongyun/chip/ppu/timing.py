"""When a program's instructions run: queues, semaphores and shared memory in integer time.

A program's order is a legal order, so one pass over each core's instructions gives their times: an
instruction starts when it is issued, its queue is free and its tokens are there. Cores meet at the
L2, the HBM and the links, which are servers. They serve requests in the order in which these would come on
the chip that the program was compiled for, whatever the chip it runs on: then no time depends on which of two
requests is earlier, every time is a sum or a maximum of others, and a better chip is never slower. Knows no
numbers in memory: those a program reads (a position, the experts' rows) are given by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tongyun.chip.ppu.asm import decode
from tongyun.chip.ppu.fault import Fault
from tongyun.chip.ppu.isa import BY_NAME, ENGINES, OPCODES, Form, Type
from tongyun.chip.ppu.program import Program
from tongyun.chip.ppu.rates import TICKS, rates
from tongyun.errors import InputError
from tongyun.specs.ppu import Ppu
from tongyun.units import DType

COUNTERS = (
    "flops", "hbm_bytes", "l2_bytes", "sram_bytes", "icn_bytes", "vector_elements",
    *(f"{engine.value}_ticks" for engine in ENGINES),
)  # fmt: skip
_BARRIER = BY_NAME["BARRIER"].code


@dataclass(frozen=True, kw_only=True)
class Timing:
    """A run's time and what it did, kernel by kernel; `times` says how often a kernel counts."""

    ppu: Ppu
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    ticks: NDArray[np.int64]
    counters: NDArray[np.int64]
    """Shape (kernels, counters), in the order of `COUNTERS`."""
    times: NDArray[np.int64]
    instructions: int
    rates: tuple[DType, ...]
    """By kernel, the type whose rate its products run at."""

    @property
    def cycles(self) -> NDArray[np.float64]:
        """By kernel."""
        return self.ticks.astype(np.float64) * (self.ppu.clock_hz / TICKS)

    @property
    def total_cycles(self) -> float:
        return self.seconds * self.ppu.clock_hz

    @property
    def seconds(self) -> float:
        return int(self.ticks @ self.times) / TICKS

    def total(self, counter: str) -> int:
        """A counter over all kernels and cores; ticks are summed over cores."""
        return int(self.counters[:, COUNTERS.index(counter)] @ self.times)


def simulate(program: Program, ppu: Ppu, symbols: Mapping[str, ArrayLike] | None = None) -> Timing:
    """Run a program's times on a chip; `symbols` gives the numbers it reads from memory, by name.

    A chip with more cores than the program is for leaves them idle. InputError names a symbol that is
    missing, or says that the cores are too few.
    """
    return _simulate(program, ppu, dict(symbols or {}), np.ones(len(program.kernels), dtype=np.int64))


def simulate_repeated(program: Program, ppu: Ppu, symbols: Mapping[str, ArrayLike] | None = None) -> Timing:
    """The same, with kernels that repeat (the layers of a model) run three times and then counted.

    Of a sequence that repeats r times the first two and the last are run; the second stands for those left
    out. What differs is what the L2 still holds, which settles after the first.
    """
    shorter, times = shortened(program)
    return _simulate(shorter, ppu, dict(symbols or {}), times)


def _simulate(program: Program, ppu: Ppu, symbols: dict[str, ArrayLike], times: NDArray[np.int64]) -> Timing:
    from tongyun.chip.ppu.clockwork import ENDS
    from tongyun.chip.ppu.fields import fields, partners
    from tongyun.chip.ppu.microcode import lower

    mine, order = chips(program, ppu)
    head, imm, reg = fields(program.words, ppu)
    partner = partners(head, imm, len(program.symbols), len(program.kernels))
    code, words = lower(head, imm, reg, partner)
    ticks, counters, count, end, row, core = _run(code, tables(program, symbols), mine, order, len(times))
    if end:
        place = int(words[row])
        name = decode(program.words[place].tolist()).op
        raise Fault(
            f"kernel {_kernel_at(program, place)}, core {core}, instruction {place} {name}: {ENDS[end]}"
        )
    return Timing(
        ppu=ppu,
        names=tuple(kernel.name for kernel in program.kernels),
        kinds=tuple(kernel.kind for kernel in program.kernels),
        ticks=np.asarray(ticks),
        counters=np.asarray(counters),
        times=times,
        instructions=int(count),
        rates=product_rates(program),
    )


def product_rates(program: Program) -> tuple[DType, ...]:
    """By kernel, the type whose rate its products run at: the wider one of their operands; bf16 for none."""
    first, codes = program.words[:, 0].astype(np.int64), program.words[:, 0] & 0xFF
    kernel = np.cumsum(codes == _BARRIER) - 1
    found = [DType.BF16] * len(program.kernels)
    places = np.flatnonzero((codes == BY_NAME["MMA"].code) | (codes == BY_NAME["ATTN"].code))
    for number, at in zip(*np.unique(kernel[places], return_index=True), strict=True):
        types = [Type(first[places[at]] >> shift & 15) for shift in (16, 20)]
        found[number] = max(types, key=lambda kind: kind.bytes).rate
    return tuple(found)


def _run(
    code: NDArray[np.int64],
    memory: tuple[NDArray[np.int64], NDArray[np.int64]],
    mine: NDArray[np.float64],
    order: NDArray[np.float64],
    kernels: int,
) -> tuple[Any, ...]:
    """What `clockwork.run` answers on a chip, served in the order of another, which is run before it."""
    from tongyun.chip.ppu.clockwork import AS_THEY_COME, FOLLOW, KEEP, run

    if np.array_equal(mine, order):
        return tuple(run(code, *memory, mine, kernels, np.zeros(1, np.int16), AS_THEY_COME)[:-1])
    *answer, turns = run(code.copy(), *memory, order, kernels, np.zeros(1 << 16, np.int16), KEEP)
    if answer[3]:
        return tuple(answer)
    return tuple(run(code, *memory, mine, kernels, turns, FOLLOW)[:-1])


def chips(program: Program, ppu: Ppu) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`rates` of the chip a program runs on, with the cores it is for, and of the one that orders it."""
    from tongyun.chip.ppu.clockwork import CORES

    mine = rates(ppu)
    order = np.array(program.order) if program.order else mine
    if ppu.cores > CORES:
        raise InputError(f"{ppu.name} has {ppu.cores} cores; the timing simulator takes {CORES}")
    if ppu.cores < order[0]:
        raise InputError(
            f"the program is for {order[0]:.0f} cores, {ppu.name} has {ppu.cores}: compile it for that chip"
        )
    mine[0] = order[0]
    # A type that the other chip has no rate for is taken at this one's.
    return mine, np.where(order < 0, mine, order)


def tables(program: Program, symbols: Mapping[str, ArrayLike]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The numbers a program reads from memory: where each symbol's begin, and all of them.

    InputError names a symbol that is missing.
    """
    missing = [name for name in program.symbols if name not in symbols]
    if missing:
        raise InputError(
            f"the program reads '{missing[0]}' from memory: give its value; it reads {program.symbols}"
        )
    each = [np.atleast_1d(np.asarray(symbols[name], dtype=np.int64)) for name in program.symbols]
    starts = np.cumsum([0, *(len(table) for table in each)]).astype(np.int64)
    return starts, np.concatenate(each) if each else np.zeros(1, dtype=np.int64)


def _kernel_at(program: Program, place: int) -> str:
    """The kernel that the instruction at a place is of."""
    begun = int(np.count_nonzero((program.words[:place, 0] & 0xFF) == _BARRIER))
    return program.kernels[begun - 1].name if begun else "before the first"


# Repeated kernels.

_PLACES = {
    each.code: [each.slot[name] for name, form in each.operands.items() if form is Form.HBM]
    for each in OPCODES
    if Form.HBM in each.operands.values()
}
"""By opcode, the slots that hold a place in HBM."""


def shortened(program: Program) -> tuple[Program, NDArray[np.int64]]:
    """The program without the middle of its longest repetition, and how often each kernel left counts."""
    borders = np.flatnonzero((program.words[:, 0] & 0xFF) == _BARRIER)
    ends = [*borders[1:], len(program.words) - 1]
    bare = _bare(program.words, borders)
    numbers: dict[bytes, int] = {}
    marks = [
        numbers.setdefault(bare[a:b].tobytes(), len(numbers)) for a, b in zip(borders, ends, strict=True)
    ]
    start, period, repeats = _repetition(marks)
    if repeats <= 3:
        return program, np.ones(len(marks), dtype=np.int64)
    keep = [*range(start + 2 * period), *range(start + (repeats - 1) * period, len(marks))]
    words = [program.words[borders[i] : ends[i]].copy() for i in keep]
    for number, part in enumerate(words):
        part[0, 2] = number
    times = np.ones(len(keep), dtype=np.int64)
    times[start + period : start + 2 * period] = repeats - 2
    shorter = replace(
        program,
        words=np.concatenate([*words, program.words[-1:]]),
        kernels=tuple(program.kernels[i] for i in keep),
    )
    return shorter, times


def _bare(words: NDArray[np.uint32], borders: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Words without the places of tensors and the numbers of kernels."""
    bare = words.copy()
    codes = bare[:, 0] & 0xFF
    for code, slots in _PLACES.items():
        rows = np.flatnonzero(codes == code)
        for slot in slots:
            bare[rows, slot] = 0
            bare[rows, slot + 1] &= 0xFF000000
    bare[borders, 2] = 0
    return bare


def _repetition(marks: Sequence[int]) -> tuple[int, int, int]:
    """(first, period, times) of the longest run of one sequence again and again."""
    given = np.asarray(marks)
    best = (0, 1, 1)
    for period in range(1, len(marks) // 4 + 1):
        # Runs of places that equal the place one period before.
        breaks = np.flatnonzero(given[period:] != given[:-period])
        edges = np.concatenate([[-1], breaks, [len(given) - period]])
        repeats = (np.diff(edges) - 1) // period + 1
        longest = int(repeats.argmax())
        if (repeats[longest] - 1) * period > (best[2] - 1) * best[1]:
            best = (int(edges[longest]) + 1, period, int(repeats[longest]))
    return best
