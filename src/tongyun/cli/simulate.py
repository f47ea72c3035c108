"""`tongyun simulate`: a workload or trace, request by request, on a fleet nobody has to own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tongyun.cli.fleet import read_fleet, refuse_told, typed
from tongyun.cli.plan import ask
from tongyun.errors import Infeasible, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from tongyun.cloud.latency import Group, Slo
    from tongyun.cloud.workload import Arrival
    from tongyun.codesign.fleet import Fleet, Played, Pool
    from tongyun.codesign.plan import Plan
    from tongyun.codesign.space import Question
    from tongyun.errors import TraceError


def simulate(
    context: typer.Context,
    fleet: Annotated[
        Path | None, typer.Option(help="TOML file: model, chip, pools, router; no flags for them then.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hugging Face id in the catalogue, or a directory.")
    ] = None,
    chip: Annotated[str | None, typer.Option(help="Catalogue name, or a TOML file.")] = None,
    chips: Annotated[int, typer.Option(help="Chips there are.")] = 1,
    rate: Annotated[
        float | None, typer.Option(help="Requests a second, Poisson, of --isl and --osl.")
    ] = None,
    isl: Annotated[int, typer.Option(help="Prompt tokens of a request, with --rate.")] = 1024,
    osl: Annotated[int, typer.Option(help="Output tokens of a request, with --rate.")] = 256,
    workload: Annotated[str | None, typer.Option(help="Catalogue name, or a TOML file.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Azure CSV, Mooncake JSONL, or a CSV of moments and lengths.")
    ] = None,
    stretch: Annotated[float, typer.Option(help="Play a trace over so many times its time.")] = 1.0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out and count bad lines of a trace.")
    ] = False,
    requests: Annotated[int | None, typer.Option(help="Only the first so many; with --rate, 1000.")] = None,
    tp: Annotated[int | None, typer.Option(help="Tensor parallelism; the best plan's if left out.")] = None,
    ep: Annotated[int, typer.Option(help="Expert parallelism, with --tp.")] = 1,
    dp: Annotated[int, typer.Option(help="Attention groups of a replica, with --tp.")] = 1,
    batch: Annotated[int, typer.Option(help="Requests at once in an attention group, with --tp.")] = 64,
    step_tokens: Annotated[int, typer.Option(help="Token budget of a step, with --tp.")] = 1024,
    prefill_replicas: Annotated[
        int, typer.Option(help="Replicas that only prefill; the others then only decode.")
    ] = 0,
    router: Annotated[str, typer.Option(help="round-robin, least-load or prefix.")] = "least-load",
    prefix_caching: Annotated[bool, typer.Option(help="Share KV blocks of equal prompt beginnings.")] = True,
    ttft_ms: Annotated[float | None, typer.Option(help="Limit on the time to first token.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(help="Limit on the mean time between tokens.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Weights and arithmetic; default as released.")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Keys and values; default bf16.")] = None,
    usd_per_chip_hour: Annotated[float | None, typer.Option(help="Your price.")] = None,
    seed: Annotated[int, typer.Option(help="Of moments, lengths and tokens.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="For programs: SI units.")] = False,
) -> None:
    """Simulate a fleet under a load, request by request, with the production scheduler."""
    given = dict(locals())
    from tongyun.cloud.retries import LOST
    from tongyun.cloud.sched.router import find_router

    slo = _slo(ttft_ms, tpot_ms)
    find_router(router)
    arrivals = _arrivals(given)
    router, asked = _fleet(given, arrivals, slo)
    begun = time.perf_counter()
    played = asked.play(arrivals, find_router(router), chip=asked.question.chip.at(), seed=seed, slo=slo)
    seconds = time.perf_counter() - begun
    if json:
        from tongyun.report import to_json

        typer.echo(to_json(as_json(asked, played, router) | {"seconds": seconds}))
    else:
        show(asked, played, router)
        typer.echo(f"{len(arrivals):,} requests simulated in {seconds:.1f} s")
    # What is lost by a failure is an outcome; what no engine takes is a question that had no answer.
    refused = [(why, count) for why, count in played.report.errors if not why.startswith(LOST)]
    if refused:
        raise Infeasible(f"{sum(count for _, count in refused)} requests could not run: {refused[0][0]}")


def _slo(ttft_ms: float | None, tpot_ms: float | None) -> Slo:
    from tongyun.cloud.latency import Slo
    from tongyun.units import MS

    for flag, value in (("--ttft-ms", ttft_ms), ("--tpot-ms", tpot_ms)):
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{flag} {value:g}: accepted: more than 0")
    return Slo(
        ttft_s=None if ttft_ms is None else ttft_ms * MS, tpot_s=None if tpot_ms is None else tpot_ms * MS
    )


# ── what is asked ────────────────────────────────────────────────────────────────────


def _arrivals(given: dict[str, Any]) -> list[Arrival]:
    """The load of exactly one of --rate, --workload and --trace."""
    from itertools import islice

    from tongyun.cloud.trace import read_trace
    from tongyun.cloud.workload import Arrivals, Lengths, Process, Workload, sample, stretched
    from tongyun.specs import find_workload

    sources = [name for name in ("rate", "workload", "trace") if given[name] is not None]
    if len(sources) != 1:
        told = " and ".join(f"--{name}" for name in sources) or "none"
        raise InputError(f"the load comes from one of --rate, --workload and --trace, not {told}")
    count = given["requests"]
    if count is not None and count < 1:
        raise InputError(f"--requests {count}: accepted: 1 or more")
    if given["trace"] is not None:
        skipped: list[TraceError] | None = [] if given["skip_bad"] else None
        arrivals = read_trace(given["trace"], limit=count, skipped=skipped)
        if skipped:
            typer.echo(f"{len(skipped):,} bad lines left out; the first: {skipped[0]}", err=True)
        return stretched(arrivals, given["stretch"])
    if given["workload"] is not None:
        load = Workload.from_spec(find_workload(given["workload"]))
        if load.arrivals.users is not None:
            raise InputError(f"--workload {given['workload']}: a closed loop is not simulated on a fleet")
        return list(islice(sample(load), count))
    return sample(
        Workload(
            arrivals=Arrivals(process=Process.POISSON, rate_per_s=given["rate"]),
            prompt=Lengths.fixed(given["isl"]),
            output=Lengths.fixed(given["osl"]),
            requests=count or 1000,
            seed=given["seed"],
        )
    )


def _fleet(given: dict[str, Any], arrivals: list[Arrival], slo: Slo) -> tuple[str, Fleet]:
    """The router's name and the fleet, from its file or from the flags."""
    from tongyun.codesign.fleet import Fleet, pools_of

    isl, osl = _lengths(arrivals)
    if given["fleet"] is not None:
        refuse_told(typed(given["context"]))
        spec, fleet = read_fleet(
            given["fleet"], isl=isl, osl=osl, usd_per_chip_hour=given["usd_per_chip_hour"]
        )
        return spec.router, fleet
    for name in ("model", "chip"):
        if given[name] is None:
            raise InputError(f"--{name} is missing; or --fleet names a file that says it")
    question = ask(
        {**given, "isl": isl, "osl": osl},
        ttft_s=slo.ttft_s,
        tpot_s=slo.tpot_s,
        dtypes=(given["dtype"], given["kv_dtype"]),
        usd_per_chip_hour=given["usd_per_chip_hour"],
    )
    plan = _given_plan(given, question) if given["tp"] is not None else _best_plan(question)
    pools = pools_of(plan, given["prefill_replicas"])
    return given["router"], Fleet(question=question, pools=pools, prefix_caching=given["prefix_caching"])


def _lengths(arrivals: list[Arrival]) -> tuple[int, int]:
    """Mean prompt and output tokens."""
    prompt = sum(arrival.prompt_tokens for arrival in arrivals) / len(arrivals)
    output = sum(arrival.output_tokens for arrival in arrivals) / len(arrivals)
    return max(1, round(prompt)), max(2, round(output))


def _given_plan(given: dict[str, Any], question: Question) -> Plan:
    from tongyun.codesign.plan import Plan
    from tongyun.model.shard import Shard

    shard = Shard(tp=given["tp"], ep=given["ep"], dp=given["dp"])
    replicas, idle = divmod(question.chips, shard.ranks)
    if not replicas:
        raise InputError(f"--chips {question.chips}: a replica of this cut takes {shard.ranks}")
    return Plan(
        shard=shard,
        batch=given["batch"],
        step_tokens=given["step_tokens"],
        replicas=replicas,
        idle_chips=idle,
    )


def _best_plan(question: Question) -> Plan:
    """The planner's best one without pipeline stages, inside the limits where any is."""
    from tongyun.codesign.plan import plan

    answer = plan(question)
    offers = [offer for offer in answer.pareto if offer.plan.shard.pp == 1]
    if not offers:
        raise Infeasible(f"no plan without pipeline stages: {answer.limit}; --tp names one")
    within = [offer for offer in offers if offer.meets] or offers
    return max(within, key=lambda offer: offer.figures.tok_s_per_chip).plan


# ── what is shown ────────────────────────────────────────────────────────────────────


def show(fleet: Fleet, played: Played, router: str) -> None:
    from tongyun import report

    parts = [_latencies(fleet, played, router), _figures(fleet, played)]
    for head, groups in (("class", played.classes), ("model", played.models)):
        if groups:
            parts.append(_groups(head, groups, played))
    report.show(*parts)


def _latencies(fleet: Fleet, played: Played, router: str) -> Table:
    from tongyun.report import NOTHING, column, number, table
    from tongyun.units import MS

    done, question = played.report, fleet.question
    pools = " + ".join(_title(pool) for pool in fleet.pools)
    title = f"{question.model.name} on {question.chips} × {question.chip.title}: {pools}, {router}"
    rows = []
    for name, one in (("TTFT ms", done.ttft_s), ("TPOT ms", done.tpot_s), ("end to end ms", done.latency_s)):
        values = () if one is None else (one.mean, one.p50, one.p90, one.p99, one.p99_9, one.most)
        rows.append([name, *([number(value / MS) for value in values] or [NOTHING] * 6)])
    names = ("mean", "p50", "p90", "p99", "p99.9", "max")
    return table(title, [column("", left=True), *map(column, names)], rows)


def _title(pool: Pool) -> str:
    plan, shard = pool.plan, pool.plan.shard
    role = "" if pool.role == "mixed" else f"{pool.role} "
    return (
        f"{plan.replicas} × {role}(tp{shard.tp} ep{shard.ep} dp{shard.dp}), "
        f"batch {plan.batch}, {plan.step_tokens} tokens a step"
    )


def _figures(fleet: Fleet, played: Played) -> Table:
    from tongyun.report import NOTHING, column, number, source_tag, table
    from tongyun.units import Source

    done, question = played.report, fleet.question
    money = NOTHING if played.usd_per_mtoken is None else f"${number(played.usd_per_mtoken)}"
    rows = [
        ["requests ended", f"{done.succeeded:,} of {done.requests:,} in {number(done.duration_s)} s"],
        ["output tokens/s", number(done.output_tokens_per_s)],
        ["per chip", number(done.output_tokens_per_s / question.chips)],
        ["engines in a step", f"{played.use:.1%}"],
        ["prompt tokens from cache", f"{played.prefix_hits:.1%}"],
        *([f"  of these from {name}", f"{share:.1%}"] for name, share in _tier_hits(fleet, played).items()),
        ["preemptions", f"{sum(one.preemptions for one in played.engines):,}"],
        ["per million output tokens", money],
        ["energy per output token", f"{number(played.joules / max(done.output_tokens, 1))} J"],
    ]
    if played.kept is not None:
        from tongyun.cli.kept import lines

        rows += lines(fleet, played.kept)
    if done.slo.ttft_s is not None or done.slo.tpot_s is not None:
        rows.insert(2, ["goodput tokens/s", number(done.goodput_tokens_per_s)])
        rows.insert(3, ["requests within limits", f"{done.attainment:.1%}"])
    tag = source_tag(frozenset({Source.SIMULATED}) | played.sources)
    return table("", [column("", left=True), column("value")], rows, caption=tag)


def _groups(head: str, groups: Mapping[str, Group], played: Played) -> Table:
    """A line for each class or model, over the whole run's time."""
    from tongyun.report import column, number, table
    from tongyun.units import MS

    rows = []
    for name, group in groups.items():
        done = group.report
        spans = [
            number(None if one is None else getattr(one, key) / MS)
            for one in (done.ttft_s, done.tpot_s)
            for key in ("p50", "p99")
        ]
        rows.append(
            [
                name or "(none)",
                f"{done.succeeded:,} of {done.requests:,}",
                *spans,
                number(done.goodput_tokens_per_s),
                f"{done.attainment:.1%}",
                number(played.usd_per_mtoken_of(group)),
                number(played.joules_per_token(group)),
            ]
        )
    felt = ("TTFT ms p50", "TTFT ms p99", "TPOT ms p50", "TPOT ms p99", "goodput tokens/s", "within limits")
    heads = ("requests ended", *felt, "$/Mtoken", "J/token")
    caption = "simulated; money and energy by the share of tokens computed"
    return table("", [column(head, left=True), *map(column, heads)], rows, caption=caption)


def _groups_json(groups: Mapping[str, Group], played: Played) -> dict[str, Any]:
    rates = ("requests_per_s", "output_tokens_per_s", "goodput_requests_per_s", "goodput_tokens_per_s")
    return {
        name: {
            "report": group.report,
            **{key: getattr(group.report, key) for key in (*rates, "attainment")},
            "share": group.share,
            "joules": group.share * played.joules,
            "usd_per_mtoken": played.usd_per_mtoken_of(group),
        }
        for name, group in groups.items()
    }


def _tier_hits(fleet: Fleet, played: Played) -> dict[str, float]:
    """Share of the prompt tokens that came back from each memory behind the cache, by its name."""
    return {} if fleet.tiers is None else dict(zip(fleet.tiers.names, played.tier_hits, strict=True))


def as_json(fleet: Fleet, played: Played, router: str) -> dict[str, Any]:
    """Everything in SI."""
    from tongyun.cli.kept import kept_json

    done, question = played.report, fleet.question
    rates = ("requests_per_s", "output_tokens_per_s", "goodput_requests_per_s", "goodput_tokens_per_s")
    return {
        "model": question.model.name,
        "chip": question.chip.name,
        "chips": question.chips,
        "pools": fleet.pools,
        "router": router,
        "report": done,
        **{name: getattr(done, name) for name in (*rates, "attainment")},
        "use": played.use,
        "prefix_hits": played.prefix_hits,
        "tier_hits": _tier_hits(fleet, played),
        "joules": played.joules,
        "usd_per_mtoken": played.usd_per_mtoken,
        "classes": _groups_json(played.classes, played),
        "models": _groups_json(played.models, played),
        "engines": played.engines,
        "kept": None if played.kept is None else kept_json(played.kept),
        "source": sorted({"simulated"} | {source.value for source in played.sources}),
    }
