"""Run a program's decoded words: what it computes, instruction by instruction.

Each core reads the program in order. That order is one legal execution: a wait whose token no earlier
instruction gave is a deadlock. With `check`, vector clocks over the engines' queues and the semaphores
find every pair of accesses to SRAM that only luck keeps in order, and accesses of two cores to the
same HBM between two barriers.
"""

from __future__ import annotations

import operator
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from tongyun.chip.ppu import links
from tongyun.chip.ppu.asm import disassemble
from tongyun.chip.ppu.fault import Fault
from tongyun.chip.ppu.isa import (
    CORE,
    CORES,
    RANK,
    REGISTERS,
    SEMAPHORES,
    Alu,
    At,
    Engine,
    Form,
    Instruction,
    Type,
)
from tongyun.chip.ppu.program import Program
from tongyun.chip.ppu.races import HbmRaces, SramRaces
from tongyun.chip.ppu.tiles import ACTS, TORCH


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a run did, by kernel: FLOPs of products, HBM bytes in and out, instructions."""

    flops: Mapping[int, int]
    loaded_bytes: Mapping[int, int]
    stored_bytes: Mapping[int, int]
    instructions: int


@dataclass
class Memory:
    """Bytes with a typed view for each data type."""

    bytes: torch.Tensor
    views: dict[Type, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, size: int) -> Memory:
        # NumPy leaves pages that nobody touches to the system; torch writes its zeros.
        raw = torch.from_numpy(np.zeros((size + 63) // 64 * 64, dtype=np.uint8))
        return cls(raw, {kind: raw.view(dtype) for kind, dtype in TORCH.items()})

    def tile(self, at: int, shape: tuple[int, int], stride: int, type: Type) -> torch.Tensor:
        """A strided tile as a view; `stride` bytes from row to row. Fault outside or off its alignment."""
        size = type.bytes
        end = at + (shape[0] - 1) * stride + shape[1] * size
        if at < 0 or end > len(self.bytes):
            raise Fault(f"bytes {at} to {end} of a memory of {len(self.bytes)}")
        if at % size or stride % size:
            raise Fault(f"address {at}, stride {stride}: not aligned to {size} bytes")
        return torch.as_strided(self.views[type], shape, (stride // size, 1), at // size)


class Chip:
    """One chip: HBM that stays between runs, and the cores that run a program over it."""

    def __init__(
        self, program: Program, *, cores: int, sram_bytes: int, rank: int = 0, check: bool = False
    ) -> None:
        self.program = program
        self.instructions = disassemble(program.words)
        self.hbm = Memory.of(program.hbm_bytes)
        self.cores = cores
        self.sram_bytes = sram_bytes
        self.rank = rank
        self.check = check

    def put(self, name: str, value: torch.Tensor) -> None:
        """Copy a tensor into its place in HBM; shape and type must be those of the program."""
        tensor = self.program.tensor(name)
        if tuple(value.shape) != tensor.shape or value.dtype != TORCH[tensor.type]:
            raise Fault(
                f"{name}: {tuple(value.shape)} {value.dtype}, "
                f"the program has {tensor.shape} {tensor.type.name}"
            )
        self.view(name).copy_(value)

    def view(self, name: str) -> torch.Tensor:
        """A tensor in HBM, as a view."""
        tensor = self.program.tensor(name)
        size = int(np.prod(tensor.shape, dtype=np.int64))
        flat = self.hbm.views[tensor.type][tensor.at // tensor.type.bytes :][:size]
        return flat.view(tensor.shape)

    def run(self) -> Counts:
        """Run the program on one chip alone. Fault names kernel, core and instruction."""
        return run([self])[0]


def run(chips: Sequence[Chip]) -> list[Counts]:
    """Run chips together; those that meet in a collective go on when its bytes have moved."""
    threads = torch.get_num_threads()
    # One thread: a product split over threads adds in another order, and results must not depend on it.
    torch.set_num_threads(1)
    try:
        runs = [_Run(chip) for chip in chips]
        links.together([each.go() for each in runs], [chip.hbm.bytes for chip in chips])
        return [each.counts() for each in runs]
    finally:
        torch.set_num_threads(threads)


@dataclass
class _Core:
    number: int
    sram: Memory
    registers: list[int]
    at: int = 0
    loops: list[list[int]] = field(default_factory=list)
    """Open loops: [first instruction of the body, times left]."""
    tokens: list[deque[Any]] = field(default_factory=lambda: [deque() for _ in range(SEMAPHORES)])
    races: SramRaces | None = None


class _Run:
    """One chip's pass through its program. Also the `Tiles` of the instruction at hand."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip
        self.cores = [self._core(number) for number in range(chip.cores)]
        self.hbm_races = HbmRaces(len(chip.hbm.bytes)) if chip.check else None
        self.kernel = 0
        self.flops: Counter[int] = Counter()
        self.loaded: Counter[int] = Counter()
        self.stored: Counter[int] = Counter()
        self.done = 0
        self.core = self.cores[0]
        self.here = Instruction(op="HALT")
        self.fn, self.flags = 0, 0
        self.types: tuple[Type, ...] = ()

    def counts(self) -> Counts:
        return Counts(
            flops=dict(self.flops),
            loaded_bytes=dict(self.loaded),
            stored_bytes=dict(self.stored),
            instructions=self.done,
        )

    def _core(self, number: int) -> _Core:
        registers = [0] * REGISTERS
        registers[CORE], registers[CORES], registers[RANK] = number, self.chip.cores, self.chip.rank
        races = SramRaces(self.chip.sram_bytes) if self.chip.check else None
        return _Core(number, Memory.of(self.chip.sram_bytes), registers, races=races)

    def go(self) -> links.Going:
        """Barrier by barrier, core by core; yields at each collective."""
        running = True
        while running:
            running = False
            stops = []
            for core in self.cores:
                self.core = core
                stop = yield from self._until_barrier(core)
                stops.append(stop.op)
                running = stop.op == "BARRIER"
                if running:
                    core.at += 1
            if len(set(stops)) > 1:
                raise Fault(f"kernel {self.kernel}: some cores wait at a barrier, others have halted")
            if running:
                self.kernel = stop.plain("kernel")
                if self.hbm_races is not None:
                    self.hbm_races.barrier()
                for core in self.cores:
                    if core.races is not None:
                        core.races.barrier()

    def _until_barrier(self, core: _Core) -> Generator[Instruction, None, Instruction]:
        while True:
            if not 0 <= core.at < len(self.chip.instructions):
                raise self._fault("the program runs past its end")
            here = self.chip.instructions[core.at]
            self.here, self.fn, self.flags, self.types = here, here.fn, here.flags, here.types
            self.done += 1
            self._begin(core, here)
            if here.op in {"BARRIER", "HALT"}:
                self._drained(core)
                return here
            if here.opcode.engine is Engine.ICN and core.number == 0:
                yield here
            self._do(core, here)
            token: Any = core.races.end(here.opcode.engine) if core.races is not None else None
            for bit in _bits(here.signal):
                core.tokens[bit].append(token)
            if here.op not in {"LOOP", "ENDLOOP"}:
                core.at += 1

    def _do(self, core: _Core, here: Instruction) -> None:
        try:
            if here.opcode.engine is Engine.CONTROL:
                self._control(core, here)
            elif here.opcode.engine is not Engine.ICN:
                self._work(here)
        except Fault as fault:
            raise self._fault(str(fault)) from None

    def _fault(self, what: str) -> Fault:
        kernels = self.chip.program.kernels
        name = kernels[self.kernel].name if self.kernel < len(kernels) else str(self.kernel)
        return Fault(
            f"kernel {name}, core {self.core.number}, instruction {self.core.at} {self.here.op}: {what}"
        )

    def _begin(self, core: _Core, here: Instruction) -> None:
        tokens = []
        for bit in _bits(here.wait):
            if not core.tokens[bit]:
                raise self._fault(f"deadlock: nothing has signalled semaphore {bit}")
            tokens.append(core.tokens[bit].popleft())
        if core.races is not None:
            core.races.begin(here.opcode.engine, tokens)

    def _drained(self, core: _Core) -> None:
        left = [bit for bit, queue in enumerate(core.tokens) if queue]
        if left:
            raise self._fault(f"semaphores {left} still hold tokens: a wait is missing")

    # Control.

    def _control(self, core: _Core, here: Instruction) -> None:
        if here.op == "ALU":
            core.registers[self._plain("rd")] = _alu(
                here.fn,
                core.registers[self._plain("ra")],
                core.registers[self._plain("rb")] + self._plain("imm"),
            )
        elif here.op == "LDS":
            core.registers[self._plain("rd")] = int(self.read("sram", (1, 1), 0, Type.I32))
        elif here.op == "LOOP":
            times = self.number("times")
            core.at += 1
            if times > 0:
                core.loops.append([core.at, times])
            else:
                core.at += self._plain("length")
        else:
            self._endloop(core, here)
        core.registers[0] = 0

    def _endloop(self, core: _Core, here: Instruction) -> None:
        if not core.loops:
            raise Fault("no loop is open")
        for name in here.opcode.operands:
            step = here.operands.get(name)
            if isinstance(step, At):
                core.registers[step.reg] += step.imm
        loop = core.loops[-1]
        loop[1] -= 1
        if loop[1]:
            core.at = loop[0]
        else:
            core.loops.pop()
            core.at += 1

    # Tiles and moves.

    def _work(self, here: Instruction) -> None:
        if here.op in ACTS:
            self.flops[self.kernel] += ACTS[here.op](self)
        elif not here.op.startswith("SYNC"):
            self._move(here)

    def _move(self, here: Instruction) -> None:
        rows, cols = self.number("rows"), self.number("cols")
        if not (rows and cols):
            return
        kind, stride = self.types[0], self._plain("hbm_stride")
        shape = (rows, cols)
        inward = here.opcode.engine is Engine.LOAD
        local = (self.write if inward else self.read)("sram", shape, self._plain("sram_stride"), kind)
        moved = rows * cols * kind.bytes
        (self.loaded if inward else self.stored)[self.kernel] += moved
        if here.op in {"GATHER", "SCATTER"}:
            index = self.read("index", (1, rows), 0, Type.I32)[0].long()
            limit = (len(self.chip.hbm.bytes) - self.address("hbm")) // max(stride, 1)
            if int(index.min()) < 0 or int(index.max()) >= max(limit, 1):
                raise Fault(f"row index {int(index.min())} to {int(index.max())} outside HBM")
            far = self._far((int(index.max()) + 1, cols), stride, kind, inward, index)
            if inward:
                local.copy_(far[index])
            else:
                far[index] = local
            return
        far = self._far(shape, stride, kind, inward, None)
        if inward:
            local.copy_(far)
        else:
            far.copy_(local)

    def _far(
        self, shape: tuple[int, int], stride: int, kind: Type, inward: bool, index: torch.Tensor | None
    ) -> torch.Tensor:
        at = self.address("hbm")
        if self.hbm_races is not None:
            rows = np.arange(shape[0]) if index is None else index.numpy()
            problem = self.hbm_races.access(
                at + rows * stride, shape[1] * kind.bytes, self.core.number, writes=not inward
            )
            if problem:
                raise Fault(problem)
        return self.chip.hbm.tile(at, shape, stride, kind)

    # The operands of the instruction at hand (`Tiles`).

    def _plain(self, name: str) -> int:
        return self.here.plain(name)

    def number(self, name: str) -> int:
        value = self.here.operands.get(name, 0)
        if not isinstance(value, At):
            return int(value)
        held = self.core.registers[value.reg]
        if self.here.opcode.operands[name] is Form.COUNT:
            return min(max(held, 0), value.imm) if value.reg else value.imm
        return value.imm + held

    def real(self, name: str) -> float:
        return float(self.here.operands.get(name, 0.0))  # type: ignore[arg-type]

    def room(self, name: str) -> int:
        value = self.here.operands.get(name, 0)
        return value.imm if isinstance(value, At) else int(value)

    def address(self, name: str) -> int:
        return self.number(name)

    def read(self, name: str, shape: tuple[int, int], stride: int, type: Type) -> torch.Tensor:
        return self._tile(name, shape, stride, type, writes=False)

    def write(self, name: str, shape: tuple[int, int], stride: int, type: Type) -> torch.Tensor:
        return self._tile(name, shape, stride, type, writes=True)

    def _tile(
        self, name: str, shape: tuple[int, int], stride: int, type: Type, *, writes: bool
    ) -> torch.Tensor:
        at = self.number(name)
        tile = self.core.sram.tile(at, shape, stride, type)
        if self.core.races is not None:
            problem = self.core.races.access(
                self.here.opcode.engine, at, shape[0], shape[1] * type.bytes, stride, writes=writes
            )
            if problem:
                raise Fault(problem)
        return tile


@cache
def _bits(mask: int) -> tuple[int, ...]:
    return tuple(bit for bit in range(SEMAPHORES) if mask >> bit & 1)


def _alu(fn: int, a: int, b: int) -> int:
    if b == 0 and fn in {Alu.DIV, Alu.MOD}:
        raise Fault("division by zero")
    return _ALU[fn](a, b)


_ALU: tuple[Callable[[int, int], int], ...] = (
    operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, min, max, operator.xor,
    lambda a, b: int(a < b),
)  # fmt: skip
"""By number; see `Alu`."""
