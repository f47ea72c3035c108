"""Words, text and damage: an instruction survives the way there and back, and a damaged one does not run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tongyun.chip.ppu import asm, document
from tongyun.chip.ppu.emit.builder import Builder
from tongyun.chip.ppu.emit.mapper import Tiling
from tongyun.chip.ppu.emit.matmul import matmul
from tongyun.chip.ppu.fault import Fault
from tongyun.chip.ppu.functional import Chip
from tongyun.chip.ppu.isa import OPCODES, REGISTERS, At, Form, Instruction, Type
from tongyun.chip.ppu.program import Program
from tongyun.errors import Infeasible, InputError
from tongyun.specs import find_ppu

PPU = dataclasses.replace(find_ppu("zhenwu-810e").at(), cores=3)

RANGES = {
    Form.REGISTER: (0, REGISTERS - 1),
    Form.INTEGER: (-(2**63), 2**63 - 1),
    Form.BYTES: (0, 2**32 - 1),
    Form.HBM: (0, 2**56 - 1),
    Form.STEP: (-(2**23), 2**23 - 1),
}


@st.composite
def instructions(draw: st.DrawFn) -> Instruction:
    opcode = draw(st.sampled_from(OPCODES))

    def operand(form: Form) -> At | int | float:
        if form is Form.FLOAT:
            return float(np.float32(draw(st.floats(-1e6, 1e6, width=32))))
        least, most = RANGES.get(form, (0, 2**24 - 1))
        number = draw(st.integers(least, most))
        return At(number, draw(st.integers(0, REGISTERS - 1))) if form.has_register else number

    operands = {name: operand(form) for name, form in opcode.operands.items()}
    functions = [0] if opcode.functions is None else [int(member) for member in opcode.functions]
    return Instruction(
        op=opcode.name,
        fn=draw(st.sampled_from(functions)),
        types=tuple(draw(st.sampled_from(Type)) for _ in range(opcode.types)),
        wait=draw(st.integers(0, 2**16 - 1)),
        signal=draw(st.integers(0, 2**16 - 1)),
        operands={name: value for name, value in operands.items() if value not in (0, At())},
    )


@settings(max_examples=300, deadline=None)
@given(instructions())
def test_words_and_text_come_back(instruction: Instruction) -> None:
    assert asm.decode(asm.encode(instruction)) == instruction
    assert asm.parse(asm.text([instruction])) == [instruction]


def test_opcodes_differ_and_fit_a_word() -> None:
    assert (
        len({opcode.code for opcode in OPCODES}) == len({opcode.name for opcode in OPCODES}) == len(OPCODES)
    )
    assert all(2 + sum(form.slots for form in opcode.operands.values()) <= 16 for opcode in OPCODES)


def test_errors_name_line_and_nearest() -> None:
    with pytest.raises(InputError, match=r"x\.s:2: unknown instruction 'MMMA'; did you mean MMA"):
        asm.parse("HALT\nMMMA a=1\n", "x.s")
    with pytest.raises(InputError, match=r"LOAD: unknown operand 'row'; did you mean rows"):
        asm.parse("LOAD.bf16 row=3")
    with pytest.raises(InputError, match=r"imm=.* does not fit"):
        asm.encode(Instruction(op="ALU", operands={"imm": 2**63}))


def test_the_document_is_made_from_the_table() -> None:
    path = Path(__file__).parents[2] / "docs" / "isa.md"
    assert path.read_text() == document.markdown()


def product() -> tuple[Program, dict[str, torch.Tensor]]:
    m, n, k = 40, 64, 96
    generator = torch.Generator().manual_seed(0)
    given = {
        "a": torch.randn(m, k, generator=generator).bfloat16(),
        "w": torch.randn(n, k, generator=generator).bfloat16(),
    }
    b = Builder(PPU)
    a = b.layout.place("a", (m, k), Type.BF16, "input")
    w = b.layout.place("w", (n, k), Type.BF16, "weight")
    out = b.layout.place("out", (m, n), Type.BF16, "output")
    with b.kernel("matmul", "product"):
        matmul(b, a, w, out, tiling=Tiling(m=16, n=32, k=32))
    return b.program(), given


def run(program: Program, given: dict[str, torch.Tensor], *, check: bool = False) -> torch.Tensor:
    chip = Chip(program, cores=PPU.cores, sram_bytes=PPU.sram_bytes, check=check)
    for name, value in given.items():
        chip.put(name, value)
    chip.run()
    return chip.view("out").clone()


def test_every_dropped_wait_fails() -> None:
    program, given = product()
    instructions = asm.disassemble(program.words)
    dropped = 0
    for place, instruction in enumerate(instructions):
        for bit in range(16):
            if instruction.wait >> bit & 1:
                changed = list(instructions)
                changed[place] = dataclasses.replace(instruction, wait=instruction.wait & ~(1 << bit))
                with pytest.raises(Fault):
                    run(dataclasses.replace(program, words=asm.assemble(changed)), given)
                dropped += 1
    assert dropped > 5


def test_every_corrupted_word_changes_the_result_or_fails() -> None:
    """One bit of every slot that is used; only the name of a kernel or a symbol may go unnoticed."""
    program, given = product()
    want = run(program, given)
    instructions = asm.disassemble(program.words)
    silent = []
    for place in range(len(program.words)):
        words = program.words.copy()
        words[place, 0] ^= 1 << 3
        words[place, 2:6] ^= 1 << 5
        try:
            same = torch.equal(run(dataclasses.replace(program, words=words), given), want)
        except (Fault, InputError):
            same = False
        if same:
            silent.append(instructions[place].op)
    assert silent == []


def test_a_planted_race_is_found() -> None:
    """The epilogue reads the accumulator without waiting; an idle instruction behind it takes the token."""
    program, given = product()
    instructions = asm.disassemble(program.words)
    drain = next(place for place, each in enumerate(instructions) if each.op == "DRAIN")
    acc_full = instructions[
        drain - 1 - next(i for i in range(20) if instructions[drain - 1 - i].op == "SYNC_TENSOR")
    ].signal
    moved = dataclasses.replace(instructions[drain], wait=instructions[drain].wait & ~acc_full)
    idle = Instruction(op="SYNC_VECTOR", wait=acc_full)
    planted = [*instructions[:drain], moved, idle, *instructions[drain + 1 :]]
    outer = next(place for place, each in enumerate(planted) if each.op == "LOOP")
    grown = {**planted[outer].operands, "length": planted[outer].operands["length"] + 1}  # type: ignore[operator]
    planted[outer] = dataclasses.replace(planted[outer], operands=grown)
    with pytest.raises(Fault, match=r"race: vector reads SRAM near .* that tensor wrote"):
        run(dataclasses.replace(program, words=asm.assemble(planted)), given, check=True)
    run(program, given, check=True)


def test_the_result_does_not_depend_on_threads() -> None:
    program, given = product()
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(program, given))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_programs_are_kept_in_files(tmp_path: Path) -> None:
    program, given = product()
    program.save(tmp_path / "a.ppu")
    again = Program.load(tmp_path / "a.ppu")
    assert torch.equal(run(again, given), run(program, given))
    (tmp_path / "b.ppu").write_bytes(b"text")
    with pytest.raises(InputError, match=r"b\.ppu: not a PPU program"):
        Program.load(tmp_path / "b.ppu")


def test_too_much_memory_is_refused_with_the_bytes_missing() -> None:
    b = Builder(PPU)
    b.layout.place("w", (PPU.hbm_bytes // 2 + 500,), Type.BF16, "weight")
    with pytest.raises(Infeasible, match=r"1,\d{3} bytes are missing"):
        b.program()
    with b.kernel("test", "large"), pytest.raises(Infeasible, match="bytes of SRAM"):
        b.sram(PPU.sram_bytes + 1)
