"""Attention over a key-value cache, by tiles of online softmax.

A unit of work is a sequence, a key head and a tile of queries; the rows of the tile are the query heads
that share the key head, token by token. Only keys up to the tile's last query are read.
"""

from __future__ import annotations

from dataclasses import dataclass

from tongyun.chip.ppu.emit.builder import Builder
from tongyun.chip.ppu.isa import Alu, At, Flag, Type
from tongyun.chip.ppu.program import Tensor


@dataclass(frozen=True, kw_only=True)
class Attention:
    """q and out are [sequences · tokens, heads · width], the cache [sequences, kv_heads, room, width]."""

    sequences: int
    tokens: int
    heads: int
    kv_heads: int
    width: int
    room: int
    scale: float
    query_stride: int
    """Bytes from token to token of q."""
    query_offset: int = 0

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


def attention(
    b: Builder, shape: Attention, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, position: Tensor
) -> None:
    """Causal attention of the new tokens at `position`, position + 1, … over the cache up to themselves."""
    s, wide = shape, shape.width * 2
    near = b.sram(64)
    b.load(Type.I32, At(position.at), near, rows=1, cols=1, stride=0, sram_stride=0, signal=["position"])
    start = b.lds(near, "position", wait=["position"])
    tokens, size = _tile(b, s)
    m = tokens * s.group
    for name, giver, taker in (
        ("q_free", "tensor", "load"), ("kv_free", "tensor", "load"), ("state_free", "vector", "vector"),
        ("out_free", "store", "vector"),
    ):  # fmt: skip
        b.lend(name, giver, taker)
    near_q, near_kv = b.pair(m * wide), b.pair(2 * size * wide)
    state, near_out = b.pair(m * (s.width + 2) * 4), b.pair(m * wide)
    tiles = -(-s.tokens // tokens)
    row_out = s.heads * wide
    with b.units(s.sequences * s.kv_heads * tiles) as unit:
        tile = b.alu(Alu.MOD, unit, imm=tiles)
        # The longest tiles first: the last ones then fill the gaps.
        b.alu(Alu.MUL, tile, imm=-1, into=tile)
        b.alu(Alu.ADD, tile, imm=tiles - 1, into=tile)
        head_unit = b.alu(Alu.DIV, unit, imm=tiles)
        head = b.alu(Alu.MOD, head_unit, imm=s.kv_heads)
        sequence = b.alu(Alu.DIV, head_unit, imm=s.kv_heads)
        rows = At(tokens, b.left(s.tokens, tile, tokens))
        held = b.alu(Alu.MIN, rows.reg, imm=tokens)
        last = b.alu(Alu.MUL, tile, imm=tokens)
        first_query = b.alu(Alu.ADD, last, rb=start)
        keys_left = b.alu(Alu.ADD, first_query, rb=held)
        times = b.alu(Alu.ADD, keys_left, imm=size - 1)
        b.alu(Alu.DIV, times, imm=size, into=times)
        b.alu(Alu.MUL, held, imm=s.group, into=held)
        m_rows = At(m, held)
        from_q = b.address(
            q, (sequence, s.tokens * s.query_stride), (tile, tokens * s.query_stride),
            (head, s.group * wide), offset=s.query_offset,
        )  # fmt: skip
        b.load(
            q.type, from_q, near_q.address, rows=rows, cols=s.group * s.width, stride=s.query_stride,
            sram_stride=s.group * wide, wait=["q_free"], signal=["q_full"],
        )  # fmt: skip
        b.emit(
            "ATTN_INIT",
            state=state.address,
            m=At(m),
            width=At(s.width),
            wait=["state_free"],
            signal=["state_ready"],
        )
        b.sync("tensor", wait=["q_full", "state_ready"])
        far_k = b.address(keys, (sequence, s.kv_heads * s.room * wide), (head, s.room * wide))
        key = b.register(0)
        n = At(size, keys_left)
        onward = ((keys_left, -size), (key, size), (far_k.reg, size * wide))
        with b.loop(At(-(-s.room // size), times), onward):
            far_v = At(values.at, far_k.reg)
            b.load(
                keys.type,
                far_k,
                near_kv.address,
                rows=n,
                cols=s.width,
                stride=wide,
                sram_stride=wide,
                wait=["kv_free"],
            )
            b.load(
                values.type, far_v, near_kv + size * wide, rows=n, cols=s.width, stride=wide,
                sram_stride=wide, signal=["kv_full"],
            )  # fmt: skip
            b.emit(
                "ATTN", q.type, keys.type, flags=Flag.CAUSAL, q=near_q.address, k=near_kv.address,
                v=near_kv + size * wide, state=state.address, m=m_rows, n=n, width=At(s.width), ldq=wide,
                ldk=wide, ldv=wide, scale=s.scale, query=At(0, first_query), key=At(0, key), group=s.group,
                wait=["kv_full"], signal=["kv_free"],
            )  # fmt: skip
            b.swap(near_kv)
        b.sync("tensor", signal=["q_free", "state_full"])
        b.emit(
            "ATTN_END", out.type, Type.NONE, state=state.address, out=near_out.address, m=m_rows,
            width=At(s.width), ldo=wide, wait=["state_full", "out_free"], signal=["state_free", "out_full"],
        )  # fmt: skip
        to = b.address(out, (sequence, s.tokens * row_out), (tile, tokens * row_out), (head, s.group * wide))
        b.store(
            out.type, to, near_out.address, rows=rows, cols=s.group * s.width, stride=row_out,
            sram_stride=s.group * wide, wait=["out_full"], signal=["out_free"],
        )  # fmt: skip
        for pair in (near_q, state, near_out):
            b.swap(pair)


def _tile(b: Builder, s: Attention) -> tuple[int, int]:
    """Query tokens and keys of a tile: about 128 rows, fewer if cores would idle; up to 256 keys."""
    tokens = max(1, min(s.tokens, 128 // s.group))
    while tokens > 1 and s.sequences * s.kv_heads * -(-s.tokens // tokens) < b.ppu.cores:
        tokens = -(-tokens // 2)
    wide = s.width * 2

    def fixed() -> int:
        return 2 * tokens * s.group * (2 * wide + 2 * wide + 8) + 4096

    while tokens > 1 and fixed() + 4 * 16 * wide > b.ppu.sram_bytes:
        tokens = -(-tokens // 2)
    size = 256
    while size > 16 and fixed() + 4 * size * wide > b.ppu.sram_bytes:
        size //= 2
    return tokens, min(size, max(16, -(-s.room // 16) * 16))
