"""Put an open-loop load on an endpoint and record what each request felt.

Requests leave when they are due, whether or not earlier ones have come back: a server
that falls behind is asked no less. Latencies count from the due moment, so neither this
process's own delay nor a cap on concurrency can hide any of it. Works on any
OpenAI-compatible endpoint; draws no workload itself.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tongyun.cloud.http import Client
from tongyun.cloud.latency import LatencyReport, Percentiles, RequestRecord, Slo, summarise
from tongyun.cloud.pauses import settled
from tongyun.cloud.probe import Endpoint, Target, probe
from tongyun.cloud.sched.request import Finish, Request
from tongyun.cloud.streamed import Outcome, read_stream
from tongyun.cloud.workload import Arrival, requests
from tongyun.errors import InputError, ServiceError
from tongyun.units import Source

_AHEAD = 512
# Spelling a long prompt takes a few milliseconds; it is done where nothing is due within that.
_IDLE_S = 0.02
_FINISHES = {finish.value: finish for finish in Finish}


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a load is sent."""

    seed: int = 0
    slo: Slo = field(default_factory=Slo)
    concurrency_limit: int | None = None
    """Requests in flight at most; what waits for a place waits on the clock."""
    warmup_requests: int = 4
    """Sent before and not counted: they compile, allocate and fill caches."""
    timeout_s: float = 600.0


@dataclass(frozen=True, kw_only=True)
class LoadRun:
    """A load's records in the order of their due moments, and what they come to."""

    endpoint: Endpoint
    records: tuple[RequestRecord, ...]
    report: LatencyReport
    lag_s: Percentiles
    """From due moment to sending: this process's own delay and the concurrency limit's."""
    details: dict[str, str]
    """For each kind of error, what the first of its kind said."""
    uncounted: int
    """Requests whose token counts were taken from their events, as the endpoint sent no usage."""
    source: Source = Source.MEASURED

    def as_json(self) -> dict[str, Any]:
        """For `--json`: SI units, every figure measured."""
        report = self.report
        rates = {
            name: getattr(report, name)
            for name in (
                "requests_per_s",
                "output_tokens_per_s",
                "total_tokens_per_s",
                "goodput_requests_per_s",
                "goodput_tokens_per_s",
                "attainment",
            )
        }
        return {
            "source": self.source.value,
            "url": self.endpoint.target.url,
            "model": self.endpoint.model,
            **asdict(report),
            **rates,
            "errors": [{"kind": k, "count": n, "detail": self.details.get(k)} for k, n in report.errors],
            "send_lag_s": asdict(self.lag_s),
            "prompts": "token ids" if self.endpoint.words is None else "words of one token",
            "ignore_eos": self.endpoint.ignore_eos,
            "uncounted": self.uncounted,
        }


@dataclass(frozen=True, kw_only=True)
class Observer:
    """Who is told while a load runs; the calls must be quick, they share the load's event loop."""

    stage: Callable[[str], None] = lambda _: None
    record: Callable[[RequestRecord], None] = lambda _: None


def measure(
    target: Target, arrivals: Sequence[Arrival], options: LoadOptions, observer: Observer | None = None
) -> LoadRun:
    """Probe the endpoint, warm it up, send `arrivals`, and sum up."""
    if not arrivals:
        raise InputError("the load is empty: no requests to send")
    with settled():
        return asyncio.run(_measure(target, arrivals, options, observer or Observer()))


async def _measure(
    target: Target, arrivals: Sequence[Arrival], options: LoadOptions, observer: Observer
) -> LoadRun:
    client = target.client()
    try:
        observer.stage("probe")
        endpoint = await probe(target, client)
        _check_context(endpoint, arrivals)
        observer.stage("warm-up")
        await _warm_up(endpoint, client, arrivals, options)
        observer.stage("load")
        sender = _Sender(endpoint, client, options, observer)
        load = requests(arrivals, vocabulary=endpoint.vocabulary, seed=options.seed)
        return sender.sum_up(await sender.send_all(load))
    finally:
        await client.close()


def _check_context(endpoint: Endpoint, arrivals: Sequence[Arrival]) -> None:
    """Refuse lengths that the endpoint says it cannot serve, before anything is timed."""
    longest = max(arrivals, key=lambda a: a.prompt_tokens + a.output_tokens)
    total = longest.prompt_tokens + longest.output_tokens
    if endpoint.context_tokens is not None and total > endpoint.context_tokens:
        raise InputError(
            f"the longest request has {longest.prompt_tokens} + {longest.output_tokens} tokens; "
            f"{endpoint.model} takes at most {endpoint.context_tokens}"
        )
    own = 0 if endpoint.words is None else endpoint.words.overhead
    shortest = min(arrival.prompt_tokens for arrival in arrivals)
    if shortest <= own:
        raise InputError(
            f"the shortest prompt has {shortest} tokens; the endpoint itself adds {own} to every one"
        )


async def _warm_up(
    endpoint: Endpoint, client: Client, arrivals: Sequence[Arrival], options: LoadOptions
) -> None:
    """The first requests of the load with other tokens, all at once."""
    begin = [arrival._replace(time_s=0.0) for arrival in arrivals[: options.warmup_requests]]
    load = requests(begin, vocabulary=endpoint.vocabulary, seed=options.seed + 1, name="warm-up")
    sender = _Sender(endpoint, client, options, Observer())
    for record in await sender.send_all(load):
        if record.error is not None:
            detail = sender.details.get(record.error)
            raise ServiceError(f"a warm-up request failed: {record.error}: {detail}")


class _Spelled:
    """Requests spelled ahead of their moment, so that a burst leaves at once; memory bounds how far."""

    def __init__(self, load: Iterator[Request], endpoint: Endpoint) -> None:
        self._load, self._endpoint = load, endpoint
        self._ready: deque[tuple[Request, bytes]] = deque()
        while self.fill():
            pass

    def fill(self) -> bool:
        """Spell one more; false where there is none, or enough lie ready."""
        if len(self._ready) >= _AHEAD:
            return False
        request = next(self._load, None)
        if request is not None:
            self._ready.append((request, self._endpoint.body(request)))
        return request is not None

    def take(self) -> tuple[Request, bytes] | None:
        """The next in order."""
        if not self._ready:
            self.fill()
        return self._ready.popleft() if self._ready else None


class _Sender:
    """Sends one load and collects its records."""

    def __init__(self, endpoint: Endpoint, client: Client, options: LoadOptions, observer: Observer) -> None:
        self._endpoint, self._client = endpoint, client
        self._options, self._observer = options, observer
        limit = options.concurrency_limit
        self._places = None if limit is None else asyncio.Semaphore(limit)
        self._lags: list[float] = []
        self._uncounted = 0
        self.details: dict[str, str] = {}

    async def send_all(self, load: Iterable[Request]) -> list[RequestRecord]:
        """Send every request at its moment; returns when the last one has ended."""
        tasks, queue = [], _Spelled(iter(load), self._endpoint)
        start_s = time.perf_counter() + 0.05
        while (due := queue.take()) is not None:
            request, body = due
            due_s = start_s + request.arrival_s
            while due_s - time.perf_counter() > _IDLE_S and queue.fill():
                await asyncio.sleep(0)
            if (wait_s := due_s - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            tasks.append(asyncio.create_task(self._one(request, body, due_s)))
        return list(await asyncio.gather(*tasks))

    async def _one(self, request: Request, body: bytes, due_s: float) -> RequestRecord:
        if self._places is None:
            outcome = await self._send(body, due_s)
        else:
            async with self._places:
                outcome = await self._send(body, due_s)
        record = self._record(request, outcome, due_s, time.perf_counter())
        self._observer.record(record)
        return record

    async def _send(self, body: bytes, due_s: float) -> Outcome:
        self._lags.append(time.perf_counter() - due_s)
        try:
            async with asyncio.timeout(self._options.timeout_s):
                answer = await self._client.send("POST", self._endpoint.path, body)
        except TimeoutError:
            return Outcome(error="timeout", detail=f"no whole answer in {self._options.timeout_s:g} s")
        except ServiceError as error:
            return Outcome(error="connection", detail=str(error))
        return read_stream(answer)

    def _record(self, request: Request, outcome: Outcome, due_s: float, ended_s: float) -> RequestRecord:
        if outcome.error is not None:
            self.details.setdefault(outcome.error, outcome.detail or "")
        elif outcome.output_tokens is None:
            self._uncounted += 1
        produced = outcome.chunks if outcome.output_tokens is None else outcome.output_tokens
        # A failed request has put its prompt on the server's books only if the server says so.
        assumed = 0 if outcome.error is not None else len(request.prompt)
        return RequestRecord(
            id=request.id,
            arrival_s=due_s,
            ended_s=ended_s,
            prompt_tokens=assumed if outcome.prompt_tokens is None else outcome.prompt_tokens,
            output_tokens=produced,
            first_token_s=outcome.first_token_s,
            last_token_s=outcome.last_token_s,
            cached_tokens=outcome.cached_tokens,
            finish=_FINISHES.get(outcome.finish or ""),
            error=outcome.error,
        )

    def sum_up(self, records: Sequence[RequestRecord]) -> LoadRun:
        lag_s = Percentiles.of(self._lags)
        assert lag_s is not None
        return LoadRun(
            endpoint=self._endpoint,
            records=tuple(records),
            report=summarise(records, self._options.slo),
            lag_s=lag_s,
            details=self.details,
            uncounted=self._uncounted,
        )
