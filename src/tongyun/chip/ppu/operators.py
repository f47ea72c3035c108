"""Which kernels the compiler makes of an operator of the planner, and their analytic price.

`Programs` prices an operator as the lowered kernels that do its work, each as a program of its own: norms
and activations within the products that take them in, attention with the writing of its keys. Each size is
priced once and kept on disk. Sizes are those that programs are compiled for: every one up to 32, then
sixteen an octave; a load between two runs in the larger. What has no lowered form is None: few bits,
windows, latent attention, whole experts on a rank, sampling, collectives but sums.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tongyun.chip.ppu.pieces import Piece
from tongyun.chip.ppu.prices import Prices
from tongyun.errors import Infeasible
from tongyun.model.graph import Kind, Operator
from tongyun.specs.ppu import Ppu
from tongyun.units import DType, Number

Load = tuple[int, ...]
Pieces = tuple[Piece, ...]
FINE = 16
"""Sizes of programs in an octave."""
_PAGE = 64
"""Positions by which a cache grows."""


class Programs:
    """The lowered kernels of one chip, priced as asked for."""

    def __init__(self, ppu: Ppu) -> None:
        self.ppu = ppu
        self._prices = Prices(ppu)

    def parts_s(self, op: Operator) -> tuple[Number, float] | None:
        """Seconds of one execution, as its work and the start of its kernels; None where it has none."""
        form = form_of(op)
        if form is None:
            return None
        counts, pieces_of = form
        shape = np.broadcast_shapes(*(np.shape(count) for count in counts))
        table = np.stack([np.broadcast_to(filled(count), shape).ravel() for count in counts], axis=1)
        loads, places = np.unique(table, axis=0, return_inverse=True)
        try:
            sets = [pieces_of(tuple(int(size) for size in load)) for load in loads]
            found = np.array([sum(self._prices.seconds(piece) for piece in each) for each in sets])
        except Infeasible:
            # No program of that size: a kernel's numbers do not fit its SRAM.
            return None
        self._prices.keep()
        start_s = len(sets[0]) * self.ppu.barrier_s if sets else 0.0
        work = (found - start_s)[places.ravel()].reshape(shape)
        return (float(work) if shape == () else work), start_s

    def close(self) -> None:
        """Keep what was priced for the next run."""
        self._prices.close()


def filled(count: Number) -> NDArray[np.int64]:
    """The least size that programs are made for and that holds `count`."""
    size = np.maximum(np.ceil(np.asarray(count, dtype=np.float64) - 1e-6), 1.0)
    step = np.maximum(2.0 ** (np.floor(np.log2(size)) - np.log2(FINE)), 1.0)
    return np.asarray(np.ceil(size / step) * step, dtype=np.int64)


def form_of(  # noqa: PLR0911 - a form a kind
    op: Operator,
) -> tuple[tuple[Number, ...], Callable[[Load], Pieces]] | None:
    """What of the operator varies with the load, and its kernels at one load."""
    if op.compute is not DType.BF16 or op.stored is not DType.BF16 or op.block_scales:
        return None
    if op.routed is not None:
        return _routed(op)
    if op.attends is not None:
        return _attends(op)
    if op.kind is Kind.MATMUL:
        return (op.m,), lambda load: _products(op, load[0])
    if op.kind is Kind.NORM:
        if op.is_normed:
            return (op.m,), lambda _: ()
        return (op.m,), lambda load: (Piece("rmsnorm", (load[0], op.n)),)
    if op.kind is Kind.EMBED and op.n:
        rows = round(float(np.max(op.resident_bytes)) / op.n / op.stored.bytes)
        return (op.m,), lambda load: _entry(op, load[0], rows)
    if op.name == "rotate" and op.joins:
        return (op.m,), lambda load: _rotations(op, load[0])
    if op.kind is Kind.ELEMENTWISE and op.name.endswith("_activation"):
        return (op.m,), lambda _: ()
    if op.kind is Kind.ALL_REDUCE and op.is_summed:
        return (op.payload_bytes,), lambda load: (Piece("all_reduce", (load[0] // 2 * 2, op.ranks, 1)),)
    return None


def _products(op: Operator, rows: int) -> Pieces:
    weights = op.resident_bytes / op.repeat if op.repeat else 0.0
    bias = int(float(np.max(weights)) > op.n * op.k * op.stored.bytes)
    ends = int(op.is_normed), int(op.is_summed), bias
    if op.is_gated:
        return (_product(rows, op.n // 2, op.k, ends, gate=1),)
    return tuple(_product(rows, columns, op.k, ends) for columns in op.joins or (op.n,))


def _product(rows: int, columns: int, inner: int, ends: Load, gate: int = 0) -> Piece:
    norm, residual, bias = ends
    return Piece("product", (rows, columns, inner, norm, gate, residual, bias))


def _entry(op: Operator, tokens: int, rows: int) -> Pieces:
    return (Piece("embed", (tokens, op.n, rows)),)


def _rotations(op: Operator, tokens: int) -> Pieces:
    """Queries and keys, their norms within. The step's angles, one small kernel, are in no operator."""
    norm = int(float(np.max(op.weight_bytes)) > 0)
    queries, keys = (columns // op.k for columns in op.joins[:2])
    turns = (Piece("rotate", (tokens, heads, op.k, norm)) for heads in (queries, keys))
    return (*turns, Piece("advance", (tokens,)))


def _attends(op: Operator) -> tuple[tuple[Number, ...], Callable[[Load], Pieces]] | None:
    from tongyun.chip.kernels import even

    attends = op.attends
    assert attends is not None
    plain = attends.width == attends.value_width and attends.cached_width == 2 * attends.width
    if not plain or attends.is_latent or attends.window is not None or attends.cache is not DType.BF16:
        return None
    count, new, context = even(attends)
    sequences: Number = np.maximum(np.round(np.asarray(count, dtype=np.float64)), 1.0)
    tokens: Number = np.asarray(count, dtype=np.float64) * np.asarray(new) / sequences
    heads, keys, width = op.n, attends.key_heads, attends.width

    def pieces(load: Load) -> Pieces:
        # The least size stands for an empty cache as well.
        many, fresh, behind = load[0], load[1], load[2] if load[2] > 1 else 0
        room = -(-(fresh + behind) // _PAGE) * _PAGE
        keep = Piece("keep", (many, fresh, keys, width, room, behind))
        return keep, keep, Piece("attention", (many, fresh, heads, keys, width, room, behind))

    return (sequences, tokens, context), pieces


def _routed(op: Operator) -> tuple[tuple[Number, ...], Callable[[Load], Pieces]] | None:
    routed = op.routed
    assert routed is not None
    whole = routed.local == routed.count and not routed.picks and routed.compute is DType.BF16
    if not whole or np.any(np.asarray(routed.mine) != np.asarray(routed.tokens)):
        return None
    count, top, hidden, inner = routed.count, routed.per_token, routed.hidden, routed.inner
    if op.kind is not Kind.GROUPED_MATMUL:
        return (routed.tokens,), lambda _: ()
    if op.k == inner and op.n == hidden:

        def down(load: Load) -> Pieces:
            pairs = load[0] * top
            sums = Piece("combine", (load[0], top, hidden, int(op.is_summed)))
            return Piece("experts_down", (pairs, count, inner, hidden)), sums

        return (routed.tokens,), down

    def up(load: Load) -> Pieces:
        choice = Piece("choose", (load[0], count, top)), Piece("dispatch", (load[0] * top, count))
        return *choice, Piece("experts_up", (load[0], top, count, hidden, inner))

    return (routed.tokens,), up
