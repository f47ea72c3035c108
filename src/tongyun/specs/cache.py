# ruff: noqa: RUF009 - `has` returns dataclasses.field, which is not evaluated per instance
"""What a fleet file's `[cache]` may say: the memories behind the chips' own, for KV blocks."""

from __future__ import annotations

from dataclasses import dataclass

from tongyun.specs.figure import BANDWIDTH, Figure
from tongyun.specs.form import Fact, Flag, Text, Whole, has


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Blocks evicted from a chip go to host memory, and from there to storage."""

    host_gb: int | None = has(Whole(), default=None)
    """Host memory for KV blocks, a chip's share."""
    storage_gb: int | None = has(Whole(), default=None)
    """Storage for KV blocks, a chip's share."""
    storage: str | None = has(Text(), default=None)
    """The storage spec that says how fast it is read."""
    host_bandwidth: Figure | None = has(Fact(BANDWIDTH), default=None)
    """Host memory to one chip; default the chip's `host_link`."""
    overlap: bool = has(Flag(), default=True)
    """Whether a step computes while its blocks come back."""

    def problem(self) -> str | None:
        if self.host_gb is None and self.storage_gb is None:
            return "no tier; accepted: host_gb, storage_gb or both"
        if (self.storage_gb is None) != (self.storage is None):
            return "storage_gb and storage (a storage spec's name) come together"
        return None
