"""Instructions to words and text, and back.

`encode` and `decode` are inverse on every legal instruction, `text` and `parse` likewise. A word that
is no instruction (unknown opcode, function or type, a bit set in a slot nothing uses) is refused:
a program that was damaged does not run.

    MMA.bf16.bf16+ACCUMULATE a=s[0+r5] b=s[65536] c=s[131072] m=128:r7 n=128 … wait=0,3 signal=1
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from tongyun.chip.ppu.isa import (
    BY_CODE,
    BY_NAME,
    REGISTERS,
    SEMAPHORES,
    SLOTS,
    At,
    Flag,
    Form,
    Instruction,
    Operand,
    Type,
    Value,
)
from tongyun.errors import InputError, unknown

Words = NDArray[np.uint32]
_FLAGGED = {"MMA": Flag.ACCUMULATE | Flag.TRANSPOSED | Flag.NORM | Flag.SCALED, "ATTN": Flag.CAUSAL}
_IMM24 = (1 << 24) - 1


def assemble(program: Iterable[Instruction]) -> Words:
    """Words of shape (instructions, 16)."""
    rows = [encode(instruction) for instruction in program]
    return np.array(rows, dtype=np.uint32).reshape(-1, SLOTS)


def disassemble(words: Words) -> list[Instruction]:
    """The instructions of (n, 16) words; InputError names the first word that is none."""
    return [decode(row, at) for at, row in enumerate(words.tolist())]


def encode(instruction: Instruction) -> list[int]:
    """Sixteen 32-bit slots. InputError when an operand does not fit its slot."""
    opcode = instruction.opcode
    word = [0] * SLOTS
    a, b, out = (*instruction.types, Type.NONE, Type.NONE, Type.NONE)[:3]
    word[0] = opcode.code | instruction.fn << 8 | a << 16 | b << 20 | out << 24 | instruction.flags << 28
    word[1] = instruction.wait | instruction.signal << 16
    strange = set(instruction.operands) - set(opcode.operands)
    if strange:
        raise InputError(f"{opcode.name}: {unknown('operand', min(strange), opcode.operands)}")
    for name, slot in opcode.slot.items():
        value = instruction.operands.get(name, 0)
        try:
            word[slot : slot + opcode.operands[name].slots] = _pack(opcode.operands[name], value)
        except (ValueError, struct.error) as error:
            raise InputError(f"{opcode.name}: {name}={value} does not fit: {error}") from None
    return word


def decode(word: list[int], at: int = 0) -> Instruction:
    """The instruction a word says; `at` is its place, for errors."""
    code, fn, flags = word[0] & 0xFF, word[0] >> 8 & 0xFF, word[0] >> 28
    opcode = BY_CODE.get(code)
    if opcode is None:
        raise InputError(f"word {at}: no instruction has the opcode 0x{code:02x}")
    codes = tuple(word[0] >> shift & 0xF for shift in (16, 20, 24))
    if any(kind > max(Type) for kind in codes) or any(codes[opcode.types :]):
        raise InputError(f"word {at}: {opcode.name} with data types {codes}")
    if not is_function(opcode.functions, fn):
        raise InputError(f"word {at}: {opcode.name} has no function {fn}")
    if flags & ~flags_of(opcode.name):
        raise InputError(f"word {at}: {opcode.name} has no flags {flags}")
    used = {0, 1}
    operands: dict[str, Value] = {}
    for name, slot in opcode.slot.items():
        form = opcode.operands[name]
        used |= set(range(slot, slot + form.slots))
        operands[name] = _unpack(form, word[slot : slot + form.slots], f"word {at}: {opcode.name}: {name}")
    if any(word[slot] for slot in range(SLOTS) if slot not in used):
        raise InputError(f"word {at}: {opcode.name} with bits set that mean nothing")
    return Instruction(
        op=opcode.name,
        fn=fn,
        types=tuple(Type(kind) for kind in codes[: opcode.types]),
        flags=flags,
        wait=word[1] & 0xFFFF,
        signal=word[1] >> 16,
        operands={name: value for name, value in operands.items() if value not in (0, At())},
    )


def flags_of(name: str) -> int:
    return int(max(Operand)) if name == "VEC" else int(_FLAGGED.get(name, 0))


def is_function(functions: object, fn: int) -> bool:
    if functions is None:
        return fn == 0
    try:
        functions(fn)  # type: ignore[operator]
    except ValueError:
        return False
    return True


def _pack(form: Form, value: Value) -> list[int]:
    if form is Form.FLOAT:
        return [struct.unpack("<I", struct.pack("<f", float(value)))[0]]  # type: ignore[arg-type]
    at = value if isinstance(value, At) else At(int(value))
    if not 0 <= at.reg < REGISTERS or (at.reg and not form.has_register):
        raise ValueError(f"register {at.reg}")
    bits = {Form.HBM: 56, Form.INTEGER: 64, Form.BYTES: 32, Form.REGISTER: 6}.get(form, 24)
    signed = form in {Form.INTEGER, Form.STEP}
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    if not low <= at.imm <= high:
        raise ValueError(f"{at.imm} is outside {low} to {high}")
    number = at.imm & ((1 << bits) - 1)
    if form is Form.HBM:
        number |= at.reg << 56
    elif form.has_register:
        number |= at.reg << 24
    return [number & 0xFFFFFFFF, number >> 32][: form.slots]


def _unpack(form: Form, slots: list[int], where: str) -> Value:
    number = slots[0] | (slots[1] << 32 if form.slots == 2 else 0)
    if form is Form.FLOAT:
        return float(struct.unpack("<f", struct.pack("<I", number))[0])
    if form is Form.INTEGER:
        return number - (1 << 64) if number >> 63 else number
    if form is Form.BYTES:
        return number
    if form is Form.REGISTER:
        if number >= REGISTERS:
            raise InputError(f"{where}: there is no register {number}")
        return number
    shift = 56 if form is Form.HBM else 24
    imm, reg = number & ((1 << shift) - 1), number >> shift
    if reg >= REGISTERS:
        raise InputError(f"{where}: there is no register {reg}")
    if form is Form.STEP and imm >> 23:
        imm -= 1 << 24
    return At(imm, reg)


# Text: one instruction a line.


def text(program: Iterable[Instruction]) -> str:
    return "\n".join(line(instruction) for instruction in program) + "\n"


def line(instruction: Instruction) -> str:
    """One instruction as the assembler reads it."""
    opcode = instruction.opcode
    name = opcode.name
    if opcode.functions is not None:
        name += f":{_function_name(opcode.functions, instruction.fn)}"
    types = (*instruction.types, *(Type.NONE,) * 3)[: opcode.types]
    name += "".join(f".{kind.name.lower()}" for kind in types)
    if instruction.flags:
        name += f"+{instruction.flags}"
    parts = [name]
    for key, form in opcode.operands.items():
        if key in instruction.operands:
            parts.append(f"{key}={_shown(form, instruction.operands[key])}")
    parts += [f"{word}={_bits(mask)}" for word in ("wait", "signal") if (mask := getattr(instruction, word))]
    return " ".join(parts)


def parse(source: str, file: object = "<text>") -> list[Instruction]:
    """Read what `text` writes; `;` begins a comment. InputError names file and line."""
    return list(_parsed(source, file))


def _parsed(source: str, file: object) -> Iterator[Instruction]:
    for number, raw in enumerate(source.splitlines(), 1):
        content = raw.split(";")[0].strip()
        if not content:
            continue
        try:
            yield _parse_line(content)
        except (ValueError, KeyError, InputError) as error:
            raise InputError(f"{file}:{number}: {error}") from None


_HEAD = re.compile(r"(?P<op>\w+)(:(?P<fn>[\w|]+))?(?P<types>(\.\w+)*)(\+(?P<flags>\d+))?$")


def _parse_line(content: str) -> Instruction:
    head, *rest = content.split()
    match = _HEAD.match(head)
    if match is None or match["op"] not in BY_NAME:
        raise InputError(unknown("instruction", head, BY_NAME))
    opcode = BY_NAME[match["op"]]
    masks = {"wait": 0, "signal": 0}
    operands: dict[str, Value] = {}
    for item in rest:
        key, equals, given = item.partition("=")
        if key in masks:
            masks[key] = _mask(given)
        elif key in opcode.operands and equals:
            operands[key] = _read(opcode.operands[key], given)
        else:
            raise InputError(f"{opcode.name}: {unknown('operand', key, [*opcode.operands, *masks])}")
    fn = 0
    if opcode.functions is not None:
        fn = _function_code(opcode.functions, match["fn"] or "")
    instruction = Instruction(
        op=opcode.name,
        fn=fn,
        types=tuple(Type[kind.upper()] for kind in match["types"].split(".")[1:]),
        flags=int(match["flags"] or 0),
        wait=masks["wait"],
        signal=masks["signal"],
        operands=operands,
    )
    return decode(encode(instruction))


def _function_name(functions: type, fn: int) -> str:
    return str(functions(fn).name or fn)


def _function_code(functions: type, name: str) -> int:
    if name.isdigit():
        return int(name)
    total = 0
    for part in name.split("|"):
        if part not in functions.__members__:  # type: ignore[attr-defined]
            raise InputError(unknown("function", part, functions.__members__))  # type: ignore[attr-defined]
        total |= int(functions[part])  # type: ignore[index]
    return total


def _shown(form: Form, value: Value) -> str:
    if not isinstance(value, At):
        return repr(value)
    join = {Form.HBM: "h[{}]", Form.SRAM: "s[{}]"}.get(form, "{}")
    sign = ":" if form is Form.COUNT else "+"
    return join.format(f"{value.imm}{sign}r{value.reg}" if value.reg else str(value.imm))


_AT = re.compile(r"(?:[hs]\[)?(?P<imm>-?\d+)(?:[:+]r(?P<reg>\d+))?\]?$")


def _read(form: Form, given: str) -> Value:
    if form is Form.FLOAT:
        return float(given)
    if not form.has_register:
        return int(given)
    match = _AT.match(given)
    if match is None:
        raise InputError(f"cannot read the operand '{given}'")
    return At(int(match["imm"]), int(match["reg"] or 0))


def _bits(mask: int) -> str:
    return ",".join(str(bit) for bit in range(SEMAPHORES) if mask >> bit & 1)


def _mask(given: str) -> int:
    bits = [int(item) for item in given.split(",")]
    if any(not 0 <= bit < SEMAPHORES for bit in bits):
        raise InputError(f"semaphores are 0 to {SEMAPHORES - 1}, got {given}")
    return sum(1 << bit for bit in set(bits))
