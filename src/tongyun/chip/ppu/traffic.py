"""Bytes that a kernel moves between the cores and memory, from its shapes and tiles alone.

Closed forms: nothing here reads an instruction. `Kernel.moves` holds them tensor by tensor, and a test
holds their sum to the bytes that the timing simulator counts in the instruction stream. What a fusion
saves is the difference of two such sums: the tensors that no longer go to memory and come back, less
what the fused kernel reads more often.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tongyun.chip.ppu.program import Program

LINE = 64
"""Memory is read in pieces of so many bytes."""


def fetched(rows: int, width: int, stride: int) -> int:
    """Bytes of one access to `rows` rows of `width` bytes, `stride` apart; a stride of 0 repeats one row."""
    if not rows or not width:
        return 0
    if stride in {0, width}:
        return _lines(width if stride == 0 else rows * width)
    return rows * _lines(width)


def tiled(rows: Sequence[int], widths: Sequence[int], stride: int) -> int:
    """A matrix read once, tile by tile."""
    many, often = Counter(rows), Counter(widths)
    return sum(many[row] * often[width] * fetched(row, width, stride) for row in many for width in often)


def pieces(size: int, step: int) -> list[int]:
    """`size` in steps, the last one what is left."""
    return [step] * (size // step) + ([size % step] if size % step else [])


def _lines(size: int) -> int:
    return -(-size // LINE) * LINE


@dataclass(frozen=True, kw_only=True)
class Saving:
    """What a program moves less than another that does the same, in bytes by shapes and tiles."""

    between: int
    """Of tensors between two operators: what no longer goes to memory and comes back."""
    given: int
    """Of weights, inputs and outputs; negative where the fused kernels read them more often."""

    @property
    def bytes(self) -> int:
        return self.between + self.given


def saving(fused: Program, other: Program) -> Saving:
    """What `fused` spares of what `other` moves.

    Kernels whose traffic depends on numbers in memory (attention, experts) have no closed form here; they
    have to be alike in both.
    """
    (less, given), (more, plain) = _moved(fused), _moved(other)
    return Saving(between=more - less, given=plain - given)


def _moved(program: Program) -> tuple[int, int]:
    """Bytes of tensors between operators, and of all others."""
    between = {tensor.name for tensor in program.tensors if tensor.role == "scratch"}
    moved = [item for kernel in program.kernels for item in kernel.moves.items()]
    inner = sum(size for name, size in moved if name in between)
    return inner, sum(size for _, size in moved) - inner
