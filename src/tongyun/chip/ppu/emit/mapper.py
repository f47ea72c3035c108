"""What a product is, and on which tiles it is computed: the mapper's estimate decides.

Knows no instructions: `matmul` writes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from tongyun.chip.ppu.isa import Type
from tongyun.chip.ppu.traffic import LINE, pieces, tiled
from tongyun.errors import InputError
from tongyun.specs.ppu import Ppu

BLOCK = 128
"""Numbers of a row, and rows and columns of a weight, that share a scale where scales go by blocks."""


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
    left: Type = Type.BF16
    right: Type = Type.BF16
    rows: int = 0
    """Scales of the rows of a, in f32: none, one for all, or one each."""
    columns: int = 0
    """Of the columns of the weight."""
    blocks: bool = False
    """An f32 for each 128 numbers of a row of a, and for each 128 × 128 of the weight."""

    @property
    def inner(self) -> int:
        """k of one part, whole blocks or a multiple of 32 where there are several."""
        step = BLOCK if self.blocks else 32
        return self.k if self.splits == 1 else -(-self.k // (step * self.splits)) * step

    @property
    def parts(self) -> list[int]:
        return pieces(self.k, self.inner)


@dataclass(frozen=True, kw_only=True)
class Tiling:
    m: int
    n: int
    k: int
    stages: int = 2
    """Steps along k whose operands have room in SRAM at a time."""
    piece: tuple[int, int] | None = None
    """Rows and columns of the result that leave at a time, two in SRAM; None is the whole tile."""

    def out_bytes(self, matmul: Matmul) -> int:
        """What leaves at a time."""
        high, wide = self.piece or (self.m, self.n)
        return high * wide * matmul.out_bytes

    def operand_bytes(self, matmul: Matmul) -> tuple[int, int]:
        """One step's tile of a and of the weight, or of both weights."""
        weights = 2 if matmul.gate else 1
        return self.m * self.k * matmul.left.bytes, weights * self.n * self.k * matmul.right.bytes

    def scale_bytes(self, matmul: Matmul) -> int:
        """The scales of one tile of the result."""
        if matmul.blocks:
            return 4 * -(-matmul.k // BLOCK) * (self.m + 1)
        return 4 * (self.m + self.n * (2 if matmul.gate else 1)) if matmul.columns else 0

    def steps(self, matmul: Matmul) -> int:
        """Products of one tile in all."""
        tiles = -(-matmul.m // self.m) * -(-matmul.n // self.n)
        return tiles * matmul.splits * -(-matmul.inner // self.k)

    def sram_bytes(self, matmul: Matmul) -> int:
        """What the kernel's buffers take."""
        products = 2 if matmul.gate else 1
        a, b = self.operand_bytes(matmul)
        c = products * self.m * self.n * 4 + (2 * self.m * 4 if matmul.norm else 0)
        out = self.out_bytes(matmul) + self.m * self.n * 2 * matmul.residual + 2 * self.n * matmul.bias
        scales = self.scale_bytes(matmul)
        gain = matmul.k * 2 if matmul.norm else 0
        return self.stages * (a + b) + 2 * (c + out + scales) + 16 * 64 + gain


def tilings(matmul: Matmul, ppu: Ppu) -> Iterator[Tiling]:
    """Every tiling that fits, from the tensor unit's tile upwards."""
    # A product of scaled blocks stays within one block of k and of the weight's rows.
    depths = [BLOCK] if matmul.blocks else _doubled(matmul.inner, max(ppu.tile_k, 32), 1024)
    for m in _sizes(matmul.m, ppu.tile_m, 256):
        for n in _sizes(matmul.n, ppu.tile_n, BLOCK if matmul.blocks else 256):
            for k in depths:
                tiling = Tiling(m=m, n=n, k=k)
                if tiling.sram_bytes(matmul) <= ppu.sram_bytes:
                    yield tiling


def _sizes(size: int, least: int, most: int) -> list[int]:
    """The least, twice, four times … as much, and from 64 on the sizes half way between."""
    sizes = _doubled(size, least, most)
    between = [3 * each // 2 for each in sizes if each >= 64 and 3 * each // 2 <= min(size, most)]
    return sorted([*sizes, *between])


def _doubled(size: int, least: int, most: int) -> list[int]:
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
    """Bytes moved of a, weight, second weight, gain, residual, bias, scales of a and of each weight, and out.

    Each column of tiles reads a, each row of tiles the weights; each core reads the gain once.
    """
    m, n = pieces(matmul.m, tiling.m), pieces(matmul.n, tiling.n)
    k = [step for part in matmul.parts for step in pieces(part, tiling.k)]
    a, b = ([kind.bytes * step for step in k] for kind in (matmul.left, matmul.right))
    weight = len(m) * tiled(n, b, matmul.right.bytes * matmul.k)
    rows, columns = _scale_traffic(matmul, m, n)
    beside = tiled(m, [2 * step for step in n], 2 * matmul.n)
    out = tiled(m, [matmul.out_bytes * step for step in n], matmul.out_bytes * matmul.n)
    return (
        len(n) * tiled(m, a, matmul.left.bytes * matmul.k),
        weight,
        weight * matmul.gate,
        cores * tiled([1], [matmul.left.bytes * matmul.k], 0) * matmul.norm,
        beside * matmul.residual,
        len(m) * tiled([1], [2 * step for step in n], 0) * matmul.bias,
        rows,
        columns,
        columns * matmul.gate,
        out * matmul.splits,
    )


def _scale_traffic(matmul: Matmul, m: list[int], n: list[int]) -> tuple[int, int]:
    """Bytes of scales of a, and of one weight's: each tile of the result reads its own."""
    if matmul.blocks:
        wide = 4 * -(-matmul.k // BLOCK)
        return len(n) * tiled(m, [wide], wide), len(m) * len(n) * tiled([1], [wide], 0)
    rows, columns = (
        0 if not many else LINE * len(steps) if many == 1 else tiled([1], [4 * step for step in steps], 0)
        for many, steps in ((matmul.rows, m), (matmul.columns, n))
    )
    return len(n) * rows, len(m) * columns


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
    of a buffer, from its request over its product to its next request; of more buffers, their share. HBM is
    charged for each operand once, which holds where the L2 keeps the other one.
    """
    products = 2 if matmul.gate else 1
    rows, cols = -(-matmul.m // tiling.m), -(-matmul.n // tiling.n)
    steps = -(-matmul.inner // tiling.k)
    tiles = rows * cols * matmul.splits
    rounds = -(-tiles // ppu.cores)
    busy = min(tiles, ppu.cores)
    m, n, k = min(tiling.m, matmul.m), min(tiling.n, matmul.n), min(tiling.k, matmul.inner)
    smallest = -(-m // ppu.tile_m) * -(-n // ppu.tile_n) * -(-k // ppu.tile_k)
    tensor = products * smallest * 2 * ppu.tile_m * ppu.tile_n * ppu.tile_k / rate(matmul, ppu)
    left, right = matmul.left.bytes, matmul.right.bytes
    moved = k * (left * m + products * right * n)
    hbm_rate = ppu.hbm_bytes_per_s / ppu.clock_hz
    latency = (ppu.hbm_latency_s + ppu.l2_latency_s) / 2 * ppu.clock_hz
    # Cores of one round share the tiles of one operand.
    shared = k * (left * min(busy, rows) * m + products * right * n * -(-busy // rows))
    transfer = max(moved / ppu.port_bytes, moved * busy / ppu.l2_rate, shared / hbm_rate)
    way = latency + transfer + tensor + ppu.tensor_latency_s * ppu.clock_hz
    step = max(tensor, transfer, way / tiling.stages, _ISSUED)
    drain = products * m * n / ppu.vector_lanes
    once = matmul.k * (left * matmul.m + products * right * matmul.n)
    once += 2 * matmul.m * matmul.n
    return max(rounds * max(steps * step, drain), once / hbm_rate) + way + drain


def rate(matmul: Matmul, ppu: Ppu) -> float:
    """FLOPs a cycle of a core: operands of two types go at the rate of the wider one. InputError for none."""
    found = []
    for kind in (matmul.left, matmul.right):
        if kind.rate not in ppu.tensor_flops:
            has = ", ".join(ppu.tensor_flops)
            raise InputError(f"{ppu.name} has no tensor rate for {kind.rate}; it has {has}")
        found.append(ppu.tensor_flops[kind.rate])
    return min(found)


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
