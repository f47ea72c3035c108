"""What bringing KV blocks back from slower memories adds to a step. Knows no chip: rates come in ready."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tongyun.cloud.sched.request import Piece


@dataclass(frozen=True, kw_only=True)
class Way:
    """From one tier to the chip's memory, as one rank has it."""

    latency_s: float
    """Of one read, however many blocks it asks for."""
    block_s: float
    """A rank's share of a block over its bandwidth."""


@dataclass(frozen=True, kw_only=True)
class Restore:
    """A step that brings blocks back reads all tiers one after the other, all blocks of a tier at once.

    With `overlap` the step computes meanwhile, layer behind layer, and takes the longer of
    the two; without, the sum. The wait draws `waiting_w`.
    """

    ways: tuple[Way, ...]
    overlap: bool
    waiting_w: float

    def read_s(self, blocks: Sequence[int]) -> float:
        """Seconds to bring so many blocks from each tier: Σ latency + blocks · block_s; none, nothing."""
        return sum(
            way.latency_s + count * way.block_s for way, count in zip(self.ways, blocks, strict=True) if count
        )

    def whole(self, seconds: float, joules: float, pieces: Sequence[Piece]) -> tuple[float, float]:
        """Seconds and joules of a step that computes for `seconds`, its reads included."""
        counts = [piece.restored for piece in pieces if piece.restored]
        if not counts:
            return seconds, joules
        read_s = self.read_s([sum(each) for each in zip(*counts, strict=True)])
        wait_s = max(read_s - seconds, 0.0) if self.overlap else read_s
        return seconds + wait_s, joules + wait_s * self.waiting_w
