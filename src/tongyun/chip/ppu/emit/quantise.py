"""Rows to few bits: the largest magnitude of a row, or of 128 numbers of it, becomes the largest number."""

from __future__ import annotations

from collections.abc import Sequence

from tongyun.chip.ppu.emit.builder import Builder
from tongyun.chip.ppu.emit.mapper import BLOCK
from tongyun.chip.ppu.emit.rows import Rows, many, rows_kernel
from tongyun.chip.ppu.isa import At, Operand, Red, Type, Vec
from tongyun.chip.ppu.program import Tensor

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
        for fn, imm in ((Vec.MUL, 1 / largest), (Vec.MAX, LEAST)):
            b.emit(
                "VEC", Type.F32, Type.F32, Type.F32, fn=fn, flags=Operand.IMMEDIATE, a=made[1], out=made[1],
                rows=parts, cols=At(1), lda=4, ldo=4, imm=imm,
            )  # fmt: skip
        b.emit(
            "VEC", Type.F32, Type.F32, Type.F32, fn=Vec.RECIPROCAL, a=made[1], out=At(work[0]), rows=parts,
            cols=At(1), lda=4, ldo=4,
        )  # fmt: skip
        b.emit(
            "VEC", kind, Type.F32, out.type, fn=Vec.MUL, flags=Operand.COLUMN, a=source, b=At(work[0]),
            out=made[0], rows=parts, cols=At(width), lda=width * kind.bytes, ldb=4,
            ldo=width * out.type.bytes,
        )  # fmt: skip

    scratch = [blocks * 4] if gain is None else [blocks * 4, x.width]
    rows_kernel(b, given, [Rows.of(out, x.cols), Rows.of(scale, blocks)], body, scratch=scratch)
