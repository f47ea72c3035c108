"""What a fleet file names, looked up: the model, the chip, the cuts of the pools.

Shared by `simulate`, which plays a load on the fleet, and `serve --twin`, which answers
requests at its pace.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tongyun.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import typer

    from tongyun.codesign.fleet import Fleet, Pool
    from tongyun.specs import FleetSpec, PoolSpec

TOLD = (
    "model",
    "chip",
    "chips",
    "tp",
    "ep",
    "dp",
    "batch",
    "step_tokens",
    "prefill_replicas",
    "router",
    "prefix_caching",
    "dtype",
    "kv_dtype",
)
"""Flags whose part a fleet file takes over."""


def read_fleet(
    path: Path, *, isl: int = 1, osl: int = 2, usd_per_chip_hour: float | None = None
) -> tuple[FleetSpec, Fleet]:
    """A fleet file and the fleet it describes, which has to hold a request of `isl` and `osl` tokens."""
    from tongyun.cli.plan import ask
    from tongyun.cloud.sched.router import find_router
    from tongyun.codesign.fleet import Fleet
    from tongyun.codesign.tiers import CacheTiers
    from tongyun.codesign.upkeep import Upkeep
    from tongyun.specs import find_fleet

    spec = find_fleet(path)
    find_router(spec.router)
    pools = tuple(_pool(each) for each in sorted(spec.pool, key=lambda each: each.role == "decode"))
    question = ask(
        {
            "model": spec.model,
            "chip": spec.chip,
            "chips": sum(pool.chips for pool in pools),
            "isl": isl,
            "osl": osl,
        },
        ttft_s=None,
        tpot_s=None,
        dtypes=(spec.dtype, spec.kv_dtype),
        usd_per_chip_hour=usd_per_chip_hour,
    )
    tiers = None if spec.cache is None else CacheTiers(spec=spec.cache)
    fleet = Fleet(question=question, pools=pools, prefix_caching=spec.prefix_caching, tiers=tiers)
    if spec.failures is None and not spec.autoscale:
        return spec, fleet
    upkeep = Upkeep(failures=spec.failures, autoscale=spec.autoscale, file=str(path))
    upkeep.check(fleet.sites(), question.chip.at())
    return spec, replace(fleet, upkeep=upkeep)


def typed(context: typer.Context) -> set[str]:
    """Names of the flags that the command line has, whatever their value."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and not source.name.startswith("DEFAULT")}


def refuse_told(given: set[str], names: Sequence[str] = TOLD, why: str = "--fleet says that") -> None:
    """InputError where a flag says what is said elsewhere."""
    twice = [f"--{name.replace('_', '-')}" for name in names if name in given]
    if twice:
        raise InputError(f"{twice[0]}: {why}; leave it out")


def _pool(spec: PoolSpec) -> Pool:
    from tongyun.codesign.fleet import Pool
    from tongyun.codesign.plan import Plan
    from tongyun.model.shard import Shard

    plan = Plan(
        shard=Shard(tp=spec.tp, ep=spec.ep, dp=spec.dp),
        batch=spec.batch,
        step_tokens=spec.step_tokens,
        replicas=spec.replicas,
        idle_chips=0,
    )
    return Pool(role=spec.role, plan=plan)
