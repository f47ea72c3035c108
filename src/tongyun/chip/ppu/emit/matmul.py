"""Products with what is fused to them: RMSNorm before, SwiGLU, scales, bias and residual behind.

Output tiles go round the cores along the shorter side, so that neighbours share a tile of the operand with
more of them, and the other operand stays in the L2.
"""

from __future__ import annotations

from dataclasses import dataclass

from tongyun.chip.ppu.emit.builder import Buffers, Builder
from tongyun.chip.ppu.emit.mapper import BLOCK, Matmul, Tiling, mapped, traffic
from tongyun.chip.ppu.emit.rows import join
from tongyun.chip.ppu.isa import Alu, At, Epilogue, Flag, Type
from tongyun.chip.ppu.program import Tensor


@dataclass(frozen=True, kw_only=True)
class Scales:
    """What the operands of a product were divided by, in f32."""

    rows: Tensor | None = None
    """[m], or one number for all, or [m, k / 128] by blocks."""
    columns: Tensor
    """[n], or one number for all, or [n / 128, k / 128] by blocks."""
    up: Tensor | None = None
    """As `columns`, of the second weight."""
    blocks: bool = False


def split_matmul(b: Builder, a: Tensor, weight: Tensor, out: Tensor, parts: int, name: str) -> None:
    """Two kernels: `parts` products of a part of k each, into f32, and their sum."""
    (m, _), n = a.shape, weight.shape[0]
    held = b.layout.place(f"{out.name}.parts", (parts * m, n), Type.F32, "scratch")
    with b.kernel("matmul", name):
        matmul(b, a, weight, held, splits=parts)
    with b.kernel("join", name):
        join(b, held, out, parts)


def matmul(  # noqa: PLR0912, PLR0915 - a kernel reads from top to bottom
    b: Builder,
    a: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    up: Tensor | None = None,
    gain: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    scales: Scales | None = None,
    tiling: Tiling | None = None,
    splits: int = 1,
) -> None:
    """Emit one product, inside `b.kernel`. Tensors are two-dimensional, a [m, k], weight [n, k].

    With `splits` the product of each part of k goes to m rows of `out` of its own. With `scales` by blocks,
    k in steps of 128 and no `up`. A tiling in pieces takes no residual.
    """
    blocks = scales is not None and scales.blocks
    (m, k), n = a.shape, weight.shape[0]
    shape = Matmul(
        m=m, n=n, k=k, norm=gain is not None, gate=up is not None, residual=residual is not None,
        bias=bias is not None, out_bytes=out.type.bytes, splits=splits, left=a.type, right=weight.type,
        rows=0 if scales is None or scales.rows is None else scales.rows.bytes // 4,
        columns=0 if scales is None else scales.columns.bytes // 4, blocks=blocks,
    )  # fmt: skip
    t = tiling or mapped(shape, b.ppu)
    rows, cols, steps = -(-m // t.m), -(-n // t.n), -(-shape.inner // t.k)
    products = 2 if up is not None else 1
    into = Operands.of(b, t, shape, out.type)
    moved = traffic(shape, t, b.ppu.cores)
    beside = (None, None, None) if scales is None else (scales.rows, scales.columns, scales.up)
    whole = a.type is weight.type is Type.INT8
    left, right = a.type.bytes, weight.type.bytes
    for tensor, size in zip((a, weight, up, gain, residual, bias, *beside, out), moved, strict=True):
        if tensor is not None:
            b.moves(tensor, size)
    near_gain = 0
    if gain is not None:
        # The queue is in order: whoever waits for the first operands has the gain as well.
        near_gain = b.sram(k * 2)
        b.load(gain.type, At(gain.at), near_gain, rows=1, cols=k, stride=0, sram_stride=0)
    with b.units(rows * cols * splits) as unit:
        fast, slow = b.alu(Alu.MOD, unit, imm=min(rows, cols)), b.alu(Alu.DIV, unit, imm=min(rows, cols))
        part = None
        if splits > 1:
            part = b.alu(Alu.DIV, slow, imm=max(rows, cols))
            b.alu(Alu.MOD, slow, imm=max(rows, cols), into=slow)
        row, col = (fast, slow) if rows <= cols else (slow, fast)
        m_left, n_left = At(t.m, b.left(m, row, t.m)), At(t.n, b.left(n, col, t.n))
        k_left = b.register(k) if part is None else b.left(k, part, shape.inner)
        along = []
        if part is not None:
            b.alu(Alu.MIN, k_left, imm=shape.inner, into=k_left)
            along = [(part, shape.inner)]
        far_a = b.address(a, (row, t.m * k * left), *((part, each * left) for part, each in along))
        far_b = b.address(weight, (col, t.n * k * right), *((part, each * right) for part, each in along))
        far_up = None if up is None else At(up.at, far_b.reg)
        far_gain = b.register(0)
        scale = BlockScales(At(), At(), 0)
        if scales is not None and blocks:
            scale = _load_blocks(b, scales, into, t, k, (row, col), m_left)
            for register, each in along:
                gone = b.alu(Alu.MUL, register, imm=each // BLOCK * 4)
                b.alu(Alu.ADD, scale.left.reg, rb=gone, into=scale.left.reg)
        k_count = At(t.k, k_left)

        def step(*, first: bool) -> None:
            flags = Flag.TRANSPOSED | (Flag.NONE if first else Flag.ACCUMULATE)
            flags |= Flag.NORM if gain is not None else Flag.NONE
            flags |= Flag.SCALED if blocks else Flag.NONE
            b.load(
                a.type,
                far_a,
                into.a.address,
                rows=m_left,
                cols=k_count,
                stride=k * left,
                sram_stride=t.k * left,
                wait=["free"],
            )
            if far_up is not None:
                b.load(
                    weight.type, far_up, into.b + t.n * t.k * right, rows=n_left, cols=k_count,
                    stride=k * right, sram_stride=t.k * right,
                )  # fmt: skip
            b.load(
                weight.type, far_b, into.b.address, rows=n_left, cols=k_count, stride=k * right,
                sram_stride=t.k * right, signal=["full"],
            )  # fmt: skip
            for product in range(products):
                last = product == products - 1
                starts = [
                    *(["full"] if product == 0 else []),
                    *(["acc_free"] if first and product == 0 else []),
                ]
                b.emit(
                    "MMA", a.type, weight.type, flags=flags, a=into.a.address,
                    b=into.b + product * t.n * t.k * right, c=into.c + product * t.m * t.n * 4, m=m_left,
                    n=n_left, k=k_count, lda=t.k * left, ldb=t.k * right, ldc=t.n * 4,
                    gain=At(near_gain, far_gain) if gain is not None else 0,
                    stats=into.c + (products * t.n + product) * t.m * 4 if gain is not None else 0,
                    left=scale.left, right=scale.right, ldl=scale.stride, wait=starts,
                    signal=["free"] if last else [],
                )  # fmt: skip
            b.swap(into.a)
            b.swap(into.b)

        onward = (
            (k_left, -t.k), (far_a.reg, left * t.k), (far_b.reg, right * t.k), (far_gain, left * t.k),
            *([(scale.left.reg, t.k // BLOCK * 4)] if blocks else []),
        )  # fmt: skip
        with b.loop(1, onward):
            step(first=True)
        if steps > 1:
            with b.loop(steps - 1, onward):
                step(first=False)
        b.sync("tensor", signal=["acc_full"])
        below = [] if part is None else [(part, m * n * out.type.bytes)]
        place = b.address(out, (row, t.m * n * out.type.bytes), (col, t.n * out.type.bytes), *below)
        waits = ["acc_full", "out_free"]
        fn = Epilogue.SCALE if gain is not None else Epilogue.PLAIN
        fn |= Epilogue.GATE if up is not None else Epilogue.PLAIN
        if residual is not None and into.residual is not None:
            other = At(residual.at, b.address(out, (row, t.m * n * 2), (col, t.n * 2)).reg)
            b.load(
                residual.type, other, into.residual.address, rows=m_left, cols=n_left, stride=n * 2,
                sram_stride=t.n * 2, wait=["res_free"], signal=["res_full"],
            )  # fmt: skip
            waits.append("res_full")
            fn |= Epilogue.RESIDUAL
        if bias is not None and into.bias is not None:
            near = b.address(bias, (col, t.n * 2))
            b.load(
                bias.type, near, into.bias.address, rows=1, cols=n_left, stride=0, sram_stride=0,
                wait=["bias_free"], signal=["bias_full"],
            )  # fmt: skip
            waits.append("bias_full")
            fn |= Epilogue.BIAS
        if scales is not None and not blocks:
            fn |= _load_scales(b, scales, into, t, (row, col), (m_left, n_left))
            waits.append("scale_full")
        frees = ["acc_free", "out_full"]
        frees += ["res_free"] if residual is not None else []
        frees += ["bias_free"] if bias is not None else []
        frees += ["scale_free"] if scales is not None else []
        stats, columns = At(), At()
        if gain is not None:
            stats = into.c + products * t.n * t.m * 4
        elif into.scales is not None and not blocks:
            stats, columns = into.scales.address, into.scales + t.m * 4
        second = into.bias.address if into.bias is not None else into.c + t.m * t.n * 4
        high, wide = t.piece or (t.m, t.n)
        tall = [(at, _left(b, m_left, at, high)) for at in range(0, min(t.m, m), high)]
        broad = [(at, _left(b, n_left, at, wide)) for at in range(0, min(t.n, n), wide)]
        places = [(down, across) for down in tall for across in broad]
        for (down, m_count), (across, n_count) in places:
            inside = (down * t.n + across) * 4
            first, last = not down and not across, (down, across) == (tall[-1][0], broad[-1][0])
            b.emit(
                "DRAIN", out.type, Type.BF16, Type.I32 if whole else Type.NONE, fn=fn, c=into.c + inside,
                gate=second + inside if up is not None or bias is not None else 0, out=into.out.address,
                m=m_count, n=n_count, ldc=t.n * 4, ldo=wide * out.type.bytes, stats=stats + 4 * down,
                columns=columns + 4 * across,
                residual=into.residual.address if into.residual is not None else 0,
                ldr=t.n * 2 if residual is not None else 0, eps=eps, width=k,
                wait=waits if first else ["out_free"], signal=frees if last else ["out_full"],
            )  # fmt: skip
            b.store(
                out.type, place + (down * n + across) * out.type.bytes, into.out.address, rows=m_count,
                cols=n_count, stride=n * out.type.bytes, sram_stride=wide * out.type.bytes,
                wait=["out_full"], signal=["out_free"],
            )  # fmt: skip
            b.swap(into.out)
        for pair in into.behind:
            b.swap(pair)


def _left(b: Builder, count: At, gone: int, most: int) -> At:
    """Of a count what is left behind its first, and no more than so many."""
    return At(most, b.alu(Alu.ADD, count.reg, imm=-gone) if gone else count.reg)


def _load_scales(
    b: Builder, scales: Scales, into: Operands, t: Tiling, tile: tuple[int, int], left: tuple[At, At]
) -> Epilogue:
    """The scales of a tile's rows and columns, and what the epilogue does with them."""
    assert into.scales is not None
    wanted = [(scales.columns, t.m * 4, tile[1], t.n, left[1])]
    if scales.up is not None:
        wanted.append((scales.up, t.m * 4 + t.n * 4, tile[1], t.n, left[1]))
    if scales.rows is not None:
        wanted.append((scales.rows, 0, tile[0], t.m, left[0]))
    for number, (tensor, near, unit, size, count) in enumerate(wanted):
        one = tensor.bytes == 4
        far = At(tensor.at) if one else b.address(tensor, (unit, size * 4))
        b.load(
            Type.F32, far, into.scales + near, rows=count if one else 1, cols=1 if one else count, stride=0,
            sram_stride=4, wait=[] if number else ["scale_free"],
            signal=["scale_full"] if number == len(wanted) - 1 else [],
        )  # fmt: skip
    return Epilogue.COLUMNS | (Epilogue.ROWS if scales.rows is not None else Epilogue.PLAIN)


def _load_blocks(
    b: Builder, scales: Scales, into: Operands, t: Tiling, k: int, tile: tuple[int, int], m_left: At
) -> BlockScales:
    """All scales of a tile's rows, and those of its columns' block; the first operands come behind them."""
    assert into.scales is not None
    assert scales.rows is not None
    deep = -(-k // BLOCK)
    b.load(
        Type.F32, b.address(scales.rows, (tile[0], t.m * deep * 4)), into.scales.address, rows=m_left,
        cols=deep, stride=deep * 4, sram_stride=deep * 4, wait=["scale_free"],
    )  # fmt: skip
    block = b.alu(Alu.MUL, tile[1], imm=t.n)
    b.alu(Alu.DIV, block, imm=BLOCK, into=block)
    b.load(
        Type.F32, b.address(scales.columns, (block, deep * 4)), into.scales + t.m * deep * 4, rows=1,
        cols=deep, stride=0, sram_stride=0,
    )  # fmt: skip
    step = b.alu(Alu.ADD, into.scales.turn)
    return BlockScales(At(into.scales.at, step), At(into.scales.at + t.m * deep * 4, step), deep * 4)


@dataclass(frozen=True)
class BlockScales:
    """Where a step along k finds its scales: of its rows, `stride` bytes apart, and of its columns."""

    left: At
    right: At
    stride: int


@dataclass(frozen=True)
class Operands:
    """The buffers of a product, their free tokens lent."""

    a: Buffers
    b: Buffers
    c: Buffers
    out: Buffers
    residual: Buffers | None
    bias: Buffers | None
    scales: Buffers | None

    @classmethod
    def of(cls, b: Builder, t: Tiling, shape: Matmul, out: Type) -> Operands:
        products = 2 if shape.gate else 1
        b.lend("free", "tensor", "load", t.stages)
        b.lend("acc_free", "vector", "tensor")
        b.lend("out_free", "store", "vector")
        if shape.residual:
            b.lend("res_free", "vector", "load")
        if shape.bias:
            b.lend("bias_free", "vector", "load")
        scales = t.scale_bytes(shape)
        if scales:
            b.lend("scale_free", "vector", "load")
        left, right = t.operand_bytes(shape)
        return cls(
            a=b.ring(left, t.stages),
            b=b.ring(right, t.stages),
            c=b.pair(products * t.m * t.n * 4 + (2 * t.m * 4 if shape.norm else 0)),
            out=b.pair(t.out_bytes(shape)),
            residual=b.pair(t.m * t.n * 2) if shape.residual else None,
            bias=b.pair(t.n * 2) if shape.bias else None,
            scales=b.pair(scales) if scales else None,
        )

    @property
    def behind(self) -> list[Buffers]:
        """Buffers that change once a tile."""
        return [pair for pair in (self.c, self.residual, self.bias, self.scales) if pair is not None]
