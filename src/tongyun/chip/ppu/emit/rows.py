"""Work that goes row by row: norms, rotation, element-wise operators, embedding, moves into the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tongyun.chip.ppu.emit.builder import Buffers, Builder
from tongyun.chip.ppu.isa import Alu, At, Operand, Red, Type, Vec
from tongyun.chip.ppu.program import Tensor
from tongyun.chip.ppu.traffic import LINE, pieces, tiled


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A matrix in HBM as a kernel of rows sees it."""

    tensor: Tensor
    rows: int
    cols: int
    stride: int
    """Bytes from row to row; 0 repeats the first row."""
    offset: int = 0
    """Bytes before the first row."""
    base: int = 0
    """A register added to the address; 0 is none."""

    @classmethod
    def of(cls, tensor: Tensor, cols: int | None = None) -> Rows:
        """A contiguous tensor as rows of its last dimension, or of `cols` numbers."""
        width = cols or tensor.shape[-1]
        count = tensor.bytes // tensor.type.bytes // width
        return cls(tensor=tensor, rows=count, cols=width, stride=width * tensor.type.bytes)

    @property
    def width(self) -> int:
        return self.cols * self.tensor.type.bytes


Body = Callable[[At, Sequence[At], Sequence[At], Sequence[int]], None]
"""Emits the work on one tile: rows (a count), input tiles, output tiles, scratch tiles. The last
instruction must not be its only one to read inputs: a sync behind it frees them."""


def rows_kernel(
    b: Builder,
    inputs: Sequence[Rows],
    outputs: Sequence[Rows],
    body: Body,
    *,
    scratch: Sequence[int] = (),
) -> None:
    """Stream rows through SRAM: load a tile of each input, `body`, store a tile of each output.

    `scratch` are bytes per row that the body works in. The tile's rows are as many as SRAM holds twice,
    but no more than gives every core some.
    """
    count = outputs[0].rows
    each = 2 * sum(item.width + 64 for item in (*inputs, *outputs)) + sum(scratch)
    room = (b.ppu.sram_bytes - 4096 - 64 * 8) // each
    size = max(1, min(room, -(-count // b.ppu.cores), 256))
    b.lend("in_free", "vector", "load")
    b.lend("out_free", "store", "vector")
    near_in = [b.pair(size * item.width) for item in inputs]
    near_out = [b.pair(size * item.width) for item in outputs]
    work = [b.sram(size * width) for width in scratch]
    for item in (*inputs, *outputs):
        b.moves(item.tensor, tiled(pieces(count, size), [item.width], item.stride))
    with b.units(-(-count // size)) as unit:
        rows = At(size, b.left(count, unit, size))
        for number, (item, near) in enumerate(zip(inputs, near_in, strict=True)):
            b.load(
                item.tensor.type, _place(b, item, unit, size), near.address,
                rows=rows if item.stride else 1, cols=item.cols, stride=item.stride, sram_stride=item.width,
                wait=["in_free"] if number == 0 else [],
                signal=["in_full"] if number == len(inputs) - 1 else [],
            )  # fmt: skip
        b.sync("vector", wait=["in_full", "out_free"])
        body(rows, [near.address for near in near_in], [near.address for near in near_out], work)
        b.sync("vector", signal=["in_free", "out_full"])
        for number, (item, near) in enumerate(zip(outputs, near_out, strict=True)):
            b.store(
                item.tensor.type, _place(b, item, unit, size), near.address, rows=rows, cols=item.cols,
                stride=item.stride, sram_stride=item.width, wait=["out_full"] if number == 0 else [],
                signal=["out_free"] if number == len(outputs) - 1 else [],
            )  # fmt: skip
        for near in (*near_in, *near_out):
            b.swap(near)


def _place(b: Builder, item: Rows, unit: int, size: int) -> At:
    at = b.alu(Alu.MUL, unit, imm=size * item.stride)
    if item.base:
        b.alu(Alu.ADD, at, rb=item.base, into=at)
    return At(item.tensor.at + item.offset, at)


def rmsnorm(b: Builder, x: Rows, gain: Tensor, out: Rows, eps: float) -> None:
    """out = x · rsqrt(mean(x²) + eps) · gain over stretches as long as the gain; a row may hold several."""
    width = gain.shape[-1]
    row, heads = Rows(tensor=gain, rows=1, cols=width, stride=0), x.cols // width

    def body(rows: At, given: Sequence[At], made: Sequence[At], _: Sequence[int]) -> None:
        b.emit(
            "RMSNORM", x.tensor.type, out.tensor.type, a=given[0], gain=given[1], out=made[0],
            rows=many(b, rows, heads), cols=At(width), lda=width * x.tensor.type.bytes,
            ldo=width * out.tensor.type.bytes, eps=eps,
        )  # fmt: skip

    rows_kernel(b, [x, row], [out], body)


def many(b: Builder, rows: At, heads: int) -> At:
    """Heads of a row lie one behind the other: rows · heads rows of one head's width."""
    if heads == 1:
        return rows
    held = b.alu(Alu.MIN, rows.reg, imm=rows.imm)
    b.alu(Alu.MUL, held, imm=heads, into=held)
    return At(rows.imm * heads, held)


def elementwise(
    b: Builder,
    fn: Vec,
    a: Tensor,
    out: Tensor,
    *,
    other: Tensor | None = None,
    imm: float | None = None,
) -> None:
    """out = f(a, other or imm). `other` may be one row, which repeats, or one number for each row."""
    width = out.shape[-1]
    kind, given = Operand.IMMEDIATE, [Rows.of(a, width)]
    if other is not None:
        numbers, whole = other.bytes // other.type.bytes, out.bytes // out.type.bytes
        if numbers == whole:
            kind = Operand.TILE
            given.append(Rows.of(other, width))
        elif numbers == whole // width and (numbers > 1 or width == 1):
            kind = Operand.COLUMN
            given.append(Rows.of(other, 1))
        elif numbers == width:
            kind = Operand.ROW
            given.append(Rows(tensor=other, rows=1, cols=width, stride=0))
        else:
            raise ValueError(f"{other.shape} does not broadcast over {out.shape} by rows or columns")

    def body(rows: At, near: Sequence[At], made: Sequence[At], _: Sequence[int]) -> None:
        second = near[1] if other is not None else At()
        b.emit(
            "VEC", a.type, other.type if other is not None else Type.F32, out.type, fn=fn, flags=kind,
            a=near[0], b=second, out=made[0], rows=rows, cols=At(width), lda=width * a.type.bytes,
            ldb=given[1].width if other is not None else 0, ldo=width * out.type.bytes, imm=imm or 0.0,
        )  # fmt: skip

    rows_kernel(b, given, [Rows.of(out, width)], body)


def swiglu(b: Builder, gate: Rows, up: Rows, out: Tensor) -> None:
    """out = bf16(silu(gate)) · up, rounded as the two operators alone would be."""

    def body(rows: At, near: Sequence[At], made: Sequence[At], work: Sequence[int]) -> None:
        wide = At(gate.cols)
        b.emit(
            "VEC", Type.BF16, Type.NONE, Type.BF16, fn=Vec.SILU, a=near[0], out=At(work[0]), rows=rows,
            cols=wide, lda=gate.width, ldo=gate.width,
        )  # fmt: skip
        b.emit(
            "VEC", Type.BF16, Type.BF16, Type.BF16, fn=Vec.MUL, a=At(work[0]), b=near[1], out=made[0],
            rows=rows, cols=wide, lda=gate.width, ldb=up.width, ldo=gate.width,
        )  # fmt: skip

    rows_kernel(b, [gate, up], [Rows.of(out)], body, scratch=[gate.width])


def softmax(b: Builder, x: Tensor, out: Tensor) -> None:
    width = x.shape[-1]

    def body(rows: At, near: Sequence[At], made: Sequence[At], _: Sequence[int]) -> None:
        b.emit(
            "RED", x.type, out.type, fn=Red.SOFTMAX, a=near[0], out=made[0], rows=rows, cols=At(width),
            lda=width * x.type.bytes, ldo=width * out.type.bytes,
        )  # fmt: skip

    rows_kernel(b, [Rows.of(x)], [Rows.of(out)], body)


@dataclass(frozen=True, kw_only=True)
class HeadNorm:
    """RMSNorm over each head, fused before the rotation."""

    gain: Tensor
    eps: float


def rotate(
    b: Builder,
    x: Rows,
    cos: Tensor,
    sin: Tensor,
    out: Rows,
    *,
    heads: int,
    norm: HeadNorm | None = None,
) -> None:
    """Rotate `heads` heads of each row by the row's angles (cos and sin [rows, width])."""
    width = cos.shape[-1]
    given = [x, Rows.of(cos, width), Rows.of(sin, width)]
    if norm is not None:
        given.append(Rows(tensor=norm.gain, rows=1, cols=width, stride=0))

    def body(rows: At, near: Sequence[At], made: Sequence[At], work: Sequence[int]) -> None:
        source = near[0]
        if norm is not None:
            b.emit(
                "RMSNORM", Type.BF16, Type.BF16, a=near[0], gain=near[3], out=At(work[0]),
                rows=many(b, rows, heads), cols=At(width), lda=width * 2, ldo=width * 2, eps=norm.eps,
            )  # fmt: skip
            source = At(work[0])
        b.emit(
            "ROPE", Type.BF16, cos.type, a=source, cos=near[1], sin=near[2], out=made[0], rows=rows,
            heads=At(heads), width=At(width), lda=x.width, ldc=width * cos.type.bytes, ldo=x.width,
        )  # fmt: skip

    rows_kernel(b, given, [out], body, scratch=[x.width] if norm is not None else [])


def join(b: Builder, held: Tensor, out: Tensor, parts: int) -> None:
    """out = the sum of `parts` f32 tensors of its shape, one behind the other in `held`, rounded once."""
    each = held.bytes // parts
    whole = out.bytes // out.type.bytes
    # Columns few enough that every core has some rows, however flat the result.
    width = next(w for w in (1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1) if whole % w == 0)
    count = whole // width
    given = [
        Rows(tensor=held, rows=count, cols=width, stride=width * 4, offset=part * each)
        for part in range(parts)
    ]

    def body(rows: At, near: Sequence[At], made: Sequence[At], _: Sequence[int]) -> None:
        for number, other in enumerate(near[1:], 1):
            last = number == parts - 1
            b.emit(
                "VEC", Type.F32, Type.F32, out.type if last else Type.F32, fn=Vec.ADD, a=near[0], b=other,
                out=made[0] if last else near[0], rows=rows, cols=At(width), lda=width * 4, ldb=width * 4,
                ldo=width * (out.type.bytes if last else 4),
            )  # fmt: skip

    rows_kernel(b, given, [Rows.of(out, width)], body)


def copy(b: Builder, source: Rows, target: Rows) -> None:
    """Rows from one place to another, with a change of type where the tensors differ."""

    def body(rows: At, near: Sequence[At], made: Sequence[At], _: Sequence[int]) -> None:
        b.emit(
            "VEC", source.tensor.type, Type.NONE, target.tensor.type, fn=Vec.COPY, a=near[0], out=made[0],
            rows=rows, cols=At(source.cols), lda=source.width, ldo=target.width,
        )  # fmt: skip

    rows_kernel(b, [source], [target], body)


def embed(b: Builder, ids: Tensor, table: Tensor, out: Tensor) -> None:
    """out[t] = table[ids[t]]; of 64-bit ids the low half is read."""
    tokens, hidden = out.bytes // table.type.bytes // table.shape[-1], table.shape[-1]
    width = hidden * table.type.bytes
    size = max(1, min(-(-tokens // b.ppu.cores), (b.ppu.sram_bytes // 2 - 4096) // (width + 64), 128))
    b.lend("index_free", "load", "load")
    b.lend("free", "store", "load")
    index, near = b.pair(size * 4), b.pair(size * width)
    with b.units(-(-tokens // size)) as unit:
        rows = At(size, b.left(tokens, unit, size))
        b.load(
            Type.I32, b.address(ids, (unit, size * ids.type.bytes)), index.address, rows=rows, cols=1,
            stride=ids.type.bytes, sram_stride=4, wait=["index_free"], signal=["index_full"],
        )  # fmt: skip
        b.gather(
            table.type, At(table.at), near.address, index.address, rows=rows, cols=hidden, stride=width,
            sram_stride=width, wait=["free", "index_full"], signal=["full", "index_free"],
        )  # fmt: skip
        b.store(
            out.type, b.address(out, (unit, size * width)), near.address, rows=rows, cols=hidden,
            stride=width, sram_stride=width, wait=["full"], signal=["free"],
        )  # fmt: skip
        b.swap(index)
        b.swap(near)


def keep(b: Builder, fresh: Tensor, cache: Tensor, start: Tensor) -> None:
    """Write [sequences · tokens, heads · width] into [sequences, heads, room, width] from `start` on."""
    sequences, heads, room, width = cache.shape
    tokens = fresh.shape[0] // sequences
    wide = width * 2
    first = position_register(b, start)
    size = max(1, min(tokens, (b.ppu.sram_bytes // 2 - 4096) // wide, 256))
    chunks = -(-tokens // size)
    b.lend("free", "store", "load")
    near = b.pair(size * wide)
    for tensor, stride in ((fresh, heads * wide), (cache, wide)):
        b.moves(tensor, sequences * heads * tiled(pieces(tokens, size), [wide], stride))
    with b.units(sequences * heads * chunks) as unit:
        chunk, pair = b.alu(Alu.MOD, unit, imm=chunks), b.alu(Alu.DIV, unit, imm=chunks)
        head, sequence = b.alu(Alu.MOD, pair, imm=heads), b.alu(Alu.DIV, pair, imm=heads)
        rows = At(size, b.left(tokens, chunk, size))
        b.load(
            fresh.type,
            b.address(fresh, (sequence, tokens * heads * wide), (chunk, size * heads * wide), (head, wide)),
            near.address, rows=rows, cols=width, stride=heads * wide, sram_stride=wide, wait=["free"],
            signal=["full"],
        )  # fmt: skip
        to = b.address(cache, (pair, room * wide), (chunk, size * wide), (first, wide))
        b.store(
            cache.type, to, near.address, rows=rows, cols=width, stride=wide, sram_stride=wide,
            wait=["full"], signal=["free"],
        )  # fmt: skip
        b.swap(near)


def angles(b: Builder, frequency: Tensor, start: Tensor, count: Tensor, cos: Tensor, sin: Tensor) -> None:
    """cos and sin of (start + count[row]) · frequency, each frequency twice, in f32 and rounded once."""
    half, width = frequency.shape[-1], cos.shape[-1]
    number = cos.shape[0]
    first = Rows(tensor=start, rows=number, cols=1, stride=0)
    given = [
        Rows(tensor=frequency, rows=1, cols=half, stride=0),
        Rows(tensor=count, rows=number, cols=1, stride=count.type.bytes),
        first,
    ]

    def body(rows: At, near: Sequence[At], made: Sequence[At], work: Sequence[int]) -> None:
        place, angle = At(work[0]), At(work[1])
        one = At(1)
        b.emit(
            "VEC", count.type, start.type, Type.I32, fn=Vec.ADD, flags=Operand.ROW, a=near[1], b=near[2],
            out=place, rows=rows, cols=one, lda=count.type.bytes, ldo=4,
        )  # fmt: skip
        b.emit(
            "VEC", frequency.type, Type.NONE, Type.F32, fn=Vec.COPY, a=near[0], out=angle, rows=rows,
            cols=At(half), lda=0, ldo=half * 4,
        )  # fmt: skip
        b.emit(
            "VEC", Type.F32, Type.I32, Type.F32, fn=Vec.MUL, flags=Operand.COLUMN, a=angle, b=place,
            out=angle, rows=rows, cols=At(half), lda=half * 4, ldb=4, ldo=half * 4,
        )  # fmt: skip
        for fn, out in ((Vec.COS, made[0]), (Vec.SIN, made[1])):
            for side in (0, 1):
                b.emit(
                    "VEC", Type.F32, Type.NONE, cos.type, fn=fn, a=angle,
                    out=out + side * half * cos.type.bytes, rows=rows, cols=At(half), lda=half * 4,
                    ldo=width * cos.type.bytes,
                )  # fmt: skip

    rows_kernel(b, given, [Rows.of(cos), Rows.of(sin)], body, scratch=[4, half * 4])


def position_register(b: Builder, position: Tensor, *, symbol: str = "position") -> int:
    """The first number of `position` in a register: where the new tokens begin."""
    near = b.sram(64)
    b.moves(position, b.ppu.cores * LINE)
    b.load(Type.I32, At(position.at), near, rows=1, cols=1, stride=0, sram_stride=0, signal=["position"])
    return b.lds(near, symbol, wait=["position"])


__all__ = [
    "Buffers",
    "HeadNorm",
    "Rows",
    "angles",
    "copy",
    "elementwise",
    "embed",
    "join",
    "keep",
    "many",
    "position_register",
    "rmsnorm",
    "rotate",
    "rows_kernel",
    "softmax",
    "swiglu",
]
