"""Kernels by their sizes alone: each the very words that the compiler writes for such an operator.

A `Piece` is a kind of kernel and its sizes. `written` makes it a program of its own, with the compiler's
emitters, so that what the planner prices and what the simulator runs are one. Knows no graph and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from tongyun.chip.ppu.emit import attention as attend
from tongyun.chip.ppu.emit import experts, rows
from tongyun.chip.ppu.emit.builder import Builder
from tongyun.chip.ppu.emit.matmul import matmul
from tongyun.chip.ppu.isa import At, Type, Vec
from tongyun.chip.ppu.program import Program, Tensor
from tongyun.specs.ppu import Ppu

Symbols = dict[str, ArrayLike]
_ANY_ROOM = 1 << 50
"""Bytes of HBM: whether a deployment fits is for who knows all of it."""


@dataclass(frozen=True)
class Piece:
    """One kernel; `sizes` as the writer of its kind names them."""

    kind: str
    sizes: tuple[int, ...]

    @property
    def key(self) -> str:
        return " ".join([self.kind, *map(str, self.sizes)])


def written(piece: Piece, ppu: Ppu) -> tuple[Program, Symbols]:
    """The program of one kernel, and the numbers it reads: experts' rows as balanced."""
    b = Builder(replace(ppu, hbm_bytes=_ANY_ROOM))
    with b.kernel(piece.kind, piece.key):
        symbols = KINDS[piece.kind](b, *piece.sizes)
    return b.program(), symbols


def _place(b: Builder, name: str, *shape: int, type: Type = Type.BF16, role: str = "input") -> Tensor:
    return b.layout.place(name, shape, type, role)


def _product(b: Builder, m: int, n: int, k: int, norm: int, gate: int, residual: int, bias: int) -> Symbols:
    matmul(
        b, _place(b, "a", m, k), _place(b, "w", n, k), _place(b, "out", m, n, role="output"),
        up=_place(b, "up", n, k) if gate else None, gain=_place(b, "gain", k) if norm else None,
        eps=1e-6 if norm else 0.0,
        residual=_place(b, "residual", m, n) if residual else None,
        bias=_place(b, "bias", n) if bias else None,
    )  # fmt: skip
    return {}


def _norm(b: Builder, count: int, width: int) -> Symbols:
    x, gain = _place(b, "x", count, width), _place(b, "gain", width)
    rows.rmsnorm(b, rows.Rows.of(x), gain, rows.Rows.of(_place(b, "out", count, width)), 1e-6)
    return {}


def _embed(b: Builder, tokens: int, hidden: int, vocabulary: int) -> Symbols:
    ids = _place(b, "ids", tokens, type=Type.I64)
    rows.embed(b, ids, _place(b, "table", vocabulary, hidden), _place(b, "out", tokens, hidden))
    return {}


def _angles(b: Builder, tokens: int, width: int) -> Symbols:
    frequency = _place(b, "frequency", width // 2, type=Type.F32)
    start, count = _place(b, "start", 1, type=Type.I64), _place(b, "count", tokens, type=Type.I32)
    cos, sin = (_place(b, name, tokens, width) for name in ("cos", "sin"))
    rows.angles(b, frequency, start, count, cos, sin)
    return {}


def _advance(b: Builder, tokens: int) -> Symbols:
    """How long the cache is now."""
    given, out = (_place(b, name, 1, type=Type.I64) for name in ("given", "out"))
    rows.elementwise(b, Vec.ADD, given, out, imm=float(tokens))
    return {}


def _rotate(b: Builder, tokens: int, heads: int, width: int, norm: int) -> Symbols:
    x, out = (_place(b, name, tokens, heads * width) for name in ("x", "out"))
    cos, sin = (_place(b, name, tokens, width) for name in ("cos", "sin"))
    gain = rows.HeadNorm(gain=_place(b, "gain", width), eps=1e-6) if norm else None
    rows.rotate(b, rows.Rows.of(x), cos, sin, rows.Rows.of(out), heads=heads, norm=gain)
    return {}


def _keep(b: Builder, sequences: int, tokens: int, heads: int, width: int, room: int, at: int) -> Symbols:
    fresh = _place(b, "fresh", sequences * tokens, heads * width)
    cache = _place(b, "cache", sequences, heads, room, width, role="state")
    rows.keep(b, fresh, cache, _place(b, "position", 1, type=Type.I64))
    return {"position": [at]}


def _attention(
    b: Builder, sequences: int, tokens: int, heads: int, kv_heads: int, width: int, room: int, at: int
) -> Symbols:  # fmt: skip
    shape = attend.Attention(
        sequences=sequences, tokens=tokens, heads=heads, kv_heads=kv_heads, width=width, room=room,
        scale=width**-0.5, query_stride=heads * width * 2,
    )  # fmt: skip
    q, out = (_place(b, name, sequences * tokens, heads * width) for name in ("q", "out"))
    cache = [_place(b, name, sequences, kv_heads, room, width, role="state") for name in ("keys", "values")]
    attend.attention(b, shape, q, cache[0], cache[1], out, _place(b, "position", 1, type=Type.I64))
    return {"position": [at]}


def _choose(b: Builder, tokens: int, count: int, top: int) -> Symbols:
    logits, share = _place(b, "logits", tokens, count), _place(b, "share", tokens, top)
    chosen = _place(b, "expert", tokens * top, type=Type.I32)
    experts.choose(b, logits, share, chosen, top=top, renormalise=True)
    return {}


def _dispatch(b: Builder, pairs: int, count: int) -> Symbols:
    chosen, owner, token, place = (
        _place(b, name, pairs, type=Type.I32) for name in ("expert", "owner", "token", "place")
    )
    offset = _place(b, "offset", count + 1, type=Type.I32)
    experts.dispatch(b, chosen, owner, token, place, offset, experts=count)
    return {}


def _up(b: Builder, tokens: int, top: int, count: int, hidden: int, inner: int) -> Symbols:
    pairs = tokens * top
    experts.grouped(
        b, _place(b, "x", tokens, hidden), _place(b, "up", count, 2 * inner, hidden),
        _place(b, "act", pairs, inner), _place(b, "offset", count + 1, type=Type.I32),
        token=_place(b, "token", pairs, type=Type.I32), gate=True,
    )  # fmt: skip
    return _balanced(pairs, count)


def _down(b: Builder, pairs: int, count: int, inner: int, hidden: int) -> Symbols:
    experts.grouped(
        b, _place(b, "act", pairs, inner), _place(b, "down", count, hidden, inner),
        _place(b, "each", pairs, hidden), _place(b, "offset", count + 1, type=Type.I32),
    )  # fmt: skip
    return _balanced(pairs, count)


def _combine(b: Builder, tokens: int, top: int, hidden: int, residual: int) -> Symbols:
    each, out = _place(b, "each", tokens * top, hidden), _place(b, "out", tokens, hidden)
    share, place = _place(b, "share", tokens, top), _place(b, "place", tokens * top, type=Type.I32)
    beside = _place(b, "residual", tokens, hidden) if residual else None
    experts.combine(b, each, share, place, out, top=top, residual=beside)
    return {}


def _balanced(pairs: int, count: int) -> Symbols:
    return {"expert_offset": np.arange(count + 1) * pairs // count}


def _reduce(b: Builder, size: int, ranks: int, residual: int) -> Symbols:
    part, out, other = (_place(b, name, size // 2) for name in ("part", "out", "residual"))
    b.emit(
        "ALL_REDUCE", part.type, source=At(part.at), target=At(out.at), bytes=part.bytes, ranks=ranks,
        addend=At(other.at) if residual else At(),
    )  # fmt: skip
    return {}


KINDS: Mapping[str, Callable[..., Symbols]] = {
    "product": _product,
    "rmsnorm": _norm,
    "embed": _embed,
    "angles": _angles,
    "advance": _advance,
    "rotate": _rotate,
    "keep": _keep,
    "attention": _attention,
    "choose": _choose,
    "dispatch": _dispatch,
    "experts_up": _up,
    "experts_down": _down,
    "combine": _combine,
    "all_reduce": _reduce,
}
