"""Products with what is fused to them: RMSNorm before, SwiGLU, bias and residual behind.

Output tiles go round the cores, row tiles fastest so that neighbours share a tile of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from tongyun.chip.ppu.emit.builder import Buffers, Builder
from tongyun.chip.ppu.emit.rows import join
from tongyun.chip.ppu.isa import Alu, At, Epilogue, Flag, Type
from tongyun.chip.ppu.program import Tensor
from tongyun.chip.ppu.traffic import pieces, tiled
from tongyun.specs.ppu import Ppu
from tongyun.units import DType


@dataclass(frozen=True, kw_only=True)
class Matmul:
    """out[m, n] = epilogue(a[m, k] · weight[n, k]ᵀ)."""

    m: int
    n: int
    k: int
    norm: bool = False
    gate: bool = False
    """Two weights of n rows each: silu(first) · second."""
    residual: bool = False
    bias: bool = False
    out_bytes: int = 2
    splits: int = 1
    """Parts of k that are multiplied side by side, each into an f32 result of its own."""

    @property
    def inner(self) -> int:
        """k of one part, a multiple of 32 where there are several."""
        return self.k if self.splits == 1 else -(-self.k // (32 * self.splits)) * 32

    @property
    def parts(self) -> list[int]:
        return pieces(self.k, self.inner)


@dataclass(frozen=True, kw_only=True)
class Tiling:
    m: int
    n: int
    k: int

    def steps(self, matmul: Matmul) -> int:
        """Products of one tile in all."""
        tiles = -(-matmul.m // self.m) * -(-matmul.n // self.n)
        return tiles * matmul.splits * -(-matmul.inner // self.k)

    def sram_bytes(self, matmul: Matmul) -> int:
        """What the kernel's double buffers take."""
        products = 2 if matmul.gate else 1
        a = self.m * self.k * 2
        b = products * self.n * self.k * 2
        c = products * self.m * self.n * 4 + (2 * self.m * 4 if matmul.norm else 0)
        out = self.m * self.n * (matmul.out_bytes + (2 if matmul.residual else 0)) + 2 * self.n * matmul.bias
        return 2 * (a + b + c + out) + 16 * 64 + (matmul.k * 2 if matmul.norm else 0)


def tilings(matmul: Matmul, ppu: Ppu) -> Iterator[Tiling]:
    """Every tiling that fits, powers of two from the tensor unit's tile upwards."""
    for m in _sizes(matmul.m, ppu.tile_m, 256):
        for n in _sizes(matmul.n, ppu.tile_n, 256):
            for k in _sizes(matmul.inner, max(ppu.tile_k, 32), 1024):
                tiling = Tiling(m=m, n=n, k=k)
                if tiling.sram_bytes(matmul) <= ppu.sram_bytes:
                    yield tiling


def _sizes(size: int, least: int, most: int) -> list[int]:
    sizes = [least]
    while sizes[-1] < min(size, most):
        sizes.append(sizes[-1] * 2)
    return sizes


@lru_cache(maxsize=4096)
def mapped(matmul: Matmul, ppu: Ppu) -> Tiling:
    """Of the tilings within 1 % of the least estimated cycles, the one of the fewest steps.

    The estimate does not tell closer ones apart; fewer steps are fewer instructions and requests. A gated
    product has half the room for each of its two accumulators. It takes no tiling that would move more
    bytes than the two products and the activation it stands for, where there is another.
    """
    found = list(tilings(matmul, ppu))
    if matmul.gate:
        most = _apart(matmul, ppu)
        found = [tiling for tiling in found if sum(traffic(matmul, tiling, ppu.cores)) <= most] or found
    cycles = {tiling: estimate(matmul, tiling, ppu) for tiling in found}
    least = min(cycles.values())
    near = [tiling for tiling, needed in cycles.items() if needed <= 1.01 * least]
    return min(near, key=lambda tiling: (tiling.steps(matmul), cycles[tiling]))


def traffic(matmul: Matmul, tiling: Tiling, cores: int) -> tuple[int, ...]:
    """Bytes moved of a, weight, second weight, gain, residual, bias and out.

    Each column of tiles reads a, each row of tiles the weights; each core reads the gain once.
    """
    m, n = pieces(matmul.m, tiling.m), pieces(matmul.n, tiling.n)
    k = [2 * step for part in matmul.parts for step in pieces(part, tiling.k)]
    wide = 2 * matmul.k
    weight = len(m) * tiled(n, k, wide)
    beside = tiled(m, [2 * step for step in n], 2 * matmul.n)
    out = tiled(m, [matmul.out_bytes * step for step in n], matmul.out_bytes * matmul.n)
    return (
        len(n) * tiled(m, k, wide),
        weight,
        weight * matmul.gate,
        cores * tiled([1], [wide], 0) * matmul.norm,
        beside * matmul.residual,
        len(m) * tiled([1], [2 * step for step in n], 0) * matmul.bias,
        out * matmul.splits,
    )


def _apart(matmul: Matmul, ppu: Ppu) -> int:
    """Bytes of the two products and the activation that a gated product stands for."""
    alone = replace(matmul, gate=False)
    product = sum(traffic(alone, mapped(alone, ppu), ppu.cores))
    return 2 * product + 3 * matmul.m * matmul.n * matmul.out_bytes


_ISSUED = 7
"""Instructions of one step along k, each a cycle of the control."""


def estimate(matmul: Matmul, tiling: Tiling, ppu: Ppu) -> float:
    """Cycles of a product on a tiling: rounds of tiles, each bound by tensor unit, port, L2 or latency.

    Two buffers hide a load's latency behind the step before it: a step takes at least half of the way
    of a buffer, from its request over its product to its next request. HBM is charged for each
    operand once, which holds where the L2 keeps the other one.
    """
    products = 2 if matmul.gate else 1
    rows, cols = -(-matmul.m // tiling.m), -(-matmul.n // tiling.n)
    steps = -(-matmul.inner // tiling.k)
    tiles = rows * cols * matmul.splits
    rounds = -(-tiles // ppu.cores)
    busy = min(tiles, ppu.cores)
    m, n, k = min(tiling.m, matmul.m), min(tiling.n, matmul.n), min(tiling.k, matmul.inner)
    smallest = -(-m // ppu.tile_m) * -(-n // ppu.tile_n) * -(-k // ppu.tile_k)
    tensor = products * smallest * 2 * ppu.tile_m * ppu.tile_n * ppu.tile_k / ppu.tensor_flops[DType.BF16]
    moved = 2 * k * (m + products * n)
    hbm_rate = ppu.hbm_bytes_per_s / ppu.clock_hz
    latency = (ppu.hbm_latency_s + ppu.l2_latency_s) / 2 * ppu.clock_hz
    # Cores of one round share the tiles of one operand.
    shared = 2 * k * (min(busy, rows) * m + products * n * -(-busy // rows))
    transfer = max(moved / ppu.port_bytes, moved * busy / ppu.l2_rate, shared / hbm_rate)
    way = latency + transfer + tensor + ppu.tensor_latency_s * ppu.clock_hz
    step = max(tensor, transfer, way / 2, _ISSUED)
    drain = products * m * n / ppu.vector_lanes
    once = 2 * (matmul.m * matmul.k + products * matmul.n * matmul.k + matmul.m * matmul.n)
    return max(rounds * max(steps * step, drain), once / hbm_rate) + way + drain


@lru_cache(maxsize=4096)
def splits(matmul: Matmul, ppu: Ppu) -> int:
    """Into how many parts of k to cut a plain product: where its tiles leave cores idle, parts fill them.

    The parts are then read once more and summed, by a kernel behind another barrier.
    """
    least, best = estimate(matmul, mapped(matmul, ppu), ppu), 1
    for parts in SPLITS:
        shape = replace(matmul, splits=parts, out_bytes=4)
        if len(shape.parts) != parts or shape.inner < 128:
            break
        size = matmul.m * matmul.n * (4 * parts + matmul.out_bytes)
        rate = ppu.l2_rate if size < ppu.l2_bytes else ppu.hbm_bytes_per_s / ppu.clock_hz
        join = (ppu.barrier_s + ppu.hbm_latency_s + ppu.l2_latency_s) * ppu.clock_hz + size / rate
        needed = estimate(shape, mapped(shape, ppu), ppu) + join
        if needed < least:
            least, best = needed, parts
    return best


SPLITS = (2, 3, 4, 6, 8, 12, 16)
"""Parts of k that a product may be cut into."""


def split_matmul(b: Builder, a: Tensor, weight: Tensor, out: Tensor, parts: int, name: str) -> None:
    """Two kernels: `parts` products of a part of k each, into f32, and their sum."""
    (m, _), n = a.shape, weight.shape[0]
    held = b.layout.place(f"{out.name}.parts", (parts * m, n), Type.F32, "scratch")
    with b.kernel("matmul", name):
        matmul(b, a, weight, held, splits=parts)
    with b.kernel("join", name):
        join(b, held, out, parts)


def matmul(  # noqa: PLR0915 - a kernel reads from top to bottom
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
    tiling: Tiling | None = None,
    splits: int = 1,
) -> None:
    """Emit one product, inside `b.kernel`. Tensors are two-dimensional, a [m, k], weight [n, k].

    With `splits` the product of each part of k goes to m rows of `out` of its own.
    """
    (m, k), n = a.shape, weight.shape[0]
    shape = Matmul(
        m=m, n=n, k=k, norm=gain is not None, gate=up is not None, residual=residual is not None,
        bias=bias is not None, out_bytes=out.type.bytes, splits=splits,
    )  # fmt: skip
    t = tiling or mapped(shape, b.ppu)
    rows, cols, steps = -(-m // t.m), -(-n // t.n), -(-shape.inner // t.k)
    products = 2 if up is not None else 1
    into = Operands.of(b, t, shape, out.type)
    moved = traffic(shape, t, b.ppu.cores)
    for tensor, size in zip((a, weight, up, gain, residual, bias, out), moved, strict=True):
        if tensor is not None:
            b.moves(tensor, size)
    near_gain = 0
    if gain is not None:
        # The queue is in order: whoever waits for the first operands has the gain as well.
        near_gain = b.sram(k * 2)
        b.load(gain.type, At(gain.at), near_gain, rows=1, cols=k, stride=0, sram_stride=0)
    with b.units(rows * cols * splits) as unit:
        row = b.alu(Alu.MOD, unit, imm=rows)
        col = b.alu(Alu.DIV, unit, imm=rows)
        part = None
        if splits > 1:
            part = b.alu(Alu.DIV, col, imm=cols)
            b.alu(Alu.MOD, col, imm=cols, into=col)
        m_left, n_left = At(t.m, b.left(m, row, t.m)), At(t.n, b.left(n, col, t.n))
        k_left = b.register(k) if part is None else b.left(k, part, shape.inner)
        along = []
        if part is not None:
            b.alu(Alu.MIN, k_left, imm=shape.inner, into=k_left)
            along = [(part, shape.inner * 2)]
        far_a = b.address(a, (row, t.m * k * 2), *along)
        far_b = b.address(weight, (col, t.n * k * 2), *along)
        far_up = None if up is None else At(up.at, far_b.reg)
        far_gain = b.register(0)
        k_count = At(t.k, k_left)

        def step(*, first: bool) -> None:
            flags = Flag.TRANSPOSED | (Flag.NONE if first else Flag.ACCUMULATE)
            flags |= Flag.NORM if gain is not None else Flag.NONE
            wide = t.k * 2
            b.load(
                a.type,
                far_a,
                into.a.address,
                rows=m_left,
                cols=k_count,
                stride=k * 2,
                sram_stride=wide,
                wait=["free"],
            )
            if far_up is not None:
                b.load(
                    a.type,
                    far_up,
                    into.b + t.n * wide,
                    rows=n_left,
                    cols=k_count,
                    stride=k * 2,
                    sram_stride=wide,
                )
            b.load(
                a.type,
                far_b,
                into.b.address,
                rows=n_left,
                cols=k_count,
                stride=k * 2,
                sram_stride=wide,
                signal=["full"],
            )
            for product in range(products):
                last = product == products - 1
                starts = [
                    *(["full"] if product == 0 else []),
                    *(["acc_free"] if first and product == 0 else []),
                ]
                b.emit(
                    "MMA", a.type, weight.type, flags=flags, a=into.a.address,
                    b=into.b + product * t.n * wide, c=into.c + product * t.m * t.n * 4, m=m_left, n=n_left,
                    k=k_count, lda=wide, ldb=wide, ldc=t.n * 4,
                    gain=At(near_gain, far_gain) if gain is not None else 0,
                    stats=into.c + (products * t.n + product) * t.m * 4 if gain is not None else 0,
                    wait=starts, signal=["free"] if last else [],
                )  # fmt: skip
            b.swap(into.a)
            b.swap(into.b)

        onward = ((k_left, -t.k), (far_a.reg, 2 * t.k), (far_b.reg, 2 * t.k), (far_gain, 2 * t.k))
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
        frees = ["acc_free", "out_full"]
        frees += ["res_free"] if residual is not None else []
        frees += ["bias_free"] if bias is not None else []
        second = into.bias.address if into.bias is not None else into.c + t.m * t.n * 4
        b.emit(
            "DRAIN", out.type, Type.BF16, fn=fn, c=into.c.address,
            gate=second if up is not None or bias is not None else 0, out=into.out.address, m=m_left,
            n=n_left, ldc=t.n * 4, ldo=t.n * out.type.bytes,
            stats=into.c + products * t.n * t.m * 4 if gain is not None else 0,
            residual=into.residual.address if into.residual is not None else 0,
            ldr=t.n * 2 if residual is not None else 0, eps=eps, width=k, wait=waits, signal=frees,
        )  # fmt: skip
        b.store(
            out.type, place, into.out.address, rows=m_left, cols=n_left, stride=n * out.type.bytes,
            sram_stride=t.n * out.type.bytes, wait=["out_full"], signal=["out_free"],
        )  # fmt: skip
        for pair in into.behind:
            b.swap(pair)


@dataclass(frozen=True)
class Operands:
    """The double buffers of a product, their free tokens lent."""

    a: Buffers
    b: Buffers
    c: Buffers
    out: Buffers
    residual: Buffers | None
    bias: Buffers | None

    @classmethod
    def of(cls, b: Builder, t: Tiling, shape: Matmul, out: Type) -> Operands:
        products = 2 if shape.gate else 1
        b.lend("free", "tensor", "load")
        b.lend("acc_free", "vector", "tensor")
        b.lend("out_free", "store", "vector")
        if shape.residual:
            b.lend("res_free", "vector", "load")
        if shape.bias:
            b.lend("bias_free", "vector", "load")
        return cls(
            a=b.pair(t.m * t.k * 2),
            b=b.pair(products * t.n * t.k * 2),
            c=b.pair(products * t.m * t.n * 4 + (2 * t.m * 4 if shape.norm else 0)),
            out=b.pair(t.m * t.n * out.bytes),
            residual=b.pair(t.m * t.n * 2) if shape.residual else None,
            bias=b.pair(t.n * 2) if shape.bias else None,
        )

    @property
    def behind(self) -> list[Buffers]:
        """Buffers that change once a tile."""
        return [pair for pair in (self.c, self.out, self.residual, self.bias) if pair is not None]
