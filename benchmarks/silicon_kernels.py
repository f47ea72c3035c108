"""How an H100's libraries run fp8 products: which tile, what an early launch spares and lost registers cost.

Rules of public sources, but for what was chosen by rows of the families that `ppu_silicon.py` fits to:
where CUTLASS's small tile ends, which barriers are spared to what, and what lost registers cost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from tongyun.chip.ppu.emit.mapper import BLOCK, Tiling
from tongyun.chip.ppu.program import Program
from tongyun.specs import Ppu


def rows_again(m: int, k: int, cores: int) -> int:
    """Rows a core of sgl-kernel's kernel that makes rows fp8 goes through at a time twice; 0 where once.

    With 16 rows a core and more a warp takes a row, 64 on a core's 2,048 threads, and keeps those of fewer
    than 2,048 numbers in shared memory; below it a block of 256 threads does, 8 on a core, and the 256 KiB
    of L1 hold what it reads again up to 16,384 numbers.
    """
    if m >= 16 * cores:
        return 64 if k >= 2048 else 0
    return 8 if k > 16384 else 0


def library_tiling(m: int) -> Tiling:
    """The tile of sgl-kernel's fp8 product (0.5.14) for m.

    CUTLASS's: one tile's products beside the epilogue of the one before, as many stages of 128 numbers of k
    as shared memory holds, and the result in pieces of 64 × 32 of which two are on their way.
    """
    size = 64 if m <= 128 else 128
    beside = 2 * PIECE[0] * PIECE[1] * 2
    return Tiling(m=size, n=size, k=128, stages=(SHARED - beside) // (2 * size * 128), piece=PIECE)


PIECE = (64, 32)
SHARED = 227 * 1024
"""Bytes of shared memory that a block of threads can have at 9.0."""


def library_chip(ppu: Ppu, m: int) -> Ppu:
    """The chip as that product uses it: whole tiles are multiplied, whatever is left of the matrices.

    Above 1,024 rows two cores under each other ask for a tile of the weight once (a cluster of 2 × 1 with
    multicast), so that of four tiles the L2 serves three in the time of four.
    """
    tiling = library_tiling(m)
    shared = 4 / 3 if m > 1024 else 1
    return replace(ppu, tile_m=tiling.m, tile_n=tiling.n, tile_k=tiling.k, l2_rate=shared * ppu.l2_rate)


def launched_early(program: Program, ppu: Ppu, kinds: tuple[str, ...]) -> Ppu:
    """The chip for a program whose kernels of some kinds are launched while the one before them runs.

    Programmatic dependent launch, from 9.0 on: of their barrier only a write to memory and a read are left.
    Every barrier of the program is given the mean. SGLang has it on for DeepGEMM (its pull request 23979),
    FlashAttention 3 for the kernel that merges parts of the keys.
    """
    early = sum(kernel.kind in kinds for kernel in program.kernels) / len(program.kernels)
    left = min(2 * (ppu.hbm_latency_s + ppu.l2_latency_s), ppu.barrier_s)
    return replace(ppu, barrier_s=early * left + (1 - early) * ppu.barrier_s)


@dataclass(frozen=True)
class BlockTiling:
    tiling: Tiling
    spills: bool
    """192 f32 sums a thread beside the operands of a product that is not multicast."""


SPILT = 5.5
"""Times as long a product takes whose sums leave the registers: chosen by the families fitted to."""


@lru_cache(maxsize=65536)
def block_tiling(m: int, n: int, k: int, cores: int) -> BlockTiling:
    """DeepGEMM's choice at 9.0 for scales by blocks (its heuristics for sm90): the least cycles of L1 and L2.

    Tiles of 64 to 256 rows, 16 to 192 columns, as many stages of k as 227 KiB hold, at least 3 or 4; pairs of
    cores share one operand where there is more than one round. Fewer than 64 rows cost as much as 64.
    """
    best, least = (64, 16, 1), float("inf")
    heights = [64, 128, *([16] if m <= 16 else []), *([32] if m <= 32 else []), 256]
    for down, across in ((1, 1), (1, 2), (2, 1)):
        for high in heights:
            for wide in (*range(16, 129, 16), 144, 160, 192):
                tiles = -(-m // high) * -(-n // wide)
                rounds = -(-tiles // cores)
                shared = down * across > 1
                if (high > 128 and wide > 128) or (shared and rounds == 1) or not _staged(high, wide, k):
                    continue
                out = 2 * high * wide
                l2 = (k * (high / across + wide / down) + out) / min(64 * cores, 6153)
                l1 = (k * (high + wide + max(64, high) + wide) + 2 * out) / (128 * cores)
                cycles = max(l1, l2) * rounds * cores
                if cycles < least:
                    best, least = (high, wide, down * across), cycles
    high, wide, pair = best
    return BlockTiling(Tiling(m=max(high, 64), n=wide, k=BLOCK), pair == 1 and _sums(high, wide) >= 192)


def _staged(high: int, wide: int, k: int) -> bool:
    """Whether shared memory holds the stages that hide a load: four, or three of a large tile."""
    stage = (high + wide) * BLOCK + -(-4 * high // 128) * 128
    beside = -(-2 * high * wide // 1024) * 1024 + 256 + 4 * -(-k // BLOCK) * (1 if BLOCK % wide == 0 else 2)
    return (SHARED - beside) // stage >= (3 if high * wide >= 128 * 192 else 4)


def _sums(high: int, wide: int) -> int:
    """Registers of one of 128 or 256 threads for the sums of a tile, and for those of one step along k."""
    groups = 1 if high <= 64 else 2
    return max(high, 64) * wide // (128 * groups) + wide // 2
