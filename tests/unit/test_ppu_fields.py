"""Words spread over arrays are the decoded instructions; what cannot be timed is refused by its place."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tongyun.chip.ppu import asm
from tongyun.chip.ppu.capture import compile_step
from tongyun.chip.ppu.emit.builder import Builder
from tongyun.chip.ppu.fault import Fault
from tongyun.chip.ppu.fields import OPS, fields
from tongyun.chip.ppu.isa import ENGINES, Alu, At, Form, Instruction, Type
from tongyun.chip.ppu.program import Kernel, Program
from tongyun.chip.ppu.timing import simulate
from tongyun.errors import InputError
from tongyun.specs import find_model, find_ppu

PPU = dataclasses.replace(find_ppu("zhenwu-810e").at(), hbm_bytes=10**12)


def program(*instructions: Instruction) -> Program:
    whole = [Instruction(op="BARRIER"), *instructions, Instruction(op="HALT")]
    return Program(words=asm.assemble(whole), tensors=(), kernels=(Kernel(name="one", kind="one"),))


@pytest.mark.parametrize("model", ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-30B-A3B"])
def test_fields_are_those_of_the_decoded_instructions(model: str) -> None:
    config, _ = find_model(model)
    words = compile_step(config, PPU, tokens=20, context=30, layers=2).program.words
    head, imm, reg = fields(words, PPU)
    for at, each in enumerate(asm.disassemble(words)):
        kind = each.types[0].bytes if each.types else 0
        engine = ENGINES.index(each.opcode.engine)
        assert head[at, [0, 1, 2, 3, 6]].tolist() == [
            OPS.index(each.op), engine, each.fn, each.flags, kind
        ]  # fmt: skip
        for mask, listed in ((each.wait, head[at, 4]), (each.signal, head[at, 5])):
            found = [int(listed) >> 5 * place & 31 for place in range(12)]
            assert sum(1 << bit - 1 for bit in found if bit) == mask
        for place, (name, form) in enumerate(each.opcode.operands.items()):
            value = each.operands.get(name, 0)
            given = value if isinstance(value, At) else At(int(value))
            if form is not Form.FLOAT and (each.op, place) != ("LDS", 3):
                assert (imm[at, place], reg[at, place]) == (given.imm, given.reg)


def test_a_word_that_is_no_instruction_is_refused_as_the_assembler_does() -> None:
    good = program(Instruction(op="ALU", operands={"rd": 5, "imm": -3}))
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        words = good.words.copy()
        words[1, rng.integers(16)] ^= np.uint32(1 << rng.integers(32))
        try:
            asm.disassemble(words)
        except InputError as error:
            refused += 1
            with pytest.raises(InputError, match=r"^word 1: ") as caught:
                fields(words, PPU)
            assert str(caught.value) == str(error)
        else:
            fields(words, PPU)
    assert refused > 100


def test_a_semaphore_holds_sixteen_tokens() -> None:
    give = Instruction(op="SYNC_LOAD", signal=4)
    simulate(program(*[give] * 16), PPU)
    with pytest.raises(Fault, match=r"kernel one, core 0, instruction 17 SYNC_LOAD: a semaphore holds 16"):
        simulate(program(*[give] * 17), PPU)


def test_a_token_that_nobody_gave_is_a_deadlock() -> None:
    give, take = Instruction(op="SYNC_LOAD", signal=4), Instruction(op="SYNC_TENSOR", wait=4)
    assert simulate(program(give, take), PPU).instructions == 4 * PPU.cores
    with pytest.raises(Fault, match="instruction 3 SYNC_TENSOR: deadlock"):
        simulate(program(give, take, take), PPU)


def test_what_cannot_be_timed_is_refused_by_its_place() -> None:
    loop = Instruction(op="LOOP", operands={"times": At(3), "length": 2})
    with pytest.raises(InputError, match="word 3: a loop that does not end"):
        simulate(program(loop, Instruction(op="SYNC_LOAD")), PPU)
    with pytest.raises(InputError, match="word 1: LDS reads a number that the program does not name"):
        simulate(program(Instruction(op="LDS", operands={"rd": 5, "symbol": 1})), PPU)
    with pytest.raises(InputError, match="word 1: BARRIER begins a kernel"):
        simulate(program(Instruction(op="BARRIER", operands={"kernel": 1})), PPU)
    product = Instruction(op="MMA", types=(Type.FP8, Type.FP8), operands={"m": At(16)})
    with pytest.raises(InputError, match="no tensor rate for FP8; it has"):
        simulate(program(product), PPU)
    with pytest.raises(InputError, match="5000 cores; the timing simulator takes 4096"):
        simulate(program(), dataclasses.replace(PPU, cores=5000))


def test_registers_that_no_time_depends_on_take_their_cycles() -> None:
    """Instructions whose register nobody counts with take as long as the same ones of a count."""
    times = []
    for counts in (False, True):
        b = Builder(PPU)
        with b.kernel("one", "one"):
            turn = b.register(64)
            with b.loop(7, ((turn, 0),)):
                b.alu(Alu.XOR, turn, imm=0, into=turn)
            rows = At(64, turn if counts else 0)
            b.emit("VEC", Type.F32, Type.NONE, Type.F32, rows=rows, cols=At(64))
        times.append(simulate(b.program(), PPU))
    assert times[0].cycles == times[1].cycles
    assert times[0].instructions == times[1].instructions == PPU.cores * (3 + 2 * 7 + 2)
