"""`tongyun bench serving`: an open-loop load on an OpenAI-compatible endpoint, and what its users felt."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tongyun.errors import InputError
from tongyun.units import MS

if TYPE_CHECKING:
    from rich.table import Table

    from tongyun.cloud.latency import Percentiles
    from tongyun.cloud.load import LoadRun, Observer
    from tongyun.cloud.workload import Arrival

bench = typer.Typer(help="Measure something that runs.", no_args_is_help=True)


@bench.callback()
def measurements() -> None:
    """Measure something that runs."""


@bench.command()
def serving(
    url: Annotated[str, typer.Option(help="Root of the endpoint, http://HOST:PORT or http://HOST:PORT/v1.")],
    model: Annotated[str | None, typer.Option(help="Model to ask for; the first listed if left out.")] = None,
    endpoint: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    rate: Annotated[float, typer.Option(help="Requests a second, Poisson.")] = 1.0,
    requests: Annotated[int, typer.Option(help="Requests to send; of a trace, the first so many.")] = 100,
    isl: Annotated[int, typer.Option(help="Prompt tokens of a request.")] = 512,
    osl: Annotated[int, typer.Option(help="Output tokens of a request.")] = 128,
    trace: Annotated[
        Path | None, typer.Option(help="Azure CSV or Mooncake JSONL, instead of a rate.")
    ] = None,
    stretch: Annotated[float, typer.Option(help="Play a trace over so many times its time.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of moments, lengths and tokens.")] = 0,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="Limit on the time to first token.")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(help="Limit on the time per token after it.")] = None,
    concurrency_limit: Annotated[int | None, typer.Option(help="Requests in flight at most.")] = None,
    warmup: Annotated[int, typer.Option(help="Requests sent before and not counted.")] = 4,
    timeout: Annotated[float, typer.Option(help="Seconds until a request is given up.")] = 600.0,
    api_key: Annotated[
        str | None, typer.Option(envvar="TONGYUN_API_KEY", help="Key of the endpoint.", show_default=False)
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Send requests when they are due, whether or not earlier ones have come back. Exits 1 if any failed."""
    from tongyun.cloud.latency import Slo
    from tongyun.cloud.load import LoadOptions, measure
    from tongyun.cloud.probe import APIS, Target
    from tongyun.errors import unknown

    if endpoint not in APIS:
        raise InputError(f"--endpoint: {unknown('endpoint', endpoint, APIS)}")
    target = Target(
        url=url, model=model, api="chat" if endpoint == "chat" else "completions", api_key=api_key
    )
    arrivals = _traced(trace, requests, stretch) if trace else _drawn(rate, requests, (isl, osl), seed)
    options = LoadOptions(
        seed=seed,
        slo=Slo(ttft_s=_limit("--slo-ttft-ms", slo_ttft_ms), tpot_s=_limit("--slo-tpot-ms", slo_tpot_ms)),
        concurrency_limit=_at_least("--concurrency-limit", concurrency_limit, 1),
        warmup_requests=_at_least("--warmup", warmup, 0) or 0,
        timeout_s=timeout,
    )
    with watched(len(arrivals)) as observer:
        run = measure(target, arrivals, options, observer)
    show(run, as_json=json_)
    if run.report.failed:
        raise typer.Exit(1)


def _drawn(rate: float, count: int, lengths: tuple[int, int], seed: int) -> list[Arrival]:
    from tongyun.cloud.workload import Arrivals, Lengths, Process, Workload, sample

    prompt, output = map(Lengths.fixed, lengths)
    arrivals = Arrivals(process=Process.POISSON, rate_per_s=rate)
    return sample(Workload(arrivals=arrivals, prompt=prompt, output=output, requests=count, seed=seed))


def _traced(file: Path, count: int, stretch: float) -> list[Arrival]:
    from tongyun.cloud.trace import read_trace
    from tongyun.cloud.workload import stretched

    return stretched(read_trace(file, limit=_at_least("--requests", count, 1)), stretch)


def _limit(flag: str, value_ms: float | None) -> float | None:
    if value_ms is not None and not 0 < value_ms < math.inf:
        raise InputError(f"{flag} {value_ms:g}: accepted: more than 0 ms")
    return None if value_ms is None else value_ms * MS


def _at_least(flag: str, value: int | None, least: int) -> int | None:
    if value is not None and value < least:
        raise InputError(f"{flag} {value}: accepted: {least} or more")
    return value


@contextmanager
def watched(total: int) -> Iterator[Observer]:
    """A progress bar on stderr while a load runs."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from tongyun.cloud.load import Observer

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn twice a second: the bar shares its cores with the load and perhaps with the server.
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2) as progress:
        task = progress.add_task("load", total=total)
        yield Observer(
            stage=lambda name: progress.update(task, description=name),
            record=lambda record: progress.advance(task),
        )


def show(run: LoadRun, *, as_json: bool) -> None:
    """Print a load's result on stdout."""
    if as_json:
        typer.echo(json.dumps(run.as_json()))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_latencies(run))
    console.print(_rates(run))
    for kind, count in run.report.errors:
        console.print(f"{count} × {kind}: {run.details.get(kind, '')}", markup=False)
    for note in _notes(run):
        console.print(note, markup=False)


def _latencies(run: LoadRun) -> Table:
    from rich.table import Table

    report = run.report
    title = (
        f"{run.endpoint.model}: {report.succeeded} of {report.requests} requests in {report.duration_s:.1f} s"
    )
    table = Table("ms", "mean", "p50", "p90", "p99", "max", "source", title=title, title_justify="left")
    for name, values in (
        ("TTFT", report.ttft_s),
        ("TPOT", report.tpot_s),
        ("end to end", report.latency_s),
        ("sent late", run.lag_s),
    ):
        table.add_row(name, *_cells(values), run.source.value)
    return table


def _cells(values: Percentiles | None) -> list[str]:
    if values is None:
        return ["–"] * 5
    return [f"{each / MS:.2f}" for each in (values.mean, values.p50, values.p90, values.p99, values.most)]


def _rates(run: LoadRun) -> Table:
    from rich.table import Table

    report = run.report
    table = Table("a second", "value", "source")
    rows = [
        ("requests", report.requests_per_s),
        ("output tokens", report.output_tokens_per_s),
        ("prompt + output tokens", report.total_tokens_per_s),
    ]
    if report.slo.ttft_s is not None or report.slo.tpot_s is not None:
        rows.append(
            (f"goodput, requests ({report.attainment:.1%} met the SLO)", report.goodput_requests_per_s)
        )
        rows.append(("goodput, output tokens", report.goodput_tokens_per_s))
    for name, value in rows:
        table.add_row(name, f"{value:.2f}", run.source.value)
    return table


def _notes(run: LoadRun) -> Iterator[str]:
    """What a reader of the figures has to know."""
    if run.endpoint.words is not None:
        yield "prompts: words that the endpoint counts as one token each"
    if not run.endpoint.ignore_eos:
        yield "the endpoint does not take ignore_eos: answers may be shorter than asked"
    if run.uncounted:
        yield f"{run.uncounted} answers came without usage: their tokens are their events"
    if run.report.cached_tokens:
        yield f"{run.report.cached_tokens} prompt tokens came from the endpoint's prefix cache"
