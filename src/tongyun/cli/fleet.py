"""What a fleet file or a plan names, looked up: the model, the chip, the cuts of the pools.

Shared by `simulate`, which plays a load on the fleet, and `serve --twin`, which answers
requests at its pace.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tongyun.errors import InputError, SpecError, unknown

if TYPE_CHECKING:
    from collections.abc import Sequence

    import typer

    from tongyun.codesign.experts import ExpertLoads
    from tongyun.codesign.fleet import Fleet
    from tongyun.codesign.plan import Plan
    from tongyun.codesign.replicas import Pool
    from tongyun.codesign.space import Question
    from tongyun.model.graph import Precision
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
    "draft_tokens",
    "acceptance",
)
"""Flags whose part a fleet file takes over."""

PLANNED = (
    "chips",
    "tp",
    "ep",
    "dp",
    "batch",
    "step_tokens",
    "dtype",
    "kv_dtype",
    "draft_tokens",
    "acceptance",
)
"""And those that a plan's file takes over; --model and --chip may say where its files are."""


def read_fleet(
    path: Path, *, isl: int = 1, osl: int = 2, usd_per_chip_hour: float | None = None
) -> tuple[FleetSpec, Fleet]:
    """A fleet file and the fleet it describes, which has to hold a request of `isl` and `osl` tokens."""
    from tongyun.cli.planning import ask
    from tongyun.cloud.sched.router import find_router
    from tongyun.codesign.experts import ExpertLoads
    from tongyun.codesign.fleet import Fleet
    from tongyun.codesign.space import MOST_DRAFTED
    from tongyun.codesign.tiers import CacheTiers
    from tongyun.codesign.upkeep import Upkeep
    from tongyun.specs import find_fleet, find_market
    from tongyun.units import Source

    if find_market(path) is not None:
        raise InputError(f"{path}: model: there are several; accepted: a fleet of one model")
    spec = find_fleet(path)
    find_router(spec.router)
    drafts = spec.drafts
    if drafts is not None and drafts.tokens > MOST_DRAFTED:
        raise SpecError(path, "drafts.tokens", f"expected 1 … {MOST_DRAFTED}, got {drafts.tokens}")
    chips = sum(each.replicas * each.tp * each.dp for each in spec.pool)
    question = ask(
        {
            "model": spec.model,
            "chip": spec.chip,
            "chips": chips,
            "isl": isl,
            "osl": osl,
            "draft_tokens": None if drafts is None else drafts.tokens,
            "acceptance": None if drafts is None else drafts.acceptance.value,
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
    pools = (pool_of(each, experts) for each in sorted(spec.pool, key=lambda each: each.role == "decode"))
    upkeep = None
    if spec.failures is not None or spec.autoscale:
        upkeep = Upkeep(failures=spec.failures, autoscale=spec.autoscale, file=str(path))
    fleet = Fleet(
        question=question,
        pools=tuple(pools),
        prefix_caching=spec.prefix_caching,
        tiers=tiers,
        experts=experts,
        classes=spec.classes,
        aging_s=spec.class_aging_s,
        migration=spec.migration,
        upkeep=upkeep,
        acceptance_source=Source.ASSUMED if drafts is None else drafts.acceptance.source,
    )
    if upkeep is not None:
        upkeep.check(fleet.sites(), question.chip.at())
    return spec, fleet


def read_plan(given: Mapping[str, Any], *, isl: int, osl: int) -> tuple[Question, Plan]:
    """The best plan that `tongyun plan --json` wrote to the file `given["plan"]`, and what it was for."""
    from tongyun.cli.planning import ask

    file = given["plan"]
    told = _read_answer(file)
    if told["best"] is None:
        raise SpecError(file, "best", f"there is no plan: {told.get('limit')}")
    cut = _under(file, told["best"], "best", "plan")
    price = given["usd_per_chip_hour"]
    question = ask(
        {
            "model": given["model"] or told["model"],
            "chip": given["chip"] or told["chip"],
            "chips": _whole(file, told, "chips", under=""),
            "isl": isl,
            "osl": osl,
            **_drafted(file, told),
        },
        ttft_s=None,
        tpot_s=None,
        dtypes=(None, None),
        usd_per_chip_hour=told.get("usd_per_chip_hour") if price is None else price,
        precision=_stored(file, told),
    )
    for key, name in (("model", question.model.name), ("chip", question.chip.name)):
        if told[key] != name:
            raise SpecError(file, key, f"the plan is for {told[key]}, not {name}")
    return question, _deployed(file, cut)


def _deployed(file: Path, cut: Mapping[str, Any]) -> Plan:
    """The plan as the search had it, from its pools."""
    from dataclasses import replace

    pools = cut.get("pools")
    if not isinstance(pools, list) or not pools:
        raise SpecError(file, "best.plan.pools", f"expected a list of pools, got {pools!r}")
    kinds = [_kind(file, pool, f"best.plan.pools.{i}") for i, pool in enumerate(pools)]
    roles = [role for role, _ in kinds]
    prefill = [kind for role, kind in kinds if role == "prefill"]
    decode = [kind for role, kind in kinds if role == "decode"]
    mixed = tuple(kind for role, kind in kinds if role == "mixed")
    if len(prefill) != len(decode) or len(prefill) > 1:
        raise SpecError(
            file,
            "best.plan.pools",
            f"their roles are {', '.join(roles)}; accepted: mixed, or one prefill and one decode",
        )
    main, others = (decode[0], mixed) if decode else (mixed[0], mixed[1:])
    idle = _whole(file, cut, "idle_chips", least=0)
    return replace(main, idle_chips=idle, prefill=prefill[0] if prefill else None, others=others)


def _kind(file: Path, pool: object, where: str) -> tuple[str, Plan]:
    """One pool's replicas, and their task."""
    from tongyun.codesign.answer import Plan
    from tongyun.model.shard import Shard
    from tongyun.specs.fleet import ROLES

    if not isinstance(pool, dict):
        raise SpecError(file, where, f"expected an object, got {pool!r}")
    if pool.get("role") not in ROLES:
        raise SpecError(file, f"{where}.role", unknown("value", str(pool.get("role")), ROLES))
    names = ("tp", "pp", "ep", "dp", "batch", "step_tokens", "replicas")
    tp, pp, ep, dp, batch, tokens, replicas = (_whole(file, pool, name, under=f"{where}.") for name in names)
    shard = Shard(tp=tp, pp=pp, ep=ep, dp=dp)
    kind = Plan(shard=shard, batch=batch, step_tokens=tokens, replicas=replicas, idle_chips=0)
    return str(pool["role"]), kind


def _read_answer(file: Path) -> dict[str, Any]:
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{file}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
    keys = ("model", "chip", "chips", "best", "precision")
    lacking = [key for key in keys if not isinstance(told, dict) or key not in told]
    if lacking:
        raise SpecError(
            file, lacking[0], "missing; accepted: what `tongyun plan --chip … --json` wrote, whole"
        )
    for key in ("model", "chip"):
        if not isinstance(told[key], str):
            raise SpecError(file, key, f"expected a text, got {told[key]!r}")
    return dict(told)


def _under(file: Path, told: object, where: str, key: str) -> Mapping[str, Any]:
    found = told.get(key) if isinstance(told, dict) else None
    if not isinstance(found, dict):
        raise SpecError(file, f"{where}.{key}", f"expected an object, got {found!r}")
    return found


def _whole(
    file: Path, told: Mapping[str, Any], key: str, *, least: int = 1, under: str = "best.plan."
) -> int:
    value = told.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SpecError(file, f"{under}{key}", f"expected a whole number ≥ {least}, got {value!r}")
    return value


def _drafted(file: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    """How many tokens the plan drafts, and how often one is right; older files do not say."""
    share = told.get("acceptance", 0.0)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise SpecError(file, "acceptance", f"expected a probability from 0 to 1, got {share!r}")
    tokens = _whole(file, {"draft_tokens": 0, **told}, "draft_tokens", least=0, under="")
    return {"draft_tokens": tokens, "acceptance": float(share)}


def _stored(file: Path, told: Mapping[str, Any]) -> Precision:
    """The plan's types, each under the name of its field."""
    import dataclasses

    from tongyun.model.graph import Precision
    from tongyun.units import DType

    fields = _under(file, told, "", "precision")
    names = [field.name for field in dataclasses.fields(Precision)]
    strange = [key for key in fields if key not in names]
    if strange:
        raise SpecError(file, f"precision.{strange[0]}", f"unknown; accepted: {', '.join(names)}")
    try:
        told_types: dict[str, Any] = {
            key: DType(value) if isinstance(value, str) else value for key, value in fields.items()
        }
        return Precision(**told_types)
    except ValueError as error:
        raise SpecError(file, "precision", str(error)) from error


def typed(context: typer.Context) -> set[str]:
    """Names of the flags that the command line has, whatever their value."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and not source.name.startswith("DEFAULT")}


def refuse_told(given: set[str], names: Sequence[str] = TOLD, why: str = "--fleet says that") -> None:
    """InputError where a flag says what is said elsewhere."""
    twice = [f"--{name.rstrip('_').replace('_', '-')}" for name in names if name in given]
    if twice:
        raise InputError(f"{twice[0]}: {why}; leave it out")


def pool_of(spec: PoolSpec, experts: ExpertLoads | None = None) -> Pool:
    """A pool as its table says."""
    from tongyun.codesign.plan import Plan
    from tongyun.codesign.replicas import Pool
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
