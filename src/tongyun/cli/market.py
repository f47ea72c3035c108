"""`tongyun simulate` on a fleet file with several models: what it names, looked up, and what came of it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tongyun.cli.fleet import TOLD, pool_of, refuse_told, typed
from tongyun.cli.kept import kept_json, lines, refuse_failed
from tongyun.cli.planning import ask
from tongyun.errors import InputError, SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.table import Table

    from tongyun.cloud.latency import LatencyReport, Slo
    from tongyun.cloud.schedule import Schedule
    from tongyun.cloud.workload import Arrival
    from tongyun.codesign.market import Market, MarketPlayed, OfModel, Part, Served
    from tongyun.specs import MarketPoolSpec, MarketSpec, ServedSpec

RATES = ("requests_per_s", "output_tokens_per_s", "goodput_requests_per_s", "goodput_tokens_per_s")


def simulate(
    given: Mapping[str, Any],
    spec: MarketSpec,
    arrivals: Sequence[Arrival],
    slo: Slo,
    schedule: Schedule | None,
) -> None:
    """Play the load on the file's models, and show or write what came of it."""
    from tongyun.cli.simulated import write_trace
    from tongyun.cloud.sched.router import find_router

    given_flags = typed(given["context"])
    refuse_told(given_flags, (*TOLD, "plan"))
    refuse_told(given_flags, ("html",), "not written for several models")
    find_router(spec.router)
    market = read_market(
        given["fleet"], spec, arrivals, slo=slo, usd_per_chip_hour=given["usd_per_chip_hour"]
    )
    chip = next(iter(market.models.values())).question.chip.at()
    begun = time.perf_counter()
    played = market.play(
        arrivals, lambda: find_router(spec.router), chip=chip, seed=given["seed"], schedule=schedule
    )
    seconds = time.perf_counter() - begun
    if given["json"]:
        from tongyun.report import to_json

        typer.echo(to_json(as_json(spec, market, played) | {"seconds": seconds}))
    else:
        show(spec, market, played)
        typer.echo(f"{len(arrivals):,} requests simulated in {seconds:.1f} s")
    report = played.whole.report
    if schedule is not None:
        write_trace(schedule, given["perfetto"], arrivals[0].time_s + report.duration_s)
    refuse_failed(report)


# ── what is asked ────────────────────────────────────────────────────────────────────


def read_market(
    file: Path,
    spec: MarketSpec,
    arrivals: Sequence[Arrival],
    *,
    slo: Slo,
    usd_per_chip_hour: float | None = None,
) -> Market:
    """The models and pools of a file, which have to hold requests of the load's mean lengths."""
    from tongyun.codesign.market import Market
    from tongyun.codesign.upkeep import Upkeep

    count = max(len(arrivals), 1)
    isl = max(1, round(sum(arrival.prompt_tokens for arrival in arrivals) / count))
    osl = max(2, round(sum(arrival.output_tokens for arrival in arrivals) / count))
    models: dict[str, Served] = {}
    for one in spec.model:
        served = _served(one, spec.chip, (isl, osl), slo, usd_per_chip_hour)
        models |= dict.fromkeys(one.names, served)
    upkeep = None
    if spec.failures is not None or spec.autoscale:
        upkeep = Upkeep(failures=spec.failures, autoscale=spec.autoscale, file=str(file))
    try:
        market = Market(
            models=models,
            parts=_parts(spec),
            sharing=spec.sharing,
            prefix_caching=spec.prefix_caching,
            migration=spec.migration,
            upkeep=upkeep,
        )
    except InputError as error:
        raise InputError(f"{file}: pool: {error}") from None
    if spec.migration is not None and not any(part.moves(spec.migration) for part in market.parts):
        raise SpecError(
            file,
            "migration",
            "no model has engines to move requests between; accepted: with a pool that is not shared and "
            "has several replicas",
        )
    return market


def _served(
    spec: ServedSpec, chip: str, lengths: tuple[int, int], slo: Slo, usd_per_chip_hour: float | None
) -> Served:
    from tongyun.codesign.market import Served
    from tongyun.units import MS

    question = ask(
        {
            "model": spec.config or spec.name,
            "chip": chip,
            "chips": 1,
            "isl": lengths[0],
            "osl": lengths[1],
        },
        ttft_s=None,
        tpot_s=None,
        dtypes=(spec.dtype, spec.kv_dtype),
        usd_per_chip_hour=usd_per_chip_hour,
    )
    limits = replace(
        slo,
        ttft_s=slo.ttft_s if spec.ttft_ms is None else spec.ttft_ms * MS,
        tpot_s=slo.tpot_s if spec.tpot_ms is None else spec.tpot_ms * MS,
    )
    return Served(question=question, slo=limits, share=spec.share)


def _parts(spec: MarketSpec) -> tuple[Part, ...]:
    """Pools that serve the same models in the same way are one part."""
    from tongyun.codesign.market import Part

    alike = {one.name: one.names for one in spec.model}
    named = {name for pool in spec.pool for each in pool.models for name in alike.get(each, (each,))}
    rest = tuple(name for one in spec.model for name in one.names if name not in named)
    found: dict[tuple[tuple[str, ...], bool], list[MarketPoolSpec]] = {}
    for pool in spec.pool:
        models = tuple(name for each in pool.models for name in alike.get(each, (each,))) or rest
        found.setdefault((models, pool.shared), []).append(pool)
    parts = []
    for (models, shared), pools in found.items():
        roles = sorted(pool.role for pool in pools)
        if roles not in (["mixed"], ["decode", "prefill"]):
            raise InputError(
                f"the pools of {_names(models)} are {', '.join(roles)}; "
                "accepted: one mixed, or one prefill and one decode"
            )
        ordered = sorted(pools, key=lambda pool: pool.role == "decode")
        parts.append(Part(models=models, pools=tuple(map(pool_of, ordered)), shared=shared))
    return tuple(parts)


def _names(models: Sequence[str]) -> str:
    if not models:
        return "no model, for others name all of them,"
    return models[0] if len(models) == 1 else f"{models[0]} and {len(models) - 1} more"


# ── what is shown ────────────────────────────────────────────────────────────────────


def show(spec: MarketSpec, market: Market, played: MarketPlayed) -> None:
    from tongyun import report
    from tongyun.cli.simulated import latencies

    head = latencies(_headline(spec, market, played), played.whole.report)
    report.show(head, _figures(market, played), _models(played))


def _headline(spec: MarketSpec, market: Market, played: MarketPlayed) -> str:
    chip = next(iter(market.models.values())).question.chip
    parts = "; ".join(_title(part) for part in market.parts)
    return f"{spec.name}: {len(market.models)} models on {played.chips} × {chip.title}: {parts}"


def _title(part: Part) -> str:
    pools = []
    for pool in part.pools:
        plan, role = pool.plan, "" if pool.role == "mixed" else f"{pool.role} "
        pools.append(f"{plan.replicas} × {role}tp{plan.shard.tp}, batch {plan.batch}")
    how = "share" if part.shared or len(part.models) == 1 else "have each"
    return f"{len(part.models)} {how} {' + '.join(pools)}"


def _figures(market: Market, played: MarketPlayed) -> Table:
    from tongyun.cli.simulated import moves
    from tongyun.cloud.engine.protocol import total
    from tongyun.report import NOTHING, column, number, source_tag, table
    from tongyun.units import GB, Source

    whole, done = played.whole, played.whole.report
    switched = total(one.switched for one in played.models.values())
    shared = [one for one in whole.engines if one.switched]
    rows = [
        ["requests ended", f"{done.succeeded:,} of {done.requests:,} in {number(done.duration_s)} s"],
        ["output tokens/s", number(done.output_tokens_per_s)],
        ["goodput tokens/s", number(done.goodput_tokens_per_s)],
        ["requests within their limits", f"{done.attainment:.1%}"],
        ["engines in a step", f"{whole.use:.1%}"],
    ]
    if shared:
        rows += [
            ["shared engines switching", f"{switched.seconds / (len(shared) * done.duration_s):.1%}"],
            ["switches, and those with weights", f"{switched.count:,}, {switched.loads:,}"],
            [
                "a rank's bytes in, out",
                f"{switched.in_bytes / GB:,.0f} GB, {switched.out_bytes / GB:,.0f} GB",
            ],
        ]
    rows += moves(whole)
    money = NOTHING if whole.usd_per_mtoken is None else f"${number(whole.usd_per_mtoken)}"
    rows += [
        ["preemptions", f"{sum(one.preemptions for one in whole.engines):,}"],
        ["per million output tokens", money],
        ["energy per output token", f"{number(whole.joules / max(done.output_tokens, 1))} J"],
    ]
    if played.kept is not None and market.upkeep is not None:
        rows += lines(market.upkeep, played.kept)
    tag = source_tag(frozenset({Source.SIMULATED}) | whole.sources)
    return table("", [column("", left=True), column("value")], rows, caption=tag)


def _models(played: MarketPlayed) -> Table:
    """A line for each model, over the whole run's time."""
    from tongyun.report import NOTHING, column, number, table
    from tongyun.units import MS

    rows = []
    for name, one in played.models.items():
        done = one.report
        spans = [NOTHING] * 4
        if done is not None:
            spans = [
                number(None if each is None else getattr(each, key) / MS)
                for each in (done.ttft_s, done.tpot_s)
                for key in ("p50", "p99")
            ]
        rows.append(
            [
                name,
                "0 of 0" if done is None else f"{done.succeeded:,} of {done.requests:,}",
                *spans,
                NOTHING if done is None else number(done.goodput_tokens_per_s),
                NOTHING if done is None else f"{done.attainment:.1%}",
                number(one.chips),
                f"{one.switched.count:,}" if one.shared else NOTHING,
                number(one.switched.seconds) if one.shared else NOTHING,
                number(one.usd_per_mtoken),
                *([] if played.whole.moves is None else [_moved(one)]),
            ]
        )
    felt = ("TTFT ms p50", "TTFT ms p99", "TPOT ms p50", "TPOT ms p99", "goodput tokens/s", "within limits")
    heads = ["ended", *felt, "chips", "switches", "s switching", "$/Mtoken"]
    if played.whole.moves is not None:
        heads.append("moved decoding, waiting")
    caption = "simulated; shared chips by the share of tokens computed"
    return table("", [column("model", left=True), *map(column, heads)], rows, caption=caption)


def _moved(one: OfModel) -> str:
    from tongyun.report import NOTHING

    return NOTHING if one.moves is None else f"{one.moves.migrated:,}, {one.moves.rescheduled:,}"


def as_json(spec: MarketSpec, market: Market, played: MarketPlayed) -> dict[str, Any]:
    """Everything in SI."""
    whole = played.whole
    chip = next(iter(market.models.values())).question.chip
    return {
        "fleet": spec.name,
        "chip": chip.name,
        "chips": played.chips,
        "parts": market.parts,
        **_felt(whole.report),
        "use": whole.use,
        "joules": whole.joules,
        "usd_per_mtoken": whole.usd_per_mtoken,
        "models": {name: _model(one) for name, one in played.models.items()},
        "classes": {
            name: {**_felt(group.report), "share": group.share, "joules": group.share * whole.joules}
            for name, group in whole.classes.items()
        },
        "engines": whole.engines,
        "moves": whole.moves,
        "kept": None if played.kept is None else kept_json(played.kept),
        "source": sorted({"simulated"} | {source.value for source in whole.sources}),
    }


def _felt(report: LatencyReport) -> dict[str, Any]:
    return {"report": report, **{key: getattr(report, key) for key in (*RATES, "attainment")}}


def _model(one: OfModel) -> dict[str, Any]:
    return {
        **({"report": None} if one.report is None else _felt(one.report)),
        "shared": one.shared,
        "chips": one.chips,
        "joules": one.joules,
        "usd_per_mtoken": one.usd_per_mtoken,
        "switched": one.switched,
        "moves": one.moves,
    }
