"""Attention over a key-value cache, by tiles of online softmax.

A unit of work is a sequence, a key head and a tile of queries; the rows of the tile are the query heads
that share the key head, token by token. Only keys up to the tile's last query are read. Where there are
fewer units than cores, the keys are cut over several, and a second kernel merges their states.
"""

from __future__ import annotations

from dataclasses import dataclass

from tongyun.chip.ppu.emit.builder import Buffers, Builder
from tongyun.chip.ppu.isa import Alu, At, Flag, Type
from tongyun.chip.ppu.program import Tensor
from tongyun.specs import Ppu


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
    alone: bool = False
    """One tile at a time, as blocks of a GPU's kernel: a core asks for the next when the last is out."""

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def state(self) -> int:
        """Numbers of one row's state: accumulator, maximum, sum."""
        return self.width + 2


def parts(shape: Attention, ppu: Ppu) -> int:
    """Over how many cores the keys of a tile are cut, by the most keys there may be.

    A core is to have at most 1.1 times its share of all pairs of tiles; no more parts than leave the cores
    of one sequence within 0.85 of the best share of busy ones, and none where one sequence fills 0.8 of them.
    """
    tokens, size = _tile(ppu, shape)
    tiles, blocks = -(-shape.tokens // tokens), -(-shape.room // size)
    alone = shape.kv_heads * tiles
    if alone >= 0.8 * ppu.cores or blocks <= 4:
        return 1
    shares = [
        alone * many / ppu.cores / -(-alone * many // ppu.cores)
        for many in range(1, min(128, ppu.cores, blocks) + 1)
    ]
    most = next(i for i, share in enumerate(shares, 1) if share >= 0.85 * max(shares))
    each = -(-int(1.1 * shape.sequences * alone * blocks) // ppu.cores)
    return max(1, min(most, -(-blocks // max(each, 1))))


def emit(
    b: Builder, shape: Attention, q: Tensor, cache: tuple[Tensor, Tensor], out: Tensor, position: Tensor,
    name: str, *, many: int | None = None,
) -> None:  # fmt: skip
    """One kernel, or two: attention over `many` parts of the keys, their states to memory, and the merge."""
    many = parts(shape, b.ppu) if many is None else many
    into = out
    if many > 1:
        tokens, _ = _tile(b.ppu, shape)
        units = shape.sequences * shape.kv_heads * -(-shape.tokens // tokens)
        size = tokens * shape.group * shape.state
        into = b.layout.place(f"{out.name}.states", (units * many, size), Type.F32, "scratch")
    with b.kernel("attention", name):
        attention(b, shape, q, *cache, into, position, many=many)
    if many > 1:
        with b.kernel("merge", name):
            merge(b, shape, into, out, many)


def attention(  # noqa: PLR0915 - a kernel reads from top to bottom
    b: Builder,
    shape: Attention,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    position: Tensor,
    *,
    many: int = 1,
) -> None:
    """Causal attention of the new tokens at `position`, position + 1, … over the cache up to themselves.

    With `many` the state of each part of the keys goes to a row of `out`.
    """
    s, wide = shape, shape.width * 2
    near, start = b.sram(64), b.register(None)
    tokens, size = _tile(b.ppu, s)
    m = tokens * s.group
    copies = _copies(s)

    def read_position() -> None:
        b.load(Type.I32, At(position.at), near, rows=1, cols=1, stride=0, sram_stride=0, signal=["position"])
        b.lds(near, "position", wait=["position"], into=start)

    if copies == 2:
        read_position()
    leaver = "vector" if many == 1 else "store"
    b.lend("q_free", "tensor", "load", copies)
    b.lend("kv_free", "tensor", "load")
    b.lend("state_free", leaver, "vector", copies)
    if many == 1:
        b.lend("out_free", "store", "vector", copies)
    if copies == 1:
        b.lend("unit_free", "store", "load", 1)
    near_q, near_kv = _buffers(b, s, m * wide), b.pair(2 * size * wide)
    state = _buffers(b, s, m * s.state * 4)
    near_out = _buffers(b, s, m * wide) if many == 1 else None
    tiles = -(-s.tokens // tokens)
    blocks = -(-s.room // (size * many))
    row_out = s.heads * wide
    last_out = ["unit_free"] if copies == 1 else []
    with b.units(s.sequences * s.kv_heads * tiles * many) as unit:
        part, tiled = None, unit
        if many > 1:
            part, tiled = b.alu(Alu.MOD, unit, imm=many), b.alu(Alu.DIV, unit, imm=many)
        # The longest tiles first: the last ones then fill the gaps.
        if copies == 2:
            tile, head_unit = b.alu(Alu.MOD, tiled, imm=tiles), b.alu(Alu.DIV, tiled, imm=tiles)
        else:
            # A block knows nothing of the one before it, and all heads' longest come first.
            b.sync("load", wait=["unit_free"])
            read_position()
            pairs = s.sequences * s.kv_heads
            tile, head_unit = b.alu(Alu.DIV, tiled, imm=pairs), b.alu(Alu.MOD, tiled, imm=pairs)
        b.alu(Alu.MUL, tile, imm=-1, into=tile)
        b.alu(Alu.ADD, tile, imm=tiles - 1, into=tile)
        head = b.alu(Alu.MOD, head_unit, imm=s.kv_heads)
        sequence = b.alu(Alu.DIV, head_unit, imm=s.kv_heads)
        rows = At(tokens, b.left(s.tokens, tile, tokens))
        held = b.alu(Alu.MIN, rows.reg, imm=tokens)
        last = b.alu(Alu.MUL, tile, imm=tokens)
        first_query = b.alu(Alu.ADD, last, rb=start)
        keys_left = b.alu(Alu.ADD, first_query, rb=held)
        far_k = b.address(keys, (sequence, s.kv_heads * s.room * wide), (head, s.room * wide))
        key = b.register(0)
        if part is not None:
            b.alu(Alu.MUL, part, imm=blocks * size, into=key)
            gone = b.alu(Alu.MUL, part, imm=-blocks * size)
            b.alu(Alu.ADD, keys_left, rb=gone, into=keys_left)
            b.alu(Alu.MUL, part, imm=blocks * size * wide, into=gone)
            b.alu(Alu.ADD, far_k.reg, rb=gone, into=far_k.reg)
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
        n = At(size, keys_left)
        onward = ((keys_left, -size), (key, size), (far_k.reg, size * wide))
        with b.loop(At(blocks, times), onward):
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
        if near_out is None:
            place = (head_unit, tiles * many), (tile, many), (part or 0, 1)
            to = b.address(out, *((register, scale * m * s.state * 4) for register, scale in place))
            b.store(
                out.type, to, state.address, rows=1, cols=m * s.state, stride=0, sram_stride=0,
                wait=["state_full"], signal=["state_free", *last_out],
            )  # fmt: skip
        else:
            b.emit(
                "ATTN_END", out.type, Type.NONE, state=state.address, out=near_out.address, m=m_rows,
                width=At(s.width), ldo=wide, wait=["state_full", "out_free"],
                signal=["state_free", "out_full"],
            )  # fmt: skip
            where = (sequence, s.tokens * row_out), (tile, tokens * row_out), (head, s.group * wide)
            b.store(
                out.type, b.address(out, *where), near_out.address, rows=rows, cols=s.group * s.width,
                stride=row_out, sram_stride=s.group * wide, wait=["out_full"],
                signal=["out_free", *last_out],
            )  # fmt: skip
        for pair in (near_q, state, near_out):
            if copies == 2 and pair is not None:
                b.swap(pair)


def merge(b: Builder, shape: Attention, states: Tensor, out: Tensor, many: int) -> None:
    """The states of `many` parts of the keys into one, rows of a token or of several at a time."""
    s, wide = shape, shape.width * 2
    tokens, _ = _tile(b.ppu, s)
    m, tiles = tokens * s.group, -(-s.tokens // tokens)
    heads, lines = _chunk(b.ppu, s, tokens, many)
    rows, here = heads * lines, heads * lines * s.state * 4
    for name, giver, taker in (("free", "vector", "load"), ("out_free", "store", "vector")):
        b.lend(name, giver, taker)
    near, near_out = b.pair((many + 1) * here), b.pair(rows * wide)
    apart, row_out = m * s.state * 4, s.heads * wide
    columns = s.group // heads
    with b.units(s.sequences * s.kv_heads * tiles * (m // rows)) as unit:
        column = b.alu(Alu.MOD, unit, imm=columns)
        line = b.alu(Alu.DIV, unit, imm=columns)
        tile = b.alu(Alu.DIV, line, imm=tokens // lines)
        b.alu(Alu.MOD, line, imm=tokens // lines, into=line)
        head_unit = b.alu(Alu.DIV, tile, imm=tiles)
        b.alu(Alu.MOD, tile, imm=tiles, into=tile)
        head = b.alu(Alu.MOD, head_unit, imm=s.kv_heads)
        sequence = b.alu(Alu.DIV, head_unit, imm=s.kv_heads)
        for offset, each in ((0, s.width), (s.width, 1), (s.width + 1, 1)):
            far = b.address(
                states, (head_unit, tiles * many * apart), (tile, many * apart),
                (line, lines * s.group * each * 4), (column, heads * each * 4), offset=m * offset * 4,
            )  # fmt: skip
            b.load(
                Type.F32, far, near + (here + rows * offset * 4), rows=many, cols=rows * each, stride=apart,
                sram_stride=here, wait=[] if offset else ["free"],
                signal=["full"] if offset > s.width else [],
            )  # fmt: skip
        b.emit("ATTN_INIT", state=near.address, m=At(rows), width=At(s.width), wait=["full"])
        other = b.alu(Alu.ADD, near.turn)
        with b.loop(many, ((other, here),)):
            b.emit(
                "ATTN_MERGE", state=near.address, other=At(near.at + here, other), m=At(rows),
                width=At(s.width),
            )  # fmt: skip
        b.emit(
            "ATTN_END", out.type, Type.NONE, state=near.address, out=near_out.address, m=At(rows),
            width=At(s.width), ldo=wide, wait=["out_free"], signal=["free", "out_full"],
        )  # fmt: skip
        first = b.alu(Alu.MUL, tile, imm=tokens)
        step = b.alu(Alu.MUL, line, imm=lines)
        b.alu(Alu.ADD, first, rb=step, into=first)
        to = b.address(
            out, (sequence, s.tokens * row_out), (first, row_out), (head, s.group * wide),
            (column, heads * wide),
        )  # fmt: skip
        b.store(
            out.type, to, near_out.address, rows=At(lines, b.left(s.tokens, first, 1)), cols=heads * s.width,
            stride=row_out, sram_stride=heads * wide, wait=["out_full"], signal=["out_free"],
        )  # fmt: skip
        b.swap(near)
        b.swap(near_out)


def _chunk(ppu: Ppu, s: Attention, tokens: int, many: int) -> tuple[int, int]:
    """Heads and tokens that a core merges at a time: enough units for all cores, at most half of its SRAM."""
    total = s.sequences * s.heads * s.tokens
    most = max(1, ppu.sram_bytes // (4 * (many + 1) * s.state * 4))
    most = max(1, min(total // (2 * ppu.cores), most, 16))
    heads = max(
        count for count in range(1, s.group + 1) if s.group % count == 0 and (count <= most or count == 1)
    )
    if heads < s.group:
        return heads, 1
    lines = max(n for n in range(1, tokens + 1) if tokens % n == 0 and (n * heads <= most or n == 1))
    return heads, lines


def _copies(s: Attention) -> int:
    """Tiles that a core holds at a time."""
    return 1 if s.alone else 2


def _buffers(b: Builder, s: Attention, size: int) -> Buffers:
    """A pair, or one buffer where a core holds one tile at a time."""
    return b.pair(size) if _copies(s) == 2 else Buffers(b.sram(size), 0, b.register(0))


def _tile(ppu: Ppu, s: Attention) -> tuple[int, int]:
    """Query tokens and keys of a tile.

    About 128 rows, fewer if cores would idle, and up to 256 keys; alone as many as the chip's kernel has.
    """
    copies = _copies(s)
    most = ppu.attention_rows if s.alone and ppu.attention_rows else 128
    tokens = max(1, min(s.tokens, most // s.group))
    while copies == 2 and tokens > 1 and s.sequences * s.kv_heads * -(-s.tokens // tokens) < ppu.cores:
        tokens = -(-tokens // 2)
    wide = s.width * 2

    def fixed() -> int:
        return copies * tokens * s.group * (2 * wide + 2 * wide + 8) + 4096

    while tokens > 1 and fixed() + 4 * 16 * wide > ppu.sram_bytes:
        tokens = -(-tokens // 2)
    size = 256
    if s.alone and ppu.attention_keys:
        size = min(size, ppu.attention_keys * 128 // max(s.width, 128) // 16 * 16)
    while size > 16 and fixed() + 4 * size * wide > ppu.sram_bytes:
        size //= 2
    return tokens, size if copies == 1 else min(size, max(16, -(-s.room // 16) * 16))
