# ruff: noqa: RUF009 - `has` returns dataclasses.field, which is not evaluated per instance
"""What a fleet file with several models may say: which models, which pools serve which of them, and how.

A pool gives each of its models replicas of its own, or lets all of them share its replicas.
"""

from __future__ import annotations

from dataclasses import dataclass

from tongyun.specs.classes import MigrationSpec
from tongyun.specs.figure import BANDWIDTH, TIME, Figure
from tongyun.specs.fleet import PoolSpec
from tongyun.specs.form import Fact, Flag, OneOrMore, Section, Sections, Text, Texts, Whole, has
from tongyun.specs.upkeep import AutoscaleSpec, FailureSpec

TURNS = ("tokens", "requests")


@dataclass(frozen=True, kw_only=True)
class ServedSpec:
    """A model, or several alike."""

    name: str = has(Text())
    """What requests call it."""
    config: str | None = has(Text(), default=None)
    """Whose weights it has the shape of: a catalogue name or a directory; default its name."""
    copies: int = has(Whole(), default=1)
    """So many alike, called `name-1`, `name-2` and so on, where there are several."""
    dtype: str | None = has(Text(), default=None)
    """Weights and arithmetic; default as released."""
    kv_dtype: str | None = has(Text(), default=None)
    share: int = has(Whole(), default=1)
    """Of the requests that name no model, in proportion; each copy's."""
    ttft_ms: int | None = has(Whole(), default=None)
    """The limit on its requests' time to first token; default the run's."""
    tpot_ms: int | None = has(Whole(), default=None)

    @property
    def names(self) -> tuple[str, ...]:
        if self.copies == 1:
            return (self.name,)
        return tuple(f"{self.name}-{number}" for number in range(1, self.copies + 1))


@dataclass(frozen=True, kw_only=True)
class MarketPoolSpec(PoolSpec):
    """A pool for some of the models."""

    models: tuple[str, ...] = has(Texts(), default=())
    """Default those that no other pool names."""
    shared: bool = has(Flag(), default=False)
    """Whether all its models take turns on every replica; else each has `replicas` of its own."""


@dataclass(frozen=True, kw_only=True)
class SharingSpec:
    """How the models of a shared pool come and go."""

    turns: str = has(Text(TURNS), default="tokens")
    """Between which a model may make way for another: `requests` end before it does, in groups."""
    host_gb: int | None = has(Whole(), default=None)
    """Host memory for weights and KV blocks, a chip's share; default enough."""
    host_bandwidth: Figure | None = has(Fact(BANDWIDTH), default=None)
    """Host memory to one chip, and back at the same time; default the chip's `host_link`."""
    start: Figure | None = has(Fact(TIME, more_is_better=False), default=None)
    """Of the engine itself each time weights come; default none, all of it kept between models."""
    prefetch: bool = has(Flag(), default=True)
    """Whether the next model's weights may come while the one before works, where both fit."""


@dataclass(frozen=True, kw_only=True)
class MarketSpec:
    """Several models on pools of one kind of chip."""

    name: str = has(Text())
    note: str | None = has(Text(), default=None)
    chip: str = has(Text())
    router: str = has(Text(), default="least-load")
    """Of pools that are not shared."""
    prefix_caching: bool = has(Flag(), default=True)
    model: tuple[ServedSpec, ...] = has(Sections(ServedSpec))
    pool: tuple[MarketPoolSpec, ...] = has(Sections(MarketPoolSpec))
    sharing: SharingSpec = has(Section(SharingSpec), default=SharingSpec())
    migration: MigrationSpec | None = has(Section(MigrationSpec), default=None)
    """How running requests move between a model's own replicas; in shared pools they stay."""
    failures: FailureSpec | None = has(Section(FailureSpec), default=None)
    """Replicas are called by their pool and number: `shared/mixed-0`, `Qwen/Qwen3-32B/decode-1`."""
    autoscale: tuple[AutoscaleSpec, ...] = has(OneOrMore(AutoscaleSpec), default=())

    def problem(self) -> str | None:
        names = [name for one in self.model for name in one.names]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            return f"two models are called '{twice}'"
        apart = any(pool.role == "prefill" and not pool.shared for pool in self.pool)
        if self.migration is not None and self.migration.prompts and not apart:
            return (
                "migration: prompts move among engines of a model's own that only prefill; no pool has those"
            )
        wide = next((pool for pool in self.pool if pool.shared and pool.dp > 1), None)
        return None if wide is None else f"a shared pool has dp {wide.dp}; accepted: 1"
