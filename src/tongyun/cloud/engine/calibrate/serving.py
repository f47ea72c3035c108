"""Measure what serving adds around the engine: the way in, the way out, and who waits for whom.

The real gateway runs in this process over a synthetic tiny model and the real load
generator in another, as they do when a model is served. What comes of it: what a request
takes beyond the engine, how that grows with its prompt, and how much longer a step takes
when it is served.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from tongyun.chip.calibrated import nonnegative
from tongyun.cloud.engine.calibrate import steps
from tongyun.cloud.engine.calibrate.bench import Bench
from tongyun.cloud.engine.live import LiveEngine
from tongyun.cloud.engine.protocol import TokenEvent
from tongyun.cloud.gateway.app import Gateway, build_app
from tongyun.cloud.gateway.ask import Served
from tongyun.cloud.gateway.ports import Sink
from tongyun.cloud.gateway.server import bind
from tongyun.cloud.gateway.server import serving as running
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.load import LoadOptions, measure
from tongyun.cloud.probe import Target
from tongyun.cloud.sched.request import Request
from tongyun.cloud.workload import Arrival
from tongyun.model.config import ModelConfig
from tongyun.model.vocabulary import Vocabulary, byte_characters
from tongyun.specs.samples import OverheadSample

SHORT, LONG = 17, 513
"""Prompt tokens of single requests; lengths that no other request of a round has."""
SINGLES = 16
GAP_S = 0.08
Records = tuple[RequestRecord, ...]

BATCHES, OUTPUT = (1, 16), 64
"""Requests that stream together; every one has a prompt of `STREAMED + batch` tokens."""
STREAMED = 32


@dataclass(kw_only=True)
class _Seen:
    """What happened at the engine: when requests came, when first tokens left, when steps ended."""

    came_s: dict[str, tuple[int, float]] = field(default_factory=dict)
    first_s: dict[str, float] = field(default_factory=dict)
    steps: list[tuple[float, int, int]] = field(default_factory=list)
    """When a step ended, the tokens it gave, and the prompt length behind the first of them."""

    def inside_s(self, prompt: int) -> float:
        """Median seconds from the engine's queue to the first token of prompts of this length."""
        waits = [
            self.first_s[name] - came
            for name, (length, came) in self.came_s.items()
            if length == prompt and name in self.first_s
        ]
        return statistics.median(waits)

    def period_s(self, batch: int, prompt: int) -> float:
        """Median seconds between two steps that each gave `batch` tokens to prompts of this length."""
        same = (batch, prompt)
        return statistics.median(b[0] - a[0] for a, b in pairwise(self.steps) if a[1:] == b[1:] == same)


class _Witnessed(LiveEngine):
    """The live engine, taking note of what passes."""

    seen: _Seen

    def submit(self, request: Request) -> None:
        self.seen.came_s[request.id] = (len(request.prompt), time.perf_counter())
        super().submit(request)


class _Bytes:
    """A tokenizer of bytes: the load sends token ids, so hardly anything is asked of it."""

    def encode(self, text: str) -> Sequence[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token % 256 for token in tokens).decode(errors="replace")

    def chat(self, messages: Sequence[Mapping[str, Any]], **template: Any) -> Sequence[int]:
        return self.encode("".join(str(message["content"]) for message in messages))


def serving(bench: Bench) -> Iterator[OverheadSample]:
    """Seconds of a request's way in and out, of each prompt token on it, and what serving adds to steps."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        # A fresh interpreter: a fork would copy the threads' locks, and a thread would share our GIL.
        rounds = [_round(bench, config, pool) for config in _shapes(bench)]
    found = _ways(rounds[0]) | _slower(rounds)
    yield from (OverheadSample(what=what, count=1, seconds=s) for what, s in found.items() if s > 0)


def _shapes(bench: Bench) -> list[ModelConfig]:
    """One that is nothing but overhead, and one whose products keep all threads busy."""
    return [steps.synthetic(1 if bench.quick else 2), steps.synthetic(4, hidden=64 if bench.quick else 512)]


@dataclass(frozen=True, kw_only=True)
class _Round:
    """One synthetic model, served and not."""

    seen: _Seen
    short: Records
    long: Records
    bare_s: tuple[float, ...]
    """The step of each of `BATCHES` without a server around it."""


def _round(bench: Bench, config: ModelConfig, pool: ProcessPoolExecutor) -> _Round:
    seen, engine = _Seen(), steps.Engine(bench, config)
    before = [_bare_s(engine, batch) for batch in BATCHES]
    with bind("127.0.0.1", 0) as sock, running(build_app(_gateway(engine, seen)), sock) as url:
        short, long, *_ = pool.submit(_load, url, bench.quick).result()
    after = [_bare_s(engine, batch) for batch in BATCHES]
    bare = tuple((a + b) / 2 for a, b in zip(before, after, strict=True))
    return _Round(seen=seen, short=short, long=long, bare_s=bare)


def _bare_s(engine: steps.Engine, batch: int) -> float:
    each = steps.Round(batch=batch, prompt=STREAMED + batch, output=OUTPUT)
    return next(engine.samples((each,), ())).seconds


def _ways(one: _Round) -> dict[str, float]:
    """What a request spends outside the engine, and each of its prompt tokens."""
    short, long = (
        statistics.median(r.ttft_s for r in records if r.ttft_s is not None) - one.seen.inside_s(prompt)
        for records, prompt in ((one.short, SHORT), (one.long, LONG))
    )
    each = max(0.0, (long - short) / (LONG - SHORT))
    return {"request": max(0.0, short - each * SHORT), "prompt_token": each}


def _slower(rounds: Sequence[_Round]) -> dict[str, float]:
    """What a served step takes more: fixed, and for each streamed token.

    Server and client take cores and caches from the engine for the tokens they handle, not
    for the time a step takes: a large model's long steps lose as little as short ones.
    """
    rows, rests = [], []
    for one in rounds:
        for batch, bare in zip(BATCHES, one.bare_s, strict=True):
            period = one.seen.period_s(batch, STREAMED + batch)
            rows.append([1 / period, batch / period])
            rests.append((period - bare) / period)
    parts = nonnegative(np.array(rows), np.array(rests)).tolist()
    return dict(zip(("served_step", "streamed_token"), parts, strict=True))


def _gateway(engine: steps.Engine, seen: _Seen) -> Gateway:
    config, loop = engine.config, engine.loop()

    def start(sink: Sink) -> LiveEngine:
        def noting(events: Sequence[TokenEvent]) -> None:
            now_s = time.perf_counter()
            length, _ = seen.came_s.get(events[0].request_id, (0, 0.0))
            seen.steps.append((now_s, len(events), length))
            for event in events:
                seen.first_s.setdefault(event.request_id, now_s)
            sink(events)

        live = _Witnessed(loop, noting)
        live.seen = seen
        return live

    symbols = {character: byte for byte, character in enumerate(byte_characters())}
    served = Served(
        names=("synthetic",),
        context_tokens=config.max_positions,
        vocab=config.vocab,
        tokenizer=_Bytes(),
        vocabulary=Vocabulary.of(symbols, []),
        created=0,
    )
    return Gateway(served=served, start_engine=start)


def _load(url: str, quick: bool) -> list[Records]:
    """Loads one after the other: short prompts alone, long prompts alone, and bursts of each batch."""
    singles = 6 if quick else SINGLES
    loads = [[Arrival(i * GAP_S, prompt, 2) for i in range(singles)] for prompt in (SHORT, LONG)]
    loads += [[Arrival(0.0, STREAMED + batch, OUTPUT)] * batch for batch in BATCHES]
    options = LoadOptions(warmup_requests=2)
    return [measure(Target(url=url), load, options).records for load in loads]
