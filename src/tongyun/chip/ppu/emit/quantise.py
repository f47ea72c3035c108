"""Rows to few bits: the largest magnitude of a row, or of 128 numbers of it, becomes the largest number."""

from __future__ import annotations

from collections.abc import Sequence

from tongyun.chip.ppu.emit.builder import Builder
from tongyun.chip.ppu.emit.mapper import BLOCK
from tongyun.chip.ppu.emit.rows import Rows, many, rows_kernel
from tongyun.chip.ppu.isa import At, Operand, Red, Type, Vec
from tongyun.chip.ppu.program import Tensor
from tongyun.chip.ppu.traffic import pieces, tiled

LARGEST = {Type.FP8: 448.0, Type.INT8: 127.0}
"""The largest number of a type that a row is scaled to: of e4m3, and of int8 without −128."""
LEAST = 1e-12
"""The scale of a row of zeros."""


def quantise(
    b: Builder, x: Rows, out: Tensor, scale: Tensor, *, gain: Tensor | None = None, eps: float = 0.0
) -> None:
    """out = x / scale in its type, scale = max |x| / largest in f32: by row, or blocks if `scale` has more.

    With `gain` the rows go through RMSNorm first, rounded as it alone would round them.
    """
    kind, largest = x.tensor.type, LARGEST[out.type]
    blocks = scale.bytes // 4 // x.rows
    width = BLOCK if blocks > 1 else x.cols
    if blocks * width != x.cols:
        raise ValueError(f"{scale.shape} are no scales of rows of {x.cols}")
    given = [x] if gain is None else [x, Rows(tensor=gain, rows=1, cols=x.cols, stride=0)]

    def body(rows: At, near: Sequence[At], made: Sequence[At], work: Sequence[int]) -> None:
        source, parts = near[0], many(b, rows, blocks)
        if gain is not None:
            source = At(work[1])
            b.emit(
                "RMSNORM", kind, kind, a=near[0], gain=near[1], out=source, rows=rows, cols=At(x.cols),
                lda=x.width, ldo=x.width, eps=eps,
            )  # fmt: skip
        b.emit(
            "RED", kind, Type.F32, fn=Red.LARGEST, a=source, out=made[1], rows=parts, cols=At(width),
            lda=width * kind.bytes, ldo=4,
        )  # fmt: skip
        _scale(b, made[1], At(work[0]), parts, largest)
        b.emit(
            "VEC", kind, Type.F32, out.type, fn=Vec.MUL, flags=Operand.COLUMN, a=source, b=At(work[0]),
            out=made[0], rows=parts, cols=At(width), lda=width * kind.bytes, ldb=4,
            ldo=width * out.type.bytes,
        )  # fmt: skip

    scratch = [blocks * 4] if gain is None else [blocks * 4, x.width]
    rows_kernel(b, given, [Rows.of(out, x.cols), Rows.of(scale, blocks)], body, scratch=scratch)


def quantise_again(b: Builder, x: Rows, out: Tensor, scale: Tensor, *, at_once: int) -> None:
    """As `quantise` by row, for rows too long to stay in SRAM: read once for their scale and once more.

    A core goes through `at_once` rows at a time.
    """
    kind, size = x.tensor.type, max(1, min(at_once, -(-x.rows // b.ppu.cores)))
    held, wide = kind.bytes, out.type.bytes
    room = (b.ppu.sram_bytes // 2 - 4096 - 64 * size) // (size * (held + wide)) // 64 * 64
    width = min(x.cols, room)
    b.lend("in_free", "vector", "load")
    b.lend("out_free", "store", "vector")
    b.lend("scale_free", "store", "vector", 1)
    near, made = b.pair(size * width * held), b.pair(size * width * wide)
    top, part, turned = (b.sram(size * 4) for _ in range(3))
    rows, across = pieces(x.rows, size), pieces(x.cols, width)
    b.moves(x.tensor, 2 * tiled(rows, [each * held for each in across], x.stride))
    b.moves(out, tiled(rows, [each * wide for each in across], x.cols * wide))
    b.moves(scale, tiled(rows, [4], 4))

    def load(far: At, count: At, cols: At) -> None:
        b.load(
            kind, far, near.address, rows=count, cols=cols, stride=x.stride, sram_stride=width * held,
            wait=["in_free"], signal=["in_full"],
        )  # fmt: skip

    with b.units(len(rows)) as unit:
        count = At(size, b.left(x.rows, unit, size))
        far, left = b.address(x.tensor, (unit, size * x.stride), offset=x.offset), b.register(x.cols)
        for first, times in ((True, 1), (False, len(across) - 1)):
            with b.loop(times, ((left, -width), (far.reg, width * held))):
                load(far, count, At(width, left))
                b.emit(
                    "RED", kind, Type.F32, fn=Red.LARGEST, a=near.address, out=At(top if first else part),
                    rows=count, cols=At(width, left), lda=width * held, ldo=4,
                    wait=["in_full", "scale_free"] if first else ["in_full"], signal=["in_free"],
                )  # fmt: skip
                if not first:
                    b.emit(
                        "VEC", Type.F32, Type.F32, Type.F32, fn=Vec.MAX, flags=Operand.TILE, a=At(top),
                        b=At(part), out=At(top), rows=count, cols=At(1), lda=4, ldb=4, ldo=4,
                    )  # fmt: skip
                b.swap(near)
            if len(across) == 1:
                break
        _scale(b, At(top), At(turned), count, LARGEST[out.type])
        b.sync("vector", signal=["scale_full"])
        b.store(
            Type.F32, b.address(scale, (unit, size * 4)), At(top), rows=count, cols=1, stride=4,
            sram_stride=4, wait=["scale_full"], signal=["scale_free"],
        )  # fmt: skip
        far, left = b.address(x.tensor, (unit, size * x.stride), offset=x.offset), b.register(x.cols)
        to = b.address(out, (unit, size * x.cols * wide))
        with b.loop(len(across), ((left, -width), (far.reg, width * held), (to.reg, width * wide))):
            load(far, count, At(width, left))
            b.emit(
                "VEC", kind, Type.F32, out.type, fn=Vec.MUL, flags=Operand.COLUMN, a=near.address,
                b=At(turned), out=made.address, rows=count, cols=At(width, left), lda=width * held, ldb=4,
                ldo=width * wide, wait=["in_full", "out_free"], signal=["in_free", "out_full"],
            )  # fmt: skip
            b.store(
                out.type, to, made.address, rows=count, cols=At(width, left), stride=x.cols * wide,
                sram_stride=width * wide, wait=["out_full"], signal=["out_free"],
            )  # fmt: skip
            b.swap(near)
            b.swap(made)


def _scale(b: Builder, top: At, turned: At, rows: At, largest: float) -> None:
    """Of largest magnitudes their scales, in place, and one over them."""
    for fn, imm in ((Vec.MUL, 1 / largest), (Vec.MAX, LEAST)):
        b.emit(
            "VEC", Type.F32, Type.F32, Type.F32, fn=fn, flags=Operand.IMMEDIATE, a=top, out=top, rows=rows,
            cols=At(1), lda=4, ldo=4, imm=imm,
        )  # fmt: skip
    b.emit(
        "VEC", Type.F32, Type.F32, Type.F32, fn=Vec.RECIPROCAL, a=top, out=turned, rows=rows, cols=At(1),
        lda=4, ldo=4,
    )  # fmt: skip
