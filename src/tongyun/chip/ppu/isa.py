# ruff: noqa: E501 - the table of opcodes reads best with one line each
"""What an instruction of the PPU is: its fields, its word, its engine. As data.

An instruction is one word of 512 bits, sixteen 32-bit slots, and describes work on a whole tile.
Slots 0 and 1 are alike in all: opcode, function, data types and flags; semaphores waited for and
signalled. The others are operands, in the order of the opcode's fields. Knows no chip and computes
nothing: `functional` says what an instruction does, `timing` how long it takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum, IntFlag, StrEnum

from tongyun.units import DType

SLOTS = 16
"""32-bit slots of an instruction word."""
REGISTERS = 64
SEMAPHORES = 16
ZERO, CORE, CORES, RANK = range(4)
"""Registers the hardware sets before the first instruction: 0, this core, how many cores run
the program, this chip's rank. Programs may write the others."""


class Engine(StrEnum):
    """An in-order queue of a core; `CONTROL` reads the program and feeds the others."""

    CONTROL = "control"
    LOAD = "load"
    STORE = "store"
    TENSOR = "tensor"
    VECTOR = "vector"
    ICN = "icn"


ENGINES = tuple(Engine)


class Type(IntEnum):
    """Data type of an operand, as encoded."""

    NONE = 0
    F32 = 1
    BF16 = 2
    FP8 = 3
    INT8 = 4
    I32 = 5
    I64 = 6

    @property
    def bytes(self) -> int:
        return (0, 4, 2, 1, 1, 4, 8)[self]

    @property
    def rate(self) -> DType:
        """The rate of the tensor unit that products of this type run at."""
        return _RATES.get(self, DType.BF16)


_RATES = {Type.FP8: DType.FP8, Type.INT8: DType.INT8, Type.F32: DType.F32}


class Form(Enum):
    """How an operand is encoded, and how many slots it takes.

    A register of `ZERO` adds nothing. A count with a register is that register's value, held
    between 0 and the immediate: the immediate is the room the program allotted.
    """

    HBM = 2
    """Byte address in HBM: 56-bit immediate + register."""
    SRAM = 1
    """Byte address in the core's SRAM: 24-bit immediate + register."""
    COUNT = "count"
    """24-bit immediate, or a register held within it."""
    POSITION = "position"
    """24-bit immediate + register: a token's place in its sequence."""
    BYTES = "bytes"
    """Unsigned 32-bit stride or size."""
    FLOAT = "float"
    REGISTER = "register"
    INTEGER = 3
    """Signed 64-bit immediate."""
    STEP = 4
    """A register and the signed 24-bit step a loop's end adds to it."""

    @property
    def slots(self) -> int:
        return 2 if self in {Form.HBM, Form.INTEGER} else 1

    @property
    def has_register(self) -> bool:
        return self in {Form.HBM, Form.SRAM, Form.COUNT, Form.POSITION, Form.STEP}


class Flag(IntFlag):
    """Four bits of slot 0; what they mean depends on the opcode."""

    NONE = 0
    ACCUMULATE = 1
    """MMA: add to C instead of replacing it."""
    TRANSPOSED = 2
    """MMA: B lies as [N, K], the way PyTorch stores a weight."""
    NORM = 4
    """MMA: multiply A's columns by `gain` on their way in and add A's squares to `stats`."""
    SCALED = 8
    """MMA: multiply the product by an f32 of each row of A (`left`) and one of B (`right`) before it is added."""
    CAUSAL = 1
    """ATTN: a query sees keys up to its own position only."""


class Vec(IntEnum):
    """Functions of VEC: element-wise, the first eight on vector lanes, the rest on special-function lanes."""

    COPY = 0
    ADD = 1
    SUB = 2
    MUL = 3
    MAX = 4
    MIN = 5
    NEG = 6
    SQUARE = 7
    DIV = 8
    RSQRT = 9
    EXP = 10
    SILU = 11
    SIN = 12
    COS = 13
    SIGMOID = 14
    LESS = 15
    RECIPROCAL = 16


class Operand(IntEnum):
    """Where VEC's second operand comes from (the flags of VEC)."""

    TILE = 0
    ROW = 1
    """One row for all rows."""
    COLUMN = 2
    """One number for each row."""
    IMMEDIATE = 3


class Red(IntEnum):
    """Functions of RED, each over a row."""

    SUM = 0
    MAX = 1
    SQUARES = 2
    SOFTMAX = 3
    """Not a reduction: the row itself, normalised; `out` is a tile."""
    LARGEST = 4
    """The largest magnitude."""


class Epilogue(IntFlag):
    """What DRAIN does to an accumulator on its way out (its function)."""

    PLAIN = 0
    SCALE = 1
    """Multiply each row by rsqrt(stats/width + eps): the RMSNorm whose gain MMA applied."""
    GATE = 2
    """silu(C) · C2: the two halves of SwiGLU."""
    RESIDUAL = 4
    """Add a tile after rounding to the type of the output."""
    WEIGHT = 8
    """Multiply each row by an f32 (an expert's share)."""
    BIAS = 16
    """Add one row to every row."""
    ROWS = 32
    """Multiply each row by an f32 (`stats`), before GATE: what a row of A was divided by."""
    COLUMNS = 64
    """Multiply each column by an f32, before GATE: what B was divided by. C2's lie `ldc` bytes behind C's."""


class Alu(IntEnum):
    """Functions of ALU: rd = f(ra, rb + immediate), on 64-bit integers."""

    ADD = 0
    SUB = 1
    MUL = 2
    DIV = 3
    MOD = 4
    MIN = 5
    MAX = 6
    XOR = 7
    LESS = 8


@dataclass(frozen=True, kw_only=True)
class Opcode:
    """One opcode: number, engine, operands in slot order, and one line of meaning."""

    name: str
    code: int
    engine: Engine
    operands: Mapping[str, Form]
    meaning: str
    functions: type[IntEnum] | type[IntFlag] | None = None
    types: int = 0
    """How many of the three data types (a, b, out) it uses."""

    @property
    def slot(self) -> Mapping[str, int]:
        """First slot of each operand."""
        places, at = {}, 2
        for name, form in self.operands.items():
            places[name] = at
            at += form.slots
        return places


def _opcode(code: int, name: str, engine: Engine, types: int, operands: str, meaning: str, functions=None):  # type: ignore[no-untyped-def]
    forms = dict(item.split(":") for item in operands.split())
    return Opcode(
        name=name,
        code=code,
        engine=engine,
        operands={key: _FORMS[form] for key, form in forms.items()},
        meaning=meaning,
        functions=functions,
        types=types,
    )


_FORMS = {
    "h": Form.HBM, "s": Form.SRAM, "n": Form.COUNT, "p": Form.POSITION, "b": Form.BYTES,
    "f": Form.FLOAT, "r": Form.REGISTER, "i": Form.INTEGER, "t": Form.STEP,
}  # fmt: skip
_MOVE = "hbm:h sram:s rows:n cols:n hbm_stride:b sram_stride:b"

OPCODES: tuple[Opcode, ...] = (
    _opcode(0x00, "HALT", Engine.CONTROL, 0, "", "End of the program."),
    _opcode(0x01, "ALU", Engine.CONTROL, 0, "rd:r ra:r rb:r imm:i", "rd = f(ra, rb + imm).", Alu),
    _opcode(0x02, "LDS", Engine.CONTROL, 0, "rd:r sram:s symbol:b", "rd = the i32 at `sram`. `symbol` names the value for simulations without data."),
    _opcode(0x03, "LOOP", Engine.CONTROL, 0, "times:n length:b", "Repeat the next `length` instructions, ENDLOOP among them; zero times skips them."),
    _opcode(0x04, "ENDLOOP", Engine.CONTROL, 0, "step0:t step1:t step2:t step3:t step4:t step5:t", "Add each step to its register; go back, or on when it was the last time."),
    _opcode(0x05, "BARRIER", Engine.CONTROL, 0, "kernel:b", "Wait until all engines of all cores are idle. Begins kernel number `kernel`."),
    _opcode(0x10, "LOAD", Engine.LOAD, 1, _MOVE + " group:b", "HBM to SRAM, a strided tile. `group` consecutive cores that ask for the same tile read HBM once (multicast)."),
    _opcode(0x11, "GATHER", Engine.LOAD, 1, _MOVE + " index:s", "HBM to SRAM; row r is row index[r] (i32 in SRAM) of the tensor at `hbm`."),
    _opcode(0x18, "STORE", Engine.STORE, 1, _MOVE, "SRAM to HBM, a strided tile."),
    _opcode(0x19, "SCATTER", Engine.STORE, 1, _MOVE + " index:s", "SRAM to HBM; row r becomes row index[r]."),
    _opcode(0x20, "MMA", Engine.TENSOR, 2, "a:s b:s c:s m:n n:n k:n lda:b ldb:b ldc:b gain:s stats:s left:s right:s ldl:b", "C[m,n] f32 (+)= A[m,k] · B[k,n], products exact, sums in f32; of int8 by int8 C and sums are i32."),
    _opcode(0x28, "ATTN", Engine.TENSOR, 2, "q:s k:s v:s state:s m:n n:n width:n ldq:b ldk:b ldv:b scale:f query:p key:p group:b", "One tile of online softmax: `n` keys into the state (acc [m,width], max [m], sum [m], all f32) of `m` query rows; `group` rows share a position."),
    _opcode(0x30, "VEC", Engine.VECTOR, 3, "a:s b:s out:s rows:n cols:n lda:b ldb:b ldo:b imm:f", "out = f(a, b), element by element in f32, rounded once; what fp8 or int8 cannot hold becomes its largest number.", Vec),
    _opcode(0x31, "RED", Engine.VECTOR, 2, "a:s out:s rows:n cols:n lda:b ldo:b", "out[row] = f over the row, in f32.", Red),
    _opcode(0x32, "RMSNORM", Engine.VECTOR, 2, "a:s gain:s out:s rows:n cols:n lda:b ldo:b eps:f", "out = a · rsqrt(mean(a²) + eps) · gain, by rows, rounded once."),
    _opcode(0x33, "ROPE", Engine.VECTOR, 2, "a:s cos:s sin:s out:s rows:n heads:n width:n lda:b ldc:b ldo:b", "Rotate the halves of each head's `width` columns by the row's angles."),
    _opcode(0x34, "DRAIN", Engine.VECTOR, 3, "c:s gate:s out:s m:n n:n ldc:b ldo:b stats:s residual:s ldr:b eps:f width:b weight:s columns:s", "Accumulator to tile, with an epilogue; types are the output's, that of what is added, and i32 for accumulators that are.", Epilogue),
    _opcode(0x35, "ATTN_END", Engine.VECTOR, 2, "state:s out:s m:n width:n ldo:b", "out = acc / sum."),
    _opcode(0x36, "ATTN_MERGE", Engine.VECTOR, 0, "state:s other:s m:n width:n", "Fold another state of the same queries, over other keys, into `state`."),
    _opcode(0x37, "ATTN_INIT", Engine.VECTOR, 0, "state:s m:n width:n", "The state before the first key: acc 0, max −∞, sum 0."),
    _opcode(0x38, "TOPK", Engine.VECTOR, 2, "a:s value:s index:s rows:n cols:n top:n lda:b ldo:b", "The `top` largest of each row, largest first, equal ones by lowest column; values f32, columns i32."),
    _opcode(0x39, "SORT", Engine.VECTOR, 0, "key:s order:s offset:s count:n segments:n", "Stable sort of `count` i32 keys in [0, segments): the order, and where each segment starts (segments + 1 numbers). The inverse of the order follows it at order + 4·count."),
    _opcode(0x40, "ALL_REDUCE", Engine.ICN, 1, "source:h target:h bytes:b ranks:b addend:h", "Sum over the ranks, in f32, in rank order, and of this rank's addend unless it is zero, rounded once; core 0 starts it."),
    _opcode(0x41, "ALL_GATHER", Engine.ICN, 1, "source:h target:h bytes:b ranks:b", "Each rank's bytes, in rank order."),
    _opcode(0x42, "REDUCE_SCATTER", Engine.ICN, 1, "source:h target:h bytes:b ranks:b", "The sum's part of each rank; `bytes` is the part."),
    _opcode(0x43, "ALL_TO_ALL", Engine.ICN, 1, "source:h target:h bytes:b ranks:b", "Part i of each rank to rank i; `bytes` is one part."),
    _opcode(0x44, "SEND", Engine.ICN, 1, "source:h target:h bytes:b peer:b", "Bytes to the peer's HBM at `target`; the peer's RECV, with the same target and bytes, waits for them."),
    _opcode(0x45, "RECV", Engine.ICN, 1, "target:h bytes:b peer:b", "Wait for the peer's SEND."),
    _opcode(0x50, "SYNC_LOAD", Engine.LOAD, 0, "", "Nothing but its semaphores, in the load queue."),
    _opcode(0x51, "SYNC_STORE", Engine.STORE, 0, "", "The same in the store queue."),
    _opcode(0x52, "SYNC_TENSOR", Engine.TENSOR, 0, "", "The same in the tensor queue."),
    _opcode(0x53, "SYNC_VECTOR", Engine.VECTOR, 0, "", "The same in the vector queue."),
)  # fmt: skip

BY_NAME: Mapping[str, Opcode] = {opcode.name: opcode for opcode in OPCODES}
BY_CODE: Mapping[int, Opcode] = {opcode.code: opcode for opcode in OPCODES}


@dataclass(frozen=True)
class At:
    """An immediate and the register that joins it."""

    imm: int = 0
    reg: int = ZERO

    def __add__(self, offset: int) -> At:
        return At(self.imm + offset, self.reg)


Value = At | int | float


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One instruction, decoded. Operands that are not given are zero."""

    op: str
    fn: int = 0
    types: tuple[Type, ...] = ()
    flags: int = 0
    wait: int = 0
    """Semaphores from each of which one token is taken before it starts, as bits."""
    signal: int = 0
    """Semaphores to each of which one token is given when it is done, as bits."""
    operands: Mapping[str, Value] = field(default_factory=dict)

    @property
    def opcode(self) -> Opcode:
        return BY_NAME[self.op]

    def plain(self, name: str) -> int:
        """An operand that no register joins, as a number."""
        value = self.operands.get(name, 0)
        return value.imm if isinstance(value, At) else int(value)
