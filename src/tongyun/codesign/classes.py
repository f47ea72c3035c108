"""A fleet's classes of service and its migration, from what the file says to what engines are told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from tongyun.cloud.latency import Slo
from tongyun.cloud.sched.migrate import MigrationPolicy, PromptPolicy
from tongyun.cloud.workload import Arrival
from tongyun.errors import InputError, unknown
from tongyun.specs.classes import ClassSpec, MigrationSpec
from tongyun.units import MS


def priorities(classes: Sequence[ClassSpec], arrivals: Iterable[Arrival]) -> Mapping[str, int]:
    """Priority by class; InputError where there are classes and a request names none of them."""
    found = {each.name: each.priority for each in classes}
    if found:
        for name in {arrival.priority_class for arrival in arrivals} - {None, *found}:
            raise InputError(f"the load's requests: {unknown('class', str(name), found)}")
    return found


def own_limits(classes: Sequence[ClassSpec], slo: Slo | None) -> Slo:
    """The run's limits, and a class's own; what a class leaves out is as for the run."""
    whole = slo or Slo()
    own = {
        each.name: replace(
            whole,
            ttft_s=whole.ttft_s if each.ttft_ms is None else each.ttft_ms * MS,
            tpot_s=whole.tpot_s if each.tpot_ms is None else each.tpot_ms * MS,
        )
        for each in classes
        if each.ttft_ms is not None or each.tpot_ms is not None
    }
    return replace(whole, classes=own)


def headroom(classes: Sequence[ClassSpec]) -> Mapping[str, float]:
    """Share of an engine's blocks to keep around the requests of a class, where it wants any."""
    return {each.name: each.headroom for each in classes if each.headroom}


def prompt_policy(spec: MigrationSpec) -> PromptPolicy:
    return PromptPolicy(interval_s=spec.interval_ms * MS)


def migration_policy(spec: MigrationSpec, classes: Sequence[ClassSpec]) -> MigrationPolicy:
    return MigrationPolicy(
        interval_s=spec.interval_ms * MS,
        below_steps=spec.below_steps,
        above_steps=spec.above_steps,
        stages=spec.stages,
        last_tokens=spec.last_tokens,
        headroom=headroom(classes),
    )
