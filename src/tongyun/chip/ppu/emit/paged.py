"""Attention over a paged key-value cache: pieces of many sequences, each behind its own context.

Keys and values lie in blocks, [blocks, kv_heads, block tokens, width]; a table names each piece's blocks.
The control reads the table and asks for one block at a time, so that a block which two sequences share is
read from HBM once. How many rows a piece has is read from memory too: one program serves every batch
of its size.
"""

from __future__ import annotations

from dataclasses import dataclass

from tongyun.chip.ppu.emit.builder import Builder
from tongyun.chip.ppu.emit.rows import Rows
from tongyun.chip.ppu.isa import Alu, At, Flag, Type
from tongyun.chip.ppu.program import Tensor


@dataclass(frozen=True, kw_only=True)
class Pages:
    """Where the pieces of a step lie; i32 but for the slots, of which the low half is read."""

    slots: Tensor
    """[tokens]: block · block tokens + place within it."""
    rows: Tensor
    """[pieces + 1]: first row of each piece, and the end of the last."""
    starts: Tensor
    """[pieces]: tokens in the cache before the piece."""
    blocks: Tensor
    """[pieces, most blocks of a piece]."""


def store(b: Builder, fresh: tuple[Rows, Rows], caches: tuple[Tensor, Tensor], slots: Tensor) -> None:
    """Write keys and values, rows of [kv_heads · width], into the slots of their tokens."""
    _, heads, page, width = caches[0].shape
    tokens, wide = fresh[0].rows, width * 2
    row = heads * wide
    size = max(1, min(-(-tokens // b.ppu.cores), (b.ppu.sram_bytes - 4096) // (4 * row + 16), 64))
    b.lend("free", "store", "load")
    index, near = b.pair(size * 4), [b.pair(size * row) for _ in fresh]
    with b.units(-(-tokens // size)) as unit:
        rows = At(size, b.left(tokens, unit, size))
        for item, to in zip(fresh, near, strict=True):
            gone = b.alu(Alu.MUL, unit, imm=size * item.stride)
            b.load(
                item.tensor.type, At(item.tensor.at + item.offset, gone), to.address, rows=rows,
                cols=item.cols, stride=item.stride, sram_stride=row, wait=["free"] if to is near[0] else [],
            )  # fmt: skip
        b.load(
            Type.I32, b.address(slots, (unit, size * slots.type.bytes)), index.address, rows=rows, cols=1,
            stride=slots.type.bytes, sram_stride=4, signal=["known", "full"],
        )  # fmt: skip
        b.sync("store", wait=["full"])
        slot = b.lds(index.address, "slot", wait=["known"])
        place = [b.alu(Alu.ADD, pair.turn) for pair in (index, *near)]
        block, target = b.register(None), b.register(None)
        with b.loop(rows, ((place[0], 4), (place[1], row), (place[2], row))):
            b.lds(At(index.at, place[0]), "slot", into=slot)
            b.alu(Alu.DIV, slot, imm=page, into=block)
            b.alu(Alu.MUL, block, imm=heads * page * wide, into=target)
            b.alu(Alu.MOD, slot, imm=page, into=block)
            b.alu(Alu.MUL, block, imm=wide, into=block)
            b.alu(Alu.ADD, target, rb=block, into=target)
            for cache, pair, register in zip(caches, near, place[1:], strict=True):
                b.store(
                    cache.type, At(cache.at, target), At(pair.at, register), rows=heads, cols=width,
                    stride=page * wide, sram_stride=wide,
                )  # fmt: skip
        b.sync("store", signal=["free"])
        for pair in (index, *near):
            b.swap(pair)


def attention(  # noqa: PLR0915 - a kernel reads from top to bottom
    b: Builder, q: Tensor, caches: tuple[Tensor, Tensor], out: Tensor, pages: Pages, scale: float
) -> None:
    """Causal attention of each piece's queries [tokens, heads · width] over its context up to themselves.

    Rows that belong to no piece are left as they are.
    """
    _, kv_heads, page, width = caches[0].shape
    pieces, most = pages.blocks.shape
    wide, row = width * 2, q.shape[1] * 2
    group = q.shape[1] // width // kv_heads
    tokens, size = _tile(b, q.shape[0], pieces * kv_heads, group, (page, width), most)
    m, span = tokens * group, page * wide
    known, bounds, starts = b.sram(pieces * most * 4), b.sram((pieces + 1) * 4), b.sram(pieces * 4)
    for tensor, near, signal in (
        (pages.blocks, known, []), (pages.rows, bounds, []), (pages.starts, starts, ["known"])
    ):  # fmt: skip
        count = tensor.bytes // tensor.type.bytes
        b.load(
            Type.I32, At(tensor.at), near, rows=1, cols=count, stride=0, sram_stride=0, signal=signal
        )  # fmt: skip
    begin, end = b.lds(bounds, "piece_row", wait=["known"]), b.register(None)
    start, block = b.lds(starts, "piece_start"), b.lds(known, "block")
    for name, giver, taker in (
        ("q_free", "tensor", "load"), ("kv_free", "tensor", "load"), ("state_free", "vector", "vector"),
        ("out_free", "store", "vector"),
    ):  # fmt: skip
        b.lend(name, giver, taker)
    near_q, near_kv = b.pair(m * wide), b.pair(2 * size * wide)
    state, near_out = b.pair(m * (width + 2) * 4), b.pair(m * wide)
    tiles = -(-q.shape[0] // tokens)
    with b.units(pieces * kv_heads * tiles) as unit:
        pair = b.alu(Alu.DIV, unit, imm=tiles)
        head, piece = b.alu(Alu.MOD, pair, imm=kv_heads), b.alu(Alu.DIV, pair, imm=kv_heads)
        entry = b.alu(Alu.MUL, piece, imm=4)
        b.lds(At(bounds, entry), "piece_row", into=begin)
        b.lds(At(bounds + 4, entry), "piece_row", into=end)
        b.lds(At(starts, entry), "piece_start", into=start)
        gone = b.alu(Alu.MOD, unit, imm=tiles)
        b.alu(Alu.MUL, gone, imm=tokens, into=gone)
        b.alu(Alu.ADD, begin, rb=gone, into=begin)
        left = b.alu(Alu.SUB, end, rb=begin)
        # Most units of a step of long and short pieces have no rows; they pass by.
        with b.loop(At(1, left)):
            rows = At(tokens, left)
            held = b.alu(Alu.MIN, left, imm=tokens)
            query = b.alu(Alu.ADD, start, rb=gone)
            keys_left = b.alu(Alu.ADD, query, rb=held)
            times = b.alu(Alu.ADD, keys_left, imm=size - 1)
            b.alu(Alu.DIV, times, imm=size, into=times)
            blocks_left = b.alu(Alu.ADD, keys_left, imm=page - 1)
            b.alu(Alu.DIV, blocks_left, imm=page, into=blocks_left)
            b.alu(Alu.MUL, held, imm=group, into=held)
            place = b.alu(Alu.MUL, begin, imm=row)
            part = b.alu(Alu.MUL, head, imm=group * wide)
            b.alu(Alu.ADD, place, rb=part, into=place)
            b.load(
                q.type, At(q.at, place), near_q.address, rows=rows, cols=group * width, stride=row,
                sram_stride=group * wide, wait=["q_free"], signal=["q_full"],
            )  # fmt: skip
            b.emit(
                "ATTN_INIT", state=state.address, m=At(m), width=At(width), wait=["state_free"],
                signal=["state_ready"],
            )  # fmt: skip
            b.sync("tensor", wait=["q_full", "state_ready"])
            cursor, key = b.alu(Alu.MUL, entry, imm=most), b.register(0)
            far, near = b.register(None), b.register(None)
            b.alu(Alu.MUL, head, imm=span, into=part)
            onward = ((keys_left, -size), (key, size), (blocks_left, -(size // page)))
            with b.loop(At(-(-most * page // size), times), onward):
                b.sync("load", wait=["kv_free"])
                b.alu(Alu.ADD, near_kv.turn, into=near)
                with b.loop(At(size // page, blocks_left), ((cursor, 4), (near, span))):
                    b.lds(At(known, cursor), "block", into=block)
                    b.alu(Alu.MUL, block, imm=kv_heads * span, into=far)
                    b.alu(Alu.ADD, far, rb=part, into=far)
                    for number, cache in enumerate(caches):
                        b.load(
                            cache.type, At(cache.at, far), At(near_kv.at + number * size * wide, near),
                            rows=page, cols=width, stride=wide, sram_stride=wide,
                        )  # fmt: skip
                b.sync("load", signal=["kv_full"])
                b.emit(
                    "ATTN", q.type, caches[0].type, flags=Flag.CAUSAL, q=near_q.address, k=near_kv.address,
                    v=near_kv + size * wide, state=state.address, m=At(m, held), n=At(size, keys_left),
                    width=At(width), ldq=wide, ldk=wide, ldv=wide, scale=scale, query=At(0, query),
                    key=At(0, key), group=group, wait=["kv_full"], signal=["kv_free"],
                )  # fmt: skip
                b.swap(near_kv)
            b.sync("tensor", signal=["q_free", "state_full"])
            b.emit(
                "ATTN_END", out.type, Type.NONE, state=state.address, out=near_out.address, m=At(m, held),
                width=At(width), ldo=wide, wait=["state_full", "out_free"], signal=["state_free", "out_full"],
            )  # fmt: skip
            b.store(
                out.type, At(out.at, place), near_out.address, rows=rows, cols=group * width, stride=row,
                sram_stride=group * wide, wait=["out_full"], signal=["out_free"],
            )  # fmt: skip
            for buffers in (near_q, state, near_out):
                b.swap(buffers)


def _tile(
    b: Builder, tokens: int, pairs: int, group: int, page: tuple[int, int], most: int
) -> tuple[int, int]:
    """Queries and keys of a tile: about 128 rows, fewer if cores would idle; up to 256 keys, whole blocks."""
    held, width = page
    count = max(1, min(tokens, 128 // group))
    while count > 1 and pairs * -(-tokens // count) < b.ppu.cores:
        count = -(-count // 2)
    blocks = max(1, min(256 // held, most))
    fixed = 2 * count * group * (8 * width + 8) + 4096 + pairs * most * 4
    while blocks > 1 and fixed + 8 * blocks * held * width > b.ppu.sram_bytes:
        blocks //= 2
    return count, blocks * held
