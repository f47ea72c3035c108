"""What a fleet file names, looked up: the model, the chip, the cuts of the pools.

Shared by `simulate`, which plays a load on the fleet, and `serve --twin`, which answers
requests at its pace.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tongyun.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import typer

    from tongyun.codesign.experts import ExpertLoads
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
    from tongyun.codesign.experts import ExpertLoads
    from tongyun.codesign.fleet import Fleet
    from tongyun.codesign.tiers import CacheTiers
    from tongyun.specs import find_fleet

    spec = find_fleet(path)
    find_router(spec.router)
    chips = sum(each.replicas * each.tp * each.dp for each in spec.pool)
    question = ask(
        {
            "model": spec.model,
            "chip": spec.chip,
            "chips": chips,
            "isl": isl,
            "osl": osl,
        },
        ttft_s=None,
        tpot_s=None,
        dtypes=(spec.dtype, spec.kv_dtype),
        usd_per_chip_hour=usd_per_chip_hour,
    )
    tiers = None if spec.cache is None else CacheTiers(spec=spec.cache)
    experts = None
    if spec.experts is not None:
        experts = ExpertLoads(spec=spec.experts, model=question.model, file=path)
    pools = (_pool(each, experts) for each in sorted(spec.pool, key=lambda each: each.role == "decode"))
    return spec, Fleet(
        question=question,
        pools=tuple(pools),
        prefix_caching=spec.prefix_caching,
        tiers=tiers,
        experts=experts,
    )


def typed(context: typer.Context) -> set[str]:
    """Names of the flags that the command line has, whatever their value."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and not source.name.startswith("DEFAULT")}


def refuse_told(given: set[str], names: Sequence[str] = TOLD, why: str = "--fleet says that") -> None:
    """InputError where a flag says what is said elsewhere."""
    twice = [f"--{name.replace('_', '-')}" for name in names if name in given]
    if twice:
        raise InputError(f"{twice[0]}: {why}; leave it out")


def _pool(spec: PoolSpec, experts: ExpertLoads | None) -> Pool:
    from tongyun.codesign.fleet import Pool
    from tongyun.codesign.plan import Plan
    from tongyun.model.shard import Shard

    picks = () if experts is None else experts.picks(spec.ep)
    plan = Plan(
        shard=Shard(tp=spec.tp, ep=spec.ep, dp=spec.dp, expert_picks=picks),
        batch=spec.batch,
        step_tokens=spec.step_tokens,
        replicas=spec.replicas,
        idle_chips=0,
    )
    return Pool(role=spec.role, plan=plan)
