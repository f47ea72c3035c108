"""`tongyun simulate`: a workload or trace, request by request, on a fleet nobody has to own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tongyun.cli.fleet import PLANNED, read_fleet, read_plan, refuse_told, typed
from tongyun.cli.kept import refuse_failed
from tongyun.cli.planning import ask, check_drafts, command
from tongyun.cli.simulated import as_json, show, write_trace
from tongyun.errors import Infeasible, InputError

if TYPE_CHECKING:
    from tongyun.cloud.latency import Slo
    from tongyun.cloud.schedule import Schedule
    from tongyun.cloud.workload import Arrival
    from tongyun.codesign.fleet import Fleet
    from tongyun.codesign.plan import Plan
    from tongyun.codesign.space import Question
    from tongyun.errors import TraceError


def simulate(
    context: typer.Context,
    fleet: Annotated[
        Path | None, typer.Option(help="TOML file: model, chip, pools, router; no flags for them then.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="What `tongyun plan --json` wrote: its best plan is the fleet.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hugging Face id in the catalogue, or a directory.")
    ] = None,
    chip: Annotated[str | None, typer.Option(help="Catalogue name, or a TOML file.")] = None,
    chips: Annotated[int, typer.Option(help="Chips there are.")] = 1,
    rate: Annotated[
        float | None, typer.Option(help="Requests a second, at random, of --isl and --osl.")
    ] = None,
    variation: Annotated[
        float, typer.Option(help="Of the time between requests, with --rate: 1 is Poisson, more is bursty.")
    ] = 1.0,
    isl: Annotated[int, typer.Option(help="Prompt tokens of a request, with --rate.")] = 1024,
    osl: Annotated[int, typer.Option(help="Output tokens of a request, with --rate.")] = 256,
    workload: Annotated[str | None, typer.Option(help="Catalogue name, or a TOML file.")] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Azure CSV, Mooncake JSONL, or a CSV or Parquet file of moments and lengths."),
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
    pools: Annotated[
        str, typer.Option(help="Without --tp, the best of: mixed, split (prefill and decode apart), both.")
    ] = "mixed",
    router: Annotated[str, typer.Option(help="round-robin, least-load, prefix or freeness.")] = "least-load",
    prefix_caching: Annotated[bool, typer.Option(help="Share KV blocks of equal prompt beginnings.")] = True,
    ttft_ms: Annotated[float | None, typer.Option(help="Limit on the time to first token.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(help="Limit on the mean time between tokens.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Weights and arithmetic; default as released.")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Keys and values; default bf16.")] = None,
    draft_tokens: Annotated[
        int | None, typer.Option(help="Tokens drafted for each step (MTP, EAGLE); default none.")
    ] = None,
    acceptance: Annotated[
        float | None, typer.Option(help="Probability that a drafted token is right, with --draft-tokens.")
    ] = None,
    usd_per_chip_hour: Annotated[float | None, typer.Option(help="Your price.")] = None,
    seed: Annotated[int, typer.Option(help="Of moments, lengths and tokens.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="For programs: SI units.")] = False,
    html: Annotated[Path | None, typer.Option(help="A report as one HTML file.")] = None,
    perfetto: Annotated[
        Path | None, typer.Option(help="The schedule as a trace for ui.perfetto.dev: steps and requests.")
    ] = None,
    window: Annotated[
        str | None, typer.Option(help="FROM:TO, seconds of the run that --perfetto shows; default from 0.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
) -> None:
    """Simulate a fleet under a load, request by request, with the production scheduler."""
    given = dict(locals())
    from tongyun.cli import market
    from tongyun.cloud.record import Recorder
    from tongyun.cloud.sched.router import find_router
    from tongyun.codesign.classes import headroom
    from tongyun.specs import find_market

    for place in (html, perfetto):
        if place is not None and place.exists() and not force:
            raise InputError(f"{place}: already there; --force replaces")
    schedule = _schedule(perfetto, window)
    slo = _slo(ttft_ms, tpot_ms)
    find_router(router)
    arrivals = _arrivals(given)
    if fleet is not None and (several := find_market(fleet)) is not None:
        market.simulate(given, several, arrivals, slo, schedule)
        return
    router, asked = _fleet(given, arrivals, slo)
    begun = time.perf_counter()
    played = asked.play(
        arrivals,
        find_router(router, headroom=headroom(asked.classes)),
        chip=asked.question.chip.at(),
        seed=seed,
        slo=slo,
        recorder=Recorder(None if schedule is None else schedule.pool),
    )
    seconds = time.perf_counter() - begun
    if json:
        from tongyun.report import to_json

        typer.echo(to_json(as_json(asked, played, router) | {"seconds": seconds}))
    else:
        show(asked, played, router)
        typer.echo(f"{len(arrivals):,} requests simulated in {seconds:.1f} s")
    if html is not None:
        from tongyun.codesign.launch import write_files
        from tongyun.codesign.run_page import page

        text = page(asked, played, router=router, command=_told(given))
        write_files({html.name: text}, html.parent, force=force)
        typer.echo(f"wrote {html}", err=True)
    if perfetto is not None and schedule is not None:
        assert played.recording is not None
        write_trace(schedule, perfetto, max(one.ended_s for one in played.recording.records))
    refuse_failed(played.report)


def _schedule(perfetto: Path | None, window: str | None) -> Schedule | None:
    """What takes the schedule down, where it is asked for."""
    from tongyun.cloud.schedule import Schedule

    if perfetto is None:
        if window is not None:
            raise InputError("--window says which part --perfetto shows, which is not given")
        return None
    if window is None:
        return Schedule()
    try:
        begin_s, end_s = map(float, window.split(":"))
    except ValueError as error:
        raise InputError(f"--window {window}: accepted: FROM:TO in seconds, such as 0:60") from error
    return Schedule(begin_s, end_s)


def _told(given: dict[str, Any]) -> str:
    """The command line, without what was left at its default."""
    names = typed(given["context"])
    off = {f"no_{name}": True for name in names if given[name] is False}
    return command({**{name: given[name] for name in given if name in names}, **off}, "simulate")


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
    for name, usual, source in (("stretch", 1.0, "trace"), ("variation", 1.0, "rate")):
        if given[name] != usual and given[source] is None:
            raise InputError(f"--{name} is about --{source}, which is not given")
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
    process = Process.POISSON if given["variation"] == 1 else Process.GAMMA
    return sample(
        Workload(
            arrivals=Arrivals(process=process, rate_per_s=given["rate"], variation=given["variation"]),
            prompt=Lengths.fixed(given["isl"]),
            output=Lengths.fixed(given["osl"]),
            requests=count or 1000,
            seed=given["seed"],
        )
    )


def _fleet(given: dict[str, Any], arrivals: list[Arrival], slo: Slo) -> tuple[str, Fleet]:
    """The router's name and the fleet, from its file or from the flags."""
    from tongyun.codesign.fleet import Fleet
    from tongyun.codesign.replicas import of_a_group, pools_of

    isl, osl = _lengths(arrivals)
    price = given["usd_per_chip_hour"]
    if given["fleet"] is not None:
        if given["plan"] is not None:
            raise InputError("the fleet comes from one of --fleet and --plan, not both")
        refuse_told(typed(given["context"]))
        spec, fleet = read_fleet(given["fleet"], isl=isl, osl=osl, usd_per_chip_hour=price)
        return spec.router, fleet
    if given["plan"] is not None:
        refuse_told(typed(given["context"]), PLANNED, "--plan says that")
        question, plan = read_plan(given, isl=isl, osl=osl)
        pools = pools_of(of_a_group(plan), given["prefill_replicas"])
        return given["router"], Fleet(question=question, pools=pools, prefix_caching=given["prefix_caching"])
    for name in ("model", "chip"):
        if given[name] is None:
            raise InputError(f"--{name} is missing; or --fleet or --plan names a file that says it")
    check_drafts(given)
    question = ask(
        {**given, "isl": isl, "osl": osl},
        ttft_s=slo.ttft_s,
        tpot_s=slo.tpot_s,
        dtypes=(given["dtype"], given["kv_dtype"]),
        usd_per_chip_hour=price,
    )
    plan = _given_plan(given, question) if given["tp"] is not None else of_a_group(_best_plan(question))
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
    """The planner's best one of one kind of replica without pipeline stages, or of two pools of them,
    inside the limits where any is. Its batch is a group's, as a fleet's is."""
    from tongyun.codesign.plan import plan

    answer = plan(question)
    offers = [
        offer
        for offer in answer.pareto
        if not offer.plan.others and all(kind.shard.pp == 1 for _, kind in offer.plan.kinds)
    ]
    if not offers:
        raise Infeasible(f"no plan of one kind without pipeline stages: {answer.limit}; --tp names one")
    within = [offer for offer in offers if offer.meets] or offers
    return max(within, key=lambda offer: offer.figures.tok_s_per_chip).plan
