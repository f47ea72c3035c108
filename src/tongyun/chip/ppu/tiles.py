"""What each tile instruction computes, on one core's memories.

Products are exact and sums f32; a result is rounded once, to the type of its output. Knows no control
flow, no order and no time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from tongyun.chip.ppu.isa import Epilogue, Flag, Operand, Red, Type, Vec

TORCH = {
    Type.F32: torch.float32,
    Type.BF16: torch.bfloat16,
    Type.FP8: torch.float8_e4m3fn,
    Type.INT8: torch.int8,
    Type.I32: torch.int32,
    Type.I64: torch.int64,
}


class Tiles(Protocol):
    """One instruction's operands, resolved against registers and memories."""

    fn: int
    flags: int
    types: tuple[Type, ...]

    def number(self, name: str) -> int: ...

    def real(self, name: str) -> float: ...

    def room(self, name: str) -> int:
        """The immediate of a count: what the program allotted."""
        ...

    def read(self, name: str, shape: tuple[int, int], stride: int, type: Type) -> torch.Tensor:
        """A tile of SRAM as a view; `stride` is in bytes."""
        ...

    def write(self, name: str, shape: tuple[int, int], stride: int, type: Type) -> torch.Tensor: ...


Act = Callable[[Tiles], int]
"""Does the work and returns the FLOPs of products."""


def mma(on: Tiles) -> int:
    m, n, k = on.number("m"), on.number("n"), on.number("k")
    if not (m and n and k):
        return 0
    a = on.read("a", (m, k), on.number("lda"), on.types[0])
    accumulate = bool(on.flags & Flag.ACCUMULATE)
    wide = a.float()
    if on.flags & Flag.NORM:
        stats = on.write("stats", (m, 1), 4, Type.F32)
        squares = wide.square().sum(1, keepdim=True)
        stats.copy_(stats + squares if accumulate else squares)
        gain = on.read("gain", (1, k), 0, on.types[0])
        wide = (wide * gain.float()).to(TORCH[on.types[0]]).float()
    if on.flags & Flag.TRANSPOSED:
        b = on.read("b", (n, k), on.number("ldb"), on.types[1]).float().T
    else:
        b = on.read("b", (k, n), on.number("ldb"), on.types[1]).float()
    if on.types[0] == on.types[1] == Type.INT8:
        # Sums of doubles are exact where those of f32 are not.
        made, kind = (wide.double() @ b.double()).int(), Type.I32
    else:
        made, kind = wide @ b, Type.F32
    if on.flags & Flag.SCALED:
        left, right = (
            on.read("left", (m, 1), on.number("ldl"), Type.F32),
            on.read("right", (1, 1), 0, Type.F32),
        )
        made = made * (left * right)
    c = on.write("c", (m, n), on.number("ldc"), kind)
    if accumulate:
        c += made
    else:
        c.copy_(made)
    return 2 * m * n * k


def drain(on: Tiles) -> int:
    m, n = on.number("m"), on.number("n")
    if not (m and n):
        return 0
    fn, ldc = Epilogue(on.fn), on.number("ldc")
    kind = on.types[2] if len(on.types) > 2 and on.types[2] else Type.F32
    y = on.read("c", (m, n), ldc, kind).float()
    other = on.read("gate", (m, n), ldc, kind).float() if fn & Epilogue.GATE else None
    if fn & Epilogue.ROWS:
        rows = on.read("stats", (m, 1), 4, Type.F32)
        y, other = y * rows, other if other is None else other * rows
    if fn & Epilogue.COLUMNS:
        columns = on.read("columns", (1 if other is None else 2, n), ldc, Type.F32)
        y, other = y * columns[:1], other if other is None else other * columns[1:]
    if fn & Epilogue.SCALE:
        stats = on.read("stats", (m, 1), 4, Type.F32)
        scale = torch.rsqrt(stats / on.number("width") + on.real("eps"))
        y = y * scale
    if other is not None:
        other = other * scale if fn & Epilogue.SCALE else other
        y = torch.nn.functional.silu(y) * other
    if fn & Epilogue.BIAS:
        y = y + on.read("gate", (1, n), 0, on.types[1]).float()
    if fn & Epilogue.WEIGHT:
        y = y * on.read("weight", (m, 1), 4, Type.F32)
    if fn & Epilogue.RESIDUAL:
        y = y.to(TORCH[on.types[0]]).float()
        y = y + on.read("residual", (m, n), on.number("ldr"), on.types[1]).float()
    on.write("out", (m, n), on.number("ldo"), on.types[0]).copy_(y)
    return 0


def _state(on: Tiles, name: str, verb: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Accumulator [m, width], maxima and sums [m, 1] of an attention state."""
    rows, width, m = on.room("m"), on.number("width"), on.number("m")
    whole = getattr(on, verb)(name, (1, rows * (width + 2)), 0, Type.F32)[0]
    acc = whole[: rows * width].view(rows, width)
    top = whole[rows * width : rows * (width + 1)].view(rows, 1)
    return acc[:m], top[:m], whole[rows * (width + 1) :].view(rows, 1)[:m]


def attn(on: Tiles) -> int:
    m, n, width = on.number("m"), on.number("n"), on.number("width")
    if not (m and n):
        return 0
    q = on.read("q", (m, width), on.number("ldq"), on.types[0]).float()
    k = on.read("k", (n, width), on.number("ldk"), on.types[1]).float()
    v = on.read("v", (n, width), on.number("ldv"), on.types[1]).float()
    acc, top, total = _state(on, "state", "write")
    scores = (q @ k.T) * on.real("scale")
    pairs = m * n
    if on.flags & Flag.CAUSAL:
        rows = on.number("query") + torch.arange(m)[:, None] // max(on.number("group"), 1)
        hidden = on.number("key") + torch.arange(n)[None, :] > rows
        scores = scores.masked_fill(hidden, -torch.inf)
        pairs -= int(hidden.sum())
    best = torch.maximum(top, scores.amax(1, keepdim=True))
    floor = torch.where(best == -torch.inf, 0.0, best)
    p = torch.exp(scores - floor)
    fade = torch.exp(top - floor)
    total.copy_(total * fade + p.sum(1, keepdim=True))
    acc.copy_(acc * fade + p.to(TORCH[on.types[1]]).float() @ v)
    top.copy_(best)
    return 4 * pairs * width


def attn_init(on: Tiles) -> int:
    acc, top, total = _state(on, "state", "write")
    acc.zero_()
    total.zero_()
    top.fill_(-torch.inf)
    return 0


def attn_end(on: Tiles) -> int:
    acc, _, total = _state(on, "state", "read")
    out = on.write("out", (on.number("m"), on.number("width")), on.number("ldo"), on.types[0])
    out.copy_(acc / total)
    return 0


def attn_merge(on: Tiles) -> int:
    acc, top, total = _state(on, "state", "write")
    acc2, top2, total2 = _state(on, "other", "read")
    best = torch.maximum(top, top2)
    floor = torch.where(best == -torch.inf, 0.0, best)
    mine, other = torch.exp(top - floor), torch.exp(top2 - floor)
    acc.copy_(acc * mine + acc2 * other)
    total.copy_(total * mine + total2 * other)
    top.copy_(best)
    return 0


_UNARY: Mapping[int, Callable[[torch.Tensor], torch.Tensor]] = {
    Vec.COPY: lambda a: a,
    Vec.NEG: torch.neg,
    Vec.SQUARE: torch.square,
    Vec.RSQRT: torch.rsqrt,
    Vec.EXP: torch.exp,
    Vec.SILU: torch.nn.functional.silu,
    Vec.SIN: torch.sin,
    Vec.COS: torch.cos,
    Vec.SIGMOID: torch.sigmoid,
    Vec.RECIPROCAL: torch.reciprocal,
}
_BINARY: Mapping[int, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    Vec.ADD: torch.add,
    Vec.SUB: torch.sub,
    Vec.MUL: torch.mul,
    Vec.DIV: torch.div,
    Vec.MAX: torch.maximum,
    Vec.MIN: torch.minimum,
    Vec.LESS: torch.less,
}


def vec(on: Tiles) -> int:
    rows, cols = on.number("rows"), on.number("cols")
    if not (rows and cols):
        return 0
    whole = on.types[0] in {Type.I32, Type.I64} and on.types[2] in {Type.I32, Type.I64}
    kind = torch.int64 if whole else torch.float32
    y = on.read("a", (rows, cols), on.number("lda"), on.types[0]).to(kind)
    if on.fn in _UNARY:
        y = _UNARY[on.fn](y)
    else:
        shape = {Operand.TILE: (rows, cols), Operand.ROW: (1, cols), Operand.COLUMN: (rows, 1)}
        if on.flags == Operand.IMMEDIATE:
            b = torch.tensor(on.real("imm")).to(kind)
        else:
            b = on.read("b", shape[Operand(on.flags)], on.number("ldb"), on.types[1]).to(kind)
        y = _BINARY[on.fn](y, b)
    on.write("out", (rows, cols), on.number("ldo"), on.types[2]).copy_(_held(y, on.types[2]))
    return 0


def _held(y: torch.Tensor, kind: Type) -> torch.Tensor:
    """Numbers that a type of few bits holds: of int8 whole ones, ties to even."""
    if kind == Type.FP8:
        return y.clamp(-448, 448)
    return y.round().clamp(-128, 127) if kind == Type.INT8 else y


def red(on: Tiles) -> int:
    rows, cols = on.number("rows"), on.number("cols")
    if not (rows and cols):
        return 0
    a = on.read("a", (rows, cols), on.number("lda"), on.types[0]).float()
    if on.fn == Red.SOFTMAX:
        on.write("out", (rows, cols), on.number("ldo"), on.types[1]).copy_(torch.softmax(a, 1))
        return 0
    if on.fn in {Red.MAX, Red.LARGEST}:
        found = (a if on.fn == Red.MAX else a.abs()).amax(1, keepdim=True)
    else:
        found = (a if on.fn == Red.SUM else a.square()).sum(1, keepdim=True)
    on.write("out", (rows, 1), on.number("ldo"), on.types[1]).copy_(found)
    return 0


def rmsnorm(on: Tiles) -> int:
    rows, cols = on.number("rows"), on.number("cols")
    if rows and cols:
        a = on.read("a", (rows, cols), on.number("lda"), on.types[0]).float()
        gain = on.read("gain", (1, cols), 0, on.types[0]).float()
        y = a * torch.rsqrt(a.square().mean(1, keepdim=True) + on.real("eps"))
        on.write("out", (rows, cols), on.number("ldo"), on.types[1]).copy_(y * gain)
    return 0


def rope(on: Tiles) -> int:
    rows, heads, width = on.number("rows"), on.number("heads"), on.number("width")
    if not (rows and heads):
        return 0
    x = on.read("a", (rows, heads * width), on.number("lda"), on.types[0]).float().reshape(rows, heads, width)
    cos = on.read("cos", (rows, width), on.number("ldc"), on.types[1]).float()[:, None]
    sin = on.read("sin", (rows, width), on.number("ldc"), on.types[1]).float()[:, None]
    left, right = x.chunk(2, -1)
    y = x * cos + torch.cat((-right, left), -1) * sin
    on.write("out", (rows, heads * width), on.number("ldo"), on.types[0]).copy_(y.reshape(rows, -1))
    return 0


def topk(on: Tiles) -> int:
    rows, cols, top = on.number("rows"), on.number("cols"), on.number("top")
    if rows and cols and top:
        a = on.read("a", (rows, cols), on.number("lda"), on.types[0]).float()
        value, index = torch.sort(a, dim=1, descending=True, stable=True)
        on.write("value", (rows, top), on.number("ldo"), Type.F32).copy_(value[:, :top])
        on.write("index", (rows, top), on.number("ldo"), Type.I32).copy_(index[:, :top])
    return 0


def sort(on: Tiles) -> int:
    count, segments = on.number("count"), on.number("segments")
    key = on.read("key", (1, count), 0, Type.I32)[0].long()
    order = torch.argsort(key, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(count)
    on.write("order", (1, 2 * count), 0, Type.I32).copy_(torch.cat((order, inverse))[None])
    starts = torch.cat((torch.zeros(1), torch.bincount(key, minlength=segments).cumsum(0)))
    on.write("offset", (1, segments + 1), 0, Type.I32).copy_(starts[None])
    return 0


ACTS: Mapping[str, Act] = {
    "MMA": mma,
    "DRAIN": drain,
    "ATTN": attn,
    "ATTN_INIT": attn_init,
    "ATTN_END": attn_end,
    "ATTN_MERGE": attn_merge,
    "VEC": vec,
    "RED": red,
    "RMSNORM": rmsnorm,
    "ROPE": rope,
    "TOPK": topk,
    "SORT": sort,
}
