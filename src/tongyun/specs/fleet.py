# ruff: noqa: RUF009 - `has` returns dataclasses.field, which is not evaluated per instance
"""What a fleet file may say: which model, on which chips, in which pools, behind which router.

Names of models, chips and routers are checked by who looks them up; a fleet measures
nothing, so that its numbers are choices and need no source.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tongyun.specs.cache import CacheSpec
from tongyun.specs.classes import ClassSpec, MigrationSpec
from tongyun.specs.drafts import DraftsSpec
from tongyun.specs.experts import ExpertsSpec
from tongyun.specs.form import Flag, Number, OneOrMore, Section, Sections, Text, Whole, has
from tongyun.specs.upkeep import AutoscaleSpec, FailureSpec

ROLES = ("mixed", "prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class PoolSpec:
    """Equal replicas with one task; a replica has tp · dp ranks, one chip each."""

    role: str = has(Text(ROLES), default="mixed")
    """`mixed` replicas take a request from its prompt to its end."""
    replicas: int = has(Whole())
    tp: int = has(Whole(), default=1)
    ep: int = has(Whole(), default=1)
    dp: int = has(Whole(), default=1)
    """Attention groups of a replica."""
    batch: int = has(Whole(), default=64)
    """Requests at once in an attention group."""
    step_tokens: int = has(Whole(), default=1024)
    """Token budget of a step."""


@dataclass(frozen=True, kw_only=True)
class FleetSpec:
    """One model on pools of one kind of chip; the router chooses for every request that arrives."""

    name: str = has(Text())
    note: str | None = has(Text(), default=None)
    model: str = has(Text())
    chip: str = has(Text())
    dtype: str | None = has(Text(), default=None)
    """Weights and arithmetic; default as released."""
    kv_dtype: str | None = has(Text(), default=None)
    router: str = has(Text(), default="least-load")
    prefix_caching: bool = has(Flag(), default=True)
    cache: CacheSpec | None = has(Section(CacheSpec), default=None)
    experts: ExpertsSpec | None = has(Section(ExpertsSpec), default=None)
    drafts: DraftsSpec | None = has(Section(DraftsSpec), default=None)
    classes: tuple[ClassSpec, ...] = has(Sections(ClassSpec), key="class", default=())
    class_aging_s: float | None = has(Number(least=1e-3), default=None)
    """Seconds of waiting that outweigh one step of priority; left out, priorities are strict."""
    migration: MigrationSpec | None = has(Section(MigrationSpec), default=None)
    pool: tuple[PoolSpec, ...] = has(Sections(PoolSpec))
    failures: FailureSpec | None = has(Section(FailureSpec), default=None)
    autoscale: tuple[AutoscaleSpec, ...] = has(OneOrMore(AutoscaleSpec), default=())

    def problem(self) -> str | None:
        return next(self._problems(), None)

    def _problems(self) -> Iterator[str]:
        names = [each.name for each in self.classes]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            yield f"class: '{twice}' is there twice"
        if self.class_aging_s is not None and not self.classes:
            yield "class_aging_s says how [[class]] tables age, and there is none"
        if self.cache is not None and not self.prefix_caching:
            yield "cache: its tiers keep prefixes, and prefix_caching is false; leave one out"
        roles = [pool.role for pool in self.pool]
        if self.migration is not None and self.migration.prompts and "prefill" not in roles:
            yield "migration: prompts move among engines that only prefill, and no pool has that role"
        if sorted(roles) not in (["mixed"], ["decode", "prefill"]):
            yield f"the pools are {', '.join(roles)}; accepted: one mixed, or one prefill and one decode"
