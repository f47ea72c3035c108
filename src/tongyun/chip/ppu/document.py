"""`docs/isa.md`, written from the table of opcodes: `python -m tongyun.chip.ppu.document > docs/isa.md`."""

from __future__ import annotations

from tongyun.chip.ppu.isa import OPCODES, REGISTERS, SEMAPHORES, SLOTS, Form, Opcode, Type

_HEAD = f"""# The instruction set of the PPU

Made from `chip/ppu/isa.py` by `python -m tongyun.chip.ppu.document`; a test holds the two together.

A program is one sequence of {SLOTS * 32}-bit words that every core runs. A core has a control, which reads
words in order and names work, and engines (load, store, tensor, vector, ICN), each an in-order queue that
does it. Between engines only semaphores keep order: an instruction takes one token from each of its
*wait* semaphores before it starts and gives one to each of its *signal* semaphores when it is done. A
program's order is one legal execution: a wait whose token no earlier instruction gave is a deadlock. At
a barrier all semaphores must be empty. Cores meet only in HBM, and only across barriers.

There are {REGISTERS} registers of 64 bits for the control: r0 is zero, r1 this core, r2 the number of
cores, r3 this chip's rank. There are {SEMAPHORES} semaphores a core. All products are exact and summed
in f32, those of int8 by int8 in i32; a result is rounded once.

## The word

| slot | bits | meaning |
|--:|---|---|
| 0 | 0–7 | opcode |
| 0 | 8–15 | function |
| 0 | 16–27 | data types of a, b and out: {", ".join(f"{kind.value} {kind.name.lower()}" for kind in Type)} |
| 0 | 28–31 | flags |
| 1 | 0–15, 16–31 | wait, signal: a bit for each semaphore |
| 2–15 | | operands, in the order of the tables below |

| operand | slots | meaning |
|---|--:|---|
| hbm | 2 | byte address in HBM: 56-bit immediate + register (bits 56–63) |
| sram | 1 | byte address in the core's SRAM: 24-bit immediate + register (bits 24–31) |
| count | 1 | 24-bit immediate, or, with a register, its value held between 0 and the immediate |
| position | 1 | 24-bit immediate + register |
| bytes | 1 | unsigned 32-bit |
| float | 1 | f32 |
| register | 1 | a register's number |
| integer | 2 | signed 64-bit |
| step | 1 | a register (bits 24–31) and the signed 24-bit number added to it |

An instruction with a count of zero does nothing but its semaphores.
"""
_NAMES = {
    Form.HBM: "hbm", Form.SRAM: "sram", Form.COUNT: "count", Form.POSITION: "position", Form.BYTES: "bytes",
    Form.FLOAT: "float", Form.REGISTER: "register", Form.INTEGER: "integer", Form.STEP: "step",
}  # fmt: skip


def markdown() -> str:
    """The whole document."""
    engines = dict.fromkeys(opcode.engine for opcode in OPCODES)
    parts = [_HEAD]
    for engine in engines:
        parts.append(f"\n## {engine.value}\n\n| opcode | name | operands | meaning |\n|---|---|---|---|\n")
        parts += [_row(opcode) for opcode in OPCODES if opcode.engine is engine]
    functions = {opcode.functions.__name__: opcode.functions for opcode in OPCODES if opcode.functions}
    parts.append("\n## Functions\n\n| instruction | functions |\n|---|---|\n")
    for name, members in functions.items():
        owner = next(opcode.name for opcode in OPCODES if opcode.functions is members)
        listed = ", ".join(f"{int(member)} {member.name}" for member in members)
        parts.append(f"| {owner} ({name}) | {listed} |\n")
    return "".join(parts)


def _row(opcode: Opcode) -> str:
    operands = ", ".join(f"{name}:{_NAMES[form]}" for name, form in opcode.operands.items())
    return f"| 0x{opcode.code:02x} | {opcode.name} | {operands} | {opcode.meaning} |\n"


if __name__ == "__main__":
    print(markdown(), end="")
