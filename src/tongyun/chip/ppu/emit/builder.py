"""Write instructions with named semaphores, buffers and registers, kernel by kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from tongyun.chip.ppu.asm import assemble
from tongyun.chip.ppu.draft import Draft
from tongyun.chip.ppu.isa import CORE, CORES, REGISTERS, SEMAPHORES, ZERO, Alu, At, Instruction, Type, Value
from tongyun.chip.ppu.program import Kernel, Layout, Program, Tensor
from tongyun.errors import Infeasible, TongyunError
from tongyun.specs.ppu import Ppu

ALIGNMENT = 64
"""Bytes to which SRAM buffers are aligned."""
_FIRST_REGISTER = 4


@dataclass(frozen=True)
class Buffers:
    """Buffers of one size, two where not told; `turn` is the register that holds how far on the next lies."""

    at: int
    size: int
    turn: int
    count: int = 2

    @property
    def address(self) -> At:
        return At(self.at, self.turn)

    def __add__(self, offset: int) -> At:
        return At(self.at + offset, self.turn)


@dataclass
class Builder:
    """A program under construction for one chip."""

    ppu: Ppu
    layout: Layout = field(default_factory=Layout)
    instructions: list[Instruction] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    symbols: list[str] = field(default_factory=list)
    _semaphores: dict[str, int] = field(default_factory=dict)
    _moves: dict[str, int] = field(default_factory=dict)
    _register: int = _FIRST_REGISTER
    _sram: int = 0
    _returned: list[tuple[str, str, int]] = field(default_factory=list)

    # Kernels.

    @contextmanager
    def kernel(self, kind: str, name: str, *, layer: int | None = None, line: str = "") -> Iterator[None]:
        """Everything emitted inside runs between two barriers; registers, semaphores and SRAM begin anew."""
        self.emit("BARRIER", kernel=len(self.kernels))
        self.kernels.append(Kernel(name=name, kind=kind, layer=layer, line=line))
        self._semaphores, self._register, self._sram, self._returned = {}, _FIRST_REGISTER, 0, []
        self._moves = {}
        yield
        self.kernels[-1] = replace(self.kernels[-1], moves=self._moves)
        # What was lent at the start is taken back, so that a kernel leaves no token behind.
        for semaphore, engine, tokens in self._returned:
            for _ in range(tokens):
                self.sync(engine, wait=[semaphore])

    def moves(self, tensor: Tensor, size: int) -> None:
        """This kernel moves so many bytes of a tensor, by its shapes and tiles."""
        self._moves[tensor.name] = self._moves.get(tensor.name, 0) + size

    def draft(self) -> Draft:
        """End the program; its tensors have no places yet."""
        self.emit("HALT")
        return Draft.of(assemble(self.instructions), self.layout.tensors, self.kernels, self.symbols)

    def program(self) -> Program:
        """End the program and place its tensors. Infeasible when they exceed the chip's HBM."""
        return self.draft().settled(self.ppu)

    # What a kernel has: SRAM, registers, semaphores.

    def sram(self, size: int) -> int:
        """Bytes of SRAM for this kernel. Infeasible when the core has no more."""
        at = self._sram
        self._sram += (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        if self._sram > self.ppu.sram_bytes:
            raise Infeasible(
                f"kernel {self.kernels[-1].name} needs {self._sram:,} bytes of SRAM, "
                f"a core of {self.ppu.name} has {self.ppu.sram_bytes:,}"
            )
        return at

    def pair(self, size: int) -> Buffers:
        """Two buffers and the register that says whose turn it is."""
        return self.ring(size, 2)

    def ring(self, size: int, count: int) -> Buffers:
        """So many buffers, which take turns."""
        each = (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        return Buffers(self.sram(count * each), each, self.register(), count)

    def swap(self, buffers: Buffers) -> None:
        if buffers.count == 2:
            self.alu(Alu.XOR, buffers.turn, imm=buffers.size, into=buffers.turn)
        else:
            self.alu(Alu.ADD, buffers.turn, imm=buffers.size, into=buffers.turn)
            self.alu(Alu.MOD, buffers.turn, imm=buffers.count * buffers.size, into=buffers.turn)

    def register(self, imm: int | None = 0) -> int:
        """A register of this kernel, set to `imm` unless that is None."""
        if self._register == REGISTERS:
            raise TongyunError(f"kernel {self.kernels[-1].name} needs more than {REGISTERS} registers")
        self._register += 1
        if imm is not None:
            self.alu(Alu.ADD, ZERO, imm=imm, into=self._register - 1)
        return self._register - 1

    def lend(self, semaphore: str, giver: str, taker: str, tokens: int = 2) -> None:
        """Free buffers at the start: `giver` signals `tokens` times; `taker` takes them back at the end."""
        for _ in range(tokens):
            self.sync(giver, signal=[semaphore])
        self._returned.append((semaphore, taker, tokens))

    def symbol(self, name: str) -> int:
        """Number of a value read from memory, for simulations without data; 0 is none."""
        if name not in self.symbols:
            self.symbols.append(name)
        return self.symbols.index(name) + 1

    # Instructions.

    def emit(
        self,
        op: str,
        *types: Type,
        fn: int = 0,
        flags: int = 0,
        wait: Sequence[str] = (),
        signal: Sequence[str] = (),
        **operands: Value,
    ) -> None:
        self.instructions.append(
            Instruction(
                op=op,
                fn=int(fn),
                types=types,
                flags=int(flags),
                wait=self._mask(wait),
                signal=self._mask(signal),
                operands=operands,
            )
        )

    def sync(self, engine: str, *, wait: Sequence[str] = (), signal: Sequence[str] = ()) -> None:
        self.emit(f"SYNC_{engine.upper()}", wait=wait, signal=signal)

    def alu(self, fn: Alu, ra: int, *, rb: int = ZERO, imm: int = 0, into: int | None = None) -> int:
        """rd = f(ra, rb + imm); a new register unless `into` is given."""
        rd = self.register(None) if into is None else into
        self.emit("ALU", fn=fn, rd=rd, ra=ra, rb=rb, imm=imm)
        return rd

    def lds(
        self, address: int | At, symbol: str, *, wait: Sequence[str] = (), into: int | None = None
    ) -> int:
        """A register holding the i32 at an SRAM address."""
        rd = self.register(None) if into is None else into
        at = address if isinstance(address, At) else At(address)
        self.emit("LDS", rd=rd, sram=at, symbol=self.symbol(symbol), wait=wait)
        return rd

    @contextmanager
    def loop(self, times: int | At, steps: Sequence[tuple[int, int]] = ()) -> Iterator[None]:
        """Repeat what is emitted inside; after each time every (register, change) of `steps` is applied."""
        place = len(self.instructions)
        at = times if isinstance(times, At) else At(times)
        self.emit("LOOP", times=at)
        yield
        places = {f"step{i}": At(change, register) for i, (register, change) in enumerate(steps)}
        self.instructions.append(Instruction(op="ENDLOOP", operands=places))
        length = len(self.instructions) - place - 1
        self.instructions[place] = Instruction(op="LOOP", operands={"times": at, "length": length})

    @contextmanager
    def units(self, count: int) -> Iterator[int]:
        """Go through this core's share of `count` units; gives the register with the unit's number.

        Core c of n takes (count − c + n − 1) // n of them.
        """
        times = self.alu(Alu.MUL, CORE, imm=-1)
        self.alu(Alu.ADD, times, rb=CORES, imm=count - 1, into=times)
        self.alu(Alu.DIV, times, rb=CORES, into=times)
        unit = self.alu(Alu.ADD, CORE)
        with self.loop(At(count, times)):
            mark = self._register
            yield unit
            self.alu(Alu.ADD, unit, rb=CORES, into=unit)
            self._register = max(self._register, mark)

    def load(
        self,
        tensor: Type,
        hbm: At,
        sram: At | int,
        *,
        rows: int | At,
        cols: int | At,
        stride: int,
        sram_stride: int,
        wait: Sequence[str] = (),
        signal: Sequence[str] = (),
        group: int = 0,
    ) -> None:
        self.emit(
            "LOAD", tensor, hbm=hbm, sram=_at(sram), rows=_at(rows), cols=_at(cols), hbm_stride=stride,
            sram_stride=sram_stride, group=group, wait=wait, signal=signal,
        )  # fmt: skip

    def gather(
        self,
        tensor: Type,
        hbm: At,
        sram: At | int,
        index: At | int,
        *,
        rows: int | At,
        cols: int | At,
        stride: int,
        sram_stride: int,
        wait: Sequence[str] = (),
        signal: Sequence[str] = (),
    ) -> None:
        self.emit(
            "GATHER", tensor, hbm=hbm, sram=_at(sram), index=_at(index), rows=_at(rows), cols=_at(cols),
            hbm_stride=stride, sram_stride=sram_stride, wait=wait, signal=signal,
        )  # fmt: skip

    def store(
        self,
        tensor: Type,
        hbm: At,
        sram: At | int,
        *,
        rows: int | At,
        cols: int | At,
        stride: int,
        sram_stride: int,
        wait: Sequence[str] = (),
        signal: Sequence[str] = (),
    ) -> None:
        self.emit(
            "STORE", tensor, hbm=hbm, sram=_at(sram), rows=_at(rows), cols=_at(cols), hbm_stride=stride,
            sram_stride=sram_stride, wait=wait, signal=signal,
        )  # fmt: skip

    def address(self, tensor: Tensor, *terms: tuple[int, int], offset: int = 0) -> At:
        """tensor + offset + Σ register · bytes, in a register."""
        total = self.alu(Alu.MUL, terms[0][0], imm=terms[0][1]) if terms else ZERO
        for register, scale in terms[1:]:
            part = self.alu(Alu.MUL, register, imm=scale)
            self.alu(Alu.ADD, total, rb=part, into=total)
        return At(tensor.at + offset, total)

    def left(self, size: int, unit: int, step: int) -> int:
        """A register with size − unit · step: what is left from this unit on."""
        gone = self.alu(Alu.MUL, unit, imm=-step)
        return self.alu(Alu.ADD, gone, imm=size, into=gone)

    def _mask(self, names: Sequence[str]) -> int:
        mask = 0
        for name in names:
            if name not in self._semaphores:
                if len(self._semaphores) == SEMAPHORES:
                    raise TongyunError(
                        f"kernel {self.kernels[-1].name} needs more than {SEMAPHORES} semaphores"
                    )
                self._semaphores[name] = len(self._semaphores)
            mask |= 1 << self._semaphores[name]
        return mask


def _at(value: At | int) -> At:
    return value if isinstance(value, At) else At(value)
