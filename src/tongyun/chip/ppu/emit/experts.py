"""A mixture of experts: choose, sort, multiply by expert, put back and sum.

`choose` takes the router's products to shares and experts; `dispatch` sorts the (token, choice) pairs by
expert; `grouped` multiplies each expert's rows by its weights, reading an expert only if it has
rows; `combine` sums each token's results by share.
"""

from __future__ import annotations

from collections.abc import Sequence

from tongyun.chip.ppu.emit.builder import Buffers, Builder
from tongyun.chip.ppu.emit.mapper import BLOCK
from tongyun.chip.ppu.emit.matmul import BlockScales, Scales
from tongyun.chip.ppu.emit.rows import Rows, rows_kernel
from tongyun.chip.ppu.isa import CORE, ZERO, Alu, At, Epilogue, Flag, Operand, Red, Type, Vec
from tongyun.chip.ppu.program import Tensor


def choose(b: Builder, logits: Tensor, share: Tensor, expert: Tensor, *, top: int, renormalise: bool) -> None:
    """Softmax in f32, the `top` largest and their shares, which sum to one if renormalised."""
    experts = logits.shape[-1]

    def body(rows: At, near: Sequence[At], made: Sequence[At], work: Sequence[int]) -> None:
        p, value, total = (At(at) for at in work)
        b.emit(
            "RED", logits.type, Type.F32, fn=Red.SOFTMAX, a=near[0], out=p, rows=rows, cols=At(experts),
            lda=experts * logits.type.bytes, ldo=experts * 4,
        )  # fmt: skip
        b.emit(
            "TOPK", Type.F32, Type.F32, a=p, value=value, index=made[1], rows=rows, cols=At(experts),
            top=At(top), lda=experts * 4, ldo=top * 4,
        )  # fmt: skip
        if renormalise:
            b.emit(
                "RED",
                Type.F32,
                Type.F32,
                fn=Red.SUM,
                a=value,
                out=total,
                rows=rows,
                cols=At(top),
                lda=top * 4,
                ldo=4,
            )
        else:
            b.emit(
                "VEC", Type.F32, Type.F32, Type.F32, fn=Vec.MUL, flags=Operand.IMMEDIATE, a=total,
                out=total, rows=rows, cols=At(1), lda=4, ldo=4, imm=0.0,
            )  # fmt: skip
        b.emit(
            "VEC", Type.F32, Type.F32, share.type, fn=Vec.DIV if renormalise else Vec.ADD,
            flags=Operand.COLUMN, a=value, b=total, out=made[0], rows=rows, cols=At(top), lda=top * 4,
            ldb=4, ldo=top * share.type.bytes,
        )  # fmt: skip

    rows_kernel(
        b,
        [Rows.of(logits)],
        [Rows.of(share, top), Rows.of(expert, top)],
        body,
        scratch=[experts * 4, top * 4, 4],
    )


def dispatch(
    b: Builder, expert: Tensor, table: Tensor, token: Tensor, place: Tensor, offset: Tensor, *, experts: int
) -> None:
    """Sort the pairs by expert, on core 0: each pair's token and place, and where each expert's rows begin.

    `expert`, `token` and `place` hold one i32 a pair, `offset` experts + 1; `table` is [pairs] 0 … with the
    token of each pair.
    """
    pairs = expert.bytes // 4
    near, order, index, bounds = (
        b.sram(size) for size in (pairs * 4, pairs * 8, pairs * 4, (experts + 1) * 4)
    )
    only = b.alu(Alu.LESS, CORE, imm=1)
    with b.loop(At(1, only)):
        b.load(Type.I32, At(expert.at), near, rows=1, cols=pairs, stride=0, sram_stride=0, signal=["key"])
        b.emit(
            "SORT", key=At(near), order=At(order), offset=At(bounds), count=At(pairs), segments=At(experts),
            wait=["key"], signal=["sorted", "stored"],
        )  # fmt: skip
        b.gather(
            Type.I32, At(table.at), index, order, rows=pairs, cols=1, stride=4, sram_stride=4,
            wait=["sorted"], signal=["index"],
        )  # fmt: skip
        b.store(
            Type.I32,
            At(offset.at),
            bounds,
            rows=1,
            cols=experts + 1,
            stride=0,
            sram_stride=0,
            wait=["stored"],
        )
        b.store(Type.I32, At(place.at), order + pairs * 4, rows=1, cols=pairs, stride=0, sram_stride=0)
        b.store(Type.I32, At(token.at), index, rows=1, cols=pairs, stride=0, sram_stride=0, wait=["index"])


def grouped(  # noqa: PLR0915 - a kernel reads from top to bottom
    b: Builder,
    a: Tensor,
    weight: Tensor,
    out: Tensor,
    offset: Tensor,
    *,
    token: Tensor | None = None,
    gate: bool = False,
    scales: Scales | None = None,
) -> None:
    """out[rows of e] = a[rows of e] · weight[e]ᵀ, over experts; rows are gathered by `token` if given.

    weight is [experts, n, k]; with `gate` the first half of n is the gate of the second, and out has n/2
    columns. Of `scales` the rows are those of a, the columns [experts, n], or [experts, n / 128, k / 128]
    by blocks, without `gate`.
    """
    experts, n, k = weight.shape
    blocks = scales is not None and scales.blocks
    if blocks and gate:
        raise ValueError("a gated product has no scaled blocks")
    n = n // 2 if gate else n
    products = 2 if gate else 1
    pairs = out.shape[0]
    each_a, each_b = a.type.bytes, weight.type.bytes
    t_m, t_n, t_k = _tile(b, -(-pairs // experts), n, k, experts, products, each_a, each_b, blocks)
    whole = a.type is weight.type is Type.INT8
    bounds = b.sram((experts + 1) * 4)
    b.load(
        Type.I32, At(offset.at), bounds, rows=1, cols=experts + 1, stride=0, sram_stride=0, signal=["bounds"]
    )
    zero = b.lds(bounds, "expert_offset", wait=["bounds"])
    for name, giver, taker in (
        ("free", "tensor", "load"), ("acc_free", "vector", "tensor"), ("out_free", "store", "vector"),
    ):  # fmt: skip
        b.lend(name, giver, taker)
    b.lend("index_free", "load", "load")
    held: Buffers | None = None
    if scales is not None:
        b.lend("scale_free", "vector", "load")
        deep = -(-k // BLOCK)
        held = b.pair(4 * (deep * (t_m + 1) if blocks else t_m + products * t_n))
    wide_a, wide_b, cols = t_k * each_a, t_k * each_b, -(-n // t_n)
    near_a, near_b = b.pair(t_m * wide_a), b.pair(products * t_n * wide_b)
    acc, near_out, near_index = b.pair(products * t_m * t_n * 4), b.pair(t_m * t_n * 2), b.pair(t_m * 4)
    with b.units(experts * cols) as unit:
        expert, col = b.alu(Alu.DIV, unit, imm=cols), b.alu(Alu.MOD, unit, imm=cols)
        entry = b.alu(Alu.MUL, expert, imm=4)
        row, end = b.lds(At(bounds, entry), "expert_offset"), b.lds(At(bounds + 4, entry), "expert_offset")
        left = b.alu(Alu.SUB, end, rb=row)
        times = b.alu(Alu.ADD, left, imm=t_m - 1)
        b.alu(Alu.DIV, times, imm=t_m, into=times)
        n_left = At(t_n, b.left(n, col, t_n))
        begin = b.address(weight, (expert, products * n * k * each_b), (col, t_n * k * each_b))
        m = At(t_m, left)
        with b.loop(At(-(-pairs // t_m), times), ((row, t_m), (left, -t_m))):
            far_b, far_k, k_left = b.alu(Alu.ADD, begin.reg), b.register(0), b.register(k)
            rows_at = b.alu(Alu.MUL, row, imm=k * each_a)
            if token is not None:
                b.load(
                    Type.I32, b.address(token, (row, 4)), near_index.address, rows=1, cols=m, stride=0,
                    sram_stride=0, wait=["index_free"], signal=["index_full"],
                )  # fmt: skip
                b.sync("load", wait=["index_full"])
            scale = BlockScales(At(), At(), 0)
            if scales is not None and held is not None:
                index = None if token is None else near_index
                _load_rows(b, scales, held, row, m, index, k if blocks else 1)
                scale = _load_columns(b, scales, held, (expert, col), (t_m, t_n), (n, k), n_left, products)
            count = At(t_k, k_left)

            def step(*, first: bool) -> None:
                if token is None:
                    far_a = At(a.at, rows_at)
                    b.load(
                        a.type,
                        far_a,
                        near_a.address,
                        rows=m,
                        cols=count,
                        stride=k * each_a,
                        sram_stride=wide_a,
                        wait=["free"],
                    )
                else:
                    b.gather(
                        a.type, At(a.at, far_k), near_a.address, near_index.address, rows=m, cols=count,
                        stride=k * each_a, sram_stride=wide_a, wait=["free"],
                    )  # fmt: skip
                for product in range(products):
                    b.load(
                        weight.type, At(weight.at + product * n * k * each_b, far_b),
                        near_b + product * t_n * wide_b, rows=n_left, cols=count, stride=k * each_b,
                        sram_stride=wide_b, signal=["full"] if product == products - 1 else [],
                    )  # fmt: skip
                for product in range(products):
                    waits = [
                        *(["full"] if product == 0 else []),
                        *(["acc_free"] if first and product == 0 else []),
                    ]
                    b.emit(
                        "MMA", a.type, weight.type,
                        flags=Flag.TRANSPOSED
                        | (0 if first else Flag.ACCUMULATE)
                        | (Flag.SCALED if blocks else 0), a=near_a.address,
                        b=near_b + product * t_n * wide_b, c=acc + product * t_m * t_n * 4, m=m, n=n_left,
                        k=count, lda=wide_a, ldb=wide_b, ldc=t_n * 4, left=scale.left, right=scale.right,
                        ldl=scale.stride, wait=waits,
                        signal=["free"] if product == products - 1 else [],
                    )  # fmt: skip
                b.swap(near_a)
                b.swap(near_b)

            onward = (
                (k_left, -t_k), (far_k, wide_a), (far_b, wide_b), (rows_at, wide_a),
                *([(scale.left.reg, t_k // BLOCK * 4)] if blocks else []),
            )  # fmt: skip
            with b.loop(1, onward):
                step(first=True)
            if k > t_k:
                with b.loop(-(-k // t_k) - 1, onward):
                    step(first=False)
            b.sync("load", signal=["index_free"]) if token is not None else None
            b.sync("tensor", signal=["acc_full"])
            fn = Epilogue.GATE if gate else Epilogue.PLAIN
            if held is not None and not blocks:
                fn |= Epilogue.ROWS | Epilogue.COLUMNS
            waits = ["acc_full", "out_free", *(["scale_full"] if fn & Epilogue.ROWS else [])]
            b.emit(
                "DRAIN", out.type, Type.NONE, Type.I32 if whole else Type.NONE, fn=fn, c=acc.address,
                gate=acc + t_m * t_n * 4 if gate else 0, out=near_out.address, m=m, n=n_left, ldc=t_n * 4,
                ldo=t_n * 2, stats=held.address if held is not None and not blocks else 0,
                columns=held + t_m * 4 if held is not None and not blocks else 0, wait=waits,
                signal=["acc_free", "out_full", *(["scale_free"] if held is not None else [])],
            )  # fmt: skip
            to = b.address(out, (row, n * 2), (col, t_n * 2))
            b.store(
                out.type, to, near_out.address, rows=m, cols=n_left, stride=n * 2, sram_stride=t_n * 2,
                wait=["out_full"], signal=["out_free"],
            )  # fmt: skip
            if token is not None:
                b.sync("load", wait=["index_free"])
                b.sync("load", signal=["index_free"])
            for pair in (acc, near_out, near_index, *([held] if held is not None else [])):
                b.swap(pair)
    b.alu(Alu.ADD, ZERO, rb=zero, into=zero)


def _load_rows(
    b: Builder, scales: Scales, held: Buffers, row: int, m: At, index: Buffers | None, k: int
) -> None:
    """The scales of a tile's rows: one each, or one each 128 of k."""
    assert scales.rows is not None
    deep = -(-k // BLOCK)
    if index is None:
        b.load(
            Type.F32, b.address(scales.rows, (row, deep * 4)), held.address, rows=m, cols=deep,
            stride=deep * 4, sram_stride=deep * 4, wait=["scale_free"],
        )  # fmt: skip
    else:
        b.gather(
            Type.F32, At(scales.rows.at), held.address, index.address, rows=m, cols=deep, stride=deep * 4,
            sram_stride=deep * 4, wait=["scale_free"],
        )  # fmt: skip


def _load_columns(
    b: Builder, scales: Scales, held: Buffers, unit: tuple[int, int], tile: tuple[int, int],
    sizes: tuple[int, int], n_left: At, products: int,
) -> BlockScales:  # fmt: skip
    """The scales of a tile's columns; with blocks, where a step along k finds its own."""
    (expert, col), (t_m, t_n), (n, k) = unit, tile, sizes
    deep, high = -(-k // BLOCK), -(-n // BLOCK)
    if not scales.blocks:
        for product in range(products):
            far = b.address(
                scales.columns, (expert, products * n * 4), (col, t_n * 4), offset=product * n * 4
            )
            b.load(
                Type.F32, far, held + (t_m + product * t_n) * 4, rows=1, cols=n_left, stride=0,
                sram_stride=0, signal=["scale_full"] if product == products - 1 else [],
            )  # fmt: skip
        return BlockScales(At(), At(), 0)
    block = b.alu(Alu.MUL, col, imm=t_n)
    b.alu(Alu.DIV, block, imm=BLOCK, into=block)
    far = b.address(scales.columns, (expert, high * deep * 4), (block, deep * 4))
    b.load(Type.F32, far, held + t_m * deep * 4, rows=1, cols=deep, stride=0, sram_stride=0)
    step = b.alu(Alu.ADD, held.turn)
    return BlockScales(At(held.at, step), At(held.at + t_m * deep * 4, step), deep * 4)


def _tile(
    b: Builder,
    rows: int,
    n: int,
    k: int,
    experts: int,
    products: int,
    left: int = 2,
    right: int = 2,
    blocks: bool = False,
) -> tuple[int, int, int]:
    """Rows like an expert's share, columns that keep the cores busy, k what SRAM leaves or a block is."""
    t_m = 16
    while t_m < min(rows, 128):
        t_m *= 2
    t_n = 128
    while t_n > 16 and (experts * -(-n // t_n) < 2 * b.ppu.cores or t_n >= 2 * n):
        t_n //= 2
    t_k = 512

    def size() -> int:
        scales = 4 * (-(-k // BLOCK) * (t_m + 1) if blocks else t_m + products * t_n)
        operands = t_m * t_k * left + products * t_n * t_k * right
        return 2 * (operands + products * t_m * t_n * 4 + t_m * t_n * 2 + scales) + 8192

    while t_k > 32 and (size() + 4 * experts > b.ppu.sram_bytes or t_k >= 2 * k):
        t_k //= 2
    return t_m, t_n, BLOCK if blocks else t_k


def combine(
    b: Builder,
    rows: Tensor,
    share: Tensor,
    place: Tensor,
    out: Tensor,
    *,
    top: int,
    residual: Tensor | None = None,
) -> None:
    """out[t] = Σ over choices j of share[t, j] · rows[place[t, j]] + residual[t], summed in f32."""
    tokens, width = out.shape[0], out.shape[-1]
    each = 2 * top * width * 2 + width * (4 + 4 + 4 + 4) + 8 * top * 8
    size = max(1, min((b.ppu.sram_bytes - 8192) // each, -(-tokens // b.ppu.cores), 64))
    b.lend("free", "vector", "load")
    b.lend("out_free", "store", "vector")
    index, near, part = (
        b.pair(size * top * 4),
        b.pair(size * top * width * 2),
        b.pair(size * top * share.type.bytes),
    )
    other, near_out = b.pair(size * width * 2), b.pair(size * width * 2)
    total, term = b.sram(size * width * 4), b.sram(size * width * 4)
    with b.units(-(-tokens // size)) as unit:
        count = At(size, b.left(tokens, unit, size))
        many = b.alu(Alu.MIN, count.reg, imm=size)
        b.alu(Alu.MUL, many, imm=top, into=many)
        gathered = At(size * top, many)
        b.load(
            Type.I32, b.address(place, (unit, size * top * 4)), index.address, rows=1, cols=gathered,
            stride=0, sram_stride=0, wait=["free"],
        )  # fmt: skip
        b.load(
            share.type, b.address(share, (unit, size * top * share.type.bytes)), part.address, rows=1,
            cols=gathered, stride=0, sram_stride=0,
        )  # fmt: skip
        if residual is not None:
            b.load(
                residual.type, b.address(residual, (unit, size * width * 2)), other.address, rows=count,
                cols=width, stride=width * 2, sram_stride=width * 2,
            )  # fmt: skip
        b.gather(
            rows.type, At(rows.at), near.address, index.address, rows=gathered, cols=width,
            stride=width * 2, sram_stride=width * 2, signal=["full"],
        )  # fmt: skip
        b.sync("vector", wait=["full", "out_free"])
        for choice in range(top):
            b.emit(
                "VEC", rows.type, share.type, Type.F32, fn=Vec.MUL, flags=Operand.COLUMN,
                a=near + choice * width * 2, b=part + choice * share.type.bytes,
                out=At(total if choice == 0 else term), rows=count, cols=At(width), lda=top * width * 2,
                ldb=top * share.type.bytes, ldo=width * 4,
            )  # fmt: skip
            if choice:
                b.emit(
                    "VEC", Type.F32, Type.F32, Type.F32, fn=Vec.ADD, a=At(total), b=At(term), out=At(total),
                    rows=count, cols=At(width), lda=width * 4, ldb=width * 4, ldo=width * 4,
                )  # fmt: skip
        if residual is None:
            b.emit(
                "VEC", Type.F32, Type.NONE, out.type, fn=Vec.COPY, a=At(total), out=near_out.address,
                rows=count, cols=At(width), lda=width * 4, ldo=width * 2,
            )  # fmt: skip
        else:
            b.emit(
                "VEC", Type.F32, residual.type, out.type, fn=Vec.ADD, a=At(total), b=other.address,
                out=near_out.address, rows=count, cols=At(width), lda=width * 4, ldb=width * 2,
                ldo=width * 2,
            )  # fmt: skip
        b.sync("vector", signal=["free", "out_full"])
        b.store(
            out.type, b.address(out, (unit, size * width * 2)), near_out.address, rows=count, cols=width,
            stride=width * 2, sram_stride=width * 2, wait=["out_full"], signal=["out_free"],
        )  # fmt: skip
        for pair in (index, near, part, other, near_out):
            b.swap(pair)
